"""The keeper: a fork of the host that clones sandboxes, and sees to it that none outlives the host.

It is single-threaded, which is what makes a bare clone(2) of it safe, and it waits in the host's own namespaces, out of
every guest's reach. It ends its sandboxes when the host asks, and all of them when the host is gone: it holds a pidfd of
the host, so that neither `kill -9` nor a forgotten duplicate of its socket keeps it waiting.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

from isolation.backends.namespace import build, fds, forking, identity, init, memory, payload, stage, syscalls
from isolation.backends.namespace.build import Construction
from isolation.backends.namespace.cgroup import Cgroup, Hierarchy
from isolation.backends.namespace.fds import Inherited
from isolation.backends.namespace.operations import FreshOperation
from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.sleeper import Sleeper
from isolation.errors import LaunchError, WireError
from isolation.guest import Guest
from isolation.wire import Message, Wire, wait_readable

STACKS_MARK = b"\0\n"  # between the stacks of one time and those of the next
_NS_GET_PARENT = 0xB702  # ioctl_ns(2)
_DUMPS_AT_MOST = 100
_DUMP_INTERVAL = 0.25  # s, near the memory limit


class KeeperProcess:
    """The host's handle of a keeper."""

    def __init__(self, pid: int, pidfd: int, wire: Wire) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.wire = wire
        self.shared = False  # by several machines, see launcher.py; it stays when one of them is closed
        self._scratch: int | None = None
        self._ended: dict[int, Message] = {}
        self._unwanted: set[int] = set()
        self._numbers = 0
        self._users = 0
        self._spares: list[tuple[int, Wire]] = []
        self._retired = False
        self._lock = threading.RLock()
        self._closing = threading.Lock()  # who finds it dead closes it, and that may be two threads at once

    def new_init(self, *, ahead: bool) -> tuple[int, Wire]:
        """A sandbox for commands that is being made, or (with `ahead`) was made before it was needed: its number, and the
        wire to its PID 1, which says "ready" first. Raises LaunchError."""
        with self._lock:
            self._users += 1
            made = self._spares.pop() if self._spares else self._request_init()
            if ahead and self.shared:
                self._spares.append(self._request_init())
            return made

    def _request_init(self) -> tuple[int, Wire]:
        self._numbers += 1
        ours, theirs = Wire.pair()  # after the keeper's fork: a copy of theirs in it would keep the wire alive
        try:
            self.request({"op": "fork", "id": self._numbers, "fds": 1}, [theirs.fileno()])
        except LaunchError:
            ours.close()
            raise
        finally:
            theirs.close()
        return self._numbers, Wire(ours, accept_fds=True)

    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self.pidfd >= 0 and not wait_readable(self.pidfd, 0)

    def retire(self) -> None:
        """Close it when its last machine is closed."""
        with self._lock:
            self._retired = True
            if self._users == 0:
                self.close()

    def done_with(self, number: int) -> None:
        """A machine is closed: wait for its end; and end the keeper, unless others use it."""
        if not self.shared:
            self.close()
            return
        try:
            self.request({"op": "kill", "id": number})
            self.last_word(number, 10.0)
        except (LaunchError, TimeoutError):
            self.close()
        with self._lock:
            self._users -= 1
            if self._retired and self._users == 0:
                self.close()

    def scratch(self) -> int:
        """How many private files a fork wants; waits until the keeper is ready. Raises LaunchError."""
        with self._lock:
            return self._first_word() if self._scratch is None else self._scratch

    def _first_word(self) -> int:
        if self._scratch is None:
            ready = self.wire.receive()
            if ready is None or ready.get("event") != "ready":
                what = ready["what"] if ready else "the process that should make it died"
                self.close()
                raise LaunchError(f"the sandbox could not be prepared: {what}")
            self._scratch = int(ready["scratch"])
        return self._scratch

    def request(self, message: Message, given: Sequence[int] = ()) -> None:
        """Ask for a clone, or for the end of one. Raises LaunchError when the keeper is gone."""
        try:
            with self._lock:
                self.wire.send(message, fds=given)
        except WireError as error:
            raise LaunchError("the process that makes sandboxes is gone; was it killed?") from error

    def last_word(self, number: int, timeout: float | None) -> Message | None:
        """What the keeper says of a clone's end ("exit", "ended" or "unforked"), waiting for it; None when it says nothing.

        Raises TimeoutError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while number not in self._ended:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            with self._lock:
                if number in self._ended:
                    break
                try:
                    message = self.wire.receive(None if left is None else min(left, 0.1))
                except TimeoutError:
                    if left is not None and left <= 0:
                        raise
                    continue
                except WireError:
                    return None
                if message is None:
                    return None
                self._note(message)
        return self._ended.pop(number)

    def forget(self, numbers: Iterable[int]) -> None:
        """Read what has arrived, and drop what is said of clones that nobody asks about any more."""
        while wait_readable(self.wire.fileno(), 0) and self.wire.fill():
            while (message := self.wire.next_message()) is not None:
                self._note(message)
        for number in numbers:
            if self._ended.pop(number, None) is None:
                self._unwanted.add(number)  # its last word is still to come

    def _note(self, message: Message) -> None:
        if message.get("id") in self._unwanted:
            self._unwanted.discard(message["id"])
        elif message.get("event") in ("exit", "ended", "unforked"):
            self._ended.setdefault(message["id"], message)

    def close(self) -> None:
        """End the keeper and all its sandboxes; returns when they are gone."""
        with self._closing:
            if self.pidfd < 0:
                return
            while self._spares:
                self._spares.pop()[1].close()
            self.wire.close()
            try:
                os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            except ChildProcessError:
                pass  # somebody else's waitpid(-1) was quicker
            os.close(self.pidfd)
            self.pidfd = -1


def commands_only(guest: Guest) -> None:
    """The function of a keeper that stays, but whose memory nobody wants."""
    for _job in guest.forks():
        pass


def start(plan: Plan, function: Callable[[Guest], object] | None = None) -> KeeperProcess:
    """Fork a keeper off this process. `function` is what its forks run; None for one sandbox for commands.

    Raises LaunchError, naming what could not be prepared.
    """
    if not syscalls.supported_machine():
        raise LaunchError("the namespace backend knows x86_64 and aarch64 processors only")
    ours, theirs = Wire.pair()
    host = os.pidfd_open(os.getpid())
    mask = frozenset(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))
    try:
        pid = forking.fork()
        if pid == 0:
            _become_keeper(plan, function, theirs, ours, host, mask)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()
    os.close(host)
    return KeeperProcess(pid, os.pidfd_open(pid), Wire(ours))


def _become_keeper(
    plan: Plan,
    function: Callable[[Guest], object] | None,
    theirs: socket.socket,
    ours: socket.socket,
    host: int,
    mask: frozenset[int],
) -> NoReturn:
    status = 1
    try:
        if len(os.listdir("/proc/self/task")) > 1:
            # A hook has started threads in this fork. A fork of it, without hooks, has one; this one only waits.
            child = syscalls.fork()
            if child:
                ours.close()
                theirs.close()
                os.waitpid(child, 0)
                os._exit(0)
        ours.close()
        if function is None or function is commands_only:
            fds.close_all_but({0, 1, 2, theirs.fileno(), host})  # a pipe of the host's, say, whose reader waits for its end
        _open_stdio()
        syscalls.set_name("isolation-keep")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        wire = Wire(theirs, accept_fds=True)
        if function is None:
            Keeper(plan, wire, host, mask).serve()
        else:
            serve_warm(plan, wire, host, mask, function)
        status = 0
    except BaseException as error:
        if os.environ.get("ISOLATION_DEBUG"):
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(status)


def serve_warm(
    plan: Plan, wire: Wire, host: int, mask: frozenset[int], function: Callable[[Guest], object]
) -> None:
    """The keeper of a template is itself PID 1 of a PID namespace, beneath which it makes its forks: so the kernel ends
    them all with it. Its parent only waits, and clears up."""
    inherited = fds.inventory(exclude=[wire.fileno(), host])
    cgroups = None
    try:
        if plan.staged:
            stage.prepare(plan.staged, plan.mount_point)
        if plan.cgroup is not None:
            plan.cgroup.sweep()
            cgroups = plan.cgroup.subtree()
        ours, theirs = socket.socketpair()
        pid, _pidfd = syscalls.clone(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID)
        if pid == 0:
            ours.close()
            build.die_with_keeper()
            build.become_root_of_namespace(plan, theirs)
            theirs.close()
            keeper = WarmKeeper(plan, wire, host, mask, cgroups, inherited)
            _run(Guest(wire, fork=lambda _guest: keeper.forks()), function)
    except OSError as error:
        wire.send({"event": "failed", "errno": error.errno, "what": error.strerror or str(error)})
    else:
        theirs.close()
        wire.sock.close()
        if ours.recv(1) == b"m":
            identity.map_range(pid)
            ours.send(b"m")
        os.waitpid(pid, 0)
        ours.close()
    if cgroups is not None:
        cgroups.remove()


def _run(guest: Guest, function: Callable[[Guest], object]) -> NoReturn:
    """In a template, and in its forks, which come to life inside of the function: status 0 only when it returned."""
    try:
        function(guest)
    except SystemExit as error:
        guest.finish(error.code if isinstance(error.code, int) else 0 if error.code is None else 1)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        guest.finish(1)
    guest.finish(0)


def _open_stdio() -> None:
    """Descriptors 0 to 2 must be taken, or the next file to be opened becomes somebody's stdout."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)


class _Child:
    """A sandbox, as its keeper knows it."""

    def __init__(self, number: int, pid: int, pidfd: int, leash: socket.socket, cgroup: Cgroup | None) -> None:
        self.number = number
        self.pid = pid  # of its payload, or of its PID 1 where it is one for commands
        self.pidfd = pidfd
        self.leash = leash
        self.cgroup = cgroup
        self.init: tuple[int, int] | None = None  # (pid, pidfd) of the sleeping PID 1 of a payload
        self.crash = -1
        self.mounts = -1  # the mount namespace of a sandbox for commands, see init.py
        self.memory_files: tuple[int, int] | None = None
        self.watch: memory.Watch | None = None
        self.deadline: float | None = None
        self.timed_out = False
        self.dumps = 0
        self.next_dump = 0.0
        self.out_of_memory = False

    def kill(self) -> None:
        """End everything inside: the death of a PID 1 is that of its whole namespace (pid_namespaces(7))."""
        signal.pidfd_send_signal(self.init[1] if self.init else self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        self.leash.close()
        if self.watch is not None:
            self.watch.close()
        elif self.memory_files is not None:
            for fd in self.memory_files:
                os.close(fd)
        for fd in (self.crash, self.mounts):
            if fd >= 0:
                os.close(fd)


class Keeper:
    """Serves one plan's sandboxes to one host. This one makes sandboxes for commands."""

    def __init__(self, plan: Plan, wire: Wire, host: int, mask: frozenset[int]) -> None:
        self._plan = plan
        self._wire = wire
        self._host = host
        self._mask = mask
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._cgroups: Hierarchy | None = None
        self._children: dict[int, _Child] = {}  # by number
        self._ending: dict[int, tuple[int, Cgroup | None]] = {}  # sleeping PID 1s that were killed: pidfd → pid, cgroup

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
            stage.prepare(plan.staged, plan.mount_point)
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
            elif (child := self._children.get(message["id"])) is not None:
                if message["op"] == "kill":
                    child.kill()
                elif message["op"] == "dump":
                    self._dump(child)

    def _next_message(self) -> Message | None:
        """The host's next wish; meanwhile, what the sandboxes want and do. None when the host is gone."""
        while True:
            message = self._wire.next_message()
            if message is not None:
                return message
            poller = select.poll()
            waiting: dict[int, Callable[[], None]] = {}
            for child in self._children.values():
                waiting[child.pidfd] = lambda child=child: self._ended(child)  # type: ignore[misc]
                if child.leash.fileno() >= 0:
                    waiting[child.leash.fileno()] = lambda child=child: self._answer(child)  # type: ignore[misc]
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
        return fd in self._ending or any(fd in (child.pidfd, child.leash.fileno()) for child in self._children.values())

    def _patience(self) -> float | None:
        """Milliseconds until something must be looked at. Ends what is over its wall-clock or memory limit."""
        now = time.monotonic()
        patience: list[float] = []
        for child in self._children.values():
            if child.deadline is not None:
                if child.deadline <= now:
                    child.deadline, child.timed_out = None, True
                    child.kill()
                else:
                    patience.append((child.deadline - now) * 1000 + 1)
            if child.watch is not None:
                patience.append(child.watch.interval)
                state = child.watch.look()
                if state == "near" and now >= child.next_dump:
                    self._dump(child)
                elif state == "over" and not child.out_of_memory:
                    child.out_of_memory = True
                    self._dump(child)
                    time.sleep(0.02)  # a moment for the stacks to be written
                    child.kill()
        return min(patience, default=None)

    def _dump(self, child: _Child) -> None:
        """Have a payload write the stacks of its threads, behind those of earlier times."""
        if child.init is not None and child.dumps < _DUMPS_AT_MOST:
            child.dumps += 1
            child.next_dump = time.monotonic() + _DUMP_INTERVAL
            try:
                os.write(child.crash, STACKS_MARK)
                signal.pidfd_send_signal(child.pidfd, payload.DUMP_SIGNAL)
            except OSError:
                pass  # the file is the guest's, too, who may have grown it beyond all bounds; or it is gone

    def _fork(self, message: Message) -> Guest | None:
        number = message["id"]
        given = self._wire.take_fds(message["fds"])
        cgroup = None
        memory_files = None
        ours, theirs = socket.socketpair()
        try:
            if self._cgroups is not None:
                cgroup = self._cgroups.create(number, self._plan.limits)
                memory_files = cgroup.open_memory_files() if self._plan.limits.memory is not None else None
            make = self._clone_payload if message.get("payload") else self._clone_init
            made = make(number, given, ours, theirs, cgroup, memory_files)
            if isinstance(made, Guest):
                return made
        except OSError as error:
            self._unforked(number, error)
            ours.close()
            if cgroup is not None:
                cgroup.remove()
        else:
            made.memory_files = memory_files
            self._children[number] = made
        theirs.close()
        for fd in given:
            os.close(fd)
        return None

    def _clone_init(
        self,
        number: int,
        given: list[int],
        ours: socket.socket,
        theirs: socket.socket,
        cgroup: Cgroup | None,
        memory_files: tuple[int, int] | None,
    ) -> _Child | Guest:
        construction = self._construction(init.NAMESPACES)
        if construction is not None:
            construction.use_leash(theirs.fileno())
        pid, pidfd = syscalls.clone(self._init_flags())
        if pid == 0:
            ours.close()
            init.live(self._plan, init.Birth(given[0], theirs, construction, memory_files, self._mask, self._umask))
        child = _Child(number, pid, pidfd, ours, cgroup)
        wall = self._plan.limits.wall
        child.deadline = None if wall is None else time.monotonic() + wall
        return child

    def _init_flags(self) -> int:
        return self._plan.clone_flags

    def _construction(self, namespaces: int) -> Construction | None:
        """How a clone becomes a sandbox, where there is a base to start from."""
        return None

    def _clone_payload(
        self,
        number: int,
        given: list[int],
        ours: socket.socket,
        theirs: socket.socket,
        cgroup: Cgroup | None,
        memory_files: tuple[int, int] | None,
    ) -> _Child | Guest:
        raise OSError(errno.ENOTSUP, "this keeper makes sandboxes for commands only")

    def _answer(self, child: _Child) -> None:
        """What a process cannot do for itself while it builds its sandbox."""
        request, given, _flags, _ = socket.recv_fds(child.leash, 4096, 2)
        try:
            if request == b"c" and child.cgroup is not None:
                child.cgroup.add(child.pid)
            elif request == b"m":
                identity.map_range(child.pid)
            elif request == b"i":
                self._map_inner(child)
            elif request == b"n" and len(given) == 1:
                child.mounts = given[0]
                return
            elif request == b"w" and len(given) == 2:
                child.watch = memory.Watch(self._plan.limits.memory or 0, None, given[0], given[1], kills=True)
                return
            else:
                child.leash.close()
                if request[:1] == b"x":
                    self._unforked(child.number, _error_in(request))
                return
            child.leash.send(request)
        except OSError as error:
            self._unforked(child.number, error)
            child.kill()

    def _map_inner(self, child: _Child) -> None:
        """Map the guest's own user namespace. That is written from the one above it only, which this keeper, who must keep
        host root's rights to its cgroups, does not enter: a child does."""
        users = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        parent = fcntl.ioctl(users, _NS_GET_PARENT)
        pid, pidfd = syscalls.clone(0)
        if pid == 0:
            try:
                syscalls.setns(parent, syscalls.CLONE_NEWUSER)
                identity.map_range(child.pid, 0)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        for fd in (users, parent, pidfd):
            os.close(fd)

    def _unforked(self, number: int, error: OSError) -> None:
        what = error.strerror or str(error)
        self._wire.send({"event": "unforked", "id": number, "errno": error.errno, "what": what})

    def _ended(self, child: _Child) -> None:
        """A payload is gone, or a PID 1 for commands."""
        _pid, status, usage = os.wait4(child.pid, 0)
        event: Message = {"event": "exit" if child.init else "ended", "id": child.number, "status": status}
        event["usage"] = [usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024]
        event["timed_out"], event["oom"] = child.timed_out, child.out_of_memory
        if child.cgroup is not None:
            event["accounts"] = child.cgroup.accounts()
        del self._children[child.number]
        os.close(child.pidfd)
        if child.init is not None:
            child.kill()  # whatever it has left running ends with it
            self._ending[child.init[1]] = child.init[0], child.cgroup
        elif child.cgroup is not None:
            child.cgroup.remove()
        try:
            self._wire.send(event)
        except WireError:
            pass  # the host is gone; the loop notices
        child.close()  # last: this is when the mounts are taken apart

    def _buried(self, pidfd: int) -> None:
        """A sleeping PID 1 is gone, and so, by the kernel's word, is everything inside."""
        pid, cgroup = self._ending.pop(pidfd)
        os.waitpid(pid, 0)
        os.close(pidfd)
        if cgroup is not None:
            cgroup.remove()

    def _end_all(self) -> None:
        for child in list(self._children.values()):
            child.kill()
        for child in list(self._children.values()):
            self._ended(child)
        for pidfd in list(self._ending):
            self._buried(pidfd)
        self._remove_cgroups()

    def _remove_cgroups(self) -> None:
        if self._cgroups is not None:
            self._cgroups.remove()


class WarmKeeper(Keeper):
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
        self._sleeper = Sleeper()
        self._base = -1  # a mount namespace to start from
        self._fresh: list[FreshOperation] = []
        self._constructions: dict[int, Construction] = {}
        self._stacks = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)  # the number that a fork's own file will have

    def _prepare(self) -> int:
        self._base, modes = self._build_base()
        self._fresh = build.with_modes(self._plan, modes)
        for namespaces in (init.NAMESPACES, _PAYLOAD_NAMESPACES):
            self._construction(namespaces)  # now, so that no fork's pages are copied for it
        payload.write_stacks_to(self._stacks)
        gc.collect()
        syscalls.malloc_trim()  # less to copy the page tables of
        gc.freeze()  # what is warm stays; without it, every fork's collections would touch, and so copy, all of it
        if "dumpable" in self._plan.defences:
            syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # its memory is that of every sleeping PID 1, too
        return sum(item.scratch for item in self._inherited)

    def _construction(self, namespaces: int) -> Construction:
        if namespaces not in self._constructions:
            self._constructions[namespaces] = Construction(
                self._plan, self._fresh, self._umask, base=self._base, namespaces=namespaces,
                first=namespaces == init.NAMESPACES,
            )  # fmt: skip
        return self._constructions[namespaces]

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
            raise _error_in(answer)
        return given[0], json.loads(answer)

    def _be_builder(self, leash: socket.socket) -> NoReturn:
        try:
            mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            build.build_base(self._plan)
            socket.send_fds(leash, [json.dumps(build.look_at_lowers(self._plan)).encode()], [mounts])
        except OSError as error:
            leash.send(f"x{error.errno or 0} {error.strerror or error}".encode("utf-8", "replace")[:4000])
        finally:
            os._exit(0)

    def _clone_payload(
        self,
        number: int,
        given: list[int],
        ours: socket.socket,
        theirs: socket.socket,
        cgroup: Cgroup | None,
        memory_files: tuple[int, int] | None,
    ) -> _Child | Guest:
        """A PID 1, and the payload as the second process of its namespace; whose parent, though, is this keeper."""
        wire, stdin, stdout, stderr, crash, *scratch = given
        construction = self._construction(_PAYLOAD_NAMESPACES)
        construction.use_leash(theirs.fileno())
        syscalls.unshare(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWTIME)  # for children
        first = pid = None
        syscalls.fork_before()
        try:
            first = self._sleeper.clone()
            pid, pidfd = syscalls.clone(self._plan.clone_flags & ~_INHERITED)
        except OSError:
            if first is not None:
                signal.pidfd_send_signal(first[1], signal.SIGKILL)
                self._ending[first[1]] = first[0], None
            raise
        finally:
            if pid != 0:
                syscalls.fork_after_parent()
                syscalls.setns(self._own_pid_namespace, syscalls.CLONE_NEWPID)
        if pid == 0:
            ours.close()
            birth = payload.Birth(
                theirs, construction, wire, (stdin, stdout, stderr), crash, self._stacks, scratch, self._inherited,
                self._mask, self._umask,
            )  # fmt: skip
            # The keeper's, not this fork's. Closed here, as sockets that are only forgotten warn of it in some test.
            for other in self._children.values():
                other.leash.close()
            self._wire.sock.close()
            self._children, self._ending, self._cgroups = {}, {}, None
            return payload.become(self._plan, birth)
        child = _Child(number, pid, pidfd, ours, cgroup)
        child.init = first
        child.crash = os.dup(crash)
        if memory_files is not None:
            child.watch = memory.Watch(self._plan.limits.memory or 0, memory_files, -1, -1, kills=False)
        return child

    def _init_flags(self) -> int:
        return self._plan.clone_flags & ~(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)  # it has both from the base

    def _map_inner(self, child: _Child) -> None:
        """This keeper is in the user namespace above, and has nothing to lose."""
        identity.map_range(_host_pid(child.pidfd), 0)

    def forks(self) -> Iterator[Guest]:
        """Serve; and in each fork, yield its guest."""
        guest = self.serve()
        if guest is not None:
            yield guest

    def _remove_cgroups(self) -> None:
        """Its parent does."""


# What a fork does not get by its clone: its user and mount namespace come later, its PID namespace came before.
_PAYLOAD_NAMESPACES = syscalls.CLONE_NEWCGROUP  # once it has joined its cgroup, which so is the root that is seen
_INHERITED = syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID


def _host_pid(pidfd: int) -> int:
    """A process's number in the /proc that is mounted here, which need not be that of this PID namespace."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


def _error_in(answer: bytes) -> OSError:
    """From "xERRNO TEXT", as a child that fails to build says it."""
    number, _, what = answer[1:].decode("utf-8", "replace").partition(" ")
    return OSError(int(number or 0), what or "the process that builds the sandbox died")
