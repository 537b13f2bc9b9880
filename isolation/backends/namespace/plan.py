"""What a sandbox is to be, as data: the planner decides it on the host, the supervisor and the new process execute it."""

from __future__ import annotations

from dataclasses import dataclass, field

from isolation.backends.namespace.rootfs import adoption
from isolation.backends.namespace.rootfs.idmap import Source
from isolation.backends.namespace.rootfs.mounts import (
    HIDDEN,
    BaseOperation,
    FreshOperation,
)
from isolation.linux import syscalls
from isolation.linux.cgroup import Hierarchy
from isolation.linux.userns import Identity
from isolation.spec import Limits

NAMESPACES = {
    "user": syscalls.CLONE_NEWUSER,
    "mount": syscalls.CLONE_NEWNS,
    "pid": syscalls.CLONE_NEWPID,
    "network": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
}


@dataclass(frozen=True)
class Plan:
    """What PID 1 of a sandbox executes."""

    base: tuple[BaseOperation, ...]
    fresh: tuple[FreshOperation, ...]
    staged: tuple[Source, ...]
    mount_point: str
    identity: Identity
    clone_flags: int
    own_network: bool
    limits: Limits
    rlimits: tuple[tuple[int, int], ...]
    watch_memory: bool
    cgroup: Hierarchy | None
    landlock: int
    filter: bytes = field(repr=False)
    nesting: bool
    workdir: str
    env: dict[str, str] = field(repr=False)
    inherit_env: bool
    defences: frozenset[str]
    notes: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()  # where directories are shown that the host may change meanwhile

    def describe(self) -> str:
        """For people: what will be made, step by step."""
        namespaces = [name for name, flag in NAMESPACES.items() if self.clone_flags & flag] + ["cgroup", "time"]
        lines = [
            "backend    namespace",
            f"namespaces {', '.join(namespaces)}",
            f"identity   {self.identity.describe()}",
            f"network    {'own loopback only' if self.own_network else 'the host: NOT isolated'}",
            f"limits     {self.limits.describe()}{self._how_limited()}",
            f"landlock   {f'ABI {self.landlock}: writes only beneath the new root' if self.landlock else 'off'}",
            f"seccomp    {len(self.filter) // 8} instructions{', nesting allowed' if self.nesting else ''}",
            f"workdir    {self.workdir}",
            f"env        {'the whole environment of the caller' if self.inherit_env else ' '.join(sorted(self.env))}",
            "root tree:",
        ]
        made = sorted((*self.base, *self.fresh), key=lambda operation: operation.target)
        lines += [f"  {item.describe()}" for item in made if not item.target.startswith(HIDDEN)]
        lines += [f"  {item.describe()}" for item in self.base if isinstance(item, adoption.Adopt)]
        return "\n".join([*lines, *(f"note       {note}" for note in self.notes)])

    def _how_limited(self) -> str:
        if self.cgroup is not None:
            return f" (cgroup v{self.cgroup.version} and rlimits)"
        return " (rlimits and a watch by the supervisor)" if self.rlimits or self.watch_memory else ""


# Each can be left out by a test, to show that the attack it stops then succeeds. Not reachable from a spec.
ALL_DEFENCES = frozenset(
    "capabilities counters dumpable environment fds keyring landlock network proc-masks seccomp sharing view".split()
)
