"""Finding backends, and choosing one."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator

import pluggy

from isolation.errors import BackendUnavailable, FeatureMissing, UnknownBackend
from isolation.hookspecs import Backend, Hooks
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
    return probe.works, probe.reason


def _preferred() -> Iterator[Backend]:
    """In the order of `backends`, looking for others only when no own one will do."""
    yield from (_own(name) for name in PREFERRED)
    yield from (backend for name, backend in backends().items() if name not in PREFERRED)


def choose(spec: SandboxSpec, features: Iterable[str] = ()) -> Backend:
    """The backend for `spec`: the one it names, or the first that works here and has `features`.

    Raises UnknownBackend, FeatureMissing, or BackendUnavailable with each backend's reason.
    """
    wanted = frozenset(features)
    if spec.backend != "auto":
        backend = get(spec.backend)
        missing = wanted and wanted - backend.features()
        if missing:
            raise FeatureMissing(f"the {backend.name} backend cannot do this here: {', '.join(sorted(missing))}")
        return backend
    reasons = []
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
    raise BackendUnavailable("no backend works here ('isolation doctor' tells more):\n  " + "\n  ".join(reasons))
