"""The host's side of the conversation with a machine's agent: a thread that keeps every stream moving.

What comes from the guest is believed in nothing: frames, messages and their number are bounded, and whoever breaks the
protocol loses its machine.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Sequence

from isolation.backends.microvm.guest.agent import CONTROL
from isolation.errors import SandboxClosed, WireError
from isolation.mux import Gone, Mux, MuxError
from isolation.plain import json, select, socket, threading, time
from isolation.wire import Decoder, Message, encode

Ends = tuple[int, int, int]  # a stream's number, its source and its sink

_MESSAGES_AT_MOST = 20_000  # that nobody has asked for yet
_BYTES_AT_MOST = 128 << 20  # of them in this process's memory, in which JSON takes several times its length
_JSON_COSTS = 8
_JSON_AT_MOST = 4 << 20
_DATA_AT_MOST = 32 << 20
_CONSOLE_AT_MOST = 64 << 10
_UNREAD_AT_MOST = 16 << 20  # bytes for a machine that does not read
_PING_AFTER = 10.0  # s of silence
_LOST_AFTER = 60.0  # s without an answer to it


class Link:
    """Begins with the machine, and ends with it: `ended` is called in its thread, once, with the reason."""

    def __init__(
        self,
        agent: socket.socket,
        console: socket.socket,
        stderr: int,
        ended: Callable[[str], None],
        *,
        ping_after: float = _PING_AFTER,
        lost_after: float = _LOST_AFTER,
    ) -> None:
        """`stderr`, a descriptor, is the link's from now on, as are the sockets."""
        agent.setblocking(False)
        console.setblocking(False)
        os.set_blocking(stderr, False)
        self._agent = agent
        self._console = console
        self._stderr = stderr
        self._ended = ended
        self._mux = Mux(agent.fileno())
        self._decoder = Decoder(_JSON_AT_MOST, _DATA_AT_MOST)
        self._mux.open(CONTROL, deliver=self._decoder.feed, urgent=True)
        self._lock = threading.Condition()
        self._todo: collections.deque[tuple[Callable[[], None], Sequence[Ends]]] = collections.deque()
        self._inbox: collections.deque[tuple[Message, int]] = collections.deque()
        self._inbox_bytes = 0
        self._held: list[tuple[Message, tuple[int, ...]]] = []
        self._outputs: dict[int, tuple[int, ...]] = {}
        self._over: str | None = None
        self._stop = False
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._heard = time.monotonic()
        self._pinged: float | None = None  # when
        self._watched = False
        self._ping_after = ping_after
        self._lost_after = lost_after
        self._hung_up = False
        self.console = bytearray()
        self.errors = bytearray()
        self.deadline: float | None = None
        self.timed_out = False
        self._thread = threading.Thread(target=self._run, name="isolation-link", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Readable when `receive` has something."""
        return self._news

    def say(
        self, message: Message, streams: Sequence[Ends] = (), *, outputs: tuple[int, ...] = (), mark: bytes = b""
    ) -> None:
        """Queue a message, and begin the streams that it speaks of; their descriptors are the link's from now on.

        The word of the end of the command that it starts (its "id") waits until all that came on `outputs` was passed on.
        `mark` wakes an agent that waits for it, which then takes the message before all else. Raises SandboxClosed when the
        machine has ended.
        """

        def begin() -> None:
            # One action: the agent must hear of a stream before its first byte, and this side know it before the answer.
            if outputs:
                self._outputs[message.get("id", 0)] = outputs
            if mark:
                self._mux.raw(mark + first_order(message))
            else:
                self._mux.write(CONTROL, encode(message))
            for number, source, sink in streams:
                self._mux.open(number, source=source, sink=sink)

        self.do(begin, streams)

    def watch(self) -> None:
        """From now on, silence means that the machine hangs."""

        def begin() -> None:
            self._heard, self._watched = time.monotonic(), True

        self.do(begin)

    def give_up(self, reason: str) -> None:
        """End the machine: its agent is there, and does not do what it is asked to."""

        def end() -> None:
            raise MuxError(reason)

        try:
            self.do(end)
        except SandboxClosed:
            pass

    def do(self, action: Callable[[], None], streams: Sequence[Ends] = ()) -> None:
        """Have something done by the thread; the descriptors of `streams` are closed if it cannot. Raises SandboxClosed."""
        with self._lock:
            if self._over is None:
                self._todo.append((action, streams))
                os.eventfd_write(self._wake, 1)
                return
        _close(streams)
        raise SandboxClosed(f"the sandbox has ended: {self._over}")

    def receive(self, timeout: float | None = None) -> Message | None:
        """The agent's next message; None when there will be none. Raises TimeoutError."""
        with self._lock:
            if not self._lock.wait_for(lambda: self._inbox or self._over is not None, timeout):
                raise TimeoutError("no message in time")
            if not self._inbox:
                return None
            message, size = self._inbox.popleft()
            self._inbox_bytes -= size
            if not self._inbox and self._over is None:
                self._clear_news()
            return message

    def wait(self, timeout: float) -> None:
        """Until there is a message, or the end, or `timeout` seconds have passed."""
        with self._lock:
            self._lock.wait_for(lambda: self._inbox or self._over is not None, timeout)

    @property
    def over(self) -> str | None:
        """Why it has ended; None while it lives."""
        return self._over

    def stop(self) -> None:
        """Let the machine be: what its memory holds now is to be kept. Returns when the thread has ended.

        Nothing is closed before `hang_up`: QEMU would tell the guest, and that is a change, too.
        """
        with self._lock:
            self._stop = True
            if self._over is None:
                os.eventfd_write(self._wake, 1)
        self.join()

    def hang_up(self) -> None:
        """Close this side's ends."""
        with self._lock:
            if self._hung_up:
                return
            self._hung_up = True
        self._drain_console()
        self._agent.close()
        self._console.close()
        os.close(self._stderr)

    def join(self, timeout: float | None = None) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def close_news(self) -> None:
        """Give back the descriptor that tells of messages; `fileno` has none any more."""
        with self._lock:
            if self._news >= 0:
                os.close(self._news)
                self._news = -1

    def _clear_news(self) -> None:
        try:
            os.eventfd_read(self._news)
        except OSError:
            pass

    def _run(self) -> None:
        reason = "the machine was stopped"
        try:
            reason = self._loop()
        except Gone:
            reason = self._last_messages() or "its virtual machine is gone"
        except MuxError as error:
            reason = str(error)
        except WireError as error:
            reason = f"its agent does not keep to the protocol: {error}"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._mux.close()
            if not self._stop:
                self.hang_up()
            try:
                self._ended(reason)
            finally:
                with self._lock:
                    for message, _streams in self._held:
                        self._put(message, 0)
                    self._held.clear()
                    self._over = reason
                    os.close(self._wake)
                    if self._news >= 0:
                        os.eventfd_write(self._news, 1)
                    self._lock.notify_all()
                for _action, streams in self._todo:  # nobody can add to them now
                    _close(streams)

    def _last_messages(self) -> str:
        """Take what came together with the end. Returns what is wrong with it, if anything is."""
        try:
            self._take_all()
        except WireError as error:
            return f"its agent does not keep to the protocol: {error}"
        return ""

    def _loop(self) -> str:
        extra = [self._wake, self._console.fileno(), self._stderr]
        while True:
            ready = self._mux.step(self._patience(), extra)
            for fd, kept in ((self._console.fileno(), self.console), (self._stderr, self.errors)):
                if fd in ready and not _collect(fd, kept):
                    extra.remove(fd)
            if self._wake in ready:
                os.eventfd_read(self._wake)
                if self._stop:
                    return "the machine was stopped"
                while self._todo:
                    self._todo.popleft()[0]()
            self._take_all()
            self._release()
            if self._mux.unsent > _UNREAD_AT_MOST:
                return "its agent does not read what it is told"
            if reason := self._too_late():
                return reason

    def _take_all(self) -> None:
        while (message := self._decoder.next_message()) is not None:
            self._heard, self._pinged = time.monotonic(), None
            self._take(message)

    def _take(self, message: Message) -> None:
        event = message.get("event")
        if not isinstance(event, str):
            raise WireError("a message of no known kind")
        if event == "pong":
            return
        number = message.get("id")
        if event in ("exit", "unspawned") and isinstance(number, int) and number in self._outputs:
            streams = self._outputs.pop(number)
            if event == "exit":
                self._held.append((message, streams))
                return
        size = len(message.get("data", b"")) + self._decoder.json_size * _JSON_COSTS + 200
        with self._lock:
            self._put(message, size)
            if len(self._inbox) > _MESSAGES_AT_MOST or self._inbox_bytes > _BYTES_AT_MOST:
                raise WireError("more messages than anybody asked for")

    def _put(self, message: Message, size: int) -> None:
        self._inbox.append((message, size))
        self._inbox_bytes += size
        if self._news >= 0:
            os.eventfd_write(self._news, 1)
        self._lock.notify_all()

    def _release(self) -> None:
        waiting = []
        for message, streams in self._held:
            if self._mux.passed_on(streams):
                with self._lock:
                    self._put(message, 0)
            else:
                waiting.append((message, streams))
        self._held = waiting

    def _patience(self) -> float | None:
        ends = [self.deadline] if self.deadline is not None else []
        if self._watched:
            ends.append(self._heard + self._ping_after if self._pinged is None else self._pinged + self._lost_after)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _too_late(self) -> str:
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline:
            self.timed_out = True
            return "timed out at its wall-clock limit"
        if self._watched and self._pinged is not None and now >= self._pinged + self._lost_after:
            return f"its kernel or agent has not answered for {self._lost_after:g} s"
        if self._watched and self._pinged is None and now >= self._heard + self._ping_after:
            # Counted from the question, not from when it was last heard: this process may have been stopped meanwhile.
            self._pinged = now
            self._mux.write(CONTROL, encode({"op": "ping"}))
        return ""

    def _drain_console(self) -> None:
        """Its last words may tell why."""
        poller = select.poll()
        for fd, kept in ((self._console.fileno(), self.console), (self._stderr, self.errors)):
            poller.register(fd, select.POLLIN)
            while poller.poll(0) and _collect(fd, kept):
                pass
            poller.unregister(fd)


def first_order(message: Message) -> bytes:
    """What follows the mark: outside of all streams, since every step more costs a machine that has just been restored."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return len(text).to_bytes(4, "big") + text


def _close(streams: Sequence[Ends]) -> None:
    for _number, source, sink in streams:
        for fd in {source, sink} - {-1}:
            os.close(fd)


def _collect(fd: int, kept: bytearray) -> bool:
    try:
        data = os.read(fd, 1 << 14)
    except BlockingIOError:
        return True
    except OSError:
        return False
    kept += data
    del kept[:-_CONSOLE_AT_MOST]
    return bool(data)


def text_of(data: bytes | bytearray, lines: int = 6) -> str:
    """The last lines of a console or of QEMU's errors, for people: no control characters."""
    text = bytes(data).decode("utf-8", "replace").replace("\r", "")
    found = [clean(line) for line in text.split("\n") if line.strip()]
    own = [line for line in found if line.startswith("isolation-")]  # of init and the agent, which say it best
    if own:
        return own[-1]
    return "; ".join(found[-lines:])


def clean(value: object, most: int = 500) -> str:
    """Something that the guest or QEMU said, for a message of this side's: short, and no control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:most])
