"""A command in a fresh sandbox: `Sandbox.run(["/bin/true"])`, and bubblewrap doing the same.

    python benchmarks/launch.py [--repeat 100]

Both in turn, from one process that has imported everything; in an order that changes, since each leaves work to the kernel
that the next one must share the processors with. bubblewrap (apt install bubblewrap) gets the namespaces and the
read-only view of the host, without an own /etc, limits, changes, or a system call filter. Also: a second command in a
sandbox that stands already, and a fork of a warm process.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

from _common import table

from isolation import Sandbox, SandboxSpec, registry
from isolation.guest import Guest

BWRAP = "bwrap --unshare-all --ro-bind / / --dev /dev --proc /proc --tmpfs /tmp --die-with-parent /bin/true"


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1000


def launch() -> None:
    with Sandbox(SandboxSpec(backend="namespace")) as box:
        assert box.run(["/bin/true"]).verdict.ok


def bwrap() -> None:
    subprocess.run(BWRAP.split(), check=True, capture_output=True)


def bare() -> None:
    subprocess.run(["/bin/true"], check=True, capture_output=True)


def answer(guest: Guest) -> None:
    for _job in guest.forks():
        guest.send({"pid": 2})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=100)
    options = parser.parse_args()
    actions: dict[str, Callable[[], object]] = {"no sandbox": bare, "isolation: new sandbox": launch}
    if shutil.which("bwrap"):
        actions["bwrap --unshare-all"] = bwrap
    else:
        print("bwrap is not installed (apt install bubblewrap): nothing to compare with", file=sys.stderr)
    with (
        Sandbox(SandboxSpec(backend="namespace")) as box,
        registry.get("namespace").template(SandboxSpec(), answer, None) as template,
    ):

        def fork() -> None:
            with template.fork() as made:
                assert made.receive(10) == {"pid": 2}

        actions["isolation: next command"] = lambda: box.run(["/bin/true"])
        actions["isolation: fork of a warm process"] = fork
        times: dict[str, list[float]] = {name: [] for name in actions}
        order, shuffle = list(actions.items()), random.Random(0).shuffle
        for turn in range(options.repeat + 3):
            shuffle(order)
            for name, action in order:
                taken = timed(action)
                if turn >= 3:
                    times[name].append(taken)
    medians = {name: median(values) for name, values in times.items()}
    peer = medians.get("bwrap --unshare-all")
    rows = [
        [name, f"{value:.2f}", f"{min(times[name]):.2f}", f"{value / peer:.2f}" if peer else "-"]
        for name, value in medians.items()
    ]
    print(table(["", "median ms", "best ms", "ratio to bwrap"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
