"""Two at a time: plain pytest, pytest-xdist (workers that are reused), pytest-forked under xdist, and fresh sandboxes.

    python benchmarks/parallel.py [--repeat 3] [--jobs 2]

The suite is pytest's own: most of its tests run pytest themselves, and so take tens of milliseconds. Outcomes must be equal,
or there is no table. pytest-forked 1.7.5 fails on pytest 9.2, and so has an environment of its own with pytest 8, which
runs the suite of that version: only its ratio to the plain run of the same version is told.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from _common import CHECKOUT, clean_environment, default_cache, make_venv, median, table, timed_run
from suites import Options, Suite, fetch

NEW, OLD = "9.2.0", "8.4.2"
NEEDS = ["attrs", "hypothesis", "xmlschema", "pytest-xdist", "pytest-forked==1.7.5", "setuptools"]
# pytest-forked leaves two files open in each child, and in this suite every warning is an error.
LEAKS = ["-W", "ignore::pytest.PytestUnraisableExceptionWarning", "-W", "ignore::ResourceWarning"]
TESTS = (
    "python", "logging", "test_assertion.py", "test_junitxml.py", "test_mark.py", "test_runner.py", "test_skipping.py",
    "test_unittest.py",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    number = str(options.jobs)
    runs: dict[str, tuple[str, list[str]]] = {
        "plain": (NEW, ["-p", "no:isolation", "-p", "no:xdist"]),
        f"xdist -n {number}": (NEW, ["-p", "no:isolation", "-n", number]),
        f"--isolation-jobs={number}": (NEW, ["-p", "no:xdist", "--isolation", f"--isolation-jobs={number}"]),
        "plain, pytest 8": (OLD, ["-p", "no:isolation", "-p", "no:xdist"]),
        f"--forked -n {number}, pytest 8": (OLD, ["-p", "no:isolation", *LEAKS, "--forked", "-n", number]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    counts: dict[str, str] = {}
    for _ in range(options.repeat):
        for name, (version, arguments) in runs.items():
            source, python = prepare(version)
            log = default_cache("parallel") / "log"
            log.parent.mkdir(parents=True, exist_ok=True)
            tests = [f"testing/{path}" for path in TESTS]
            words: list[str | Path] = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, *tests]
            run = timed_run(words, cwd=source, log=log, timeout=1800, environment=clean_environment(python))
            text = log.read_text(errors="replace")
            if run.status not in (0, 1):
                print(text[-3000:], file=sys.stderr)
                return 1
            seconds[name].append(run.seconds)
            counts[name] = re.sub(r", \d+ warnings?", "", text.strip().splitlines()[-1].partition(" in ")[0])
    different = {counts[name] for name, (version, _) in runs.items() if version == NEW}
    rows = []
    for name, (version, _arguments) in runs.items():
        plain, middle = median(seconds["plain" if version == NEW else "plain, pytest 8"]), median(seconds[name])
        rows.append([name, f"{middle:.1f}", f"{middle / plain:.2f}", counts[name]])
    print(table(["", "seconds", "of plain", "outcomes"], rows, left=(0, 3)))
    ours, theirs = median(seconds[f"--isolation-jobs={number}"]), median(seconds[f"xdist -n {number}"])
    print(f"\nisolation : xdist = {ours / theirs:.2f}")
    if len(different) > 1:
        print("the outcomes differ", file=sys.stderr)
        return 1
    return 0


def prepare(version: str) -> tuple[Path, Path]:
    """The unpacked sdist of a pytest, and an interpreter that has it."""
    cache = default_cache("suites")
    options = Options(sys.executable, version, cache, flags=(), plain_only=False, repeat=1, timeout=None)
    source = fetch(Suite("pytest", version, "testing"), options)
    python = make_venv(cache / "venvs" / f"pytest-itself-{version}", [f"pytest=={version}", *NEEDS], checkout=CHECKOUT)
    return source, python


if __name__ == "__main__":
    sys.exit(main())
