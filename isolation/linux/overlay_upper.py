"""What a guest wrote: the upper directory of an overlay, walked; or of several, which lie upon each other.

The directories are the guest's work, so nothing in them is trusted: no symlink is followed, nothing is opened but
directories, and the walk is bounded. Deletions are whiteouts, 0:0 character devices (kernel:
Documentation/filesystems/overlayfs.rst).
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

AT_MOST = 100_000
_DEEPEST = 200
_HELD_AT_MOST = 400  # descriptors at a time; layers that would want more are left out


class Entry(NamedTuple):
    """A path that was written or deleted; `size` in bytes, of files only."""

    path: str
    kind: Literal["added", "changed", "deleted"]
    type: Literal["file", "directory", "symlink", "other"] = "file"
    size: int | None = None


def walk(dirfd: int, top: str, target: str, source: str, *, most: int = AT_MOST) -> list[Entry]:
    """Every path added, changed or deleted beneath `top` (relative to `dirfd`), which is shown at `target`; `source` is
    what was there before, "" for nothing. At most `most` of them."""
    return walk_layers(dirfd, [top], target, source, most=most)


def walk_layers(dirfd: int, tops: Sequence[str], target: str, source: str, *, most: int = AT_MOST) -> list[Entry]:
    """The same, for several layers of which all but the first lie beneath others."""
    layers = [(dirfd, top) for top in tops]
    return list(itertools.islice(_walk(layers, target, source, 0, 0), max(0, most)))


def parents(path: str) -> Iterator[str]:
    """The directories above `path`, without the root."""
    while (path := os.path.dirname(path)) != "/":
        yield path


def _walk(
    layers: Sequence[tuple[int, str]], target: str, source: str, depth: int, held: int, *, replaced: bool = False
) -> Iterator[Entry]:
    """A directory, as the layers show it in which it is one. `held`: how many descriptors are open above. `replaced`: what
    was there before is not shown through them."""
    fds: list[int] = []
    try:
        for dirfd, name in layers:
            try:
                fds.append(os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd))
            except OSError:
                continue  # gone meanwhile, or made unreadable by the guest
            if _is_opaque(fds[-1]):
                replaced = True
                break
            if held + len(fds) >= _HELD_AT_MOST:
                break
        seen: set[str] = set()
        for index, fd in enumerate(fds):
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.name in seen:
                        continue
                    if replaced or index < len(fds) - 1:
                        seen.add(entry.name)
                    before = source and f"{source}/{entry.name}"
                    yield from _entry(fds, index, entry, f"{target}/{entry.name}", before, depth, held, replaced)
        if replaced and source:
            for name in sorted(set(_names(source)) - seen):
                yield Entry(f"{target}/{name}", "deleted", "other")
    finally:
        for fd in fds:
            os.close(fd)


def _entry(
    fds: Sequence[int], index: int, entry: os.DirEntry[str], target: str, source: str, depth: int, held: int, replaced: bool
) -> Iterator[Entry]:
    """What is shown at `target`: it is in the layer of this index, and in none above."""
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return
    below = [(fd, found) for fd in fds[index + 1 :] if (found := _status(fd, entry.name)) is not None]
    # The undermost whiteout hides what was there before. Else there may be none of it: what was added, was deleted.
    hides = not replaced and _is_whiteout(below[-1][1] if below else status)
    existed = hides or (bool(source) and os.path.lexists(source))
    if _is_whiteout(status):
        if existed:
            yield Entry(target, "deleted", "other")
    elif stat.S_ISDIR(status.st_mode):
        if not existed:
            yield Entry(target, "added", "directory")
        elif source and os.path.lexists(source) and not os.path.isdir(source):
            yield Entry(target, "changed", "directory")
        shown = list(itertools.takewhile(lambda item: stat.S_ISDIR(item[1].st_mode), below))
        if depth < _DEEPEST:
            layers = [(fd, entry.name) for fd in (fds[index], *(fd for fd, _status in shown))]
            hidden = replaced or len(shown) < len(below)
            yield from _walk(layers, target, source if existed else "", depth + 1, held + len(fds), replaced=hidden)
    elif stat.S_ISREG(status.st_mode):
        yield Entry(target, "changed" if existed else "added", "file", status.st_size)
    else:
        kind = "symlink" if stat.S_ISLNK(status.st_mode) else "other"
        yield Entry(target, "changed" if existed else "added", kind)  # type: ignore[arg-type]


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _is_opaque(fd: int) -> bool:
    """Whether a directory hides those of the same name in the layers beneath."""
    try:
        return os.getxattr(fd, "user.overlay.opaque") == b"y"
    except OSError:
        return False


def _status(fd: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError:
        return None


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
