"""The backend as the core's registry finds it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from isolation.errors import FeatureMissing, SpecError
from isolation.hookspecs import (
    CHANGES,
    CPU_LIMIT,
    DISK_LIMIT,
    FORK,
    MEMORY_LIMIT,
    NESTING,
    NETWORK_NAT,
    NETWORK_NONE,
    PIDS_LIMIT,
    SNAPSHOT,
    TTY,
    Backend,
    Machine,
    Probe,
    hookimpl,
)
from isolation.spec import SandboxSpec
from isolation.template import Template

if TYPE_CHECKING:
    from isolation.backends.microvm.artifacts.setup import Images
    from isolation.backends.microvm.plan import Plan


class MicrovmBackend(Backend):
    """A virtual machine for every sandbox: QEMU, started from a saved machine."""

    name = "microvm"

    def probe(self) -> Probe:
        from isolation.backends.microvm import probe

        return probe.probe(self.features(), acceleration)

    def features(self) -> frozenset[str]:
        found = {CHANGES, CPU_LIMIT, DISK_LIMIT, FORK, MEMORY_LIMIT, NESTING, NETWORK_NONE, NETWORK_NAT, PIDS_LIMIT}
        return frozenset(found | {SNAPSHOT, TTY})

    def describe(self) -> str:
        from isolation.backends.microvm.vm import accel

        return f"microvm ({accel.describe(acceleration(_images()))})"

    def launch(self, spec: SandboxSpec) -> Machine:
        from isolation.backends.microvm.machine import MicrovmMachine

        return MicrovmMachine(_plan(spec))

    def template(self, spec: SandboxSpec, payload: Callable[..., object] | str, config: Any) -> Template:
        from isolation.backends.microvm.template import MicrovmTemplate

        return MicrovmTemplate.make(_plan(spec), _checked(payload), config, path=_path(spec))

    def load(self, spec: SandboxSpec, payload: str, config: Any, directory: str) -> Template:
        from isolation.backends.microvm.template import MicrovmTemplate

        return MicrovmTemplate.load(_plan(spec), _checked(payload), config, directory)

    def explain(self, spec: SandboxSpec) -> str:
        return _plan(spec).describe()

    def main(self, argv: Sequence[str]) -> int:
        from isolation.backends.microvm.artifacts import commands

        return commands.main(argv)


def _images() -> Images:
    from isolation.backends.microvm.artifacts import setup
    from isolation.backends.microvm.artifacts.progress import SILENT, Progress

    progress = Progress.stderr() if sys.stderr is not None and sys.stderr.isatty() else SILENT
    return setup.load(progress=progress)


def acceleration(images: Images) -> str:
    """ "kvm" or "tcg", whichever works here."""
    from isolation.backends.microvm import boot
    from isolation.backends.microvm.vm import accel

    return accel.choose(images.cache, lambda: boot.boots_with_kvm(images))


def _plan(spec: SandboxSpec) -> Plan:
    from isolation.backends.microvm import plan

    images = _images()
    return plan.make_plan(spec, images, acceleration(images))


def _checked(payload: Callable[..., object] | str) -> str:
    if not isinstance(payload, str):
        raise FeatureMissing("a virtual machine cannot be forked off this very process; name 'package.module:function'")
    module, _, function = payload.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), function]):
        raise SpecError(f"a template's payload is 'package.module:function', not {payload!r}")
    return payload


def _path(spec: SandboxSpec) -> list[str]:
    """`sys.path` of a payload: this process's."""
    return [entry or spec.workdir for entry in sys.path]


@hookimpl
def isolation_backend() -> Backend:
    return MicrovmBackend()
