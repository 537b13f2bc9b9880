"""Asking the pool for a kernel. Imports little: this is the way that has to be fast."""

from __future__ import annotations

import binascii
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from isolation.errors import WireError
from isolation.wire import Message, Wire, wait_readable

_ANSWER = 2.0  # s
_HARMLESS = frozenset(["--HistoryManager.hist_file=:memory:"])  # nbclient's; a waiting kernel's history is its own anyway


def place() -> str:
    """The directory of this user's pool. Each Python environment has its own: its kernels import what is installed there."""
    run = f"/run/user/{os.geteuid()}"
    root = run if os.path.isdir(run) and os.access(run, os.W_OK) else "/tmp"
    environment = binascii.crc32(os.fsencode(f"{sys.prefix}:{__file__}"))
    return f"{root}/isolation-kernel-{os.geteuid()}-{environment:08x}"


def connect() -> socket.socket | None:
    """To the daemon; None where there is none, or where it is not certain that it is this user's."""
    directory = place()
    try:
        status = os.lstat(directory)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            return None
        end = socket.socket(socket.AF_UNIX)
        try:
            end.settimeout(_ANSWER)
            end.connect(f"{directory}/daemon")
        except OSError:
            end.close()
            return None
    except OSError:
        return None
    return end


def ask(
    words: Sequence[str],
    cwd: str,
    environ: Mapping[str, str],
    connection: Mapping[str, Any],
    arguments: Sequence[str],
    listeners: Sequence[socket.socket] = (),
) -> Adopted | None:
    """A kernel for a launcher with these words before its connection file; None when it has to be started after all."""
    if "curve_secretkey" in connection or not set(arguments) <= _HARMLESS:
        return None  # a kernel has to know both before it opens its sockets
    end = connect()
    if end is None:
        return None
    wire = Wire(end)
    try:
        request = {"op": "adopt", "words": list(words), "cwd": cwd, "env": dict(environ), "connection": dict(connection)}
        wire.send(request, fds=[2, *(listener.fileno() for listener in listeners)])
        answer = wire.receive(_ANSWER)
    except (WireError, TimeoutError):
        answer = None
    if answer is None or answer.get("event") != "adopted":
        wire.close()
        return None
    end.settimeout(None)
    return Adopted(wire, int(answer["pid"]))


class Adopted:
    """A kernel from the pool. Has what `subprocess.Popen` has, as far as Jupyter uses it; ends when this end is closed."""

    stdin = stdout = stderr = None

    def __init__(self, wire: Wire, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._wire = wire

    def fileno(self) -> int:
        """Readable when `poll` has news."""
        return self._wire.fileno()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end; None when it has not come in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                if not wait_readable(self._wire.fileno(), left):
                    return None
                message: Message | None = self._wire.receive(1.0)
            except TimeoutError:
                continue
            except WireError:
                message = None
            self._ended(message)
        return self.returncode

    def _ended(self, message: Message | None) -> None:
        self.returncode = -signal.SIGKILL if message is None else int(message["code"])
        self._wire.close()

    def send_signal(self, number: int) -> None:
        """To the kernel, as a launcher would pass it on."""
        if self.returncode is not None:
            return
        if number == signal.SIGKILL:
            self._ended(None)  # who serves it notices, and ends it
            return
        try:
            self._wire.send({"signal": int(number)})
        except WireError:
            self._ended(None)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
