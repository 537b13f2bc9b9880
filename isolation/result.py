"""What is told afterwards: why something ended, what it used, and what it changed."""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass
from typing import Literal


class Ended(enum.StrEnum):
    """The ways in which something ends."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"
    DEADLOCKED = "deadlocked"  # every thread waited for another
    KILLED = "killed"  # by the host: closed, cancelled
    LOST = "lost"  # the sandbox went away without saying why


@dataclass(frozen=True)
class Verdict:
    """Why something ended. `status` is the exit status or the signal's number, where there is one."""

    ended: Ended
    status: int | None = None
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Exited by itself, with status 0."""
        return self.ended is Ended.EXITED and self.status == 0

    @property
    def returncode(self) -> int:
        """As `subprocess` has it: the exit status, or minus the signal (SIGKILL where the host ended it)."""
        if self.ended is Ended.EXITED:
            return self.status or 0
        if self.ended is Ended.SIGNALLED and self.status:
            return -self.status
        return -signal.SIGKILL

    @property
    def shell_code(self) -> int:
        """As a shell has it: 128+signal; 124 on timeout (timeout(1)), 137 when out of memory."""
        if self.ended is Ended.TIMED_OUT:
            return 124
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    def __str__(self) -> str:
        if self.ended is Ended.EXITED:
            said = f"exited with status {self.status}"
        elif self.ended is Ended.SIGNALLED:
            said = f"killed by signal {self.status} ({signal_name(self.status or 0)})"
        else:
            said = self.ended.value
        return f"{said}: {self.detail}" if self.detail else said


def signal_name(number: int) -> str:
    """ "SIGSEGV" for 11; "signal 99" for what has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True)
class Usage:
    """What ran, added up over all its processes. Seconds and bytes; None where nobody measured it."""

    wall: float
    cpu_user: float = 0.0
    cpu_system: float = 0.0
    memory_peak: int | None = None

    @property
    def cpu(self) -> float:
        """User and system time together, in seconds."""
        return self.cpu_user + self.cpu_system


@dataclass(frozen=True)
class Completed:
    """A command that ran to its end. Output over the asked-for bound is dropped, and `truncated` says so."""

    args: tuple[str, ...]
    verdict: Verdict
    usage: Usage
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False

    @property
    def returncode(self) -> int:
        """As `subprocess` has it."""
        return self.verdict.returncode


@dataclass(frozen=True, order=True)
class Change:
    """A path that the guest added, changed or deleted, seen from the host; `size` in bytes (files only)."""

    path: str
    kind: Literal["added", "changed", "deleted"]
    type: Literal["file", "directory", "symlink", "other"] = "file"
    size: int | None = None


@dataclass(frozen=True)
class Account:
    """What a fork left behind: `changes` to its files, and the command lines of `processes` that still ran."""

    changes: tuple[Change, ...] = ()
    processes: tuple[str, ...] = ()
