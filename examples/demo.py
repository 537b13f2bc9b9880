"""What `make demo` shows, step by step. It looks at each outcome itself: status 1 if one is not as it should be.

python examples/demo.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
LINES_AT_MOST = 24


class Demo:
    """Counts what was not as it should be."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._number = 0
        self.wrong: list[str] = []

    def step(self, title: str, command: str, *expected: str, project: str = "", status: int = 0, copy: bool = False) -> None:
        """Run a command, in an example's directory or a copy of that. All of `expected` must be in what it prints."""
        self._number += 1
        where = f"cd examples/{project}; " if project else ""
        print(f"\n\033[1m{self._number}. {title}\033[0m\n$ {where}{command}", flush=True)
        place = HERE / project if project else HERE.parent
        if copy:
            place = shutil.copytree(place, self._directory / project)
        environment = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "110",
            # Of other plug-ins that are installed here, one shuffles the tests.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p isolation",
            # A machine shows this directory, too, and is made anew when anything in it has changed.
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        done = subprocess.run(
            ["sh", "-c", f"exec {command}"], cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip
        # Tests that mean harm print what they like, and to a pipe it is passed on as it is.
        lines = ["".join(char if char.isprintable() else "�" for char in line) for line in done.stdout.splitlines()]
        missing = [text for text in expected if text not in done.stdout]
        fine = not missing and done.returncode == status
        shown = lines if len(lines) <= LINES_AT_MOST or not fine else ["…", *lines[-LINES_AT_MOST:]]
        print(*(f"  {line}" for line in shown), sep="\n")
        self.judge(fine, f"status {done.returncode}; missing: {missing or 'nothing'}")

    def judge(self, fine: bool, why: str) -> None:
        """Tell whether a step went as it should."""
        print("  → as it should be" if fine else f"  → NOT as it should be: {why}", flush=True)
        if not fine:
            self.wrong.append(f"step {self._number}: {why}")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="isolation-demo-") as name:
        demo = Demo(Path(name))
        demo.step("What works on this machine", "isolation doctor", "namespace")
        demo.step(
            "Fourteen tests in plain pytest. Seven leave something behind, and seven trip over it",
            "pytest -q --tb=no", "7 failed, 7 passed", project="leaky", status=1, copy=True,
        )  # fmt: skip
        demo.step(
            "The same, each in a sandbox of its own: what one leaves, no other sees",
            "pytest -q --isolation", "14 passed", project="leaky",
        )  # fmt: skip
        demo.step(
            "Fourteen tests that mean harm. Those that crash, hang, hoard or lie fail with the reason; the run goes on",
            "pytest -q --isolation --tb=no", "7 failed, 7 passed", "ran out of memory", "timed out after 5s",
            "killed by signal 11", project="hostile", status=1,
        )  # fmt: skip
        marks = Path("/tmp/isolation-untrusted")
        before = sorted(marks.rglob("*"))
        demo.step(
            "A project whose configuration and imports mean harm, too: all of pytest runs in a sandbox",
            "isolation pytest -q", "6 passed", project="untrusted",
        )  # fmt: skip
        demo.judge(sorted(marks.rglob("*")) == before, f"it has left something in {marks}")
        demo.step(
            "The first suite again, each test in a virtual machine of its own",
            "pytest -q --isolation=microvm", "14 passed", project="leaky",
        )  # fmt: skip
        demo.step(
            "Real projects' own suites, plain and isolated: does every test end alike?",
            f"{sys.executable} benchmarks/suites.py itsdangerous pluggy", "itsdangerous",
        )  # fmt: skip
    if demo.wrong:
        print("\nNOT all was as it should be:", *demo.wrong, sep="\n  ")
        return 1
    print("\nAll was as it should be.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
