"""The QEMU Machine Protocol, as far as machines are started, saved and restored with it (QEMU: docs/interop/qmp-spec).

Synchronous, over a private socketpair: whoever speaks QMP has the power of the QEMU process, so it never has a path.
"""

from __future__ import annotations

import collections
from typing import Any

from isolation.backends.microvm.vm.link import clean
from isolation.errors import LaunchError
from isolation.plain import json, select, socket, time

_AT_MOST = 1 << 20  # bytes of one answer; more is not QEMU's
_KEPT_AT_MOST = 100  # answers that nobody has asked for


class QmpError(LaunchError):
    """QEMU refused a command, says nonsense, or is gone."""


class Qmp:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = bytearray()
        self._kept: collections.deque[dict[str, Any]] = collections.deque()

    def send(self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None) -> None:
        """Send a command without waiting for its answer. A descriptor goes with "getfd"."""
        text = json.dumps({"execute": command} | ({"arguments": arguments} if arguments else {})).encode() + b"\n"
        try:  # an empty socket buffer takes all of it
            if fd is None:
                self._sock.send(text)
            else:
                socket.send_fds(self._sock, [text], [fd])
        except OSError as error:
            raise QmpError(f"QEMU is gone ({error.strerror})") from error

    def answer(self, timeout: float) -> Any:
        """What the next command returned; events are skipped. Raises QmpError for an error, and after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            message = self._kept.popleft() if self._kept else self._message(deadline)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise _refusal(message["error"])

    def wait_for(self, event: str, timeout: float) -> None:
        """Until QEMU tells of `event`; answers that come before it are kept. Raises QmpError for an error among them."""
        deadline = time.monotonic() + timeout
        while (message := self._message(deadline)).get("event") != event:
            if "error" in message:
                raise _refusal(message["error"])
            if "return" in message:
                self._kept.append(message)
                if len(self._kept) > _KEPT_AT_MOST:
                    raise QmpError("QEMU says more than it should")

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None) -> Any:
        """Send a command and return what it returns. Raises QmpError."""
        self.send(command, arguments, fd=fd)
        return self.answer(30.0)

    def close(self) -> None:
        self._sock.close()

    def _message(self, deadline: float) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            poller = select.poll()
            try:
                poller.register(self._sock, select.POLLIN)
            except ValueError:
                raise QmpError("QEMU is gone") from None  # closed here, when it had ended
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise QmpError("QEMU does not answer")
            try:
                data = self._sock.recv(1 << 16)
            except OSError as error:
                raise QmpError(f"QEMU is gone ({error.strerror})") from error
            if not data:
                raise QmpError("QEMU is gone")
            self._buffer += data
            if len(self._buffer) > _AT_MOST:
                raise QmpError("QEMU says more than it should")
        if time.monotonic() > deadline:
            raise QmpError("QEMU does not answer")  # it speaks of other things all the time
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QmpError("QEMU says something that is not JSON") from error
        if not isinstance(message, dict):
            raise QmpError("QEMU says something that is not QMP")
        return message


def _refusal(error: object) -> QmpError:
    words = error.get("desc", error) if isinstance(error, dict) else error
    return QmpError(f"QEMU refused: {clean(words)}")
