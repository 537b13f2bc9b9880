"""A fork of a fork, as far as it can be made without the memory that is to live in it: its namespaces and its file tree.

The memory of a template below another's level is that of a sealed process, which can build nothing. So its supervisor does,
by two processes that share the supervisor's memory and run system calls only (script_process.py):

    builder     enters the template's mount namespace, and the user namespace that is to own all; makes the others
      PID 1     sleeps (pause.py); or is the next supervisor, where the fork is to be a template, too
      tree builder second process of the new PID namespace, of which so the new /proc is: makes the tree, brings `lo` up,
                opens all namespaces

The two share the supervisor's descriptor table, too: what the tree builder opens, the supervisor has. A copy of the
template's memory then enters them (fork_point.py), and finds everything done.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import messages, network, steps
from isolation.backends.namespace.process.pause import Sleeper
from isolation.backends.namespace.rootfs import pivot
from isolation.backends.namespace.rootfs.mounts import FreshOperation
from isolation.linux import syscalls
from isolation.linux.namespaces import ENTERED
from isolation.linux.script_process import ScriptProcess
from isolation.linux.syscall_script import Result, SyscallScript
from isolation.plain import os


@dataclass
class NamespaceSet:
    """Descriptors of this process, to be closed by who has them.

    namespaces  as in ENTERED, but for "user"; -1 where it is the template's own
    proc        the new /proc
    store       where all that is written lands
    mounts      the mount namespace as forks of this one want it, for a template
    init        pidfd of the sleeping PID 1; -1 where there is another
    """

    namespaces: list[int]
    proc: int
    store: int
    mounts: int
    init: int

    def close(self) -> None:
        """But for `init`."""
        for fd in (*self.namespaces, self.proc, self.store, self.mounts):
            if fd >= 0:
                os.close(fd)


class NamespaceSetBuilder:
    """Makes them, for one template."""

    def __init__(
        self, plan: Plan, fresh: Sequence[FreshOperation], umask: int, level: int, sleeper: Sleeper | None, *,
        mounts: int, owner: int,
    ) -> None:  # fmt: skip
        """`mounts` and `owner` are descriptors of the template's mount namespace, and of the user namespace that owns what
        is made. Without a sleeper, the PID namespace is there already, with who will be the next supervisor."""
        self._template = sleeper is None
        self._tree_builder = _TreeBuilder(plan, fresh, umask, level, template=self._template)
        self._script = script = SyscallScript()
        self._control_socket = script.slot()
        self._pid_namespace = script.slot()
        self._init = script.memory(b"\xff" * 8)
        if plan.cgroup is not None:
            steps.write_ask(script, self._control_socket, messages.JOIN_CGROUP)
        steps.write_leave_host_ids(script, plan)
        script.call("setns", mounts, syscalls.CLONE_NEWNS, about="the template's mount namespace")
        script.call("setns", owner, syscalls.CLONE_NEWUSER, about="the user namespace of forks")
        flags = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWCGROUP
        flags |= syscalls.CLONE_NEWNET if plan.own_network else 0
        if sleeper is None:
            script.call("unshare", flags, about="namespaces of a template")
            script.call("setns", self._pid_namespace.value(), syscalls.CLONE_NEWPID, about="the next supervisor's namespace")
        else:
            script.call("unshare", flags | syscalls.CLONE_NEWPID, about="namespaces of a fork")
            # It shares the table of descriptors: a copy would keep open what everybody else has closed.
            flags = syscalls.CLONE_VM | syscalls.CLONE_FILES | syscalls.CLONE_PARENT | syscalls.CLONE_PIDFD | signal.SIGCHLD
            script.spawn(flags, sleeper.stack.begin(), self._init, about="PID 1 of a fork")
        flags = syscalls.CLONE_VM | syscalls.CLONE_FILES | syscalls.CLONE_VFORK | signal.SIGCHLD
        script.spawn(flags, self._tree_builder.script_process.begin(), 0, about="the tree builder")
        script.call("wait4", -1, 0, 0, 0)
        script.finish()
        self._sleeper = sleeper
        self._script_process = ScriptProcess(script)

    def make(self, control_socket: int, pid_namespace: int, ask: steps.Answer) -> NamespaceSet:
        """A new one. `ask` answers what is said on `control socket`, for the process whose pid it is given. Raises
        OSError."""
        self._script.set(self._control_socket, control_socket)
        self._script.set(self._pid_namespace, max(0, pid_namespace))
        self._script.set(self._init, 0xFFFFFFFF)
        self._tree_builder.script_process.begin()
        self._script_process.begin()
        if self._sleeper is not None:
            self._sleeper.stack.begin()
        flags = syscalls.CLONE_VM | syscalls.CLONE_FILES | signal.SIGCHLD
        pid, pidfd = syscalls.clone_function(
            self._script_process.function, self._script_process.stack, flags, self._script_process.argument
        )
        try:
            ask(pid)
        finally:
            os.waitpid(pid, 0)
            os.close(pidfd)
        init = -1 if self._template else self._script.read(self._init)
        try:
            self._script_process.check()
            self._tree_builder.script_process.check()
        except OSError:
            if init >= 0:
                signal.pidfd_send_signal(init, signal.SIGKILL)
                os.close(init)
            raise
        return self._tree_builder.results(init)


class _TreeBuilder:
    """What the tree builder does."""

    def __init__(self, plan: Plan, fresh: Sequence[FreshOperation], umask: int, level: int, *, template: bool) -> None:
        self._script = script = SyscallScript()
        script.call("umask", 0)
        self._store = pivot.write_fresh(script, fresh, plan.limits.disk, level)
        self._mounts = pivot.write_open_mounts(script) if template else None
        pivot.write_cover(script)
        script.call("umask", umask)
        if plan.own_network:
            network.write_loopback_up(script)
            network.write_open_low_ports(script)
        self._opened: list[Result | None] = []
        for name, _flag in ENTERED[1:]:
            own = name != "net" or plan.own_network
            self._opened.append(_write_open(script, f"/proc/self/ns/{name}", os.O_RDONLY) if own else None)
        self._proc = _write_open(script, "/proc", os.O_RDONLY | os.O_DIRECTORY)
        script.finish()
        self.script_process = ScriptProcess(script)

    def results(self, init: int) -> NamespaceSet:
        number = self._script.result
        return NamespaceSet(
            [-1 if result is None else number(result) for result in self._opened],
            number(self._proc), number(self._store), -1 if self._mounts is None else number(self._mounts), init,
        )  # fmt: skip


def _write_open(script: SyscallScript, path: str, flags: int) -> Result:
    return script.call("openat", syscalls.AT_FDCWD, path, flags | os.O_CLOEXEC, 0, about=path)
