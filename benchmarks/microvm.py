"""What a virtual machine for every test costs: boot, snapshot, fork, a warm pytest, memory.

    python benchmarks/microvm.py [--repeat N] [--alive N]

Needs `isolation microvm setup`. The figures are for this machine's acceleration, which is printed first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

from _common import median, table

from isolation import Mount, SandboxSpec
from isolation.backends.microvm import boot, machine
from isolation.backends.microvm.artifacts import setup
from isolation.backends.microvm.artifacts.progress import Progress
from isolation.backends.microvm.plan import Plan, make_plan
from isolation.backends.microvm.plugin import MicrovmBackend, acceleration
from isolation.backends.microvm.template import MicrovmTemplate
from isolation.backends.microvm.vm.vm import State, Vm
from isolation.guest import Guest

TESTS = "import pytest\n@pytest.mark.parametrize('n', range(200))\ndef test_x(n): assert n >= 0\n"


def answer(guest: Guest) -> None:
    """The smallest payload: says that it is there."""
    for job in guest.forks():
        guest.send({"job": job})


def available() -> int:
    """MemAvailable, in bytes."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))


def boots(plan: Plan, repeat: int) -> tuple[list[float], list[float], State]:
    """Seconds from nothing to an agent that speaks, and from there to a saved machine."""
    booted: list[float] = []
    saved: list[float] = []
    saving = Vm.save
    state: State | None = None

    def timed_save(vm: Vm) -> State:
        booted.append(time.perf_counter() - begun)
        before = time.perf_counter()
        made = saving(vm)
        saved.append(time.perf_counter() - before)
        return made

    Vm.save = timed_save  # type: ignore[assignment, method-assign]
    try:
        for _ in range(repeat):
            begun = time.perf_counter()
            if state is not None:
                state.close()
            state = boot.boot(plan)
    finally:
        Vm.save = saving  # type: ignore[method-assign]
    assert state is not None
    return booted, saved, state


def forks(template: MicrovmTemplate, repeat: int, *, reseed: bool) -> list[float]:
    """Seconds from asking for a fork to its payload's first word; none was made ahead."""
    times = []
    for number in range(repeat):
        before = time.perf_counter()
        with template.fork(number, reseed=reseed) as fork:
            assert fork.receive(30) == {"job": number}
            times.append(time.perf_counter() - before)
        time.sleep(0.1)  # its end is not the next one's beginning
    return times


def alive(template: MicrovmTemplate, count: int) -> tuple[float, float]:
    """`count` forks that all live at once: seconds to make each and hear from it, and bytes of memory each."""
    before, begun = available(), time.perf_counter()
    made = [template.fork(number) for number in range(count)]
    for number, fork in enumerate(made):
        assert fork.receive(60) == {"job": number}
    taken, used = time.perf_counter() - begun, before - available()
    for fork in made:
        fork.close()
    return taken / count, used / count


def tests(template: MicrovmTemplate, names: list[str], jobs: int) -> float:
    """Seconds a test, each in a fork of a pytest that has collected."""
    left = list(reversed(names))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not left:
                    return
                name = left.pop()
            with template.fork({"nodeid": name, "nth": 0, "tell_capture": False}) as fork:
                said = list(iter(lambda: fork.receive(60), None))
                assert any("done" in message for message in said), said

    begun = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - begun) / len(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--alive", type=int, default=64)
    options = parser.parse_args()
    images = setup.load(progress=Progress.stderr())
    accel = acceleration(images)
    rows: list[list[str]] = []

    def row(what: str, values: list[float], unit: str = "ms", factor: float = 1000) -> None:
        middle, best, worst = (value * factor for value in (median(values), min(values), max(values)))
        rows.append([what, f"{middle:.1f} {unit}", f"{best:.1f}", f"{worst:.1f}"])

    with tempfile.TemporaryDirectory() as directory:
        project = Path(directory)
        (project / "test_x.py").write_text(TESTS)
        spec = SandboxSpec("microvm", mounts=[Mount.overlay(project)], workdir=project)
        plan = make_plan(spec, images, accel)
        booted, saved, state = boots(plan, max(3, options.repeat // 5))
        state.close()
        row("boot to agent", booted)
        row("snapshot (memory stays where it is)", saved)
        launches = []
        for _ in range(options.repeat):
            before = time.perf_counter()
            machine.prepare(plan).close()
            launches.append(time.perf_counter() - before)
        row("new sandbox, from the saved boot, and its end", launches)

        path = [str(Path(__file__).parent), *sys.path]
        with MicrovmTemplate.make(plan, "microvm:answer", None, path=path, ahead=0) as template:
            forks(template, 3, reseed=True)
            row("fork to first reply, clock set", forks(template, options.repeat, reseed=False))
            row("fork to first reply, clock set and reseeded", forks(template, options.repeat, reseed=True))
            each, memory = alive(template, options.alive)
            rows.append([f"{options.alive} forks alive: each", f"{each * 1000:.1f} ms", "", ""])
            rows.append([f"{options.alive} forks alive: memory each", f"{memory / (1 << 20):.1f} MiB", "", ""])

        names = [f"test_x.py::test_x[{number}]" for number in range(2 * options.repeat)]
        config = {"args": ["-q", "-p", "no:cacheprovider"]}
        begun = time.perf_counter()
        for jobs in (1, 2):
            with MicrovmTemplate.make(
                plan, "pytest_isolation.inside.worker:main", config, path=sys.path, ahead=jobs
            ) as template:
                warm = time.perf_counter() - begun
                tests(template, names[:4], jobs)
                row(f"a test in a fork of a warm pytest, {jobs} at a time", [tests(template, names, jobs) for _ in range(3)])
        rows.append(["pytest warmed up (boot saved before)", f"{warm * 1000:.0f} ms", "", ""])
    print(f"{MicrovmBackend().describe()}; medians of {options.repeat}")
    print(table(["", "median", "best", "worst"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
