"""Files that a template has open for writing: to its forks, each is the file that was opened, by its number.

An overlay copies a file up when it is opened for writing, and goes on to show the number of the lower one, as long as it is
that overlay. To a fork's, the template's copy would be the lower file, whose number is another. Programs compare: SQLite
does not write to a database when its path leads to another inode than the one that it has opened (SQLITE_READONLY_DBMOVED).

So a template's copies are put aside while it waits to be forked. A fork finds, at each level, the file that is below them
all, and fills its own copy of that from the descriptor that it has inherited (inherited.py). Before the template goes on,
they are put back where they were; it has seen nothing, as its overlay knows them by what they are and not by where.

What is told here of a file is the template's, which is not trusted. It all happens in its own store, without a symlink.
"""

from __future__ import annotations

import contextlib
import signal
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import inherited as fds
from isolation.backends.namespace.process import steps
from isolation.backends.namespace.rootfs.mounts import FreshOperation, Ground, Overlay, Private, Rebind
from isolation.linux import syscalls
from isolation.plain import os, socket

_ASIDE = "/aside"  # in the store
_FILES_AT_MOST = 64
_BYTES_AT_MOST = 64 << 10  # of what is told
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Held(NamedTuple):
    """A file that is open for writing, with the number that it has to those who see it."""

    path: bytes
    inode: int


def held(inherited: Iterable[fds.Inherited]) -> list[Held]:
    """In a template: what it tells of its descriptors."""
    found: dict[Held, None] = {}
    size = 0
    for item in inherited:
        if fds.is_written(item):
            one = Held(os.fsencode(item.path), item.identity[1])
            size += len(one.path)
            if one not in found and len(found) < _FILES_AT_MOST and size < _BYTES_AT_MOST:
                found[one] = None
    return list(found)


def mark(inherited: Sequence[fds.Inherited], put_aside: Sequence[Held]) -> Sequence[fds.Inherited]:
    """For a fork: which of its files are to be filled."""
    if not put_aside:
        return inherited
    return [
        item._replace(aside=bool(item.path) and Held(os.fsencode(item.path), item.identity[1]) in put_aside)
        for item in inherited
    ]


def encode(files: Iterable[Held]) -> bytes:
    """For the supervisor."""
    return b"".join(b"\0%d %s" % (one.inode, one.path) for one in files)


def decode(told: Sequence[bytes]) -> list[Held]:
    """What was between the zeroes. Raises ValueError."""
    files = []
    for text in told[:_FILES_AT_MOST]:
        number, _, path = text.partition(b" ")
        if len(number) > 20 or not number.isdigit() or not path.startswith(b"/"):
            raise ValueError("no file")
        files.append(Held(path, int(number)))
    return files


class Aside:
    """Of one template. `level`: how many forks away from the host it is."""

    def __init__(self, plan: Plan, fresh: Sequence[FreshOperation], mounts: int, level: int) -> None:
        self._plan = plan
        self._fresh = fresh
        self._mounts = mounts
        self._ground = Ground(level)
        self._files: list[Held] = []
        self.put_aside: list[int] = []  # of the files, by their place among those that were told

    def put(self, files: list[Held]) -> None:
        """The template waits. Raises OSError."""
        self._files = files
        if files:
            self.put_aside = self._have_done(back=False)

    def put_back(self) -> None:
        """It is about to go on. Raises OSError."""
        if self.put_aside:
            self._have_done(back=True)
        self.put_aside = []

    def _have_done(self, *, back: bool) -> list[int]:
        """By a process in the template's mount namespace, in which its store is not covered."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid, pidfd = syscalls.clone(0)
        if pid == 0:
            self._be_mover(theirs, back=back)
        theirs.close()
        answer = ours.recv(4096)
        ours.close()
        os.waitpid(pid, 0)
        os.close(pidfd)
        if not answer:
            raise OSError("the files that a template has open could not be put aside")
        return [int(word) for word in answer.split()[1:]]

    def _be_mover(self, control_socket: socket.socket, *, back: bool) -> NoReturn:
        try:
            steps.leave_host_ids(self._plan)
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of ids has cleared it
            sys.meta_path.clear()  # what could be imported from here on is the guest's
            syscalls.setns(self._mounts, syscalls.CLONE_NEWNS)
            chosen = self.put_aside if back else range(len(self._files))
            moved = [number for number in chosen if self._move(number, back=back)]
            control_socket.send(b" ".join([b"a", *(b"%d" % number for number in moved)]))
        finally:
            os._exit(0)

    def _move(self, number: int, *, back: bool) -> bool:
        place = os.fsencode(self._ground.store + _ASIDE)
        one = self._files[number]
        found = self._overlay_of(one.path)
        if found is None:
            return False
        upper, lowers, names = found
        with contextlib.suppress(OSError), _directory(upper, names[:-1]) as parent:
            if back:
                _rename(b"%s/%d" % (place, number), None, names[-1], parent)
                return True
            if self._is_copy(one, os.stat(names[-1], dir_fd=parent, follow_symlinks=False), lowers, names):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(place, 0o700)
                _rename(names[-1], parent, b"%s/%d" % (place, number), None)
                return True
        return False

    def _overlay_of(self, path: bytes) -> tuple[bytes, list[bytes], list[bytes]] | None:
        """Of the template's layer for it, and those beneath: where they are; and the names that lead to it there."""
        nearest: Private | Overlay | Rebind | None = None
        for operation in self._fresh:
            within = path.startswith(os.fsencode(operation.target).rstrip(b"/") + b"/")
            if within and isinstance(operation, (Private, Overlay, Rebind)):
                if nearest is None or len(operation.target) > len(nearest.target):
                    nearest = operation
        if nearest is None or isinstance(nearest, Rebind):
            return None
        lowers = [os.fsencode(lower) for lower in nearest.beneath(self._ground)]
        names = path[len(os.fsencode(nearest.target)) :].strip(b"/").split(b"/")
        if not lowers or not {b"", b".", b".."}.isdisjoint(names):
            return None
        return os.fsencode(self._ground.upper(nearest.layer)), lowers, names

    def _is_copy(self, one: Held, status: os.stat_result, lowers: Iterable[bytes], names: Sequence[bytes]) -> bool:
        """Whether that is a file which shows the number of the one beneath it."""
        if not stat.S_ISREG(status.st_mode) or status.st_ino == one.inode:
            return False
        for lower in lowers:
            with contextlib.suppress(OSError), _directory(lower, names[:-1]) as parent:
                beneath = os.stat(names[-1], dir_fd=parent, follow_symlinks=False)
                return stat.S_ISREG(beneath.st_mode) and beneath.st_ino == one.inode
        return False


@contextlib.contextmanager
def _directory(top: bytes, names: Iterable[bytes]) -> Iterator[int]:
    """Raises OSError, for a symlink, too."""
    fd = os.open(top, _DIRECTORY)
    try:
        for name in names:
            below = os.open(name, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _rename(source: bytes, source_fd: int | None, target: bytes, target_fd: int | None) -> None:
    """The directory in which the guest sees the file does not show it by its times."""
    seen = source_fd if source_fd is not None else target_fd
    assert seen is not None
    status = os.fstat(seen)
    os.rename(source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd)
    os.utime(seen, ns=(status.st_atime_ns, status.st_mtime_ns))
