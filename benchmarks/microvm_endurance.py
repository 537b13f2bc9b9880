"""Forks of a machine, many in a row: does anything fail, grow, or get slower?

    python benchmarks/microvm_endurance.py [FORKS]

Each is restored, asked for one message, and closed. Printed: failures, and descriptors, threads, machines and memory of this
process at the beginning and the end, with the median time of the first and the last hundred.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from isolation import IsolationError, Mount, Sandbox, SandboxSpec

_WARM = """
def main(guest):
    for job in guest.forks():
        guest.send({"job": job})
"""
_FIRST = 20  # forks until everything that is made once is there


def _state() -> dict[str, int]:
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize() >> 10
    return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(), "resident KiB": resident}


def main() -> int:
    forks = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    times: list[float] = []
    failures: list[str] = []
    before: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "warm_endurance.py").write_text(_WARM, encoding="utf-8")
        sys.path.insert(0, directory)
        spec = SandboxSpec(backend="microvm", mounts=[Mount.overlay(directory)], workdir=directory)
        with Sandbox(spec).template("warm_endurance:main") as template:
            for number in range(forks):
                begun = time.perf_counter()
                try:
                    with template.fork(number) as fork:
                        message = fork.receive(60)
                        if message != {"job": number}:
                            failures.append(f"{number}: {message!r}, {fork.wait(5)}")
                except (IsolationError, TimeoutError) as error:
                    failures.append(f"{number}: {type(error).__name__}: {error}")
                times.append(time.perf_counter() - begun)
                if number == _FIRST:
                    before = _state()
                if number % 100 == 99:
                    print(f"{number + 1:6}  {statistics.median(times[-100:]) * 1000:6.0f} ms  {_state()}", flush=True)
            after = _state()
        left = _state()
    first, last = (statistics.median(part) * 1000 for part in (times[:100], times[-100:]))
    print(f"{forks} forks, {len(failures)} failures; median of the first hundred {first:.0f} ms, of the last {last:.0f} ms")
    for name, value in after.items():
        print(f"  {name}: {before.get(name, 0)} after {_FIRST}, {value} after {forks}, {left[name]} when all was closed")
    for failure in failures[:20]:
        print(f"  failed: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
