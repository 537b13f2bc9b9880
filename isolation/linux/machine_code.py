"""Machine code of our own, made executable; for what must run where Python cannot."""

from __future__ import annotations

import ctypes
import mmap

from isolation.linux import syscalls


class MachineCode:
    """Instructions in a page of their own, and their address. The page stays for as long as this object does."""

    def __init__(self, instructions: bytes) -> None:
        self._pages = private_pages(len(instructions))
        self._pages[: len(instructions)] = instructions
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        # Never writable and executable at once; and this change is when an ARM kernel brings the instruction cache up to
        # date with what was written (arm64: __sync_icache_dcache).
        syscalls.mprotect(self.address, len(self._pages), mmap.PROT_READ | mmap.PROT_EXEC)


def private_pages(size: int) -> mmap.mmap:
    """At least `size` bytes of memory of their own. Private: Python's default is shared, and a fork, which is the guest's,
    could then write what its supervisor runs."""
    pages = -(-size // mmap.PAGESIZE)
    return mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
