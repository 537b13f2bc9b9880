"""Runs the tests: files side by side, each in a pytest of its own; what failed once more, alone, after all others.

    python tests/suite.py [--quick] [--jobs N] [FILE …]

Most tests wait: for sandboxes, machines, kernels. So more than one file runs at a time, the longest first. Nothing that a test
looks at is another's: each pytest has its own command line, by which tests know what they have started (conftest.py).

A test that fails is run again when nothing else runs. If it passes then, it is told as FLAKY, with both outputs; two such tests
are forgiven, and each is a defect to mend. Where several run this at once (CI: root and an ordinary user), they name a common
file in ISOLATION_TEST_LOCK: "alone" waits for the others, too, and two are forgiven in all. Each says who it is in ISOLATION_TESTS ("root", "user"): tests
that do not depend on who runs them (marked "once") are run by one of them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).parent
SOURCES = ("isolation", "plugins", "kernels", "benchmarks")
FLAKY_AT_MOST = 2
AGAIN_AT_MOST = 10
BOUND = 30 * 60  # s, for one file; the longest takes less than half of it
# What takes longest comes first, or it would be what everybody waits for in the end.
LONG = """
    kernel/test_machine backends/microvm/test_machine kernel/test_features pytest_plugin/test_microvm kernel/test_undo
    pytest_plugin/test_ecosystem test_sandbox kernel/test_pool backends/microvm/test_template pytest_plugin/test_wide
    backends/namespace/checkpoints/test_file_checkpoints pytest_plugin/test_outcomes pytest_plugin/test_sealed kernel/test_lab
    kernel/test_frontends kernel/test_security pytest_plugin/test_deadlock test_template test_branch security/test_microvm
    pytest_plugin/test_reports pytest_plugin/test_runs security/test_namespace test_docs test_examples
""".split()
# Each user has one pool of warm kernels, which every kernel that starts asks: what tests that runs beside no other kernels.
POOL, KERNELS = "tests/kernel/test_pool.py", "tests/kernel/"
# Seconds in all: no machine, no kernel, few runs of pytest.
QUICK = """
    backends/microvm/vm/test_qemu backends/microvm/vm/test_qmp backends/namespace/rootfs/test_layer_tree backends/namespace/test_plan
    linux pytest_plugin/test_strays test_doctor test_mux test_spec test_template test_wire
""".split()


@dataclass
class Outcome:
    """What became of one pytest."""

    name: str
    output: str = ""
    seconds: float = 0.0
    cpu: float = 0.0  # s, of all that it has waited for
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counted = ", ".join(f"{self.counts[what]} {what}" for what in ("passed", "failed", "skipped") if self.counts[what])
        return f"{self.name:48} {counted or 'ran no test'} in {self.seconds:.0f} s (cpu {self.cpu:.0f} s)"


class Pytest:
    """A running one."""

    def __init__(self, name: str, words: Sequence[str], directory: Path) -> None:
        self.outcome = Outcome(name)
        self._directory = directory
        directory.mkdir()
        self._output = (directory / "output").open("w+", encoding="utf-8", errors="replace")
        self._begun = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={directory}/cache", f"--junitxml={directory}/junit.xml"]
        self._process = subprocess.Popen(
            [*command, "--durations=5", *words], cwd=HERE.parent, stdin=subprocess.DEVNULL, stdout=self._output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def poll(self) -> Outcome | None:
        """The outcome, once it has ended."""
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if not pid:
            if time.monotonic() - self._begun > BOUND:
                self.end()
            return None
        self._process.returncode = os.waitstatus_to_exitcode(status)
        outcome = self.outcome
        outcome.cpu = usage.ru_utime + usage.ru_stime
        outcome.seconds = time.monotonic() - self._begun
        self._output.seek(0)
        outcome.output = self._output.read()
        self._output.close()
        with contextlib.suppress(OSError, ValueError):
            outcome.failed = list(json.loads((self._directory / "cache/v/cache/lastfailed").read_text()))
        with contextlib.suppress(OSError, xml.etree.ElementTree.ParseError):
            for suite in xml.etree.ElementTree.parse(self._directory / "junit.xml").iter("testsuite"):
                number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
                outcome.counts["skipped"] += number["skipped"]
                outcome.counts["passed"] += number["tests"] - number["failures"] - number["errors"] - number["skipped"]
        if self._process.returncode not in (0, 5) and not outcome.failed:
            outcome.failed = [outcome.name]  # it has not got so far as to say which
        outcome.counts["failed"] = len(outcome.failed)
        return outcome

    def end(self) -> None:
        """At once, with what it has started."""
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def side_by_side(files: Sequence[str], jobs: int, directory: Path) -> Iterator[Outcome]:
    """Run each file; yields as they end."""
    waiting, running = list(files), list[Pytest]()
    try:
        while waiting or running:
            while len(running) < jobs and (name := may_run(waiting, [each.outcome.name for each in running])) is not None:
                waiting.remove(name)
                running.append(Pytest(name, [name], directory / name.replace("/", "-")))
            time.sleep(0.05)
            for each in list(running):
                if (outcome := each.poll()) is not None:
                    running.remove(each)
                    yield outcome
    finally:
        for each in running:
            each.end()


def may_run(waiting: Iterable[str], running: Sequence[str]) -> str | None:
    """The first that disturbs none of those that run."""
    for name in waiting:
        others = [each for each in running if each.startswith(KERNELS) and POOL in (each, name)]
        if not (others and name.startswith(KERNELS)):
            return name
    return None


def alone(test: str, directory: Path) -> Outcome:
    """Run one test again."""
    running = Pytest(test, [test], directory)
    try:
        while (outcome := running.poll()) is None:
            time.sleep(0.05)
        return outcome
    finally:
        running.end()


def files_of(words: Sequence[str]) -> list[str]:
    """Test files by path from the root of the project, the longest first."""
    found = set[str]()
    for word in words:
        path = HERE.parent / word
        if not path.exists():
            raise SystemExit(f"there is no {word}")
        found |= {str(file.relative_to(HERE.parent)) for file in ([path] if path.is_file() else path.rglob("test_*.py"))}
    order = {f"tests/{name}.py": number for number, name in enumerate(LONG)}
    return sorted(found, key=lambda name: (order.get(name, len(order)), name))


@contextlib.contextmanager
def together() -> Iterator[TextIO]:
    """The common file, locked together with those that run side by side. It holds the names of tests that were flaky."""
    path = os.environ.get("ISOLATION_TEST_LOCK")
    with open(path, "a+", encoding="utf-8") if path else tempfile.TemporaryFile("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield file


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="only what is done within a minute")
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1, help="files at a time (default: %(default)s)")
    parser.add_argument("files", nargs="*", default=["tests"], metavar="FILE")
    options = parser.parse_args()
    quick = [f"tests/{name}" if (HERE / name).is_dir() else f"tests/{name}.py" for name in QUICK]
    words = quick if options.quick else options.files
    files = files_of(words)
    if not files:
        parser.error(f"no test file in {' '.join(words)}")
    begun = time.monotonic()
    # A shell that starts this in the background has it ignore these, which tests would inherit: some are about Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    # What Python and pytest write beside the sources, they write now: a machine shows these directories, and is made anew when
    # anything in them has changed.
    subprocess.run([sys.executable, "-m", "compileall", "-q", *SOURCES], cwd=HERE.parent, check=True)
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *files], cwd=HERE.parent,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if collected.returncode not in (0, 5):
        print(collected.stdout + collected.stderr)
        return 1
    chosen = {line.partition("::")[0] for line in collected.stdout.splitlines()}
    files = [name for name in files if name in chosen]
    counts: collections.Counter[str] = collections.Counter()
    failed: dict[str, Outcome] = {}
    flaky: list[str] = []
    with tempfile.TemporaryDirectory(prefix="isolation-tests-") as name, together() as common:
        directory = Path(name)
        os.environ.setdefault("ISOLATION_TEST_CACHE", f"{directory}/downloads")  # three files' tests need the same kernel
        for outcome in side_by_side(files, options.jobs, directory):
            print(outcome, flush=True)
            counts += outcome.counts
            failed |= dict.fromkeys(outcome.failed, outcome)
        if failed:
            fcntl.flock(common, fcntl.LOCK_EX)
        for outcome in {id(each): each for each in failed.values()}.values():
            print(f"\n{outcome.output}", flush=True)
        for number, test in enumerate(list(failed)):
            if number >= AGAIN_AT_MOST:
                print(f"{len(failed) - number} more have failed, and were not run again")
                break
            again = alone(test, directory / f"again-{number}")
            if again.failed or not again.counts["passed"]:
                print(f"\n{again.output}\nFAILED again, alone: {test}", flush=True)
                continue
            print(f"\n{again.output}\nFLAKY {test} (it failed beside others, see above, and has passed alone)", flush=True)
            del failed[test]
            print(test, file=common, flush=True)
            counts["failed"] -= 1
            counts["passed"] += 1
        common.seek(0)
        flaky = common.read().splitlines()
    for test in failed:
        print(f"FAILED {test}")
    if len(flaky) > FLAKY_AT_MOST:
        print(f"{len(flaky)} tests are flaky, which is more than {FLAKY_AT_MOST}")
    minutes, seconds = divmod(int(time.monotonic() - begun), 60)
    print(f"{minutes}:{seconds:02} min, {len(flaky)} flaky")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 1 if failed or len(flaky) > FLAKY_AT_MOST else 0


if __name__ == "__main__":
    sys.exit(main())
