"""What the benchmarks share: a cache folder, venvs made once, timed runs, medians and plain-text tables."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from statistics import median

__all__ = [
    "CHECKOUT",
    "PreparationError",
    "Run",
    "clean_environment",
    "default_cache",
    "make_venv",
    "median",
    "run_to_log",
    "table",
    "timed_run",
]

CHECKOUT = Path(__file__).resolve().parent.parent


class PreparationError(Exception):
    """Something a benchmark needs could not be fetched or installed; the text names the log to read."""


@dataclass(frozen=True)
class Run:
    """How one timed command ended."""

    seconds: float
    status: int  # negative: the signal that ended it
    timed_out: bool = False


def default_cache(part: str) -> Path:
    """`~/.cache/isolation-kit/PART`, or the same below $XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "isolation-kit" / part


def clean_environment(python: Path, **extra: str) -> dict[str, str]:
    """This process's environment less what steers Python and pytest, with the venv of `python` first on PATH.

    Hashes are fixed: some suites parametrise over sets, and a test's name must be the same in every run.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PYTEST_", "COV_", "COVERAGE_")) and name != "VIRTUAL_ENV"
    }
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment["PYTHONHASHSEED"] = "0"
    return {**environment, **extra}


def timed_run(command: Sequence[str | Path], *, cwd: Path, environment: Mapping[str, str], log: Path, timeout: float) -> Run:
    """Run `command`, its output in `log`; after `timeout` seconds kill its process group, and only that."""
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:  # an interrupt from the keyboard ends the run too
            if process.poll() is None:
                # Not yet waited for, so the number is still that of our child, and of the group it leads.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return Run(time.perf_counter() - start, process.returncode, timed_out)


def run_to_log(command: Sequence[str | Path], log: Path, what: str) -> None:
    """Run a preparing command with its output appended to `log`. Raises PreparationError if it fails."""
    with log.open("a", encoding="utf-8") as output:
        print("$", *command, file=output, flush=True)
        status = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status != 0:
        raise PreparationError(f"{what} failed with status {status}; see {log}")


def make_venv(
    directory: Path,
    requirements: Sequence[str],
    *,
    python: str = sys.executable,
    checkout: Path | None = None,
) -> Path:
    """The interpreter of a venv that has `requirements`, and with `checkout` that project (editable) as well.

    A venv is made once, and again when what it should hold has changed: its requirements, the interpreter's
    path, or the checkout's pyproject.toml, for an editable install keeps the entry points it was made with.
    """
    interpreter = directory / "bin" / "python"
    log = directory.with_name(directory.name + ".log")
    pip = [python, "-m", "pip", "--python", str(interpreter), "--no-input", "install"]
    directory.parent.mkdir(parents=True, exist_ok=True)

    base = directory / ".requirements"
    wanted = "\n".join([python, *requirements])
    if _read(base) != wanted:
        if directory.exists():
            rmtree(directory)
        log.unlink(missing_ok=True)
        run_to_log([python, "-m", "venv", "--without-pip", directory], log, f"making the venv {directory}")
        run_to_log([*pip, *requirements], log, f"installing {' '.join(requirements)}")
        base.write_text(wanted, encoding="utf-8")

    if checkout is not None:
        editable = directory / ".checkout"
        project = (checkout / "pyproject.toml").read_bytes()
        wanted = f"{checkout}\n{hashlib.sha256(project).hexdigest()}"
        if _read(editable) != wanted:
            # The requirements again, so that the project's own cannot move a pinned one.
            run_to_log([*pip, "-e", f"{checkout}[pytest]", *requirements], log, f"installing {checkout}[pytest]")
            editable.write_text(wanted, encoding="utf-8")
    return interpreter


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], left: Sequence[int] = (0,)) -> str:
    """A plain-text table; the columns numbered in `left` are left-aligned, all others right-aligned."""
    lines = [[str(cell) for cell in line] for line in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
