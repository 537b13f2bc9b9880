"""Finding backends, and choosing one."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator

import pluggy

from isolation.errors import BackendUnavailable, FeatureMissing, UnknownBackend
from isolation.hookspecs import (
    CPU_LIMIT,
    DISK_LIMIT,
    MEMORY_LIMIT,
    NESTING,
    NETWORK_HOST,
    NETWORK_NAT,
    PIDS_LIMIT,
    Backend,
    Hooks,
)
from isolation.spec import SandboxSpec

# Where our own are. To look through everything that is installed takes longer than to make a sandbox.
_OWN = {name: f"isolation.backends.{name}.plugin" for name in ("namespace", "microvm")}
PREFERRED = ("namespace", "microvm")  # what "auto" tries first; others follow in name order


@functools.cache
def backends() -> dict[str, Backend]:
    """Every installed backend by name, in the order that "auto" tries them."""
    manager = _manager()
    manager.load_setuptools_entrypoints("isolation")
    found = {backend.name: backend for backend in manager.hook.isolation_backend()}
    order = [name for name in PREFERRED if name in found] + sorted(set(found) - set(PREFERRED))
    return {name: found[name] for name in order}


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("isolation")
    manager.add_hookspecs(Hooks)
    return manager


@functools.cache
def _own(name: str) -> Backend:
    manager = _manager()
    manager.register(importlib.import_module(_OWN[name]))
    backend: Backend = manager.hook.isolation_backend()[0]
    return backend


def get(name: str) -> Backend:
    """The backend of that name. Raises UnknownBackend."""
    if name in _OWN:
        return _own(name)
    try:
        return backends()[name]
    except KeyError:
        known = ", ".join(backends()) or "none"
        raise UnknownBackend(f"no backend {name!r} is installed; there is: {known}") from None


@functools.cache
def _works(name: str) -> tuple[bool, str]:
    probe = get(name).probe()
    if not probe.works and (again := get(name).probe()).works:
        probe = again  # what ends a first sandbox from outside, once, is no reason to do without
    return probe.works, probe.reason


def _preferred() -> Iterator[Backend]:
    """In the order of `backends`, looking for others only when no own one will do."""
    yield from (_own(name) for name in PREFERRED)
    yield from (backend for name, backend in backends().items() if name not in PREFERRED)


def needs(spec: SandboxSpec) -> frozenset[str]:
    """The features without which it cannot be made, but those that every backend has."""
    limits = spec.limits
    wanted = {
        NETWORK_HOST: spec.network.mode == "host",
        NETWORK_NAT: spec.network.mode == "nat",
        CPU_LIMIT: limits.cpus is not None,
        DISK_LIMIT: limits.disk is not None,
        MEMORY_LIMIT: limits.memory is not None,
        PIDS_LIMIT: limits.pids is not None,
        NESTING: spec.nesting,
    }
    return frozenset(name for name, wants in wanted.items() if wants)


def choose(spec: SandboxSpec, features: Iterable[str] = ()) -> Backend:
    """The backend for `spec`: the one it names, or the first that works here, and has `features` and what the spec needs.

    Raises UnknownBackend, FeatureMissing, or BackendUnavailable with each backend's reason.
    """
    wanted = frozenset(features)
    if spec.backend != "auto":
        backend = get(spec.backend)
        missing = wanted and wanted - backend.features()
        if missing:
            raise FeatureMissing(f"the {backend.name} backend cannot do this here: {', '.join(sorted(missing))}")
        return backend
    reasons: list[str] = []
    found = _first(wanted | needs(spec), reasons) or _first(wanted, [])  # which will say what it cannot do, and why
    if found is None:
        raise BackendUnavailable("no backend works here ('isolation doctor' tells more):\n  " + "\n  ".join(reasons))
    return found


def passed_over(spec: SandboxSpec, features: Iterable[str] = ()) -> list[str]:
    """Why it is not a backend that comes before the one that `choose` finds: a line each, with its name."""
    reasons: list[str] = []
    if spec.backend == "auto":
        _first(frozenset(features) | needs(spec), reasons)
    return reasons


def _first(wanted: frozenset[str], reasons: list[str]) -> Backend | None:
    """The first that will do; `reasons` are added to, for those before it."""
    for backend in _preferred():
        name = backend.name
        missing = wanted and wanted - backend.features()
        if missing:
            reasons.append(f"{name}: has no {', '.join(sorted(missing))} here")
            continue
        works, reason = _works(name)
        if works:
            return backend
        reasons.append(f"{name}: {reason}")
    return None
