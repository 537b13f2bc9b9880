"""Messages between host and guest: framed JSON plus raw bytes, bounded, never pickle.

A frame is an 8-byte header (two big-endian 32-bit lengths), a JSON object in UTF-8, and raw bytes that
reach the other end under the key "data". File descriptors travel beside the frame (SCM_RIGHTS,
unix(7)), and only to an end that asked for them: the host never takes one from a guest.

The standard library only: this module also runs inside.
"""

from __future__ import annotations

import array
import collections
import struct
from collections.abc import Sequence
from typing import Any

from isolation.errors import WireError
from isolation.plain import json, os, select, socket, time

Message = dict[str, Any]

MAX_JSON = 32 << 20
MAX_DATA = 64 << 20
_VALUES_AT_MOST = 1_000_000
_MAX_FDS = 32
_HEADER = struct.Struct(">II")
_CHUNK = 1 << 16


def encode(message: Message, data: bytes = b"") -> bytes:
    """One frame. Raises WireError when it is larger than any other end takes, or has a "data" of its own."""
    if "data" in message:
        raise WireError("the key 'data' of a message is for raw bytes, which are given beside it")
    text = json.dumps(message, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    if len(text) > MAX_JSON or len(data) > MAX_DATA:
        raise WireError(f"a message of {len(text)} + {len(data)} bytes is too large for the wire")
    return _HEADER.pack(len(text), len(data)) + text + data


class Decoder:
    """Turns bytes, as they arrive, back into messages."""

    def __init__(self, max_json: int = MAX_JSON, max_data: int = MAX_DATA) -> None:
        self._max_json = max_json
        self._max_data = max_data
        self._buffer = bytearray()
        self.json_size = 0  # bytes of JSON in the last message

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        self._buffer += data

    @property
    def pending(self) -> bool:
        """There is a part of a message."""
        return bool(self._buffer)

    def next_message(self) -> Message | None:
        """A message that has wholly arrived, or None. Raises WireError for a malformed or oversized one."""
        if len(self._buffer) < _HEADER.size:
            return None
        json_size, data_size = _HEADER.unpack_from(self._buffer)
        if json_size > self._max_json or data_size > self._max_data:
            raise WireError(f"the other end announced a message of {json_size} + {data_size} bytes: too large")
        end = _HEADER.size + json_size + data_size
        if len(self._buffer) < end:
            return None
        text = bytes(self._buffer[_HEADER.size : _HEADER.size + json_size])
        data = bytes(self._buffer[_HEADER.size + json_size : end])
        del self._buffer[:end]
        if json.values(text) > _VALUES_AT_MOST:
            raise WireError(f"the other end sent more than {_VALUES_AT_MOST} values in one message")
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise WireError(f"the other end sent something that is not JSON: {error}") from error
        if not isinstance(message, dict):
            raise WireError("the other end sent JSON that is not an object")
        if "data" in message:
            raise WireError("the other end sent as JSON what must be raw bytes")
        if data:
            message["data"] = data
        self.json_size = json_size
        return message


class Wire:
    """One end of a stream socket that carries messages. Not for use by two threads at once."""

    def __init__(
        self, sock: socket.socket, *, accept_fds: bool = False, max_json: int = MAX_JSON, max_data: int = MAX_DATA
    ) -> None:
        self.sock = sock
        self.fds: collections.deque[int] = collections.deque()
        self._accept_fds = accept_fds
        self._decoder = Decoder(max_json, max_data)
        self._eof = False

    @classmethod
    def pair(cls) -> tuple[socket.socket, socket.socket]:
        """The two ends, not yet wired."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Message, data: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send one message; blocks until it is all with the kernel.

        Raises WireError when the other end is gone, or the message is larger than the other end takes.
        """
        frame = memoryview(encode(message, data))
        try:
            if fds:
                frame = frame[socket.send_fds(self.sock, [frame], fds) :]
            if frame:
                self.sock.sendall(frame)
        except OSError as error:
            raise WireError(f"the other end of the wire is gone ({error.strerror})") from error

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message; None at the end of the stream.

        Raises TimeoutError after `timeout` seconds, and WireError for a malformed, oversized or broken-off one.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            message = self.next_message()
            if message is not None:
                return message
            if self._eof:
                if self._decoder.pending:
                    raise WireError("the other end went away in the middle of a message")
                return None
            if deadline is not None and not wait_readable(self.sock.fileno(), deadline - time.monotonic()):
                raise TimeoutError("no message in time")
            self.fill()

    def fill(self) -> bool:
        """Read once from the socket, which must be readable (or this blocks). False at the end of the stream."""
        try:
            if self._accept_fds:
                data, ancillary, _flags, _ = self.sock.recvmsg(_CHUNK, socket.CMSG_SPACE(_MAX_FDS * 4))
                for level, kind, payload in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        self.fds.extend(array.array("i", payload[: len(payload) // 4 * 4]))
            else:
                data = self.sock.recv(_CHUNK)  # no room for ancillary data: the kernel closes what was sent
        except (BlockingIOError, InterruptedError):
            return True
        except ConnectionError:
            data = b""
        except OSError as error:
            raise WireError(f"the wire broke: {error.strerror}") from error
        if not data:
            self._eof = True
            return False
        self._decoder.feed(data)
        return True

    def next_message(self) -> Message | None:
        """A message that has wholly arrived, or None. Reads nothing."""
        return self._decoder.next_message()

    @property
    def at_end(self) -> bool:
        """The other end has closed; messages that arrived before may still be read."""
        return self._eof

    def take_fds(self, count: int) -> list[int]:
        """The descriptors that came with the last message. Raises WireError when there are fewer."""
        if len(self.fds) < count:
            raise WireError(f"{count} file descriptors were announced, {len(self.fds)} came")
        return [self.fds.popleft() for _ in range(count)]

    def close(self) -> None:
        """End the connection, and close every descriptor that nobody took.

        Shut down, not only closed: a process that was forked meanwhile may hold a duplicate.
        """
        while self.fds:
            os.close(self.fds.popleft())
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was quicker
        self.sock.close()


def wait_readable(fd: int, timeout: float | None) -> bool:
    """Whether `fd` becomes readable (or ends) within `timeout` seconds; poll(2), so any fd number goes."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(None if timeout is None else max(0, timeout) * 1000))
