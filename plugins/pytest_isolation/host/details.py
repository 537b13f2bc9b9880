"""What a test did, beyond its outcome: for people, for junit, and for `--isolation-strict`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from isolation.plain import os
from isolation.result import Account, Change, Usage
from isolation.units import format_size
from pytest_isolation.wire.sanitize import clean_name

_SHOWN = 10
# What Python, pytest and hypothesis keep for the next run; discarded with the sandbox, and nobody's leak.
_CACHES = ("__pycache__", ".pytest_cache", ".hypothesis", ".mypy_cache", ".coverage")


@dataclass(frozen=True)
class Details:
    """Of one sandbox. `refused` counts attempts to reach a network that is not there; `started`, processes and threads."""

    wall: float
    usage: Usage | None
    changes: tuple[Change, ...]
    processes: tuple[str, ...]
    started: int | None
    refused: int

    def lines(self) -> list[str]:
        """For a failure's report."""
        figures = [f"wall {self.wall:.2f} s"]
        if self.usage is not None:
            figures.append(f"cpu {self.usage.cpu:.2f} s")
            if self.usage.memory_peak:
                figures.append(f"peak memory {format_size(self.usage.memory_peak)}")
        if self.started:
            figures.append(f"{self.started} process{'es' if self.started > 1 else ''} or threads started")
        found = [", ".join(figures)]
        found += _some([f"{change.kind} {clean_name(change.path)}" for change in self.changes], "file changes")
        found += _some([f"left running: {clean_name(words)}" for words in self.processes], "processes left running")
        if self.refused:
            found.append(f"network: {self.refused} attempt{'s' if self.refused > 1 else ''} refused, as there is no route")
        return found

    def properties(self) -> list[tuple[str, object]]:
        """For `user_properties`, and so for junit."""
        found: list[tuple[str, object]] = [("isolation_wall", round(self.wall, 4))]
        if self.usage is not None:
            found += [("isolation_cpu", round(self.usage.cpu, 4)), ("isolation_memory", self.usage.memory_peak or 0)]
        found += [("isolation_changes", len(self.changes)), ("isolation_processes_left", len(self.processes))]
        return [*found, ("isolation_network_refused", self.refused)]

    def leak(self) -> str:
        """What `--isolation-strict` objects to; "" for nothing."""
        found = _some([f"{change.kind} {clean_name(change.path)}" for change in self.changes], "file changes")
        found += _some([f"still running: {clean_name(words)}" for words in self.processes], "processes")
        return "\n".join(found)


def relevant(account: Account, ignored: Iterable[str]) -> tuple[Change, ...]:
    """The changes that say something: outside of `ignored` directories (pytest's own) and those that hold them, and of
    caches."""
    prefixes = tuple(os.path.join(path, "") for path in ignored)
    return tuple(
        change for change in account.changes
        if not change.path.startswith(prefixes)
        and not any(prefix.startswith(os.path.join(change.path, "")) for prefix in prefixes)
        and not any(part.startswith(_CACHES) for part in change.path.split("/"))
    )  # fmt: skip


def _some(lines: list[str], what: str) -> list[str]:
    if len(lines) <= _SHOWN:
        return lines
    return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more {what}"]
