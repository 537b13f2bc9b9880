"""What a session fixture costs that takes 2 s: plain pytest, pytest-forked (which pays for it in every test), and this.

    python benchmarks/fixtures.py [--tests 50] [--seconds 2] [--repeat 3]

The runs take turns; the medians are compared. pytest-forked 1.7.5 fails on pytest 9.2, and so has an environment of its own,
and is run once: it takes tests × seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from _common import CHECKOUT, clean_environment, default_cache, make_venv, median, table, timed_run

SUITE = """
import time
import pytest

@pytest.fixture(scope="session")
def slow():
    time.sleep({seconds})
    return []

@pytest.mark.parametrize("number", range({tests}))
def test_it(slow, number):
    slow.append(number)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    cache = default_cache("per_test")
    ours = make_venv(cache / "ours", ["pytest", "numpy"], checkout=CHECKOUT)
    forked = make_venv(cache / "forked", ["pytest<9", "pytest-forked==1.7.5", "numpy"])
    commands: dict[str, tuple[list[str | Path], int]] = {
        "plain": ([ours, "-m", "pytest", "-p", "no:isolation"], options.repeat),
        "isolation": ([ours, "-m", "pytest", "--isolation"], options.repeat),
        "isolation, 2 jobs": ([ours, "-m", "pytest", "--isolation", "--isolation-jobs=2"], options.repeat),
        "forked": ([forked, "-m", "pytest", "--forked"], 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "test_it.py").write_text(SUITE.format(seconds=options.seconds, tests=options.tests))
        for turn in range(options.repeat):
            for name, (command, times) in commands.items():
                if turn >= times:
                    continue
                log = Path(directory, "log")
                words = [*command, "-q", "-p", "no:cacheprovider"]
                run = timed_run(words, cwd=Path(directory), log=log, timeout=900, environment=clean_environment(ours))
                if run.status != 0:
                    print(log.read_text()[-2000:], file=sys.stderr)
                    return 1
                seconds[name].append(run.seconds)
    plain = median(seconds["plain"])
    rows = [[name, f"{median(found):.2f}", f"{median(found) / plain:.2f}"] for name, found in seconds.items()]
    print(f"{options.tests} tests with a session fixture of {options.seconds:g} s, medians of {options.repeat}")
    print(table(["", "seconds", "of plain"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
