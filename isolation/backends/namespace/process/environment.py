"""Making the environment block of a process that serves unreadable."""

from __future__ import annotations

from isolation import command_line
from isolation.linux import syscalls
from isolation.plain import os


def scrub() -> None:
    """Overwrite the block that /proc/PID/environ shows; for processes that serve, and never need a variable again.

    There is no execve(2) to replace that memory, and clearing `os.environ` does not touch it.
    """
    os.environ.clear()
    syscalls.clearenv()
    _clear(command_line.ENVIRONMENT)


def scrub_command_line() -> None:
    """Likewise what /proc/PID/cmdline shows: the host's, with the paths of what it has mounted, and how it was called."""
    _clear(command_line.ARGUMENTS)


def _clear(field: int) -> None:
    start, end = command_line.area(field)
    if start < end:
        syscalls.clear_memory(start, end)
