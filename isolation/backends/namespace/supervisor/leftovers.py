"""What a fork left behind, looked at by its supervisor when the payload has ended, and before all is taken down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isolation.backends.namespace.rootfs import changes
from isolation.backends.namespace.rootfs.mounts import FreshOperation
from isolation.plain import os, time

_CHANGES_AT_MOST = 1000
_PROCESSES_AT_MOST = 50
_TEXT_AT_MOST = 200
_PATH_AT_MOST = 500


def of(proc: int, store: int, fresh: Sequence[FreshOperation], level: int) -> dict[str, Any]:
    """As JSON: `changes`, each (path, kind, type, size), and command lines of `processes` but PID 1."""
    found = changes.of_store(store, fresh, level=level, most=_CHANGES_AT_MOST)
    return {
        "changes": [(change.path[:_PATH_AT_MOST], change.kind, change.type, change.size) for change in found],
        "processes": _processes(proc),
    }


def _processes(proc: int) -> list[str]:
    found: list[str] = []
    patience = 20  # ms, for all of them
    for name in os.listdir(proc):
        if name.isdigit() and name != "1" and len(found) < _PROCESSES_AT_MOST:
            state = _read(proc, f"{name}/stat").rpartition(")")[2].split()[:1]
            if state and state[0] not in "ZX":
                # In the middle of execve(2) there is a name before there are arguments.
                while not (words := _read(proc, f"{name}/cmdline").replace("\0", " ").strip()) and patience > 0:
                    patience -= 1
                    time.sleep(0.001)
                found.append((words or _read(proc, f"{name}/comm").strip())[:_TEXT_AT_MOST])
    return found


def _read(proc: int, name: str) -> str:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    except OSError:
        return ""
    try:
        return os.read(fd, 4096).decode("utf-8", "replace")
    except OSError:
        return ""
    finally:
        os.close(fd)
