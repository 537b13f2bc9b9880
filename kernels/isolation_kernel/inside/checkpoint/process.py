"""What the kernel of the operating system says of this process, and of the others in the sandbox."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Iterator
from typing import Any, Final

HOLDER_NAME: Final = "iso-check-"  # of the processes that keep checkpoints, and the slot; 15 bytes at most (prctl(2))
_TRACKERS: Final = (
    "multiprocessing.resource_tracker", "loky.backend.resource_tracker", "joblib.externals.loky.backend.resource_tracker",
)  # fmt: skip
SEMAPHORE: Final = "/dev/shm/sem."  # of multiprocessing's locks, tqdm's among them; each is in a file that is deleted


def fork() -> int:
    """Quietly: from Python 3.12 on it is said that the kernel has threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def fork_and_end() -> None:
    """For what handlers do before a fork."""
    pid = fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def descriptors() -> list[tuple[int, str]]:
    """Numbers of what is open, and what that is."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except OSError:
            continue  # the one of listdir itself
    return sorted(found)


def processes() -> Iterator[int]:
    """Of the sandbox, but for those that keep checkpoints."""
    return (pid for pid, command in _commands() if not command.startswith(HOLDER_NAME))


def holders(slot: int) -> Iterator[int]:
    """Processes that keep the checkpoint of a slot: one, or none."""
    return (pid for pid, command in _commands() if command == f"{HOLDER_NAME}{slot}")


def _commands() -> Iterator[tuple[int, str]]:
    """Processes that have not ended, and their names."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    text = file.read()
            except OSError:
                continue
            if text[text.rindex(")") + 2] not in "ZX":
                yield int(name), text[text.index("(") + 1 : text.rindex(")")]


def command_of(which: str) -> str:
    with open(f"/proc/{which}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def trackers() -> tuple[set[int], set[int]]:
    """The resource trackers of multiprocessing and of loky, which stay once something has needed them, and may serve whoever
    has their pipes: their pids, and those descriptors. A fork forgets the pid of some (register_at_fork), and is not to end
    them: so they are remembered here."""
    found = [getattr(sys.modules.get(name), "_resource_tracker", None) for name in _TRACKERS]
    pids, fds = ([getattr(tracker, name, None) for tracker in found] for name in ("_pid", "_fd"))
    _seen.update(pid for pid in pids if pid is not None)
    return {pid for pid in _seen if _is_tracker(pid)}, {fd for fd in fds if fd is not None}


_seen: set[int] = set()


def _is_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"resource_tracker" in file.read()
    except OSError:
        return False


def shared_maps() -> Iterator[str]:
    seen = set()
    for permissions, path in _maps_of_files():
        if permissions[1] == "w" and permissions[3] == "s" and path not in seen:
            seen.add(path)
            yield path


def _maps_of_files() -> Iterator[tuple[str, str]]:
    """Permissions and path of what is mapped."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            fields = line.rstrip("\n").split(None, 5)
            if len(fields) == 6:
                yield fields[1], fields[5]


def looked_at(fd: int) -> socket.socket:
    """An object for a socket, which is not changed by that: it would be, by a user's default for time-outs."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    try:
        return socket.socket(fileno=os.dup(fd))
    finally:
        socket.setdefaulttimeout(before)


def address(fd: int) -> Any:
    with looked_at(fd) as end:
        return addresses(end)[0]


def addresses(end: socket.socket) -> tuple[Any, Any]:
    found = []
    for ask in (end.getsockname, end.getpeername):
        try:
            found.append(ask())
        except OSError:
            found.append(None)
    return found[0], found[1]
