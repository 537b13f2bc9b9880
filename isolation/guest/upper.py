"""What a guest wrote: the upper directory of an overlay, walked.

The directories are the guest's work, so nothing in them is trusted: no symlink is followed, nothing is opened but
directories, and the walk is bounded. Deletions are whiteouts, 0:0 character devices (kernel:
Documentation/filesystems/overlayfs.rst).
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator

from isolation.result import Change

AT_MOST = 100_000
_DEEPEST = 200


def walk(dirfd: int, top: str, target: str, source: str, *, most: int = AT_MOST) -> list[Change]:
    """Every path added, changed or deleted beneath `top` (relative to `dirfd`), which is shown at `target`; `source` is
    what was there before, "" for nothing. At most `most` of them."""
    return list(itertools.islice(_walk(dirfd, top, target, source, 0), max(0, most)))


def parents(path: str) -> Iterator[str]:
    """The directories above `path`, without the root."""
    while (path := os.path.dirname(path)) != "/":
        yield path


def _walk(dirfd: int, name: str, target: str, source: str, depth: int) -> Iterator[Change]:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)
    except OSError:
        return  # gone meanwhile, or made unreadable by the guest
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                yield from _entry(fd, entry, f"{target}/{entry.name}", source and f"{source}/{entry.name}", depth)
    finally:
        os.close(fd)


def _entry(fd: int, entry: os.DirEntry[str], target: str, source: str, depth: int) -> Iterator[Change]:
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
        yield Change(target, "deleted", "other")
        return
    existed = bool(source) and os.path.lexists(source)
    if stat.S_ISDIR(status.st_mode):
        if not existed:
            yield Change(target, "added", "directory")
        if depth < _DEEPEST:
            yield from _walk(fd, entry.name, target, source if existed else "", depth + 1)
    elif stat.S_ISREG(status.st_mode):
        yield Change(target, "changed" if existed else "added", "file", status.st_size)
    else:
        kind = "symlink" if stat.S_ISLNK(status.st_mode) else "other"
        yield Change(target, "changed" if existed else "added", kind)  # type: ignore[arg-type]
