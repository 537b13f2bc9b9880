"""Runs in the launcher: what a kernel exports, on its way out."""

from __future__ import annotations

import contextlib
import os
from typing import BinaryIO, Final

from isolation.errors import GuestError
from isolation.units import format_size

FILE_AT_MOST: Final = 1 << 30  # bytes, of one
IN_ALL: Final = 4 << 30  # bytes on the disk, of one kernel
_FILES: Final = 1000
_BLOCK: Final = 1 << 16
_SLICE: Final = 1 << 20  # what is copied between two looks at all else


class Room:
    """What one kernel may put on the host's disk: so many bytes in all, and of each file."""

    def __init__(self, in_all: int = IN_ALL, each: int = FILE_AT_MOST) -> None:
        self._bytes, self._files = in_all, _FILES
        self.each = each

    def begin(self) -> None:
        """One more file. Raises GuestError."""
        if self._bytes <= 0 or self._files <= 0:
            raise GuestError(
                f"this kernel has exported {_FILES} files or {format_size(IN_ALL)}, which is all that one may; start another"
            )
        self._files -= 1

    def take(self, size: int) -> None:
        """So many bytes of its data. Raises GuestError."""
        self._bytes -= size
        if self._bytes < 0:
            raise GuestError(f"all exports of one kernel together may have {format_size(IN_ALL)}")


class Partial:
    """A file beside its place, until all of it has come. Zeros take no room on the disk, as they take none inside."""

    def __init__(self, target: str, room: Room) -> None:
        """Raises OSError, GuestError."""
        room.begin()
        self.size = 0
        self._room = room
        self._target = target
        self._path = f"{target}.{os.getpid()}.part"
        self._file: BinaryIO = open(self._path, "xb")

    def write(self, data: bytes) -> None:
        """Raises OSError, GuestError."""
        self.size += len(data)
        if self.size > self._room.each:
            raise GuestError(f"it is larger than {format_size(self._room.each)}")
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            if block.count(0) == len(block):
                self._file.seek(len(block), os.SEEK_CUR)
            else:
                self._room.take(len(block))
                self._file.write(block)

    def finish(self) -> int:
        """Put it in its place; returns its size. Raises OSError."""
        self._file.truncate(self.size)
        self._file.close()
        os.replace(self._path, self._target)
        return self.size

    def abandon(self) -> None:
        """Nobody wants it any more."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)


class Copy:
    """Of a file of a container's, a slice at a time."""

    def __init__(self, source: BinaryIO, partial: Partial) -> None:
        self._source = source
        self._partial = partial

    def go_on(self) -> int | None:
        """The next slice; the file's size when all is done. Raises OSError, GuestError; then there is nothing of it left."""
        try:
            data = self._source.read(_SLICE)
            if data:
                self._partial.write(data)
                return None
            self._source.close()
            return self._partial.finish()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Broken off."""
        self._source.close()
        self._partial.abandon()
