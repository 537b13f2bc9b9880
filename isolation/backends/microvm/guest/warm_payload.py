"""The agent's side of a payload that is forked while it is warm."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import time
from typing import Any

from isolation.backends.microvm.guest.programs import FIRST_PASSED, User, start
from isolation.backends.microvm.guest.tree import HIDDEN

DUMP_SIGNAL = signal.SIGRTMAX - 1  # makes a payload write the stacks of its threads
STACKS_MARK = b"\0\n"
_STACKS_AT_MOST = 256 << 10
_STACKS_WAIT = 1.0  # s
_WARM = b"w"


class WarmPayload:
    """A payload process, what it writes, and what it had open when it became warm."""

    def __init__(self, order: dict[str, Any], env: dict[str, str], user: User, workdir: str, cgroup: str) -> None:
        wire, its_wire = socket.socketpair()
        control, its_control = socket.socketpair()
        stdout, its_stdout = os.pipe2(os.O_CLOEXEC)
        stderr, its_stderr = os.pipe2(os.O_CLOEXEC)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._crash = os.open(f"{HIDDEN}/rw/stacks", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_APPEND, 0o600)
        # What this interpreter needs to find its own library, so does the payload's, which is the same one.
        libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        try:
            self.pid = start(
                order["argv"], libraries | env, workdir, user, [null, its_stdout, its_stderr],
                given=[its_wire.fileno(), its_control.fileno(), self._crash], cgroup=cgroup,
            )  # fmt: skip
        finally:
            its_wire.close()
            its_control.close()
            for fd in (its_stdout, its_stderr, null):
                os.close(fd)
        self._streams = (wire.detach(), stdout, stderr)
        for fd in self._streams:
            os.set_blocking(fd, False)
        control.setblocking(False)
        self._control = control
        self._deleted: dict[int, int] = {}

    @property
    def control(self) -> int:
        """Readable when it has something to say to the agent; -1 when it is gone."""
        return self._control.fileno()

    def take_streams(self) -> tuple[int, int, int]:
        """Its wire, stdout and stderr, for who carries them on."""
        return self._streams

    def said_warm(self) -> bool:
        """It waits to be forked."""
        try:
            data = self._control.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._control.close()
        return data == _WARM

    def wake(self, seed: str | None, job: Any) -> None:
        """In a fork: let it go on, with its job, and a seed (in hexadecimal) for its own random numbers."""
        try:
            self._control.setblocking(True)
            self._control.sendall(json.dumps([seed, job]).encode() + b"\n")
        except OSError:
            pass  # it has ended
        finally:
            self._control.setblocking(False)

    def keep_deleted_files(self) -> None:
        """Hold the unlinked files that it has open (pytest's capture), for when it has died. The same in every fork."""
        for fd in self._deleted.values():
            os.close(fd)
        self._deleted.clear()
        directory = f"/proc/{self.pid}/fd"
        try:
            names = os.listdir(directory)
        except OSError:
            return
        for name in names:
            try:
                status = os.stat(f"{directory}/{name}")
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    self._deleted[status.st_ino] = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue

    def deleted_file(self, inode: int, most: int) -> bytes | None:
        """Its content, as it is now."""
        fd = self._deleted.get(inode)
        return None if fd is None else os.pread(fd, most, 0)

    def ask_for_stacks(self) -> None:
        """Returns when they are written, or after a second."""
        before = last = os.fstat(self._crash).st_size
        try:
            os.kill(self.pid, DUMP_SIGNAL)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + _STACKS_WAIT
        while time.monotonic() < deadline:
            time.sleep(0.02)
            now = os.fstat(self._crash).st_size
            if now != before and now == last:
                return
            last = now

    def stacks(self) -> bytes:
        """The last of what faulthandler wrote."""
        size = os.fstat(self._crash).st_size
        return os.pread(self._crash, _STACKS_AT_MOST, max(0, size - _STACKS_AT_MOST))


def argv(python: str, path: list[str], payload: str) -> list[str]:
    """The command of a payload process. `path` is the host's `sys.path`."""
    program = (
        f"import sys; sys.path[:] = {path!r}; from isolation.backends.microvm.guest import payload as guest; "
        f"guest.main({payload!r}, {FIRST_PASSED})"
    )
    return [python, "-c", program]
