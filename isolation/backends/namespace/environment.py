"""Making the environment block of a process that serves unreadable."""

from __future__ import annotations

from isolation import command_line
from isolation.backends.namespace import syscalls
from isolation.plain import os


def scrub() -> None:
    """Overwrite the block that /proc/PID/environ shows; for processes that serve, and never need a variable again.

    There is no execve(2) to replace that memory, and clearing `os.environ` does not touch it (proc(5), stat fields
    50 and 51).
    """
    os.environ.clear()
    syscalls.clearenv()
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    if 0 < start < end:
        syscalls.clear_memory(start, end)


def scrub_command_line() -> None:
    """Likewise what /proc/PID/cmdline shows: the host's, with the paths of what it has mounted, and how it was called."""
    start, end = command_line.bounds()
    if 0 < start < end:
        syscalls.clear_memory(start, end)
