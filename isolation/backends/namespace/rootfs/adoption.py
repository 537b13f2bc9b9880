"""Files of another owner or group that the user may write: the guest gets them as copies of its own.

An ordinary user's namespace has one user and one group id. Overlayfs copies nothing up whose owner or group has none
there (EOVERFLOW; CVE-2023-0386 is why), and so neither does it what lies beneath. In a directory that a group shares, that
is everything. Real root's namespace has a range of ids, and its guest none of the privileges by which root writes what is
other users'. So there is one more lower layer, between the host's tree and what the guest writes: its directories are
the guest's own, and overlayfs merges them with those of the host, whose new files are so still seen; files are copies,
since no file system lets an ordinary user have the same data under another owner.

What the user may do is what its copy allows; beyond that nothing is gained, for nothing of it reaches the host.
"""

from __future__ import annotations

import contextlib
import itertools
import stat
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from isolation.backends.namespace.rootfs.mounts import NEW_ROOT, BaseOperation, adopted, make_directory
from isolation.linux.userns import RANGE_SIZE
from isolation.plain import os
from isolation.units import format_size

_FILE_AT_MOST: Final = 64 << 20
_BYTES_AT_MOST: Final = 256 << 20  # of memory, for one directory that is shown
_ENTRIES_AT_MOST: Final = 50_000
_KNOWN_AT_MOST: Final = 64
_LOOKED_AT_MOST: Final = 200_000  # 4 µs each
_NAMED: Final = 3
_CHUNK: Final = 1 << 20
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# Trees of a package manager, which nobody writes to but that: not looked through, where they are the user's own.
_MARK_OF_VENV: Final = "pyvenv.cfg"
_PACKAGES: Final = "node_modules"


class Own(NamedTuple):
    """Whose files the guest can write to without this. `gid`: None for real root, who has a range of groups."""

    uid: int
    gid: int | None

    def has(self, status: os.stat_result) -> bool:
        """Whether this is one of them."""
        group = status.st_gid < RANGE_SIZE if self.gid is None else status.st_gid == self.gid
        return group and status.st_uid == self.uid


class Entry(NamedTuple):
    """Something to have in the layer. `path` is below the directory that is shown, and empty for that itself; `mode` is the
    kind of it, and what its copy allows. Of a directory no more is told, since what is in it is not all here."""

    path: str
    mode: int
    size: int = 0
    mtime: int = 0


@dataclass(frozen=True)
class Adopt(BaseOperation):
    """Base: that layer, for one overlay."""

    number: int
    source: str
    lower: str
    entries: tuple[Entry, ...]

    @property
    def target(self) -> str:  # type: ignore[override]
        """Where it is."""
        return adopted(self.number)

    def execute(self) -> None:
        make_directory(NEW_ROOT + self.target)
        copy(self.lower, NEW_ROOT + self.target, self.entries)

    def describe(self) -> str:
        return f"adopted  {self.source} ({len(self.entries)} entries of other owners or groups, as the guest's own)"


class Copied(NamedTuple):
    """A directory of the host's that is to be copied to `path`, below that in which it is shown. It stands at `lower`."""

    path: str
    lower: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Seed(BaseOperation):
    """Base: the lower layer of a directory that is empty but for these."""

    target: str
    mode: int
    copied: tuple[Copied, ...]

    def execute(self) -> None:
        make_directory(NEW_ROOT + self.target, self.mode)
        for one in self.copied:
            target = f"{NEW_ROOT}{self.target}/{one.path}"
            make_directory(target)
            copy(one.lower, target, one.entries)

    def describe(self) -> str:
        return f"copied   {', '.join(one.path for one in self.copied)}"


class Survey(NamedTuple):
    """What was found. `left`: paths that the user may write, and that are too large, or too many, to be copied."""

    entries: tuple[Entry, ...]
    left: tuple[str, ...]

    def note(self, top: str) -> str:
        """For people, before anything runs; "" when there is nothing to say."""
        if not self.left:
            return ""
        named = ", ".join(name if name.isprintable() else ascii(name) for name in self.left[:_NAMED])
        more = f" and {len(self.left) - _NAMED} more" if len(self.left) > _NAMED else ""
        return (
            f"read-only inside, though you may write it: {named}{more} in {top}, of another owner or group, and too much to "
            f"copy ({format_size(_FILE_AT_MOST)} each, {format_size(_BYTES_AT_MOST)} and {_ENTRIES_AT_MOST} files in all); "
            "make it your own (chown, chgrp) to have it copy-on-write"
        )


@dataclass
class _Known:
    """What was found once, and how to tell that it is so still: times of the directories, and of what is copied."""

    number: int
    survey: Survey
    times: dict[str, tuple[int, int]]

    def holds(self) -> bool:
        try:
            return all(_times(os.lstat(path)) == times for path, times in self.times.items())
        except OSError:
            return False


_known: dict[tuple[str, Own], _Known] = {}
_numbers = itertools.count()


def survey(top: str, own: Own) -> Survey:
    """Look through the directory for what is not the guest's own; unless that is known."""
    known = _known.get((top, own))
    if known is None or not known.holds():
        times: dict[str, tuple[int, int]] = {}
        found = look(top, own, times)
        for entry in found.entries:
            if not stat.S_ISDIR(entry.mode):
                with contextlib.suppress(OSError):  # gone meanwhile, which its directory tells
                    path = os.path.join(top, entry.path)
                    times[path] = _times(os.lstat(path))
        known = _Known(next(_numbers), found, times)
        while len(_known) >= _KNOWN_AT_MOST:
            _known.pop(next(iter(_known)), None)
        _known[top, own] = known
    return known.survey


def state(tops: Iterable[str]) -> tuple[int, ...]:
    """What is known of these directories, and those beneath, as numbers that nothing else has; -1 for what has changed."""
    above = tuple(os.path.join(top, "") for top in tops)
    found = [known for (top, _own), known in list(_known.items()) if os.path.join(top, "").startswith(above)]
    return tuple(known.number if known.holds() else -1 for known in found)


def _times(status: os.stat_result) -> tuple[int, int]:
    return status.st_mtime_ns, status.st_ctime_ns


def look(top: str, own: Own, times: dict[str, tuple[int, int]] | None = None) -> Survey:
    """As `survey`, without a memory. Tells the times of the directories."""
    found: list[Entry] = []
    passed: dict[str, Entry] = {}
    looked_at = 0
    todo = deque([("", os.lstat(top))])
    while todo and looked_at < _LOOKED_AT_MOST:
        path, status = todo.popleft()
        here = os.path.join(top, path)
        try:
            with os.scandir(here) as inside:
                entries = list(inside)
        except OSError:
            continue  # neither can overlayfs look into it
        looked_at += len(entries)
        if times is not None:
            times[here] = _times(status)
        if not own.has(status):
            found.append(Entry(path, _mode_of_copy(here, status)))
        elif path and any(item.name == _MARK_OF_VENV for item in entries):
            continue
        else:
            passed[path] = Entry(path, status.st_mode)
        for item in entries:
            try:
                status = item.stat(follow_symlinks=False)
            except OSError:
                continue  # gone meanwhile
            foreign = not own.has(status)
            below = f"{path}/{item.name}" if path else item.name
            if stat.S_ISDIR(status.st_mode):
                if foreign or item.name != _PACKAGES:
                    todo.append((below, status))
            elif foreign and stat.S_ISLNK(status.st_mode):
                found.append(Entry(below, status.st_mode, 0, status.st_mtime_ns))
            elif foreign and stat.S_ISREG(status.st_mode) and os.access(item.path, os.R_OK):
                found.append(Entry(below, _mode_of_copy(item.path, status), status.st_size, status.st_mtime_ns))
    if not found:
        return Survey((), ())
    return _chosen(found, passed, [path for path, status in todo if not own.has(status)])


def entries_of(top: str) -> tuple[Entry, ...]:
    """All that a copy of the directory has, as far as there is room."""
    found = [Entry("", os.lstat(top).st_mode)]
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            path = os.path.join(directory, name)
            with contextlib.suppress(OSError):  # gone meanwhile
                status = os.lstat(path)
                if stat.S_IFMT(status.st_mode) in (stat.S_IFDIR, stat.S_IFLNK, stat.S_IFREG):
                    found.append(Entry(os.path.relpath(path, top), status.st_mode, status.st_size, status.st_mtime_ns))
    return tuple(sorted(found))[:_ENTRIES_AT_MOST]


def _chosen(found: Sequence[Entry], passed: Mapping[str, Entry], left: list[str]) -> Survey:
    """As many as there is room for: directories and links, then what can be written, the smallest first."""
    chosen: dict[str, Entry] = {}
    room = _BYTES_AT_MOST
    for entry in sorted(found, key=lambda entry: (stat.S_ISREG(entry.mode), not entry.mode & 0o200, entry.size)):
        if entry.size > min(room, _FILE_AT_MOST) or len(chosen) >= _ENTRIES_AT_MOST:
            if stat.S_ISREG(entry.mode) and entry.mode & 0o200:
                left.append(entry.path)
            continue
        room -= entry.size
        chosen[entry.path] = entry
    for path in list(chosen):  # the directories on the way
        while path:
            path = os.path.dirname(path)
            if path in chosen or path not in passed:
                break
            chosen[path] = passed[path]
    return Survey(tuple(sorted(chosen.values())), tuple(sorted(left)))


def _mode_of_copy(path: str, status: os.stat_result) -> int:
    """Its owner, who the guest is, may do what the user may."""
    allowed = sum(bit for bit, how in ((4, os.R_OK), (2, os.W_OK), (1, os.X_OK)) if os.access(path, how))
    kept = stat.S_IFMT(status.st_mode) | 0o077 | (0o3000 if stat.S_ISDIR(status.st_mode) else 0)
    return status.st_mode & kept | allowed << 6


def copy_again(source: str, target: str, entries: Sequence[Entry]) -> None:
    """Bring the layer up to date. It is ours alone: no guest can write to it."""
    wanted = {os.path.join(target, entry.path): entry for entry in entries}
    for directory, names, files in os.walk(target, topdown=False):
        for name in [*names, *files]:
            path = os.path.join(directory, name)
            status, entry = os.lstat(path), wanted.get(path)
            if entry is not None and stat.S_IFMT(entry.mode) == stat.S_IFMT(status.st_mode):
                if stat.S_ISDIR(status.st_mode) or (entry.size, entry.mtime) == (status.st_size, status.st_mtime_ns):
                    continue
                if stat.S_ISLNK(status.st_mode) and entry.mtime == status.st_mtime_ns:
                    continue
            with contextlib.suppress(OSError):  # a directory in which something is left: it has just become one
                os.rmdir(path) if stat.S_ISDIR(status.st_mode) else os.unlink(path)
    copy(source, target, entries)


def copy(source: str, target: str, entries: Iterable[Entry]) -> None:
    """Fill the layer. What is not there any more, or is something else by now, is left out; and what is there already."""
    with contextlib.ExitStack() as tops:
        top = _Pair(*(_open_directory(tops, path, None) for path in (source, target)))
        ordered = sorted((os.path.split(entry.path), entry) for entry in entries)
        for parent, group in itertools.groupby(ordered, lambda item: item[0][0]):
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
                pair = top
                for name in parent.split("/") if parent else ():
                    pair = _Pair(*(_open_directory(stack, name, fd) for fd in pair))
                for (_parent, name), entry in group:
                    with contextlib.suppress(OSError):
                        _copy_entry(name, entry, pair)
        # Now that nothing is made in them any more, and no mode stands in the way of a walk.
        for entry in sorted(entries, reverse=True):
            if stat.S_ISDIR(entry.mode):
                with contextlib.suppress(OSError):
                    status = os.stat(f"{source}/{entry.path}", follow_symlinks=False)
                    os.chmod(f"{target}/{entry.path}", stat.S_IMODE(entry.mode))
                    os.utime(f"{target}/{entry.path}", ns=(status.st_atime_ns, status.st_mtime_ns))


class _Pair(NamedTuple):
    """Descriptors of a directory: on the host, which somebody else may write to, so no symlink is followed; and of ours."""

    source: int
    target: int


def _open_directory(stack: contextlib.ExitStack, path: str, parent: int | None) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    stack.callback(os.close, fd)
    return fd


def _copy_entry(name: str, entry: Entry, pair: _Pair) -> None:
    if not name:
        return  # the directory itself
    if stat.S_ISDIR(entry.mode):
        os.mkdir(name, 0o700, dir_fd=pair.target)
        return
    if stat.S_ISLNK(entry.mode):
        os.symlink(os.readlink(name, dir_fd=pair.source), name, dir_fd=pair.target)
        status = os.stat(name, dir_fd=pair.source, follow_symlinks=False)
    else:
        with open(os.open(name, _READ, dir_fd=pair.source), "rb") as theirs:
            status = os.fstat(theirs.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _FILE_AT_MOST:
                return
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=pair.target)
            with open(fd, "wb"):
                size = 0
                while size < _FILE_AT_MOST and (count := os.sendfile(fd, theirs.fileno(), size, _CHUNK)):
                    size += count
                os.fchmod(fd, stat.S_IMODE(entry.mode))
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=pair.target, follow_symlinks=False)
