"""What a supervisor does all day: makes sandboxes as the host asks, and tells it of their end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import resource
import signal
from collections.abc import Callable

from isolation.backends.namespace.checkpoints.session import Inconsistent, KeptFiles
from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import init, memory_watch, messages, payload
from isolation.backends.namespace.process.steps import Construction
from isolation.backends.namespace.rootfs import idmap
from isolation.backends.namespace.supervisor import leftovers
from isolation.backends.namespace.supervisor.child import LOOK_AGAIN, Child, SandboxRequest
from isolation.backends.namespace.supervisor.deadlock import DeadlockWatch
from isolation.errors import WireError
from isolation.guest import Guest
from isolation.linux import syscalls, userns
from isolation.linux.cgroup import Cgroup, Hierarchy
from isolation.linux.userns import UsernsMapper
from isolation.plain import os, select, socket, time
from isolation.wire import Message, Wire, encode, wait_readable

STACKS_MARK = b"\0\n"  # between the stacks of one time and those of the next
_NS_GET_PARENT = 0xB702  # ioctl_ns(2)
_DUMPS_AT_MOST = 100
_ENDING = 0.05  # s, which a PID 1 rarely takes to end
_END_ALL = 10.0  # s, for all of them; then the kernel does it, when the supervisor itself ends
_DUMP_INTERVAL = 0.25  # s, near the memory limit


class Supervisor:
    """Serves one plan's sandboxes to one host. This one makes sandboxes for commands."""

    def __init__(self, plan: Plan, wire: Wire, host: int, mask: frozenset[int]) -> None:
        self._plan = plan
        self._wire = wire
        self._host = host
        self._mask = mask
        self._range = userns.choose_range()
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._cgroups: Hierarchy | None = None
        self._mapper: UsernsMapper | None = None
        self._level = 1  # of the forks that it makes
        self._children: dict[int, Child] = {}  # by number
        self._ending: dict[int, Cgroup | None] = {}  # PID 1s of payloads that were killed, by pidfd
        self._collected: dict[int, tuple[int, resource.struct_rusage]] = {}  # reaped together with strangers, by pid
        self._next_collection: float | None = None

    def serve(self) -> Guest | None:
        """Until the host is gone; then None. In each forked payload it returns, too: that fork's guest."""
        try:
            scratch = self._prepare()
        except OSError as error:
            self._wire.send({"event": "failed", "errno": error.errno, "what": error.strerror or str(error)})
            return None
        self._wire.send({"event": "ready", "scratch": scratch})
        try:
            return self._loop()
        except WireError:
            return None
        finally:
            self._end_all()

    def _prepare(self) -> int:
        """What is done once. Returns how many private files a fork wants."""
        plan = self._plan
        if plan.staged:
            idmap.prepare(plan.staged, plan.mount_point, self._range)
        if plan.cgroup is not None:
            plan.cgroup.sweep()
            self._cgroups = plan.cgroup.subtree()
        return 0

    def _loop(self) -> Guest | None:
        while True:
            message = self._next_message()
            if message is None:
                return None
            if message["op"] == "fork":
                guest = self._fork(message)
                if guest is not None:
                    return guest
            elif message["op"] == "advance":
                self._advance()
            elif (child := self._children.get(message["id"])) is not None:
                if message["op"] == "kill":
                    child.kill()
                elif message["op"] == "dump":
                    self._dump(child)
                elif message["op"] == "files":
                    self._keep_files(child, message)
            elif message["op"] == "files":
                self._wire.send({"event": "files", "id": message["id"], "ask": message["ask"], "ended": True})

    def _next_message(self) -> Message | None:
        """The host's next wish; meanwhile, what the sandboxes want and do. None when the host is gone."""
        while True:
            message = self._wire.next_message()
            if message is not None:
                return message
            poller = select.poll()
            waiting = self._others()
            for child in self._children.values():
                if child.pidfd >= 0 and child.look_again is None:
                    waiting[child.pidfd] = lambda child=child: self._ended(child)  # type: ignore[misc]
                if child.control_socket.fileno() >= 0:
                    waiting[child.control_socket.fileno()] = lambda child=child: self._answer(child)  # type: ignore[misc]
                if child.files is not None and child.files.fileno() >= 0:
                    waiting[child.files.fileno()] = lambda child=child: self._hear_of_files(child)  # type: ignore[misc]
            for pidfd in self._ending:
                waiting[pidfd] = lambda pidfd=pidfd: self._buried(pidfd)  # type: ignore[misc]
            for fd in (self._wire.fileno(), self._host, *waiting):
                poller.register(fd, select.POLLIN)
            ready = [fd for fd, _events in poller.poll(self._patience())]
            if self._host in ready:
                return None
            for fd in ready:
                if fd in waiting and self._is_current(fd):
                    waiting[fd]()
            if self._wire.fileno() in ready and not self._wire.fill():
                return None

    def _is_current(self, fd: int) -> bool:
        """What one event did may have ended what another was about."""
        if fd in self._ending or fd in self._others():
            return True
        for child in self._children.values():
            if fd in (child.pidfd, child.control_socket.fileno(), -1 if child.files is None else child.files.fileno()):
                return True
        return False

    def _others(self) -> dict[int, Callable[[], None]]:
        """What else is waited for: descriptors, and what to do when they are readable."""
        return {}

    def _advance(self) -> None:
        """The host wants the template itself to go on."""

    def _patience(self) -> float | None:
        """Milliseconds until something must be looked at. Ends what is over its wall-clock or memory limit, or takes too
        long."""
        now = time.monotonic()
        patience: list[float] = []
        self._look_at_endings(now, patience)
        for child in self._children.values():
            if child.deadline is not None:
                if child.deadline <= now:
                    child.deadline, child.timed_out = None, True
                    child.kill()
                else:
                    patience.append((child.deadline - now) * 1000 + 1)
            # Of one for commands, PID 1 tells when there is something to watch again.
            if child.watch is not None and not (child.watch.idle and child.control >= 0):
                state = child.watch.look()
                patience.append(child.watch.interval)
                if state == "near" and now >= child.next_dump:
                    self._dump(child)
                elif state == "over" and not child.out_of_memory:
                    child.out_of_memory = True
                    if child.init >= 0:
                        self._dump(child)
                        time.sleep(0.02)  # a moment for the stacks to be written
                    child.kill()
            if child.deadlock is not None and child.pid >= 0:
                if self._is_deadlocked(child):
                    child.deadlock, child.deadlocked = None, True
                    self._dump(child)
                    time.sleep(0.02)  # a moment for the stacks to be written
                    child.kill()
                else:
                    patience.append(child.deadlock.patience())
            if child.files is not None and (deadline := child.files.deadline) is not None:
                if deadline <= now:
                    self._hear_of_files(child, late=True)
                else:
                    patience.append((deadline - now) * 1000 + 1)
        return min(patience, default=None)

    def _is_deadlocked(self, child: Child) -> bool:
        assert child.deadlock is not None
        try:
            return child.deadlock.look((host_pid(child.init), host_pid(child.pidfd)))
        except (OSError, StopIteration):
            return False  # it is about to end

    def _dump(self, child: Child) -> None:
        """Have a payload write the stacks of its threads, behind those of earlier times."""
        if child.init >= 0 and child.pidfd >= 0 and child.dumps < _DUMPS_AT_MOST:
            child.dumps += 1
            child.next_dump = time.monotonic() + _DUMP_INTERVAL
            try:
                os.write(child.crash, STACKS_MARK)
                signal.pidfd_send_signal(child.pidfd, payload.DUMP_SIGNAL)
            except OSError:
                pass  # the file is the guest's, too, who may have grown it beyond all bounds; or it is gone

    def _keep_files(self, child: Child, message: Message) -> None:
        """Keep them, restore or forget what is kept. The answer comes later."""
        try:
            if child.files is None:
                while (
                    child.mounts < 0
                    and child.control_socket.fileno() >= 0
                    and wait_readable(child.control_socket.fileno(), 0)
                ):
                    self._answer(child)  # it has sent them, but has not been heard yet
                if child.mounts < 0:
                    raise OSError(errno.ENOTSUP, "this is no sandbox for commands, or it has ended")
                child.files = KeptFiles(self._plan, child.mounts)
            child.files.begin(message)
        except OSError as error:
            self._wire.send({
                "event": "files", "id": child.number, "ask": message["ask"], "errno": error.errno,
                "what": error.strerror or str(error),
            })  # fmt: skip

    def _hear_of_files(self, child: Child, *, late: bool = False) -> None:
        assert child.files is not None
        try:
            answer = child.files.give_up() if late else child.files.hear()
        except Inconsistent:
            child.kill()
        else:
            if answer is not None:
                self._wire.send(answer)

    def _fork(self, message: Message) -> Guest | None:
        ours, theirs = socket.socketpair()
        order = SandboxRequest(message["id"], self._wire.take_fds(message["fds"]), ours, theirs)
        order.template, order.account = bool(message.get("template")), bool(message.get("account"))
        order.deadlock = message.get("deadlock", "")
        try:
            if self._cgroups is not None:
                limits = self._plan.limits
                order.cgroup = self._cgroups.create(order.number, memory=limits.memory, cpus=limits.cpus)
                order.memory_files = order.cgroup.open_memory_files() if limits.memory is not None else None
            made = self._clone_payload(order) if message.get("payload") else self._clone_init(order)
            if isinstance(made, Guest):
                return made
        except OSError as error:
            self._unforked(order.number, error)
            ours.close()
            if order.cgroup is not None:
                order.cgroup.remove()
        else:
            ours.setblocking(False)  # what the other end does not read must not keep this process waiting
            made.memory_files, made.account, made.template = order.memory_files, order.account, order.template
            made.deadlock = DeadlockWatch(loops=order.deadlock == "loops") if order.deadlock else None
            self._children[order.number] = made
        theirs.close()
        for fd in order.given:
            os.close(fd)
        return None

    def _clone_init(self, order: SandboxRequest) -> Child:
        construction = self._construction(init.NAMESPACES)
        if construction is not None:
            construction.use_control_socket(order.theirs.fileno())
        pid, pidfd = syscalls.clone(self._init_flags())
        if pid == 0:
            order.ours.close()
            args = init.InitArgs(order.given[0], order.theirs, construction, order.memory_files, self._mask, self._umask)
            init.live(self._plan, args)
        child = Child(order.number, pid, pidfd, order.ours, order.cgroup)
        wall = self._plan.limits.wall
        child.deadline = None if wall is None else time.monotonic() + wall
        if self._plan.watch_memory:
            child.control = os.dup(order.given[0])
        return child

    def _init_flags(self) -> int:
        return self._plan.clone_flags

    def _construction(self, namespaces: int) -> Construction | None:
        """How a clone becomes a sandbox, where there is a base to start from."""
        return None

    def _clone_payload(self, order: SandboxRequest) -> Child | Guest:
        raise OSError(errno.ENOTSUP, "this supervisor makes sandboxes for commands only")

    def _answer(self, child: Child) -> None:
        """What a process cannot do for itself while it builds its sandbox."""
        try:
            request, given, _flags, _ = socket.recv_fds(child.control_socket, 4096, 2)
        except BlockingIOError:
            return
        except ConnectionResetError:  # it was ended before it had read the last answer
            request, given = b"", []
        try:
            if request == messages.JOIN_CGROUP and child.cgroup is not None:
                child.cgroup.add(child.pid)
            elif request == messages.MAP_RANGE:
                userns.map_range(child.pid, self._range)
            elif request == messages.MAP_INNER:
                self._map_inner(child)
            elif child.watch is not None and request and not request.strip(messages.ACTIVE):
                child.watch.idle = False
                return
            elif request == messages.MOUNTS and len(given) == 1:
                child.mounts = given[0]
                return
            elif request == messages.PLACES and len(given) == 2:
                self._show(child, *given)
                return
            else:
                child.control_socket.close()
                if request[:1] == messages.FAILED:
                    self._unforked(child.number, error_in(request))
                return
            child.control_socket.send(request)
        except OSError as error:
            self._unforked(child.number, error)
            child.kill()

    def _show(self, child: Child, proc: int, store: int) -> None:
        """What there is to see of a fork from here: its /proc, and its store."""
        child.proc, child.store = proc, store
        if self._plan.watch_memory:
            child.watch = memory_watch.Watch(
                self._plan.limits.memory or 0, None, os.dup(proc), os.dup(store), kills=True, own_only=child.template
            )  # fmt: skip

    def _map_inner(self, child: Child) -> None:
        """Map the guest's own user namespace. That is written from the one above it only, which this supervisor, who must
        keep host root's rights to its cgroups, does not enter: a child does."""
        directory = os.open(f"/proc/{host_pid(child.pidfd)}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        users = os.open("ns/user", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        parent = fcntl.ioctl(users, _NS_GET_PARENT)
        try:
            if self._mapper is None:
                self._mapper = UsernsMapper()
            self._mapper.map(parent, directory)
        finally:
            for fd in (directory, users, parent):
                os.close(fd)

    def _unforked(self, number: int, error: OSError) -> None:
        what = error.strerror or str(error)
        self._wire.send({"event": "unforked", "id": number, "errno": error.errno, "what": what})

    def _look_at_endings(self, now: float, patience: list[float]) -> None:
        """Take what could not be reaped before; and see to it that PID 1s can end. `patience` gets milliseconds until the
        next look."""
        for child in [child for child in self._children.values() if child.look_again is not None]:
            assert child.look_again is not None
            if child.look_again <= now:
                self._ended(child)
            if child.number in self._children:
                patience.append((child.look_again - now) * 1000 + 1)
        if not self._ending:
            self._next_collection = None
        elif self._next_collection is None:
            self._next_collection = now + _ENDING
        elif self._next_collection <= now:
            if all(child.pid >= 0 for child in self._children.values()):  # else it could be one that is yet to say so
                self._collect()
            self._next_collection = now + LOOK_AGAIN[1]
        if self._next_collection is not None:
            patience.append((self._next_collection - now) * 1000 + 1)

    def _collect(self) -> None:
        """Reap all that has ended. A guest that finds a way to make siblings (CLONE_PARENT, which the filter refuses) has
        made children of this process, which nobody else waits for; and until they are gone, their PID 1 cannot end."""
        known = {child.pid for child in self._children.values()}
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in known:
                self._collected[pid] = status, usage

    def _ended(self, child: Child) -> None:
        """A payload is gone, or a PID 1 for commands."""
        if child.account and child.store >= 0 and child.told_account is None:
            child.told_account = leftovers.of(child.proc, child.store, self._plan.fresh, self._level)
        if child.init >= 0:
            # Whatever it has left running ends with it. First of all, as a tracer may be among that, which keeps its
            # tracee from the parent (ptrace(2), "Death under ptrace").
            child.kill()
        reaped = self._reap(child)
        if reaped is None:
            child.look_again = time.monotonic() + child.patience
            child.patience = min(LOOK_AGAIN[1], child.patience * 2)
            return
        status, usage = reaped
        event: Message = {"event": "exit" if child.init >= 0 else "ended", "id": child.number, "status": status}
        event["usage"] = [usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024]
        event["timed_out"], event["oom"] = child.timed_out, child.out_of_memory
        event["deadlocked"] = child.deadlocked
        if child.cgroup is not None:
            event["accounts"] = child.cgroup.accounts()
        if child.told_account is not None:
            event["account"] = child.told_account
        del self._children[child.number]
        if child.pidfd >= 0:
            os.close(child.pidfd)
        if child.init >= 0:
            self._ending[child.init] = child.cgroup
        elif child.cgroup is not None:
            child.cgroup.remove()
        if child.out_of_memory and child.control >= 0:
            _tell(child.control, {"event": "oom"})
        try:
            self._wire.send(event)
        except WireError:
            pass  # the host is gone; the loop notices
        child.close()  # last: this is when the mounts are taken apart

    def _reap(self, child: Child) -> tuple[int, resource.struct_rusage] | None:
        """The status of a child that has ended, and what it used; None while the kernel does not say so. Never waits: the
        guest has a say in when that is."""
        if child.pid in self._collected:
            return self._collected.pop(child.pid)
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        return (status, usage) if pid else None

    def _buried(self, pidfd: int) -> None:
        """A PID 1 is gone, and so, by the kernel's word, is everything inside."""
        cgroup = self._ending.pop(pidfd)
        try:
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            pass  # collected already
        os.close(pidfd)
        if cgroup is not None:
            cgroup.remove()

    def _end_all(self) -> None:
        """Within a bound: what is left then, the kernel ends with this process."""
        for child in list(self._children.values()):
            child.account = False  # nobody asks any more
            child.kill()
        deadline = time.monotonic() + _END_ALL
        while (self._children or self._ending) and time.monotonic() < deadline:
            self._collect()
            for child in list(self._children.values()):
                if child.pid < 0:
                    self._drop(child)
                elif wait_readable(child.pidfd, 0):
                    self._ended(child)
            for pidfd in list(self._ending):
                if wait_readable(pidfd, 0):
                    self._buried(pidfd)
            poller = select.poll()
            for pidfd in (*(child.pidfd for child in self._children.values() if child.look_again is None), *self._ending):
                poller.register(pidfd, select.POLLIN)
            tries_again = any(child.look_again is not None for child in self._children.values())
            if self._children or self._ending:
                poller.poll(LOOK_AGAIN[0 if tries_again else 1] * 1000)
        self._remove_cgroups()

    def _drop(self, child: Child) -> None:
        """One that has not come to life."""
        del self._children[child.number]
        child.kill()
        self._ending[child.init] = child.cgroup
        if child.pidfd >= 0:
            os.close(child.pidfd)
        child.close()

    def _remove_cgroups(self) -> None:
        if self._cgroups is not None:
            self._cgroups.remove()


def _tell(control: int, message: Message) -> None:
    """In the name of a PID 1 that has ended; as far as there is room for it."""
    with socket.socket(fileno=os.dup(control)) as sock, contextlib.suppress(OSError):
        sock.send(encode(message), socket.MSG_DONTWAIT)


def host_pid(pidfd: int) -> int:
    """A process's number in the /proc that is mounted here, which need not be that of this PID namespace."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


def error_in(answer: bytes) -> OSError:
    """From "xERRNO TEXT", as a child that fails to build says it."""
    number, _, what = answer[1:].decode("utf-8", "replace").partition(" ")
    known = number.isdecimal() and len(number) < 5  # a template may have written it
    return OSError(int(number) if known else 0, what or "the process that builds the sandbox died")
