"""What becomes of the descriptors that a fork inherits.

There is no execve(2), so close-on-exec does nothing, and every one is the host's: an inet socket is a way out of the
network namespace, a directory one out of the root, a writable file a way to write the host. But Python objects own
those numbers, and would later close whatever reused them. So each number stays taken:

    a file that the sandbox's tree has too  → the tree's own, opened again at the same offset; with what the template has
                                              written to it, where its copy was put aside (open_files.py)
    an unlinked file (pytest's capture, …)  → a private copy, in memory
    the host's stdout or stderr, duplicated → the sandbox's
    what can be made anew                   → a new one, in the same state (recreated.py)
    anything else                           → /dev/null
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from isolation.backends.namespace.process import recreatable, recreated
from isolation.backends.showing import PREFIX
from isolation.linux import syscalls
from isolation.plain import os

_DELETED = " (deleted)"
_COPY_AT_MOST = 64 << 20
_AT_ONCE = 16 << 20
_REOPEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_PATH
_OF_PROCESS = re.compile(r"/proc/(\d+)/")


class Inherited(NamedTuple):
    """A descriptor above 2: how it looks on the host, before the tree changes.

    identity  device and inode: what tells that the number still is this file's, when its turn comes
    """

    fd: int
    identity: tuple[int, int]
    path: str = ""  # to open again
    flags: int = 0
    scratch: bool = False  # to copy
    aside: bool = False  # the tree's own is to be filled from it
    stdio: int = 0  # 1 or 2: a duplicate of the host's stdout or stderr
    made: recreated.Object | None = None  # what it is one of the descriptors of


def inventory(exclude: Sequence[int] = ()) -> list[Inherited]:
    """All open descriptors but 0 to 2 and `exclude`, in ascending order."""
    stdio = {}
    for number in (2, 1):
        try:
            stdio[_identity(os.fstat(number))] = number
        except OSError:
            continue
    found = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in exclude:
            try:
                found.append(_classify(fd, stdio))
            except OSError:
                continue  # the descriptor of the listing itself
    others = [item.fd for item in found if not (item.path or item.scratch or item.stdio)]
    made = {fd: one for one in recreatable.look(others) for fd in one.numbers}
    return sorted((item._replace(made=made.get(item.fd)) for item in found), key=lambda item: item.fd)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _classify(fd: int, stdio: dict[tuple[int, int], int]) -> Inherited:
    status = os.fstat(fd)
    identity = _identity(status)
    if identity in stdio:
        return Inherited(fd, identity, stdio=stdio[identity])
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & _REOPEN_FLAGS
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode) and not _is_reopened(status.st_mode, flags):
        return Inherited(fd, identity)
    path = os.readlink(f"/proc/self/fd/{fd}")
    if (match := _OF_PROCESS.match(path)) is not None and int(match[1]) in (os.getpid(), os.getppid()):
        return Inherited(fd, identity, path=f"/proc/self/{path[match.end() :]}", flags=flags)  # of who is forked
    if not path.startswith("/"):  # a pipe, which recreated.py is for
        return Inherited(fd, identity)
    if path.startswith(f"/memfd:{PREFIX}"):
        return Inherited(fd, identity)
    if status.st_nlink == 0 or path.startswith("/memfd:"):
        return Inherited(fd, identity, scratch=stat.S_ISREG(status.st_mode))
    return Inherited(fd, identity, path=path.removesuffix(_DELETED), flags=flags)


def _is_reopened(mode: int, flags: int) -> bool:
    """A place in the tree, or a named pipe, of those that are opened without waiting for anybody (fifo(7))."""
    return bool(flags & os.O_PATH) or (stat.S_ISFIFO(mode) and flags & os.O_ACCMODE == os.O_RDWR)


def is_written(item: Inherited) -> bool:
    """Whether it is of a file in the tree, which its owner may write to."""
    if not item.path or item.flags & (os.O_DIRECTORY | os.O_PATH) or item.flags & os.O_ACCMODE == os.O_RDONLY:
        return False
    return os.access(f"/proc/self/fd/{item.fd}", os.R_OK)


def adopt(inherited: Sequence[Inherited], stdio: Sequence[int], scratch: Sequence[int], keep: Sequence[int]) -> None:
    """Make the table safe, inside: 0 to 2 become `stdio`, `keep` stays as it is, `inherited` is replaced as the
    module says (unlinked files by `scratch`, in order), and everything else is closed.

    A number that has been closed since the inventory, and may be that of one of `stdio` or `scratch` now, is nobody's.
    """
    spare = iter(scratch)
    pairs = [(item, next(spare, -1) if item.scratch else -1) for item in inherited]
    pairs = [(item, copy) for item, copy in pairs if item.fd not in keep and _is_there(item)]
    dead = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number, fd in enumerate(stdio):
        os.dup2(fd, number)
    for path, item in {item.path: item for item, _copy in pairs if item.aside}.items():
        _fill(path, item.fd)
    for item, copy in pairs:
        _replace(item, dead, copy)
    _make_anew({item.fd: item.made for item, _copy in pairs if item.made is not None}, {item.fd for item, _copy in pairs})
    close_all_but({0, 1, 2, *keep, *(item.fd for item, _copy in pairs)})


def close_all_but(keep: Iterable[int]) -> None:
    """Close every other descriptor of this process."""
    kept = sorted({-1, *keep})
    for below, above in zip(kept, [*kept[1:], 1 << 31], strict=True):
        if above - below > 1:
            syscalls.close_range(below + 1, above - 1)


def _is_there(item: Inherited) -> bool:
    try:
        return _identity(os.fstat(item.fd)) == item.identity
    except OSError:
        return False


def _replace(item: Inherited, dead: int, copy: int) -> None:
    if item.stdio:
        os.dup2(item.stdio, item.fd, inheritable=False)
        return
    if copy >= 0:
        _copy(item.fd, copy)
        os.dup2(copy, item.fd, inheritable=False)
        return
    if item.path:
        try:
            new = os.open(item.path, item.flags | os.O_CLOEXEC)
        except OSError:
            pass
        else:
            if not item.flags & os.O_DIRECTORY:
                with contextlib.suppress(OSError):  # of some files there is none
                    os.lseek(new, os.lseek(item.fd, 0, os.SEEK_CUR), os.SEEK_SET)
            os.dup2(new, item.fd, inheritable=False)
            os.close(new)
            return
    os.dup2(dead, item.fd, inheritable=False)


def _make_anew(wanted: Mapping[int, recreated.Object], inherited: Collection[int]) -> None:
    """At their numbers, where nothing is now; it stays so for what cannot be had."""
    objects = list(dict.fromkeys(wanted.values()))
    for item in objects:
        try:
            ends = item.make()
        except OSError:
            continue
        for numbers, fd in ends:
            for number in numbers:
                if wanted.get(number) is item:
                    os.dup2(fd, number, inheritable=False)
            os.close(fd)
    for item in objects:
        item.connect({0, 1, 2, *inherited})


def _copy(source: int, target: int) -> None:
    position = os.lseek(source, 0, os.SEEK_CUR)
    size = min(os.fstat(source).st_size, _COPY_AT_MOST)
    if size:
        os.pwrite(target, os.pread(source, size, 0), 0)
    os.lseek(target, position, os.SEEK_SET)


def _fill(path: str, source: int) -> None:
    """The file at `path` with what is in the one that `source` is of. Opened in this way, it is copied up empty."""
    data = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            copy_file(data, target)
            status = os.fstat(data)
            os.fchmod(target, stat.S_IMODE(status.st_mode))
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(target)
    except OSError as error:
        raise OSError(error.errno, f"a copy of {path}, which a fixture has open: {error.strerror}") from error
    finally:
        os.close(data)


def copy_file(source: int, target: int) -> None:
    """All of it but its holes. The position of `source` means nothing, as forks have it in common."""
    size = os.fstat(source).st_size
    if os.fstat(target).st_size < size:
        os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            data = os.pread(source, min(end - at, _AT_ONCE), at)
            if not data:
                return
            at += os.pwrite(target, data, at)
