"""The daemon: keeps kernels ready, hands them out, and ends when nobody has asked for long."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import socket
import stat
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from isolation.errors import IsolationError, WireError
from isolation.wire import Message, Wire
from isolation_kernel.pool.client import place

Key = tuple[tuple[str, ...], str]  # the words of a launcher before its connection file, and its directory

_KEYS_AT_MOST: Final = 3
_REQUEST: Final = 2.0  # s
_LATER: Final = 0.5  # s, until a kernel that was handed out is replaced: its first cells come first
_NOT_NOW: Final = 3.0  # s, after somebody has had to start one: theirs comes first
_AGAIN: Final = 30.0  # s, until a kernel that did not start is tried again


@dataclass
class _Waiting:
    """A kernel that gets ready, or is."""

    wire: Wire
    process: subprocess.Popen[bytes]
    state: tuple[Any, ...]  # of what it has imported, and shows
    doors: str
    ready: bool = False

    def end(self) -> None:
        self.wire.close()
        self.process.wait()
        for number in range(5):
            try:
                os.unlink(f"{self.doors}-{number}")
            except OSError:
                pass


@dataclass
class _Shelf:
    """The kernels for one key."""

    waiting: list[_Waiting] = field(default_factory=list)
    refill: float = 0.0  # not before this time


class Daemon:
    """One per user: the lock says so."""

    def __init__(self, count: int, idle: float) -> None:
        """Raises IsolationError when there is one already."""
        self._count = count
        self._idle = idle
        self._shelves: OrderedDict[Key, _Shelf] = OrderedDict()
        self._numbers = 0
        self._asked = time.monotonic()
        self._directory = own_directory()
        self._lock = os.open(f"{self._directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise IsolationError("warm kernels are being kept already ('isolation kernel warm --stop' ends it)") from None
        for name in os.listdir(self._directory):
            if name != "lock":
                os.unlink(f"{self._directory}/{name}")  # what a daemon that was killed has left
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{self._directory}/daemon")
        self._listener.listen(16)

    def keep(self, key: Key) -> None:
        """Have kernels ready for this."""
        self._shelves.setdefault(key, _Shelf())
        self._shelves.move_to_end(key)
        while len(self._shelves) > _KEYS_AT_MOST:
            _key, shelf = self._shelves.popitem(last=False)
            for waiting in shelf.waiting:
                waiting.end()

    def serve(self) -> None:
        """Until nobody has asked for a while, or somebody asks for the end."""
        try:
            while time.monotonic() - self._asked < self._idle:
                self._refill()
                poller = select.poll()
                poller.register(self._listener, select.POLLIN)
                byfd = {}
                for shelf in self._shelves.values():
                    for waiting in shelf.waiting:
                        poller.register(waiting.wire.fileno(), select.POLLIN)
                        byfd[waiting.wire.fileno()] = (shelf, waiting)
                for fd, _events in poller.poll(_LATER * 1000):
                    if fd in byfd:
                        self._heard(*byfd[fd])
                    elif not self._accept():
                        return
        finally:
            self.close()

    def _refill(self) -> None:
        now = time.monotonic()
        for key, shelf in reversed(self._shelves.items()):
            starting = any(not waiting.ready for waiting in shelf.waiting)
            if len(shelf.waiting) < self._count and now >= shelf.refill and not starting:
                shelf.waiting.append(self._start(key))
                return  # one at a time

    def _start(self, key: Key) -> _Waiting:
        words, cwd = key
        self._numbers += 1
        doors = f"{self._directory}/{self._numbers}"
        ours, theirs = socket.socketpair()
        wanted = json.dumps({"words": words, "cwd": cwd, "doors": doors})
        argv = [sys.executable, "-I", "-m", "isolation_kernel.pool.standby", wanted]
        state = state_of(cwd)
        with theirs:
            # A session of its own: it outlives this daemon once it is handed out.
            process = subprocess.Popen(
                argv, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True, cwd=cwd
            )
        return _Waiting(Wire(ours), process, state, doors)

    def _heard(self, shelf: _Shelf, waiting: _Waiting) -> None:
        """It is ready; or it has ended, which it should not."""
        try:
            message = waiting.wire.receive(_REQUEST)
        except (WireError, TimeoutError):
            message = None
        if message is not None:
            waiting.ready = True
            return
        shelf.waiting.remove(waiting)
        shelf.refill = time.monotonic() + _AGAIN
        waiting.end()

    def _accept(self) -> bool:
        """One request; False when it is for the end."""
        end, _ = self._listener.accept()
        end.settimeout(_REQUEST)
        wire = Wire(end, accept_fds=True)
        try:
            message = wire.receive(_REQUEST)
            if message is None:
                return True
            if message.get("op") == "stop":
                wire.send({"event": "stopped"})
                return False
            if message.get("op") == "list":
                shelves = [
                    [" ".join(words), cwd, sum(waiting.ready for waiting in shelf.waiting)]
                    for (words, cwd), shelf in self._shelves.items()
                ]
                wire.send({"event": "list", "pid": os.getpid(), "shelves": shelves})
            elif message.get("op") == "adopt":
                self._asked = time.monotonic()
                if not self._hand_out(message, wire):
                    wire.send({"event": "none"})
        except (WireError, TimeoutError):
            pass  # whoever asked is gone
        finally:
            while wire.fds:
                os.close(wire.fds.popleft())
            end.close()  # not shut down: the standby has it now
        return True

    def _hand_out(self, message: Message, asker: Wire) -> bool:
        key: Key = (tuple(message["words"]), str(message["cwd"]))
        new = key not in self._shelves
        self.keep(key)
        shelf = self._shelves[key]
        if new:
            shelf.refill = time.monotonic() + _NOT_NOW
        state = state_of(key[1])
        for waiting in list(shelf.waiting):
            if waiting.state != state:
                shelf.waiting.remove(waiting)  # something was installed meanwhile, or the directory is another
                waiting.end()
            elif waiting.ready:
                shelf.waiting.remove(waiting)
                shelf.refill = time.monotonic() + _LATER
                fds = [asker.fileno(), *asker.fds]
                waiting.wire.send({**message, "fds": len(fds)}, fds=fds)
                waiting.wire.sock.close()
                _reap_later(waiting.process)
                return True
        return False

    def close(self) -> None:
        """End every kernel that waits; those that were handed out are not ours any more."""
        self._listener.close()
        for shelf in self._shelves.values():
            for waiting in shelf.waiting:
                waiting.end()
        self._shelves.clear()
        try:
            os.unlink(f"{self._directory}/daemon")
        except OSError:
            pass
        os.close(self._lock)


_handed_out: list[subprocess.Popen[bytes]] = []


def _reap_later(process: subprocess.Popen[bytes]) -> None:
    _handed_out[:] = [one for one in _handed_out if one.poll() is None]
    _handed_out.append(process)


def state_of(cwd: str) -> tuple[Any, ...]:
    """What a waiting kernel depends on: where it was started, and what is installed."""

    def stamp(path: str) -> tuple[int, ...]:
        try:
            status = os.stat(path)
        except OSError:
            return ()
        return (status.st_dev, status.st_ino, *((status.st_mtime_ns,) if path != cwd else ()))

    return tuple(stamp(path) for path in (cwd, *sys.path) if path)


def own_directory() -> str:
    """The pool's, made where it is not there. Raises IsolationError when it is somebody else's."""
    directory = place()
    try:
        os.mkdir(directory, 0o700)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise IsolationError(f"{directory} is not a directory of yours alone (mode 0700); remove it")
    return directory


def warm_keys(names: Sequence[str], cwd: str) -> list[Key]:
    """Of installed kernelspecs, by name."""
    from isolation_kernel import kernelspec

    found = {item.name: item for item in kernelspec.installed()}
    missing = [name for name in names if name not in found]
    if missing or not found:
        known = ", ".join(found) or "none; 'isolation kernel install' installs one"
        raise IsolationError(f"there is no kernel {missing[0] if missing else ''!r} of ours; there is: {known}")
    return [(tuple(found[name].line.options.words()), cwd) for name in names or list(found)[:_KEYS_AT_MOST]]
