"""From a clone to a sealed sandbox: the steps, in their order, and why it is that order."""

from __future__ import annotations

import errno
import resource
import signal
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import messages, network
from isolation.backends.namespace.rootfs import pivot
from isolation.backends.namespace.rootfs.mounts import FreshOperation, Overlay
from isolation.linux import privileges, seccomp, syscalls, userns
from isolation.linux.syscall_script import Memory, SyscallScript
from isolation.plain import os, socket

Answer = Callable[[int], object]  # of a supervisor, to the process with this pid
_FORKS_OF_TEMPLATE = 16  # whose limits of processes may be used up at the same time


class Construction:
    """Every step that can be written down beforehand, once for a supervisor (syscall_script.py). `control socket` is each
    clone's own socket to the supervisor, as a number in its table.

    What comes first is for a clone of a supervisor that has a base; `build_fresh` and `seal` are for all. `first`: the
    clone is the sandbox's own PID 1. `template`: what is made will be forked itself.
    """

    def __init__(
        self,
        plan: Plan,
        fresh: Sequence[FreshOperation],
        umask: int,
        *,
        base: int = -1,
        namespaces: int = 0,
        first: bool,
        template: bool = False,
    ) -> None:
        self._script = script = SyscallScript()
        self._control_socket = script.slot()
        script.call("prctl", syscalls.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # see die_with_supervisor
        script.call("setsid")
        if plan.cgroup is not None:
            write_ask(script, self._control_socket, messages.JOIN_CGROUP)
        _write_enter_base(script, plan, base, namespaces)
        self._fresh = script.mark()
        if "keyring" in plan.defences:
            _write_fresh_keyring(script)
        script.call("umask", 0)
        self._store = pivot.write_fresh(script, fresh, plan.limits.disk)
        self._mounts = pivot.write_open_mounts(script) if template else None
        pivot.write_cover(script)
        script.call("umask", umask)
        if plan.own_network:
            network.write_loopback_up(script)
            network.write_open_low_ports(script)
        self._seal = script.mark()
        _write_seal(script, plan, self._control_socket, first=first, template=template)
        script.finish()

    def use_control_socket(self, control_socket: int) -> None:
        """Before a clone is made."""
        self._script.set(self._control_socket, control_socket)

    def enter_and_build(self) -> int:
        """In a clone of a supervisor that has a base: everything up to `seal`. Returns a descriptor of the store."""
        self._script.run(0, self._seal)
        return self._script.result(self._store)

    def build_fresh(self) -> int:
        """With the base as the root: what is this sandbox's alone (keyring, files, network, limits). Returns a descriptor of
        the store."""
        self._script.run(self._fresh, self._seal)
        return self._script.result(self._store)

    def mounts(self) -> int:
        """For a template: a descriptor of its mount namespace, as its forks want it."""
        assert self._mounts is not None
        return self._script.result(self._mounts)

    def seal(self) -> None:
        """The end of all privileges, for this process and its children."""
        self._script.run(self._seal)


def ask_supervisor(control_socket: socket.socket, request: bytes) -> None:
    """One byte there, one back: the supervisor has mapped ids ("m", "i"), or put this process into its cgroup ("c")."""
    control_socket.send(request)
    if control_socket.recv(1) != request:
        os._exit(1)


def become_root_of_namespace(plan: Plan, control_socket: socket.socket) -> None:
    """In a clone with a new user namespace: have ids in it. Real root keeps its host's, until `leave_host_ids`."""
    who = plan.identity
    if who.ranged:
        ask_supervisor(control_socket, messages.MAP_RANGE)  # only real root, outside, can map a range
    else:
        userns.map_own_ids(0, 0, who.uid, who.gid)  # devpts wants a mapped root (bubblewrap)
    if "counters" in plan.defences:
        _limit_counters()


def _limit_counters() -> None:
    """A quarter of what the machine gives to a user (inotify(7)) for this namespace and all below it: those of the host's
    programs are counted by the same user (user_namespaces(7), /proc/sys/user)."""
    for name in ("instances", "watches"):
        try:
            whole = int(Path(f"/proc/sys/fs/inotify/max_user_{name}").read_text(encoding="ascii"))
            Path(f"/proc/sys/user/max_inotify_{name}").write_text(str(whole // 4), encoding="ascii")
        except OSError:
            continue  # a read-only /proc/sys, as Docker has


def leave_host_ids(plan: Plan) -> None:
    """In every process of a sandbox, before it makes a file: real root becomes the root of the mapped range."""
    if plan.identity.ranged:
        userns.become_mapped_root()


def write_leave_host_ids(script: SyscallScript, plan: Plan) -> None:
    """`leave_host_ids`, as steps."""
    if plan.identity.ranged:
        for call, *arguments in userns.BECOME_MAPPED_ROOT:
            script.call(call, *arguments)


def build_base(plan: Plan) -> None:
    """In a new mount namespace: the part of the tree that never changes. Raises OSError."""
    leave_host_ids(plan)
    os.umask(0)
    pivot.build_base(plan.base, plan.mount_point)


def look_at_lowers(plan: Plan) -> dict[str, int]:
    """Where the base stands: modes for the overlays whose owner has no id inside, by number. Raises OSError."""
    if plan.identity.ranged:
        return {}  # everybody has
    found = {str(item.number): item.mode_for_guest() for item in plan.fresh if isinstance(item, Overlay)}
    return {number: mode for number, mode in found.items() if mode is not None}


def with_modes(plan: Plan, modes: Mapping[str, int]) -> list[FreshOperation]:
    """The fresh operations, with what `look_at_lowers` has seen."""
    return [
        replace(item, foreign_mode=modes.get(str(item.number))) if isinstance(item, Overlay) else item for item in plan.fresh
    ]


def write_ask(script: SyscallScript, control_socket: Memory, request: bytes) -> None:
    """`ask_supervisor`, as steps."""
    script.call("write", control_socket.value(), request, 1, only=1, about="the supervisor")
    _write_await(script, control_socket)


def _write_await(script: SyscallScript, control_socket: Memory) -> None:
    """The supervisor answers with the same byte, or closes."""
    script.call("read", control_socket.value(), script.memory(bytes(8)), 1, only=1, about="the supervisor")


def _write_enter_base(script: SyscallScript, plan: Plan, base: int, namespaces: int) -> None:
    """Start from a copy of the base's mount namespace; and `namespaces` of its own, after the cgroup was joined, so that it
    is the root that is seen."""
    write_leave_host_ids(script, plan)
    script.call("setns", base, syscalls.CLONE_NEWNS)
    script.call("unshare", syscalls.CLONE_NEWNS | namespaces)


class Seal:
    """The end of all privileges for a fork of a fork, which has entered its namespaces, and so holds them all again, but for
    what its template has given up for good: no_new_privs, Landlock and the filter are inherited."""

    def __init__(self, plan: Plan, *, template: bool) -> None:
        self._script = script = SyscallScript()
        self._control_socket = script.slot()
        # The template's is higher (see _write_limits), and what a user namespace is made with is for all of its siblings.
        _write_inner_user_namespace(script, plan, self._control_socket)
        _write_limits(script, plan, first=False, template=template)
        if "capabilities" in plan.defences:
            privileges.write_drop_capabilities(script, keep_setfcap=False)
        if "seccomp" in plan.defences and not template:
            privileges.write_filter_system_calls(script, seccomp.compiled_leaf_filter())
        if plan.identity.ranged:
            _write_await(script, self._control_socket)
        script.finish()

    def run(self, control_socket: int) -> None:
        """In the fork. Raises OSError."""
        self._script.set(self._control_socket, control_socket)
        self._script.run()


def _write_seal(script: SyscallScript, plan: Plan, control_socket: Memory, *, first: bool, template: bool) -> None:
    _write_inner_user_namespace(script, plan, control_socket)
    _write_limits(script, plan, first=first, template=template)
    if "capabilities" in plan.defences:
        privileges.write_drop_capabilities(script, keep_setfcap=plan.nesting and plan.identity.uid == 0)
    privileges.write_no_new_privileges(script)
    if plan.landlock:
        privileges.write_restrict_to_root(script, plan.landlock)
    if "seccomp" in plan.defences:
        privileges.write_filter_system_calls(script, seccomp.compiled_template_filter() if template else plan.filter)
    if plan.identity.ranged:
        _write_await(script, control_socket)  # only now: what came between needs no ids, and the supervisor has had its time


def _write_inner_user_namespace(script: SyscallScript, plan: Plan, control_socket: Memory) -> None:
    """The guest's own, below the one that owns the mounts: even with capabilities in its own, it has none over them."""
    script.call("unshare", syscalls.CLONE_NEWUSER)
    who = plan.identity
    if who.ranged:
        script.call("prctl", syscalls.PR_SET_DUMPABLE, 1, 0, 0, 0)  # else its maps belong to host root
        script.call("write", control_socket.value(), messages.MAP_INNER, 1, only=1, about="the supervisor")
    else:
        userns.write_map_own_ids(script, who.uid, who.gid, 0, 0)


def _write_limits(script: SyscallScript, plan: Plan, *, first: bool, template: bool) -> None:
    """Only behind the user namespace: one is bound to the limits of who makes it, and counts all processes below its parent,
    which is to say those of every sandbox of this supervisor."""
    for number, value in plan.rlimits:
        if number == resource.RLIMIT_NPROC:
            # PID 1 of a sandbox for commands is one of the processes that are counted; that of a fork is above. For a
            # template's forks, what it is bound to itself is the bound of them all together.
            value = value * _FORKS_OF_TEMPLATE if template else value + int(first)
        _write_rlimit(script, number, value)


def die_with_supervisor() -> None:
    """The supervisor is single-threaded, so its death is the death of the thread that made this process (prctl(2))."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)


def _write_fresh_keyring(script: SyscallScript) -> None:
    """Keyrings are in no namespace (keyrings(7)): leave the host's session keyring. A kernel without keys has none to
    leave, and an outer sandbox may have refused the call along with all others on keys."""
    join = syscalls.KEYCTL_JOIN_SESSION_KEYRING
    script.call("keyctl", join, 0, 0, 0, 0, accept=(errno.ENOSYS, errno.EPERM), about="a session keyring")


def _write_rlimit(script: SyscallScript, number: int, value: int) -> None:
    soft, hard = (value if limit == resource.RLIM_INFINITY else min(value, limit) for limit in resource.getrlimit(number))
    if number == resource.RLIMIT_CORE:
        soft = hard
    script.call("prlimit64", 0, number, script.memory(struct.pack("=QQ", soft, hard)), 0, about=f"resource limit {number}")
