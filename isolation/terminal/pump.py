"""Bytes from one descriptor to another, with back-pressure, or into memory."""

from __future__ import annotations

import errno
import fcntl
import stat
import struct
import termios
from collections.abc import Callable, Iterator
from typing import Final

from isolation.plain import os, select, socket

_BOUND: Final = 1 << 16  # bytes that wait in a pump, at most
_PTY_HOLDS: Final = 1 << 17  # more than the kernel keeps for the master of a terminal
_SURE: Final = 512  # bytes that a blocking descriptor takes when poll(2) says that it takes any


class Capture:
    """Output that is kept, up to a bound."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.truncated = False
        self._limit = limit

    def take(self, data: bytes) -> None:
        room = self._limit - len(self.data)
        self.data += data[:room]
        self.truncated = self.truncated or room < len(data)


class Pump:
    """Bytes from one descriptor to another, of which it never sets O_NONBLOCK on the caller's: that is a flag of the open
    file, which the caller shares with its shell."""

    def __init__(
        self,
        name: str,
        source: int,
        sink: int | Capture,
        *,
        at_end: Callable[[], None] | None = None,
        at_loss: Callable[[], None] | None = None,
        screen: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self.sink = sink
        self.error: OSError | None = None  # of the sink, except that nobody reads it
        self._reading = True
        self._waiting = b""
        self._budget: int | None = None  # of what is still to be read, when draining
        self._at_end = at_end  # all was read, and written
        self._at_loss = at_loss  # nobody takes it any more
        self._screen = screen  # what it makes of the bytes is passed on
        self._most = _SURE
        self._socket: socket.socket | None = None
        self._pipes = False  # from one to another: bytes need not come here
        if isinstance(sink, int):
            if stat.S_ISSOCK(os.fstat(sink).st_mode):
                self._socket = socket.socket(fileno=os.dup(sink))
            if stat.S_ISFIFO(os.fstat(sink).st_mode):
                self._most = select.PIPE_BUF  # pipe(7): what has room, when it has any
                self._pipes = screen is None and stat.S_ISFIFO(os.fstat(source).st_mode)
            if self._socket or stat.S_ISREG(os.fstat(sink).st_mode) or not os.get_blocking(sink):
                self._most = _BOUND

    def wants(self) -> Iterator[tuple[int, int]]:
        """What to poll(2) for. Nothing is wanted of a source whose bytes have no room: that is the back-pressure."""
        if self._reading and len(self._waiting) < _BOUND:
            yield self.source, select.POLLIN
        if self._waiting and isinstance(self.sink, int):
            yield self.sink, select.POLLOUT

    def move(self, ready: dict[int, int]) -> None:
        """Read and write what goes without blocking."""
        if self._reading and len(self._waiting) < _BOUND and ready.get(self.source, 0) & ~select.POLLOUT:
            self._read()
        if self._waiting and isinstance(self.sink, int) and ready.get(self.sink, 0) & ~select.POLLIN:
            self._write(self.sink)

    def start_draining(self) -> None:
        """The command has ended: what it wrote is still wanted, what its background processes go on writing is not."""
        if not self._reading:
            return
        if os.isatty(self.source):
            self._budget = _PTY_HOLDS
        else:
            waiting = fcntl.ioctl(self.source, termios.FIONREAD, b"\0" * 4)
            self._budget = int(struct.unpack("i", waiting)[0])

    def drain(self) -> bool:
        """Read what has room, from a source that does not block. False when all of it is read and written."""
        while self._reading and len(self._waiting) < _BOUND:
            if self._budget == 0 or not self._read():
                self._end()
        return bool(self._waiting)

    def _splice(self, sink: int) -> bool | None:
        """As `_read`; None where it has to be done by hand."""
        try:
            count = os.splice(self.source, sink, _BOUND, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return None  # nothing to read, or no room
        except OSError as error:
            self._lose(error)
            return False
        if not count:
            self._end()
        return count > 0

    def _read(self) -> bool:
        if self._pipes and not self._waiting and self._budget is None and isinstance(self.sink, int):
            done = self._splice(self.sink)
            if done is not None:
                return done
        room = _BOUND - len(self._waiting)
        try:
            data = os.read(self.source, room if self._budget is None else min(room, self._budget))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # how a terminal says that nobody is left at its other end
                self.error = error
            data = b""
        if not data:
            self._end()
            return False
        if self._budget is not None:
            self._budget -= len(data)
        if isinstance(self.sink, Capture):
            self.sink.take(data)
        else:
            self._waiting += data if self._screen is None else self._screen(data)
        return True

    def _write(self, sink: int) -> None:
        data = self._waiting[: self._most]
        try:
            if self._socket is not None:
                count = self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                count = os.write(sink, data)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        self._waiting = self._waiting[count:]
        if not self._waiting and not self._reading:
            self._finish()

    def _lose(self, error: OSError) -> None:
        """Nobody takes it any more."""
        if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
            self.error = error
        self._waiting = b""
        self._end()
        if self._at_loss is not None:
            self._at_loss()

    def _end(self) -> None:
        self._reading = False
        if not self._waiting:
            self._finish()

    def _finish(self) -> None:
        if self._at_end is not None:
            self._at_end()
            self._at_end = None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
