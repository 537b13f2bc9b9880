"""Many byte streams over one, each with its own flow control, so that none can keep another waiting.

A frame is a 9-byte header (kind, stream number, length of what follows; big-endian) and at most 32 KiB. A sender may have
256 KiB of a stream under way (its credit); the receiver gives credit back as it passes the bytes on. An end that
overdraws its credit, or sends what is not a frame, is not worth talking to: MuxError.

Local ends of a stream are file descriptors, or functions. The standard library only: this module also runs inside.
"""

from __future__ import annotations

import fcntl
import stat
import struct
import termios
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from isolation.errors import WireError
from isolation.plain import os, select, socket, time

WINDOW: Final = 256 << 10
_CHUNK = 32 << 10
_JAMMED = 128 << 10  # bytes on their way out; until they are gone nothing more is taken in
_POLITE = 4096  # bytes at a time into a descriptor that may block: what POLLOUT promises of a pipe (pipe(7), PIPE_BUF)
_AGAIN = 0.001  # s
_HEADER = struct.Struct(">BII")
_COUNT = struct.Struct(">I")
_DATA, _END, _CREDIT, _REFUSE = range(4)

_IN = select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLNVAL


class MuxError(WireError):
    """The other end does not keep to the protocol, or is gone."""


class Gone(MuxError):
    """The other end is gone."""


class Stream:
    """One stream. `source` is where its bytes come from on this side, `sink` where arriving ones go; -1 for neither."""

    def __init__(
        self, number: int, source: int, sink: int, deliver: Callable[[bytes], None] | None, ended: Callable[[], None] | None
    ) -> None:
        self.number = number
        self.source = source
        self.sink = sink
        self.deliver = deliver
        self.ended = ended
        self.credit = WINDOW
        self.taken = 0  # bytes, from the source
        self.owed = 0  # bytes passed on, not yet given back as credit
        self.arrived = bytearray()
        self.queued = bytearray()  # from this side's own functions
        self.sending = source >= 0 or deliver is not None
        self.receiving = sink >= 0 or deliver is not None
        self.finishing = False
        self.urgent = False
        self.last = False  # the other end has sent its last byte
        self.polite = sink >= 0 and not _never_blocks(sink)


class Mux:
    """One end. `fd` (a socket, or a character device) must be non-blocking; it is not closed here.

    Not for use by two threads at once.
    """

    def __init__(self, fd: int, *, patient: bool = False) -> None:
        """`patient`: an end that is not there now may come back, as the host's is when a machine has just been restored."""
        self.fd = fd
        self._patient = patient
        self._out = bytearray()
        self._in = bytearray()
        self._streams: dict[int, Stream] = {}
        self._highest = -1  # of the numbers in use so far: what comes for an older stream crossed its end

    def open(
        self,
        number: int,
        *,
        source: int = -1,
        sink: int = -1,
        deliver: Callable[[bytes], None] | None = None,
        ended: Callable[[], None] | None = None,
        urgent: bool = False,
    ) -> Stream:
        """Begin a stream; the descriptors are the mux's from now on (the same one may be both). `ended` is called when it is
        over in both directions. What is `urgent` is sent without waiting for credit, so in order with all else: for an
        other end that is trusted to be read."""
        if number in self._streams:
            raise MuxError(f"stream {number} is open already")
        if sink == source >= 0:
            sink = os.dup(sink)
        stream = self._streams[number] = Stream(number, source, sink, deliver, ended)
        stream.urgent = urgent
        self.expect(number)
        return stream

    def expect(self, number: int) -> None:
        """What comes for streams up to this number is no mistake, though they may be over (or never have begun)."""
        self._highest = max(self._highest, number)

    def stream(self, number: int) -> Stream | None:
        """An open stream."""
        return self._streams.get(number)

    def write(self, number: int, data: bytes) -> None:
        """Queue bytes for a stream without a source descriptor. Raises MuxError when the other end wants no more of it."""
        stream = self._streams.get(number)
        if stream is None or not stream.sending:
            raise MuxError(f"the other end has closed stream {number}")
        stream.queued += data
        self._send_queued(stream)

    def finish(self, number: int) -> None:
        """The last byte of a stream without a source descriptor was written."""
        stream = self._streams.get(number)
        if stream is not None and stream.sending:
            stream.finishing = True
            self._send_queued(stream)

    def close(self) -> None:
        """Close every stream's descriptors; who reads or writes their other ends notices."""
        for stream in list(self._streams.values()):
            _close(stream.source, stream.sink)
            stream.source = stream.sink = -1
        self._streams.clear()

    def raw(self, data: bytes) -> None:
        """Bytes outside of the protocol, for an end that waits for them."""
        self._out += data

    def restart(self) -> None:
        """The other end is a new one, to which every stream is as if just opened."""
        self._in.clear()
        self._out.clear()
        for stream in self._streams.values():
            stream.credit = WINDOW
            stream.owed = 0
            stream.queued.clear()

    def marks(self, numbers: Iterable[int]) -> dict[int, int]:
        """How far each stream will have come when all is taken that waits in its source now; for `reached`."""
        marks = {}
        for number in numbers:
            stream = self._streams.get(number)
            if stream is not None and stream.source >= 0:
                marks[number] = stream.taken + _waiting(stream.source)
        return marks

    def reached(self, marks: dict[int, int]) -> bool:
        """Whether all of it was taken."""
        streams = ((self._streams.get(number), mark) for number, mark in marks.items())
        return all(stream is None or stream.taken >= mark for stream, mark in streams)

    def passed_on(self, numbers: Iterable[int]) -> bool:
        """Whether nothing of these streams that has arrived is still here."""
        return not any(stream.arrived for number in numbers if (stream := self._streams.get(number)) is not None)

    @property
    def unsent(self) -> int:
        """Bytes that the other end has not taken yet."""
        return len(self._out)

    @property
    def idle(self) -> bool:
        """All frames have left."""
        return not self._out

    def flush(self) -> None:
        """Write as much as goes without waiting."""
        while self._out:
            try:
                count = os.write(self.fd, memoryview(self._out)[: 1 << 16])
            except BlockingIOError:
                return
            except OSError as error:
                if self._patient:
                    return
                raise Gone(f"the other end is gone ({error.strerror})") from error
            del self._out[:count]

    def step(self, timeout: float | None = None, extra: Sequence[int] = ()) -> set[int]:
        """Wait until something can move, at most `timeout` seconds, and move it. Returns those of `extra` that are readable.

        Raises MuxError at the end of the other end.
        """
        self.flush()
        poller = select.poll()
        wanted: dict[int, int] = {self.fd: select.POLLIN | (select.POLLOUT if self._out else 0)}
        for fd in extra:
            wanted[fd] = select.POLLIN
        room = len(self._out) < _JAMMED
        asked = list(self._streams.values())  # what begins below may have a descriptor with the number of another's
        for stream in asked:
            if stream.source >= 0 and stream.sending and stream.credit > 0 and room:
                wanted[stream.source] = wanted.get(stream.source, 0) | select.POLLIN
            if stream.sink >= 0 and stream.arrived:
                wanted[stream.sink] = wanted.get(stream.sink, 0) | select.POLLOUT
        for fd, events in wanted.items():
            poller.register(fd, events)
        ready = dict(poller.poll(None if timeout is None else max(0, timeout) * 1000))
        if ready.get(self.fd, 0) & _IN:
            self._receive()
        for stream in asked:
            if stream.sink >= 0 and stream.arrived and ready.get(stream.sink, 0):
                self._pass_on(stream)
            if stream.source >= 0 and stream.sending and ready.get(stream.source, 0) & _IN and len(self._out) < _JAMMED:
                self._take(stream)
        self.flush()
        return {fd for fd in extra if ready.get(fd, 0)}

    def drain(self) -> None:
        """Take everything that the sources have now."""
        moved = True
        while moved:
            moved = False
            for stream in list(self._streams.values()):
                if stream.source >= 0 and stream.sending and stream.credit > 0 and _readable(stream.source):
                    self._take(stream)
                    moved = True

    def _frame(self, kind: int, number: int, data: bytes = b"") -> None:
        self._out += _HEADER.pack(kind, number, len(data))
        self._out += data

    def _take(self, stream: Stream) -> None:
        try:
            data = os.read(stream.source, min(_CHUNK, stream.credit))
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a terminal whose last user is gone says EIO
        if data:
            stream.credit -= len(data)
            stream.taken += len(data)
            self._frame(_DATA, stream.number, data)
            return
        self._frame(_END, stream.number)
        self._stop_sending(stream)

    def _stop_sending(self, stream: Stream) -> None:
        stream.sending = False
        _close(stream.source)
        stream.source = -1
        self._tidy(stream)

    def _stop_receiving(self, stream: Stream) -> None:
        stream.receiving = False
        stream.arrived.clear()
        if stream.sink >= 0 and stat.S_ISSOCK(os.fstat(stream.sink).st_mode):
            try:
                with socket.socket(fileno=os.dup(stream.sink)) as end:
                    end.shutdown(socket.SHUT_WR)  # closing is not enough: `source` may be the same socket
            except OSError:
                pass  # its other end is gone
        _close(stream.sink)
        stream.sink = -1
        self._tidy(stream)

    def _tidy(self, stream: Stream) -> None:
        if not stream.sending and not stream.receiving and self._streams.get(stream.number) is stream:
            del self._streams[stream.number]
            if stream.ended is not None:
                stream.ended()

    def _send_queued(self, stream: Stream) -> None:
        while stream.queued and (stream.credit > 0 or stream.urgent):
            data = bytes(stream.queued[: _CHUNK if stream.urgent else min(_CHUNK, stream.credit)])
            del stream.queued[: len(data)]
            stream.credit -= len(data)
            self._frame(_DATA, stream.number, data)
        if stream.finishing and not stream.queued and stream.sending:
            self._frame(_END, stream.number)
            self._stop_sending(stream)

    def _receive(self) -> None:
        for _ in range(16):
            try:
                data = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                if self._patient:
                    time.sleep(_AGAIN)
                    break
                raise Gone(f"the other end is gone ({error.strerror})") from error
            if not data:
                if self._patient:
                    time.sleep(_AGAIN)  # poll(2) reports its absence all the time
                    break
                raise Gone("the other end is gone")
            self._in += data
            self._frames()
            if len(data) < _POLITE:
                break

    def _frames(self) -> None:
        position = 0
        while len(self._in) - position >= _HEADER.size:
            kind, number, length = _HEADER.unpack_from(self._in, position)
            if kind > _REFUSE or length > _CHUNK:
                raise MuxError("the other end sent something that is no frame")
            start = position + _HEADER.size
            if len(self._in) - start < length:
                break
            position = start + length
            self._handle(kind, number, bytes(self._in[start:position]))
        del self._in[:position]

    def _handle(self, kind: int, number: int, data: bytes) -> None:
        stream = self._streams.get(number)
        if stream is None:
            if number <= self._highest:
                return
            raise MuxError(f"the other end sent something for stream {number}, which nobody opened")
        if kind == _CREDIT:
            if len(data) != _COUNT.size:
                raise MuxError("the other end sent credit that is no number")
            stream.credit = min(WINDOW, stream.credit + _COUNT.unpack(data)[0])
            self._send_queued(stream)
        elif kind == _REFUSE:
            stream.queued.clear()
            if stream.sending:
                self._stop_sending(stream)
        elif kind == _END:
            stream.last = True
            if not stream.arrived and stream.receiving:
                self._stop_receiving(stream)
        elif data and stream.receiving:
            if stream.last or len(stream.arrived) + stream.owed + len(data) > WINDOW:
                raise MuxError(f"the other end sent more on stream {number} than it may")
            if stream.deliver is not None:
                stream.deliver(data)
                self._give_back(stream, len(data))
            else:
                stream.arrived += data
                self._pass_on(stream)

    def _give_back(self, stream: Stream, count: int) -> None:
        stream.owed += count
        if stream.owed >= WINDOW // 4:
            self._frame(_CREDIT, stream.number, _COUNT.pack(stream.owed))
            stream.owed = 0

    def _pass_on(self, stream: Stream) -> None:
        """Write what has arrived into the sink, as far as it takes it."""
        while stream.arrived:
            if stream.polite and not _writable(stream.sink):
                return
            try:
                with memoryview(stream.arrived) as view:  # released before `arrived` is cleared
                    count = os.write(stream.sink, view[: _POLITE if stream.polite else _CHUNK])
            except BlockingIOError:
                return
            except OSError:
                self._frame(_REFUSE, stream.number)
                self._stop_receiving(stream)
                return
            del stream.arrived[:count]
            self._give_back(stream, count)
        if stream.last:
            self._stop_receiving(stream)


def _close(*fds: int) -> None:
    for fd in {fd for fd in fds if fd >= 0}:
        try:
            os.close(fd)
        except OSError:
            pass  # an error that was delayed until now (close(2)); it is closed


def _never_blocks(fd: int) -> bool:
    return not os.get_blocking(fd) or stat.S_ISREG(os.fstat(fd).st_mode)


def _waiting(fd: int) -> int:
    count = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0]
    return int(count)


def _readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))


def _writable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    return bool(poller.poll(0))
