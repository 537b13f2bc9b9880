"""The keeper: a fork of the host that clones sandboxes, and sees to it that none outlives the host.

It is single-threaded, which is what makes a bare clone(2) of it safe, and it waits in the host's own namespaces, out of
every guest's reach. It ends its sandboxes when the host asks, and all of them when the host is gone: it holds a pidfd of
the host, so that neither `kill -9` nor a forgotten duplicate of its socket keeps it waiting.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from isolation.backends.namespace import fds, identity, init, stage, syscalls
from isolation.backends.namespace.cgroup import Cgroup
from isolation.backends.namespace.fds import Inherited
from isolation.backends.namespace.init import Birth
from isolation.backends.namespace.plan import Plan
from isolation.errors import LaunchError, WireError
from isolation.guest import Guest
from isolation.wire import Message, Wire, wait_readable


class KeeperProcess:
    """The host's handle of a keeper."""

    def __init__(self, pid: int, pidfd: int, wire: Wire) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.wire = wire
        self._scratch: int | None = None
        self._ended: dict[int, Message] = {}

    def scratch(self) -> int:
        """How many private files a fork wants; waits until the keeper is ready. Raises LaunchError."""
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
            self.wire.send(message, fds=given)
        except WireError as error:
            raise LaunchError("the process that makes sandboxes is gone; was it killed?") from error

    def ended(self, number: int, timeout: float | None) -> Message | None:
        """The keeper's last word on a clone ("ended" or "unforked"), waiting for it; None when there is none."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while number not in self._ended:
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                message = self.wire.receive(left)
            except (TimeoutError, WireError):
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
            self._ended.pop(number, None)

    def _note(self, message: Message) -> None:
        if message.get("event") in ("ended", "unforked"):
            self._ended.setdefault(message["id"], message)

    def close(self) -> None:
        """End the keeper and all its sandboxes; returns when they are gone."""
        if self.pidfd < 0:
            return
        self.wire.close()
        try:
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        except ChildProcessError:
            pass  # somebody else's waitpid(-1) was quicker
        os.close(self.pidfd)
        self.pidfd = -1


def start(plan: Plan, payload: Callable[[Guest], object] | None = None) -> KeeperProcess:
    """Fork a keeper off this process. `payload` is what its forks run; None for commands only.

    Raises LaunchError, naming what could not be prepared.
    """
    if not syscalls.supported_machine():
        raise LaunchError("the namespace backend knows x86_64 and aarch64 processors only")
    ours, theirs = Wire.pair()
    host = os.pidfd_open(os.getpid())
    mask = frozenset(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))
    # Before anything is forked: at-fork hooks that start threads would make unshare(2) and clone(2) fail or unsafe.
    syscalls.fork_before()
    try:
        pid = syscalls.fork()
        if pid == 0:
            _become_keeper(plan, payload, theirs, ours, host, mask)
    finally:
        syscalls.fork_after_parent()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()
    os.close(host)
    return KeeperProcess(pid, os.pidfd_open(pid), Wire(ours))


def _become_keeper(
    plan: Plan,
    payload: Callable[[Guest], object] | None,
    theirs: socket.socket,
    ours: socket.socket,
    host: int,
    mask: frozenset[int],
) -> NoReturn:
    status = 1
    try:
        syscalls.fork_after_child()
        if len(os.listdir("/proc/self/task")) > 1:
            # A hook has started threads in this fork. A fork of it, without hooks, has one; this one only waits.
            child = syscalls.fork()
            if child:
                ours.close()
                theirs.close()
                os.waitpid(child, 0)
                os._exit(0)
        ours.close()
        _open_stdio()
        syscalls.set_name("isolation-keep")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        wire = Wire(theirs, accept_fds=True)
        keeper = Keeper(plan, wire, host, mask)
        guest = keeper.serve()
        if guest is not None:
            _run_payload(guest, payload)
        status = 0
    except BaseException as error:
        if os.environ.get("ISOLATION_DEBUG"):
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(status)


def _run_payload(guest: Guest, payload: Callable[[Guest], object] | None) -> NoReturn:
    """In a fork: its status is 0 only when the function returned."""
    try:
        assert payload is not None
        payload(guest)
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


@dataclass
class _Child:
    number: int
    pid: int
    pidfd: int
    leash: int
    cgroup: Cgroup | None
    deadline: float | None
    timed_out: bool = False


class Keeper:
    """Serves one plan's sandboxes to one host."""

    def __init__(self, plan: Plan, wire: Wire, host: int, mask: frozenset[int]) -> None:
        self._plan = plan
        self._wire = wire
        self._host = host
        self._mask = mask
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._children: dict[int, _Child] = {}
        self._inherited: list[Inherited] = []

    def serve(self) -> Guest | None:
        """Until the host is gone; then None. In each forked payload it returns, too: that fork's guest."""
        try:
            self._inherited = fds.inventory(exclude=[self._wire.fileno(), self._host])
            if self._plan.staged:
                stage.prepare(self._plan.staged, self._plan.mount_point)
            if self._plan.cgroup is not None:
                self._plan.cgroup.sweep()
        except OSError as error:
            self._wire.send({"event": "failed", "what": error.strerror or str(error)})
            return None
        self._wire.send({"event": "ready", "scratch": sum(item.scratch for item in self._inherited)})
        try:
            return self._loop()
        except WireError:
            return None
        finally:
            self._end_all()

    def _loop(self) -> Guest | None:
        while True:
            message = self._next_message()
            if message is None:
                return None
            if message["op"] == "kill":
                self._kill(message["id"])
            elif message["op"] == "fork":
                guest = self._fork(message)
                if guest is not None:
                    return guest

    def _next_message(self) -> Message | None:
        while True:
            message = self._wire.next_message()
            if message is not None:
                return message
            poller = select.poll()
            for fd in (self._wire.fileno(), self._host, *self._children):
                poller.register(fd, select.POLLIN)
            for fd, _events in poller.poll(self._until_deadline()):
                if fd == self._host:
                    return None
                if fd in self._children:
                    self._ended(self._children[fd])
                elif fd == self._wire.fileno() and not self._wire.fill():
                    return None

    def _until_deadline(self) -> float | None:
        """Milliseconds to the next wall-clock limit; ends those that have reached theirs."""
        deadlines = [child.deadline for child in self._children.values() if child.deadline is not None]
        if not deadlines:
            return None
        now = time.monotonic()
        for child in self._children.values():
            if child.deadline is not None and child.deadline <= now:
                child.deadline, child.timed_out = None, True
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        return max(0.0, (min(deadlines) - now) * 1000) + 1

    def _fork(self, message: Message) -> Guest | None:
        number = message["id"]
        given = self._wire.take_fds(message["fds"])
        cgroup = None
        memory_files = None
        try:
            if self._plan.cgroup is not None:
                cgroup = self._plan.cgroup.create(number, self._plan.limits)
                memory_files = cgroup.open_memory_files() if self._plan.limits.memory is not None else None
            leash, our_leash = os.pipe2(os.O_CLOEXEC)
            birth = self._birth(message, given, leash, memory_files)
            pid, pidfd = syscalls.clone(self._plan.clone_flags)
        except OSError as error:
            self._wire.send({"event": "unforked", "id": number, "errno": error.errno, "what": error.strerror})
            if cgroup is not None:
                cgroup.remove()
            for fd in given:
                os.close(fd)
            return None
        if pid == 0:
            os.close(our_leash)
            guest = init.live(self._plan, birth)
            self._children = {}  # those of the keeper, not of this fork
            return guest
        for fd in (*given, leash, *(memory_files or ())):
            os.close(fd)
        wall = None if message.get("payload") else self._plan.limits.wall  # a payload's begins with its job
        deadline = None if wall is None else time.monotonic() + wall
        self._children[pidfd] = _Child(number, pid, pidfd, our_leash, cgroup, deadline)
        try:
            if cgroup is not None:
                cgroup.add(pid)
            if self._plan.identity.ranged:
                identity.map_range(pid)
            os.write(our_leash, b"g")
        except OSError as error:
            self._wire.send({"event": "unforked", "id": number, "errno": error.errno, "what": error.strerror})
            self._kill(number)
        return None

    def _birth(self, message: Message, given: list[int], leash: int, memory_files: tuple[int, int] | None) -> Birth:
        if not message.get("payload"):
            return Birth(
                control=given[0], leash=leash, memory_files=memory_files, umask=self._umask,
                spawn=message.get("spawn"), spawn_fds=tuple(given[1:]),
            )  # fmt: skip
        control, wire, stdin, stdout, stderr, crash, *scratch = given
        return Birth(
            control=control, leash=leash, wire=wire, stdio=(stdin, stdout, stderr), crash=crash,
            scratch=tuple(scratch), inherited=self._inherited, memory_files=memory_files,
            signal_mask=self._mask, umask=self._umask,
        )  # fmt: skip

    def _kill(self, number: int) -> None:
        for child in self._children.values():
            if child.number == number:
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def _ended(self, child: _Child) -> None:
        """PID 1 is gone, and so, by the kernel's word, is everything inside (pid_namespaces(7))."""
        _pid, status, usage = os.wait4(child.pid, 0)
        event: Message = {"event": "ended", "id": child.number, "status": status, "timed_out": child.timed_out}
        event["usage"] = [usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024]
        del self._children[child.pidfd]
        os.close(child.pidfd)
        os.close(child.leash)
        if child.cgroup is not None:
            event["accounts"] = child.cgroup.accounts()
            child.cgroup.remove()
        try:
            self._wire.send(event)
        except WireError:
            pass  # the host is gone; the loop notices

    def _end_all(self) -> None:
        for child in list(self._children.values()):
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        for child in list(self._children.values()):
            self._ended(child)
