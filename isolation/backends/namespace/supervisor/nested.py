"""The supervisor of a template that is itself a fork: PID 1 above the template and its forks.

It is a clone of the supervisor above, and like that one trusted, not dumpable, and out of the template's reach. What it
cannot give is memory: that is the template's, which it asks, by a socket, for a copy of it in a sandbox that it has made
ready. So the template can refuse, or lie of it, and harm nobody but its own forks.
"""

from __future__ import annotations

import resource
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from isolation.backends.namespace.process import inherited, memory_watch, messages, steps
from isolation.backends.namespace.process.open_files import Aside, decode
from isolation.backends.namespace.process.pause import Sleeper
from isolation.backends.namespace.rootfs.mounts import DEEPEST, FreshOperation
from isolation.backends.namespace.supervisor.child import Child, SandboxRequest
from isolation.backends.namespace.supervisor.prebuilt import NamespaceSetBuilder
from isolation.backends.namespace.supervisor.supervisor import Supervisor, error_in
from isolation.errors import WireError
from isolation.guest import Guest
from isolation.linux import privileges, seccomp, syscalls, userns
from isolation.linux.namespaces import ENTERED
from isolation.linux.syscall_script import SyscallScript
from isolation.plain import json, os, select, socket
from isolation.wire import Wire

_CREDENTIALS = struct.Struct("=iII")  # struct ucred
_SCRATCH_AT_MOST = 200
_WORD_AT_MOST = 128 << 10
_REAPED_LATE = 0.05  # s between two tries


class NestedForkServer(Supervisor):
    """One template's. `level`: of its forks."""

    def __init__(
        self, above: Supervisor, wire: int, fork_channel: socket.socket, fresh: Sequence[FreshOperation], sleeper: Sleeper,
        stacks: int, *, level: int,
    ) -> None:  # fmt: skip
        host = above._host
        inherited.close_all_but({0, 1, 2, wire, fork_channel.fileno(), host})
        super().__init__(above._plan, Wire(socket.socket(fileno=wire), accept_fds=True), host, above._mask)
        self._above = above  # never forgotten: its sockets would close numbers that are others' now
        self._cgroups = above._cgroups
        self._fork_channel = fork_channel
        self._fresh = fresh
        self._sleeper = sleeper
        self._stacks = stacks
        self._level = level
        self._mounts = self._owner = -1
        self._builders: dict[bool, NamespaceSetBuilder] = {}
        self._warm = False
        self._umask = above._umask

    def live(self) -> NoReturn:
        """Be PID 1."""
        try:
            self.serve()
        except BaseException as error:
            if os.environ.get("ISOLATION_DEBUG"):
                sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(0)

    def _prepare(self) -> int:
        self._await_template()
        request, given, _flags, _ = socket.recv_fds(self._fork_channel, 64, 2)
        if request != messages.SEALED or len(given) != 2:
            raise OSError("the template did not start")
        self._mounts, user = given
        self._owner = self._make_owner(user)
        os.close(user)
        self._aside = Aside(self._plan, self._fresh, self._mounts, self._level - 1)
        self._fork_channel.send(messages.SEALED)
        self._fork_channel.setblocking(False)  # the template need not read what it is sent
        self._await_template()
        return self._read_warm()

    def _await_template(self) -> None:
        """Until it says something; it may never do so. Raises WireError when the host is gone."""
        poller = select.poll()
        for fd in (self._fork_channel.fileno(), self._wire.fileno(), self._host):
            poller.register(fd, select.POLLIN)
        while True:
            ready = [fd for fd, _events in poller.poll()]
            if self._host in ready or (self._wire.fileno() in ready and not self._wire.fill()):
                raise WireError("the host is gone")
            if self._fork_channel.fileno() in ready:
                return

    def _read_warm(self) -> int:
        """The template waits to be forked: how many private files a fork wants. Raises WireError when it is gone."""
        said = self._fork_channel.recv(_WORD_AT_MOST)
        if not said:
            raise WireError("the template is gone")
        number, *held = said.split(b"\0")
        if self._warm or number[:1] != messages.WARM or not number[1:].isdigit() or len(number) > 8:
            raise WireError("the template does not speak as it should")
        try:
            self._aside.put(decode(held))
        except (ValueError, OSError) as error:
            raise WireError(f"the template does not speak as it should: {error}") from error
        self._warm = True
        return min(_SCRATCH_AT_MOST, int(number[1:]))

    def _others(self) -> dict[int, Callable[[], None]]:
        return {self._fork_channel.fileno(): self._hear}

    def _hear(self) -> None:
        self._wire.send({"event": "ready", "scratch": self._read_warm()})

    def _advance(self) -> None:
        self._warm = False
        self._aside.put_back()
        self._fork_channel.send(b'"advance"')

    def _clone_payload(self, order: SandboxRequest) -> Child | Guest:
        """Make the sandbox ready, and ask the template for a copy of its memory in it."""
        if not self._warm:
            raise OSError("the template is at work")
        if order.template and self._level >= DEEPEST:
            raise OSError(f"templates nest at most {DEEPEST - 1} deep")
        init = pid_namespace = -1
        fork_channel: socket.socket | None = None
        vacant = None
        try:
            if order.template:
                fork_channel, init, pid_namespace = self._make_next_fork_server(order.given.pop(0))
            order.ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            builder = self._builder(template=order.template)
            vacant = builder.make(order.theirs.fileno(), pid_namespace, lambda pid: self._let_join(order, pid))
            if not order.template:
                init = vacant.init
            self._send_order(order, vacant.namespaces, fork_channel, vacant.mounts)
            child = Child(order.number, -1, -1, order.ours, order.cgroup)
            child.init = init
            child.crash = os.dup(order.given[4])
            if order.memory_files is not None:
                child.watch = memory_watch.Watch(self._plan.limits.memory or 0, order.memory_files, -1, -1, kills=False)
            if order.account or self._plan.watch_memory:
                self._show(child, os.dup(vacant.proc), os.dup(vacant.store))
            return child
        except OSError:
            if init >= 0:
                signal.pidfd_send_signal(init, signal.SIGKILL)
                self._ending[init] = None
            raise
        finally:
            if vacant is not None:
                vacant.close()
            if fork_channel is not None:
                fork_channel.close()
            if pid_namespace >= 0:
                os.close(pid_namespace)

    def _builder(self, *, template: bool) -> NamespaceSetBuilder:
        if template not in self._builders:
            self._builders[template] = NamespaceSetBuilder(
                self._plan, self._fresh, self._umask, self._level, None if template else self._sleeper,
                mounts=self._mounts, owner=self._owner,
            )  # fmt: skip
        return self._builders[template]

    def _let_join(self, order: SandboxRequest, pid: int) -> None:
        """The builder wants to be in the sandbox's cgroup, which so is the root that is seen inside."""
        if self._plan.cgroup is not None and order.ours.recv(1) == messages.JOIN_CGROUP:
            assert order.cgroup is not None
            order.cgroup.add(pid)
            order.ours.send(messages.JOIN_CGROUP)

    def _send_order(
        self, order: SandboxRequest, namespaces: Sequence[int], fork_channel: socket.socket | None, mounts: int
    ) -> None:
        named = dict(zip([name for name, _flag in ENTERED], [self._owner, *namespaces], strict=True))
        there = {name: fd for name, fd in named.items() if fd >= 0}
        about = {"namespaces": list(there), "template": order.template, "aside": self._aside.put_aside}
        streams, scratch = order.given[:5], order.given[5:]
        more = [fork_channel.fileno(), mounts] if fork_channel is not None else []
        given = [*there.values(), order.theirs.fileno(), *streams, *more, *scratch]
        socket.send_fds(self._fork_channel, [json.dumps(about).encode()], given)

    def _answer(self, child: Child) -> None:
        if child.pid >= 0:
            self._answer_started(child)
            return
        request = b""
        ancillary: list[tuple[int, int, bytes]] = []
        try:
            request, ancillary, _flags, _ = child.control_socket.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
        except BlockingIOError:
            return
        except ConnectionResetError:
            pass
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and request == messages.BORN:
                self._has_started(child, _CREDENTIALS.unpack(data)[0])
                return
        refused = OSError("the template made no copy of itself")
        self._unforked(child.number, error_in(request) if request[:1] == messages.FAILED else refused)
        self._drop(child)

    def _answer_started(self, child: Child) -> None:
        """Its code is the template's, which is not trusted: it may have its ids mapped, and nothing else."""
        request = b""
        try:
            request = child.control_socket.recv(4096)
        except BlockingIOError:
            return
        except ConnectionResetError:
            pass
        try:
            if request != messages.MAP_INNER:
                child.control_socket.close()
                if request[:1] == messages.FAILED:  # it could not become what it should: no test has run in it
                    self._unforked(child.number, error_in(request))
                return
            self._map_inner(child)
            child.control_socket.send(request)
        except OSError as error:
            self._unforked(child.number, error)
            child.kill()

    def _has_started(self, child: Child, pid: int) -> None:
        """Its number is the kernel's word (SCM_CREDENTIALS, unix(7)), in this PID namespace."""
        try:
            child.pidfd = os.pidfd_open(pid)
            child.pid = pid
            if child.cgroup is not None:
                child.cgroup.add(pid)
            child.control_socket.send(messages.BORN)
        except OSError as error:
            self._unforked(child.number, error)
            self._drop(child)

    def _reap(self, child: Child) -> tuple[int, resource.struct_rusage] | None:
        """It becomes a child of this process when the one ends that made it; unless the template has seen to it that its own
        descendants stay with it (PR_SET_CHILD_SUBREAPER), and then nothing is known of its end."""
        try:
            return super()._reap(child)
        except ChildProcessError:
            if child.patience < _REAPED_LATE:
                return None
        return signal.SIGKILL, resource.getrusage(resource.RUSAGE_THREAD)

    def _remove_cgroups(self) -> None:
        """The supervisor above all does, at its end: among them are others', which may be empty as they are about to be
        used."""

    def _make_owner(self, user: int) -> int:
        """The user namespace that owns what this template's forks are made of: below the template's own, so that it is let
        in; and with a root, which file systems want. Raises OSError."""
        ours, theirs = socket.socketpair()
        pid, pidfd = syscalls.clone(0)
        if pid == 0:
            self._own_user_namespace(theirs, user)
        theirs.close()
        answer, given, _flags, _ = socket.recv_fds(ours, 4096, 1)
        ours.close()
        os.waitpid(pid, 0)
        os.close(pidfd)
        if not given:
            raise error_in(answer)
        return given[0]

    def _own_user_namespace(self, control_socket: socket.socket, user: int) -> NoReturn:
        try:
            steps.leave_host_ids(self._plan)
            syscalls.setns(self._mounts, syscalls.CLONE_NEWNS)
            syscalls.setns(user, syscalls.CLONE_NEWUSER)
            ready, its_ready = os.pipe()
            first, _pidfd = syscalls.clone(syscalls.CLONE_NEWUSER)
            if first == 0:
                _be_first(its_ready)
            os.close(its_ready)
            os.read(ready, 1)
            who = self._plan.identity
            for name, number in (("uid_map", who.uid), ("gid_map", who.gid)):
                text = f"0 0 {userns.RANGE_SIZE}" if who.ranged else f"0 {number} 1"
                userns.write_map(f"/proc/{first}/{name}", text)
            made = os.open(f"/proc/{first}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            socket.send_fds(control_socket, [b"u"], [made])
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)
        except OSError as error:
            control_socket.send(f"x{error.errno or 0} {error.strerror or error}".encode("utf-8", "replace")[:4000])
        finally:
            os._exit(0)

    def _make_next_fork_server(self, wire: int) -> tuple[socket.socket, int, int]:
        """For a template among the forks: its end of a socket to its supervisor; the supervisor's pidfd; and the PID
        namespace."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        answers, its_answers = socket.socketpair()
        pid, pidfd = syscalls.clone(0)
        if pid == 0:
            try:
                syscalls.setns(self._owner, syscalls.CLONE_NEWUSER)
                syscalls.unshare(syscalls.CLONE_NEWPID)
                first, first_pidfd = syscalls.clone(syscalls.CLONE_PARENT)
                if first == 0:
                    NestedForkServer(
                        self, wire, ours, self._fresh, self._sleeper, self._stacks, level=self._level + 1
                    ).live()
                namespace = os.open("/proc/self/ns/pid_for_children", os.O_RDONLY | os.O_CLOEXEC)
                socket.send_fds(its_answers, [b"k"], [first_pidfd, namespace])
            except OSError as error:
                its_answers.send(f"x{error.errno or 0} {error.strerror or error}".encode("utf-8", "replace")[:4000])
            finally:
                os._exit(0)
        its_answers.close()
        ours.close()
        os.close(wire)
        answer, given, _flags, _ = socket.recv_fds(answers, 4096, 2)
        answers.close()
        os.waitpid(pid, 0)
        os.close(pidfd)
        if len(given) != 2:
            theirs.close()
            raise error_in(answer)
        return theirs, given[0], given[1]


def _be_first(ready: int) -> NoReturn:
    """Be in a new user namespace until its maps are written. They can be, and so can this process be traced, only when it is
    dumpable; the template might, and must find nothing in it that it has not itself."""
    try:
        inherited.close_all_but({ready})
        script = SyscallScript()
        privileges.write_no_new_privileges(script)
        seccomp.write_install(script, seccomp.compiled_template_filter())
        script.finish()
        script.run()
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
        os.write(ready, b"r")
        while True:
            signal.pause()
    finally:
        os._exit(1)
