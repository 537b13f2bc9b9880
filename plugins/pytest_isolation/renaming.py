"""Renaming a directory that was there before the test: overlayfs refuses it (EXDEV), and for Python code this makes up.

The kernel has an answer (redirect_dir), but not where the overlay belongs to a user namespace. So when rename(2) refuses a
directory within one file system, it is made at its new place, and what lies in it renamed one by one, which the kernel does:
files stay the same files, open or not.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import shutil
import stat
from collections.abc import Callable
from typing import Any

from isolation.plain import os

Path = Any  # what os.rename takes
_rename, _replace = os.rename, os.replace


def install() -> None:
    """For this process, and its forks."""
    os.rename = _made_up_for(_rename)
    os.replace = _made_up_for(_replace)


def _made_up_for(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def rename(src: Path, dst: Path, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        __tracebackhide__ = True
        try:
            original(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            source, target = _beneath(src, src_dir_fd), _beneath(dst, dst_dir_fd)
            if not _can_be_moved(source, target):
                raise
            try:
                _move_followed(source, target)
            except OSError as failure:
                raise OSError(failure.errno, os.strerror(failure.errno or 0), src, None, dst) from None

    return rename


def _beneath(path: Path, directory: int | None) -> str:
    text = os.fsdecode(path)
    text = text if directory is None or os.path.isabs(text) else f"/proc/self/fd/{directory}/{text}"
    return text.rstrip("/") or "/"


def _can_be_moved(source: str, target: str) -> bool:
    """A directory, to another place in the same file system."""
    try:
        here, there = (os.stat(os.path.dirname(path) or ".") for path in (source, target))
        status = os.lstat(source)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and here.st_dev == there.st_dev == status.st_dev


def _move_followed(source: str, target: str) -> None:
    """The working directory goes with it."""
    inside = ""
    with contextlib.suppress(OSError):
        inside = os.path.relpath(os.getcwd(), os.path.realpath(source))
    if os.path.lexists(target):
        os.rmdir(target)  # rename(2) takes the place of an empty one
    done: list[tuple[str, str]] = []
    try:
        _move(source, target, done)
    except OSError:
        _undo(done)
        raise
    if inside and inside.split("/")[0] != "..":
        os.chdir(os.path.join(target, inside))


def _move(source: str, target: str, done: list[tuple[str, str]]) -> None:
    """`done`: what has been, the directories by an empty source."""
    try:
        _rename(source, target)
        done.append((source, target))
        return
    except OSError as error:
        if error.errno != errno.EXDEV or not stat.S_ISDIR(os.lstat(source).st_mode):
            raise
    status = os.stat(source)
    os.mkdir(target, 0o700)
    done.append(("", target))
    for name in os.listdir(source):
        _move(os.path.join(source, name), os.path.join(target, name), done)
    with contextlib.suppress(OSError):
        os.chown(target, status.st_uid, status.st_gid)
    shutil.copystat(source, target)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))  # as it was before that
    os.rmdir(source)


def _undo(done: list[tuple[str, str]]) -> None:
    """As far as it can be: a directory from before, once it is empty and gone, is made anew."""
    for source, target in reversed(done):
        with contextlib.suppress(OSError):
            if source:
                os.makedirs(os.path.dirname(source) or ".", exist_ok=True)
                _rename(target, source)
            else:
                os.rmdir(target)
