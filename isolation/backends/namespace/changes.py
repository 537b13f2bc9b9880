"""What a guest wrote: its store, walked from the host.

The directories are the guest's work, so nothing in them is trusted: no symlink is followed, nothing is opened but
directories, and the walk is bounded. Deletions are whiteouts, 0:0 character devices (kernel:
Documentation/filesystems/overlayfs.rst).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from isolation.backends.namespace.operations import LAYERS, PRIVATE, Operation, Overlay, Private
from isolation.result import Change

_AT_MOST = 100_000
_DEEPEST = 200


def of_store(store: int, operations: Sequence[Operation]) -> list[Change]:
    """Every path added, changed or deleted in the store behind the descriptor, sorted; at most 100,000."""
    found: list[Change] = []
    for operation in operations:
        if isinstance(operation, Overlay):
            top, source = f".{LAYERS}/{operation.number}/upper", operation.source
        elif isinstance(operation, Private):
            top, source = f".{PRIVATE}/{operation.number}", ""
        else:
            continue
        for change in _walk(store, top, operation.target, source, 0):
            found.append(change)
            if len(found) >= _AT_MOST:
                return sorted(found)
    # A mount point inside another private directory is part of the tree, not of what the guest did.
    shown = {operation.target for operation in operations}
    parents = {parent for target in shown for parent in _above(target)}
    return sorted(change for change in found if change.path not in shown | parents)


def _above(path: str) -> Iterator[str]:
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
