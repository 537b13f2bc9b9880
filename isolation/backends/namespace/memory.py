"""PID 1's eye on the sandbox's memory.

Where a cgroup holds the limit, the kernel kills at once, and no stack could be written any more: so PID 1 has it
written when the limit is near. Where there is none (an ordinary user without a delegated cgroup), PID 1 adds up
what the sandbox's processes hold, and ends the sandbox itself.
"""

from __future__ import annotations

import os
import time

from isolation.backends.namespace.cgroup import oom_kills

_NEAR = 0.85
_INTERVAL = 20  # ms; an allocating process touches some 1 to 2 GB/s, and so overshoots by some 30 MB
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Looks at most every `interval` milliseconds."""

    interval = _INTERVAL

    def __init__(self, limit: int, cgroup_files: tuple[int, int] | None, store: int, *, kills: bool) -> None:
        self._limit = limit
        self._files = cgroup_files
        self._store = store
        self._kills = kills
        self._next = 0.0

    def look(self) -> str:
        """"low", "near" the limit or "over" it (only where nobody else holds it); "unknown" between two looks."""
        now = time.monotonic()
        if now < self._next:
            return "unknown"
        self._next = now + _INTERVAL / 1000
        used = self._used()
        if used > self._limit and self._kills:
            return "over"
        return "near" if used > self._limit * _NEAR else "low"

    def kernel_killed(self) -> bool:
        """Whether the kernel has killed something of this sandbox for want of memory."""
        return self._files is not None and oom_kills(os.pread(self._files[1], 4096, 0).decode()) > 0

    def _used(self) -> int:
        if self._files is not None:
            return int(os.pread(self._files[0], 64, 0))
        filesystem = os.fstatvfs(self._store)
        stored = (filesystem.f_blocks - filesystem.f_bfree) * filesystem.f_frsize
        # Resident sizes count a page once for each process that shares it: a bound that costs 10 µs a process. Only
        # when it says "near" is the kernel asked for the exact share, which walks page tables.
        bound = stored + _resident_sum()
        return bound if bound < self._limit * _NEAR else stored + sum(map(_share, _processes()))


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]


def _resident_sum() -> int:
    return sum(map(_resident, _processes()))


def _resident(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _share(pid: str) -> int:
    """Proportional anonymous and shared memory; for a process that made itself undumpable, all it has."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            fields = dict(line.split(b":") for line in file.read().splitlines()[1:])
        return sum(int(fields[name].split()[0]) << 10 for name in (b"Pss_Anon", b"Pss_Shmem"))
    except (OSError, KeyError, ValueError):
        return _resident(pid)
