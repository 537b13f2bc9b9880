"""A machine's memory as a file that has no name: copied without its holes, and sealed once it is to be shared."""

from __future__ import annotations

import fcntl
import os

from isolation.backends.showing import PREFIX
from isolation.errors import LaunchError

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def empty(size: int, name: str = "memory") -> int:
    """A new memfd of `size` bytes, none of them allocated."""
    fd = os.memfd_create(f"{PREFIX}-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def seal(fd: int) -> None:
    """From here on nobody can change it, not even who has it open for writing. Raises LaunchError while it is mapped so."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        raise LaunchError(f"the memory of the template cannot be sealed: {error.strerror}") from error


def copy(source: int, target: int) -> int:
    """Copy all that is allocated; returns how many bytes that was."""
    size = os.fstat(source).st_size
    position = copied = 0
    while position < size:
        try:
            begin = os.lseek(source, position, os.SEEK_DATA)
        except OSError:
            break  # ENXIO: only a hole is left
        position = os.lseek(source, begin, os.SEEK_HOLE)
        os.lseek(target, begin, os.SEEK_SET)
        while begin < position:
            count = os.sendfile(target, source, begin, min(position - begin, 1 << 26))
            if count == 0:
                raise LaunchError("a memory image ended before its time")
            begin += count
            copied += count
    return copied
