"""The supervisor of a template that is a copy of the host's own memory."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from typing import NoReturn

from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import init, memory_watch, payload, shared_memory, steps
from isolation.backends.namespace.process.inherited import Inherited
from isolation.backends.namespace.process.pause import Sleeper
from isolation.backends.namespace.process.steps import Construction
from isolation.backends.namespace.rootfs.mounts import FreshOperation
from isolation.backends.namespace.supervisor.child import Child, SandboxRequest
from isolation.backends.namespace.supervisor.nested import NestedForkServer
from isolation.backends.namespace.supervisor.supervisor import Supervisor, error_in, host_pid
from isolation.guest import Guest
from isolation.linux import syscalls, userns
from isolation.linux.cgroup import Hierarchy
from isolation.plain import json, os, socket
from isolation.wire import Wire

# What a fork does not get by its clone: its user and mount namespace come later, its PID namespace came before.
_PAYLOAD_NAMESPACES = syscalls.CLONE_NEWCGROUP  # once it has joined its cgroup, which so is the root that is seen
_INHERITED = syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID


class ForkServer(Supervisor):
    """Makes forks of itself: root of the user namespace that owns them, and PID 1 above theirs."""

    def __init__(
        self,
        plan: Plan,
        wire: Wire,
        host: int,
        mask: frozenset[int],
        cgroups: Hierarchy | None,
        inherited: list[Inherited],
    ) -> None:
        super().__init__(plan, wire, host, mask)
        self._cgroups = cgroups
        self._inherited = inherited
        self._own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._shared: list[shared_memory.Object] = []
        self._sleeper = Sleeper()
        self._base = -1  # a mount namespace to start from
        self._fresh: list[FreshOperation] = []
        self._constructions: dict[tuple[int, bool], Construction] = {}
        self._stacks = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)  # the number that a fork's own file will have

    def _prepare(self) -> int:
        self._base, modes = self._build_base()
        self._fresh = steps.with_modes(self._plan, modes)
        for namespaces in (init.NAMESPACES, _PAYLOAD_NAMESPACES):
            self._construction(namespaces)  # now, so that no fork's pages are copied for it
        payload.write_stacks_to(self._stacks)
        if "sharing" in self._plan.defences:
            self._shared = shared_memory.look(self._inherited)
        gc.collect()
        syscalls.malloc_trim()  # less to copy the page tables of
        gc.freeze()  # what is warm stays; without it, every fork's collections would touch, and so copy, all of it
        if "dumpable" in self._plan.defences:
            syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # its memory is that of every sleeping PID 1, too
        return sum(item.scratch for item in self._inherited)

    def _construction(self, namespaces: int, *, template: bool = False) -> Construction:
        key = namespaces, template
        if key not in self._constructions:
            self._constructions[key] = Construction(
                self._plan, self._fresh, self._umask, base=self._base, namespaces=namespaces,
                first=namespaces == init.NAMESPACES, template=template,
            )  # fmt: skip
        return self._constructions[key]

    def _build_base(self) -> tuple[int, dict[str, int]]:
        """A mount namespace with what all forks share, built by a clone; and what that saw there (build.look_at_lowers)."""
        ours, theirs = socket.socketpair()
        pid, pidfd = syscalls.clone(syscalls.CLONE_NEWNS)
        if pid == 0:
            ours.close()
            self._be_builder(theirs)
        theirs.close()
        answer, given, _flags, _ = socket.recv_fds(ours, 1 << 16, 1)
        ours.close()
        os.waitpid(pid, 0)
        os.close(pidfd)
        if not given:
            raise error_in(answer)
        return given[0], json.loads(answer)

    def _be_builder(self, control_socket: socket.socket) -> NoReturn:
        try:
            mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            steps.build_base(self._plan)
            socket.send_fds(control_socket, [json.dumps(steps.look_at_lowers(self._plan)).encode()], [mounts])
        except OSError as error:
            control_socket.send(f"x{error.errno or 0} {error.strerror or error}".encode("utf-8", "replace")[:4000])
        finally:
            os._exit(0)

    def _clone_payload(self, order: SandboxRequest) -> Child | Guest:
        """A PID 1, and the payload as the second process of its namespace; whose parent, though, is this supervisor."""
        construction = self._construction(_PAYLOAD_NAMESPACES, template=order.template)
        construction.use_control_socket(order.theirs.fileno())
        syscalls.unshare(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWTIME)  # for children
        first = pid = fork_channel = None
        try:
            if order.template:
                fork_channel, first = self._make_nested_fork_server(order.given.pop(0))
            else:
                first = self._sleeper.clone()[1]
            syscalls.fork_before()
            try:
                pid, pidfd = syscalls.clone(self._plan.clone_flags & ~_INHERITED)
            finally:
                if pid != 0:
                    syscalls.fork_after_parent()
        except OSError:
            if first is not None:
                signal.pidfd_send_signal(first, signal.SIGKILL)
                self._ending[first] = None
            raise
        finally:
            if pid != 0:
                syscalls.setns(self._own_pid_namespace, syscalls.CLONE_NEWPID)
        wire, stdin, stdout, stderr, crash, *scratch = order.given
        if pid == 0:
            order.ours.close()
            args = payload.PayloadArgs(
                order.theirs, construction, wire, (stdin, stdout, stderr), crash, self._stacks, scratch, self._inherited,
                self._shared, self._mask, self._umask, fork_channel, order.account,
            )  # fmt: skip
            # The supervisor's, not this fork's. Closed here, as sockets that are only forgotten warn of it in some test.
            for other in self._children.values():
                other.control_socket.close()
            self._wire.sock.close()
            self._children, self._ending, self._cgroups = {}, {}, None
            return payload.become(self._plan, args)
        if fork_channel is not None:
            fork_channel.close()
        child = Child(order.number, pid, pidfd, order.ours, order.cgroup)
        child.init = first
        child.crash = os.dup(crash)
        if order.memory_files is not None:
            child.watch = memory_watch.Watch(self._plan.limits.memory or 0, order.memory_files, -1, -1, kills=False)
        return child

    def _make_nested_fork_server(self, wire: int) -> tuple[socket.socket, int]:
        """For a template: who will keep its forks is PID 1 above them. Returns the template's end of a socket to it, and its
        pidfd."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid, pidfd = syscalls.clone(0)
        if pid == 0:
            NestedForkServer(self, wire, ours, self._fresh, self._sleeper, self._stacks, level=2).live()
        ours.close()
        os.close(wire)
        return theirs, pidfd

    def _init_flags(self) -> int:
        return self._plan.clone_flags & ~(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)  # it has both from the base

    def _map_inner(self, child: Child) -> None:
        """This supervisor is in the user namespace above, and has nothing to lose."""
        userns.map_range(host_pid(child.pidfd), 0)

    def forks(self) -> Iterator[Guest]:
        """Serve; and in each fork, yield its guest."""
        guest = self.serve()
        if guest is not None:
            yield guest

    def _remove_cgroups(self) -> None:
        """Its parent does."""
