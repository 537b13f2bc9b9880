"""What the sandbox uses, and may use, where programs would otherwise be shown the host's figures."""

from __future__ import annotations

import math
import os
from typing import Any

from isolation.units import format_size as size

_PAGE = os.sysconf("SC_PAGE_SIZE")


def processes() -> int:
    """How many processes there are in the sandbox."""
    return sum(name.isdigit() for name in os.listdir("/proc"))


def memory_used() -> int:
    """Bytes of memory of all processes in the sandbox; what they share (forks, checkpoints) is counted once."""
    return sum(_memory(name) for name in os.listdir("/proc") if name.isdigit())


def _memory(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        pass  # PID 1 lets nobody look, but at its size
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def show_limits(psutil: Any, memory: int | None, cpus: float | None) -> None:
    """Let that module, and with it ipykernel's usage report, tell of the sandbox."""
    if memory is not None:
        host_memory = psutil.virtual_memory

        def virtual_memory() -> Any:
            found = host_memory()
            total = min(memory, found.total)
            used = min(memory_used(), total)
            return found._replace(
                total=total, used=used, free=total - used, available=total - used, percent=round(100 * used / total, 1)
            )

        psutil.virtual_memory = virtual_memory
    if cpus is not None:
        host_count = psutil.cpu_count

        def cpu_count(logical: bool = True) -> int | None:
            found = host_count(logical)
            return None if found is None else min(found, math.ceil(cpus))

        psutil.cpu_count = cpu_count


__all__ = ["memory_used", "processes", "show_limits", "size"]
