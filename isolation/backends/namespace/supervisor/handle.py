"""Runs in the user's process: the handle of a supervisor, by which it is asked for sandboxes and hears of their end."""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable, Iterable, Sequence

from isolation.errors import LaunchError, WireError
from isolation.guest import Guest
from isolation.plain import os, socket, threading, time
from isolation.wire import Message, Wire, wait_readable

END_WAIT = 15.0  # s, for a supervisor to end its sandboxes; more than it takes (supervisor.py)
_SEND_TIMEOUT = 30  # s, for a supervisor to read what it is asked


class SupervisorHandle:
    """The host's handle of a supervisor."""

    def __init__(self, pid: int, pidfd: int, wire: Wire) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.wire = wire
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT, 0))
        self.shared = False  # by several machines, see supervisor_pool.py; it stays when one of them is closed
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
        ours, theirs = Wire.pair()  # after the supervisor's fork: a copy of theirs in it would keep the wire alive
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
        """A machine is closed: wait for its end; and end the supervisor, unless others use it."""
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
        """How many private files a fork wants; waits until the supervisor is ready. Raises LaunchError."""
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
        """Ask for a clone, or for the end of one. Raises LaunchError when the supervisor is gone."""
        try:
            with self._lock:
                self.wire.send(message, fds=given)
        except WireError as error:
            raise LaunchError("the process that makes sandboxes is gone; was it killed?") from error

    def last_word(self, number: int, timeout: float | None) -> Message | None:
        """What the supervisor says of a clone's end ("exit", "ended" or "unforked"), waiting for it; None when it says
        nothing.

        Raises TimeoutError.
        """
        return self._ended.pop(number) if self._wait_for(lambda: number in self._ended, timeout) else None

    def files(self, number: int, do: str, kept: int | None, timeout: float) -> Message | None:
        """Ask that the files of a sandbox be kept, or what is kept be restored or forgotten; the answer, or None when the
        sandbox has ended. Raises TimeoutError, and LaunchError when the supervisor is gone."""
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
        """Read what the supervisor says until something is known; False when it says no more. Raises TimeoutError."""
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
        """End the supervisor and all its sandboxes; returns when they are gone."""
        with self._closing:
            if self.pidfd < 0:
                return
            while self._spares:
                self._spares.pop()[1].close()
            self.wire.close()
            if not wait_readable(self.pidfd, END_WAIT + 5):  # what it has made ends with it
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            try:
                os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            except ChildProcessError:
                pass  # somebody else's waitpid(-1) was quicker
            os.close(self.pidfd)
            self.pidfd = -1


def commands_only(guest: Guest) -> None:
    """The function of a supervisor that stays, but whose memory nobody wants."""
    for _job in guest.forks():
        pass
