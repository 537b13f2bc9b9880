"""The control group of the guest's programs: limits, freezing, and the kernel's word on memory (cgroup v2)."""

from __future__ import annotations

import os
import select
from typing import Any

_PERIOD = 100_000  # µs, of cpu.max


class Cgroup:
    """One group beside the agent's own."""

    guest = ""

    def prepare(self, root: str) -> None:
        """`root` is where cgroup2 is mounted."""
        _write(f"{root}/cgroup.subtree_control", "+memory +pids +cpu")
        self.guest = f"{root}/guest"
        os.mkdir(self.guest)
        self._kills = _oom_kills()

    def limit(self, limits: dict[str, Any]) -> None:
        """memory in bytes, pids, cpus in cores; None for no limit."""
        if limits["memory"] is not None:
            _write(f"{self.guest}/memory.max", str(limits["memory"]))
        if limits["pids"] is not None:
            _write(f"{self.guest}/pids.max", str(limits["pids"]))
        if limits["cpus"] is not None:
            _write(f"{self.guest}/cpu.max", f"{int(limits['cpus'] * _PERIOD)} {_PERIOD}")

    def busy(self) -> bool:
        """Whether there is more in it than one process with one thread."""
        with open(f"{self.guest}/cgroup.threads", encoding="ascii") as file:
            return len(file.read().split()) > 1

    def freeze(self, *, frozen: bool) -> None:
        """Stop every program where it is, or let them run on; waits until they are stopped."""
        _write(f"{self.guest}/cgroup.freeze", "1" if frozen else "0")
        if not frozen:
            return
        fd = os.open(f"{self.guest}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        poller = select.poll()
        poller.register(fd, select.POLLPRI)
        try:
            while b"frozen 1" not in os.pread(fd, 200, 0):
                poller.poll(1000)
        finally:
            os.close(fd)

    def killed_for_memory(self) -> bool:
        """Whether the kernel has killed something for want of memory since this was last asked."""
        kills = _oom_kills()
        before, self._kills = self._kills, kills
        return kills != before

    def memory_peak(self) -> int | None:
        """Bytes, of all the guest's programs together."""
        try:
            with open(f"{self.guest}/memory.peak", encoding="ascii") as file:
                return int(file.read())
        except (OSError, ValueError):
            return None  # a kernel before 5.19


def _oom_kills() -> int:
    """For a limit as for the whole machine."""
    with open("/proc/vmstat", encoding="ascii") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)
