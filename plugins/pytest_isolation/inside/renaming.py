"""Renaming a directory that was there before the test: overlayfs refuses it (EXDEV), and for Python code this makes up.
Likewise where something is put elsewhere that on the host lies in the same file system: from `tmp_path` to the project, say.

The kernel has an answer (redirect_dir), but not where the overlay belongs to a user namespace. So when rename(2) refuses a
directory within one file system, it is made at its new place, and what lies in it renamed one by one, which the kernel does:
files stay the same files, open or not. Between two mounts, there is a copy.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os as tests_os
import shutil
import stat
from collections.abc import Callable, Iterable
from typing import Any

from isolation.plain import os

Path = Any  # what os.rename takes
_rename = os.rename
_devices: dict[str, int] = {}  # of directories, as they are on the host


def install(directories: Iterable[str]) -> None:
    """For this process, and its forks. `directories` are shown to these each by a mount of its own."""
    for directory in directories:
        with contextlib.suppress(OSError):
            _devices[os.path.realpath(directory)] = os.stat(directory).st_dev
    tests_os.rename = _made_up_for(tests_os.rename)
    tests_os.replace = _made_up_for(tests_os.replace)


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
            move = _way(source, target)
            if move is None:
                raise
            try:
                move(source, target)
            except OSError as failure:
                raise OSError(failure.errno, os.strerror(failure.errno or 0), src, None, dst) from None

    return rename


def _beneath(path: Path, directory: int | None) -> str:
    text = os.fsdecode(path)
    text = text if directory is None or os.path.isabs(text) else f"/proc/self/fd/{directory}/{text}"
    return text.rstrip("/") or "/"


def _way(source: str, target: str) -> Callable[[str, str], None] | None:
    """How it can be done; None where rename(2) would not do it on the host either."""
    try:
        here, there = (os.stat(os.path.dirname(path) or ".") for path in (source, target))
        status = os.lstat(source)
    except OSError:
        return None
    if stat.S_ISDIR(status.st_mode) and here.st_dev == there.st_dev == status.st_dev:
        return _move_followed
    host = [_device_on_host(path) for path in (source, target)]
    kinds = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
    return _copy if None not in host and host[0] == host[1] and stat.S_IFMT(status.st_mode) in kinds else None


def _device_on_host(path: str) -> int | None:
    directory = os.path.realpath(os.path.dirname(path) or ".")
    while directory not in _devices:
        if directory == "/":
            return None
        directory = os.path.dirname(directory)
    return _devices[directory]


def _copy(source: str, target: str) -> None:
    """From one mount to another. A file is there as a whole, or not at all."""
    if os.path.isdir(source) and not os.path.islink(source):
        if os.path.lexists(target):
            os.rmdir(target)
        try:
            shutil.copytree(source, target, symlinks=True)
        except shutil.Error as error:
            shutil.rmtree(target, ignore_errors=True)
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV)) from error
        shutil.rmtree(source)
        return
    beside = f"{target}.{os.getpid()}.isolation"
    try:
        shutil.copy2(source, beside, follow_symlinks=False)
        _rename(beside, target)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    os.unlink(source)


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
