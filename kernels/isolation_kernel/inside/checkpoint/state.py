"""What a fork shares with the process that it is a fork of, or does again at random, and can be set back to what it was."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import stat
from typing import Final

from isolation_kernel.inside.checkpoint.process import SEMAPHORE, descriptors

_SEMAPHORE: Final = 32  # bytes: sizeof(sem_t)


class State:
    """As it is now: random numbers, the working directory, how far files are read, semaphores of multiprocessing's."""

    def __init__(self) -> None:
        self._random = random.getstate()  # which Python seeds anew in a fork
        self.place = os.getcwd()
        self._offsets: dict[int, int] = {}
        for fd, _link in descriptors():
            with contextlib.suppress(OSError):
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    self._offsets[fd] = os.lseek(fd, 0, os.SEEK_CUR)
        self._semaphores = {address: ctypes.string_at(address, _SEMAPHORE) for address in _semaphores()}

    def restore(self) -> None:
        """In a fork, which has it alone by now."""
        random.setstate(self._random)
        for fd, offset in self._offsets.items():
            with contextlib.suppress(OSError):
                os.lseek(fd, offset, os.SEEK_SET)
        for address, content in self._semaphores.items():
            ctypes.memmove(address, content, len(content))
        self.go_back()

    def go_back(self) -> None:
        """To the working directory, by its name: what is there now may be another file tree."""
        for place in (self.place, "/tmp"):
            with contextlib.suppress(OSError):  # in a mount that does not go back, it may be gone
                os.chdir(place)
                return


def _semaphores() -> list[int]:
    """Where they are mapped."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace", newline="\n") as file:
        return [int(line.partition("-")[0], 16) for line in file if SEMAPHORE in line]
