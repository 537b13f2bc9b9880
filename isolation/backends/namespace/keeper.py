"""The keeper: a fork of the host that clones sandboxes, and sees to it that none outlives the host.

It is single-threaded, which is what makes a bare clone(2) of it safe, and it waits in the host's own namespaces, out of
every guest's reach. It ends its sandboxes when the host asks, and all of them when the host is gone: it holds a pidfd of
the host, so that neither `kill -9` nor a forgotten duplicate of its socket keeps it waiting.
"""

from __future__ import annotations

import signal
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from isolation.backends.namespace import build, fds, stage, words
from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.serving import Keeper
from isolation.backends.namespace.warmkeeper import WarmKeeper
from isolation.errors import LaunchError, WireError
from isolation.guest import Guest, streams
from isolation.linux import fork, syscalls, userns
from isolation.plain import os, select, socket, threading, time
from isolation.wire import Message, Wire, wait_readable

_END_WAIT = 15.0  # s, for a keeper to end its sandboxes; more than it takes (serving.py)
_SEND_TIMEOUT = 30  # s, for a keeper to read what it is asked


class KeeperProcess:
    """The host's handle of a keeper."""

    def __init__(self, pid: int, pidfd: int, wire: Wire) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.wire = wire
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT, 0))
        self.shared = False  # by several machines, see launcher.py; it stays when one of them is closed
        self._scratch: int | None = None
        self._ended: dict[int, Message] = {}
        self._unwanted: set[int] = set()
        self._asked = 0
        self._asking: dict[int, int] = {}  # sandboxes whose files are asked for, by the number of the question
        self._answers: dict[int, Message] = {}
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
            try:
                count = self.ready(None)
            except BaseException:  # an interrupt, too: its first word may be read and lost, and is not said again
                self.close()
                raise
            assert count is not None
            self._scratch = count
        return self._scratch

    def ready(self, timeout: float | None) -> int | None:
        """Wait until forks can be made; how many private files each wants, or None when it is not yet so far.

        Raises LaunchError when it never will be.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while True:
                try:
                    message = self.wire.receive(None if deadline is None else max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    return None
                except WireError:
                    message = None
                if message is not None and message["event"] == "ready":
                    return int(message["scratch"])
                if message is None or message["event"] == "failed":
                    what = message["what"] if message else "the process that should make it died"
                    raise LaunchError(f"the sandbox could not be prepared: {what}")
                self._note(message)

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
        return self._ended.pop(number) if self._wait_for(lambda: number in self._ended, timeout) else None

    def files(self, number: int, do: str, kept: int | None, timeout: float) -> Message | None:
        """Ask that the files of a sandbox be kept, or what is kept be restored or forgotten; the answer, or None when the
        sandbox has ended. Raises TimeoutError, and LaunchError when the keeper is gone."""
        with self._lock:
            self._asked += 1
            ask = self._asked
            self._asking[ask] = number
        try:
            self.request({"op": "files", "id": number, "ask": ask, "do": do, "kept": kept})
            self._wait_for(lambda: ask in self._answers, timeout)
        finally:
            with self._lock:
                del self._asking[ask]
                answer = self._answers.pop(ask, None)
        return None if answer is None or answer.get("ended") else answer

    def _wait_for(self, there: Callable[[], bool], timeout: float | None) -> bool:
        """Read what the keeper says until something is known; False when it says no more. Raises TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not there():
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            with self._lock:
                if there():
                    break
                if self.wire.fileno() < 0:
                    return False  # closed, and all its sandboxes with it
                try:
                    message = self.wire.receive(None if left is None else min(left, 0.1))
                except TimeoutError:
                    if left is not None and left <= 0:
                        raise
                    continue
                except WireError:
                    return False
                if message is None:
                    return False
                self._note(message)
        return True

    def forget(self, numbers: Iterable[int]) -> None:
        """Read what has arrived, and drop what is said of clones that nobody asks about any more."""
        while wait_readable(self.wire.fileno(), 0) and self.wire.fill():
            while (message := self.wire.next_message()) is not None:
                self._note(message)
        for number in numbers:
            if self._ended.pop(number, None) is None:
                self._unwanted.add(number)  # its last word is still to come

    def _note(self, message: Message) -> None:
        if message.get("event") == "files":
            if message["ask"] in self._asking:
                self._answers[message["ask"]] = message
            return
        if message.get("event") in ("exit", "ended"):
            for ask, number in self._asking.items():
                if number == message["id"]:
                    self._answers.setdefault(ask, {"ended": True})
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
            if not wait_readable(self.pidfd, _END_WAIT + 5):  # what it has made ends with it
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
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
    streams.flush()
    host = os.pidfd_open(os.getpid())
    mask = frozenset(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))
    try:
        pid = fork.fork()
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


def serve_warm(plan: Plan, wire: Wire, host: int, mask: frozenset[int], function: Callable[[Guest], object]) -> None:
    """The keeper of a template is itself PID 1 of a PID namespace, beneath which it makes its forks: so the kernel ends
    them all with it. Its parent only waits, and clears up."""
    inherited = fds.inventory(exclude=[wire.fileno(), host])
    cgroups = None
    base = userns.choose_range()
    try:
        if plan.staged:
            stage.prepare(plan.staged, plan.mount_point, base)
        if plan.cgroup is not None:
            plan.cgroup.sweep()
            cgroups = plan.cgroup.subtree()
        ours, theirs = socket.socketpair()
        pid, pidfd = syscalls.clone(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID)
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
        if ours.recv(1) == words.MAP_RANGE:
            userns.map_range(pid, base)
            ours.send(words.MAP_RANGE)
        _see_end(pid, pidfd, host)
        ours.close()
    if cgroups is not None:
        cgroups.remove()


def _see_end(pid: int, pidfd: int, host: int) -> None:
    """Wait for a warm keeper. It ends with the host; should it not, it is ended."""
    poller = select.poll()
    for fd in (pidfd, host):
        poller.register(fd, select.POLLIN)
    poller.poll()
    if not wait_readable(pidfd, 0) and not wait_readable(pidfd, _END_WAIT):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.waitpid(pid, 0)


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
