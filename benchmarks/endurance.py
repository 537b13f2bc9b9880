"""10,000 forks from one template: memory, descriptors and time per fork must stay what they were.

python benchmarks/endurance.py [--forks 10000]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from statistics import median

from _common import table

from isolation import SandboxSpec, registry
from isolation.guest import Guest


def answer(guest: Guest) -> None:
    for job in guest.forks():
        guest.send({"job": job})


def memory_of(pid: int) -> int:
    """Proportional set size in KiB."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forks", type=int, default=10_000)
    options = parser.parse_args()
    rows = []
    with registry.get("namespace").template(SandboxSpec(), answer, None) as template:
        times: list[float] = []
        for number in range(1, options.forks + 1):
            started = time.perf_counter()
            with template.fork(number) as fork:
                assert fork.receive(30) == {"job": number}
            times.append((time.perf_counter() - started) * 1000)
            if number % (options.forks // 10) == 0:
                descriptors = len(os.listdir("/proc/self/fd"))
                rows.append([number, f"{median(times):.2f}", descriptors, memory_of(os.getpid())])
                times.clear()
    print(table(["forks", "median ms", "descriptors", "memory KiB"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
