"""The QEMU Machine Protocol, as far as machines are started, saved and restored with it (QEMU: docs/interop/qmp-spec).

Synchronous, over a private socketpair: whoever speaks QMP has the power of the QEMU process, so it never has a path.
"""

from __future__ import annotations

import array
import collections
import json
import select
import socket
import time
from typing import Any

from isolation.errors import LaunchError

_AT_MOST = 1 << 20  # bytes of one answer; more is not QEMU's


class QmpError(LaunchError):
    """QEMU refused a command, or is gone."""


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
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        try:
            self._sock.sendmsg([text], rights)  # an empty socket buffer takes all of it
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
                raise QmpError(f"QEMU refused: {message['error'].get('desc', message['error'])}")

    def wait_for(self, event: str, timeout: float) -> None:
        """Until QEMU tells of `event`; answers that come before it are kept. Raises QmpError for an error among them."""
        deadline = time.monotonic() + timeout
        while (message := self._message(deadline)).get("event") != event:
            if "error" in message:
                raise QmpError(f"QEMU refused: {message['error'].get('desc', message['error'])}")
            if "return" in message:
                self._kept.append(message)

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None) -> Any:
        """Send a command and return what it returns. Raises QmpError."""
        self.send(command, arguments, fd=fd)
        return self.answer(30.0)

    def close(self) -> None:
        self._sock.close()

    def _message(self, deadline: float) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            poller = select.poll()
            poller.register(self._sock, select.POLLIN)
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
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as error:
            raise QmpError("QEMU says something that is not JSON") from error
        if not isinstance(message, dict):
            raise QmpError("QEMU says something that is not QMP")
        return message
