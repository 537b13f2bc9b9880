"""What a sandbox for every test costs: plain pytest, pytest-forked (a bare fork, no sandbox), and this.

    python benchmarks/per_test.py [--tests 500] [--repeat 3]

500 trivial tests, and 500 tests of a module that imports numpy; the three run in turn, and the medians are compared.
pytest-forked 1.7.5 fails on pytest 9.2, and so has an environment of its own with pytest 8. The last column is the goal:
full isolation in less than 0.8 of the bare fork's time. A last row shows that the plug-in costs nothing while it is off.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from _common import CHECKOUT, clean_environment, default_cache, make_venv, median, table, timed_run

SUITES = {"trivial": "", "numpy": "import numpy\n"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    cache = default_cache("per_test")
    ours = make_venv(cache / "ours", ["pytest", "numpy"], checkout=CHECKOUT)
    forked = make_venv(cache / "forked", ["pytest<9", "pytest-forked==1.7.5", "numpy"])
    commands: dict[str, list[str | Path]] = {
        "plain": [ours, "-m", "pytest", "-p", "no:isolation"],
        "off": [ours, "-m", "pytest"],
        "forked": [forked, "-m", "pytest", "--forked"],
        "isolation": [ours, "-m", "pytest", "--isolation"],
    }
    rows: list[list[object]] = []
    for suite, head in SUITES.items():
        with tempfile.TemporaryDirectory() as directory:
            tests = "\n".join(f"def test_{n}():\n    assert True" for n in range(options.tests))
            Path(directory, "test_it.py").write_text(head + tests)
            seconds: dict[str, list[float]] = {name: [] for name in commands}
            for _ in range(options.repeat + 1):  # the first of each warms the caches, and is not counted
                for name, command in commands.items():
                    environment = clean_environment(Path(command[0]))
                    log = Path(directory, f"{name}.log")
                    words = [*command, "-q", "-p", "no:cacheprovider"]
                    run = timed_run(words, cwd=Path(directory), log=log, timeout=600, environment=environment)
                    if run.status != 0:
                        print(log.read_text()[-2000:], file=sys.stderr)
                        return 1
                    seconds[name].append(run.seconds)
        medians = {name: median(values[1:]) for name, values in seconds.items()}
        each = {name: (value - medians["plain"]) / options.tests * 1000 for name, value in medians.items()}
        rows.append(
            [suite, *(f"{medians[name]:.2f}" for name in commands), f"{each['forked']:.2f}", f"{each['isolation']:.2f}",
             f"{each['isolation'] / each['forked']:.2f}", f"{each['off']:+.3f}"]
        )  # fmt: skip
    heads = "suite|plain s|off s|forked s|isolation s|forked ms/test|isolation ms/test|ratio|off ms/test"
    print(table(heads.split("|"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
