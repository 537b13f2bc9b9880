"""The backend as the core's registry finds it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from isolation.errors import FeatureMissing, SpecError
from isolation.hookspecs import (
    CHANGES,
    CPU_LIMIT,
    DISK_LIMIT,
    FILE_CHECKPOINTS,
    FORK,
    FORK_ACCOUNT,
    FORK_DEADLOCK,
    FORK_HERE,
    MEMORY_LIMIT,
    NESTING,
    NETWORK_HOST,
    NETWORK_NONE,
    PASS_FDS,
    PIDS_LIMIT,
    TTY,
    Backend,
    Machine,
    Probe,
    hookimpl,
)
from isolation.linux.cgroup import Hierarchy
from isolation.spec import SandboxSpec
from isolation.template import Template


class NamespaceBackend(Backend):
    """A Linux container in pure Python: no daemon, no root, no program but the kernel."""

    name = "namespace"

    def probe(self) -> Probe:
        from isolation.backends.namespace import probe

        return probe.probe(self.features())

    def features(self) -> frozenset[str]:
        from isolation.backends.namespace.checkpoints import remount

        found = {CHANGES, DISK_LIMIT, FORK, FORK_ACCOUNT, FORK_DEADLOCK, FORK_HERE, MEMORY_LIMIT, NESTING}
        found |= {NETWORK_HOST, NETWORK_NONE, PASS_FDS, PIDS_LIMIT, TTY}
        if Hierarchy.find().can("cpu"):
            found.add(CPU_LIMIT)
        if remount.usable():
            found.add(FILE_CHECKPOINTS)
        return frozenset(found)

    def launch(self, spec: SandboxSpec) -> Machine:
        from isolation.backends.namespace.host import supervisor_pool
        from isolation.backends.namespace.host.sandbox import NamespaceMachine

        return NamespaceMachine(supervisor_pool.plan_for(spec))

    def template(self, spec: SandboxSpec, payload: Callable[..., object] | str, config: Any) -> Template:
        from isolation.backends.namespace.host import supervisor_pool
        from isolation.backends.namespace.host.sandbox import NamespaceMachine
        from isolation.backends.namespace.host.template import NamespaceTemplate, SealedTemplate

        if isinstance(payload, str):
            module, _, function = payload.partition(":")
            if not all(part.isidentifier() for part in [*module.split("."), function]):
                raise SpecError(f"a template's payload is 'package.module:function', not {payload!r}")
            writable = [mount.target for mount in spec.mounts if mount.mode != "ro"]
            machine = self.launch(spec.replace(nesting=True))
            assert isinstance(machine, NamespaceMachine)
            return SealedTemplate(machine, payload, config, [spec.workdir], writable)
        if spec.nesting:
            raise FeatureMissing(
                "a fork of this very process cannot nest: its interpreter is the host's file, which only Landlock "
                "protects, and nesting rules Landlock out; use a template inside a sandbox, or leave nesting out"
            )
        return NamespaceTemplate(supervisor_pool.plan_for(spec), payload)

    def carries(self, descriptors: Collection[int]) -> frozenset[int]:
        from isolation.backends.namespace.process import recreatable

        return frozenset(number for item in recreatable.look(descriptors) for number in item.numbers)

    def borrow(self, token: Any, fds: Sequence[int]) -> Machine:
        from isolation.backends.namespace.host.sandbox import BorrowedMachine

        return BorrowedMachine(token, fds[0])

    def notes(self, spec: SandboxSpec) -> Sequence[str]:
        from isolation.backends.namespace.host import supervisor_pool

        return supervisor_pool.plan_for(spec).notes

    def explain(self, spec: SandboxSpec) -> str:
        from isolation.backends.namespace.planner import make_plan
        from isolation.backends.showing import python_environment

        return make_plan(spec, python=python_environment()).describe()


@hookimpl
def isolation_backend() -> Backend:
    return NamespaceBackend()
