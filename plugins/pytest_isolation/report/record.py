"""What a run with sandboxes leaves to be read afterwards: one record a test, and one of the run around them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from isolation.result import Change

FORMAT = 1  # of the JSON; counts up when a reader of the old one would be misled


@dataclass(frozen=True)
class TestRecord:
    """One test in one sandbox; a test that is run again has one record for each time."""

    __test__: ClassVar[bool] = False  # pytest takes it for a test class where a test imports it

    nodeid: str
    outcome: str  # passed, failed, error, skipped, xfailed, xpassed, rerun
    sandbox: int  # number of the fork, from 1; 0 for a test in pytest's own process
    worker: int  # its lane, from 0
    backend: str
    start: float  # seconds since the epoch
    wall: float  # seconds
    cpu: float | None = None  # seconds
    memory: int | None = None  # peak, in bytes
    verdict: str = ""  # why its process ended
    message: str = ""  # why it did not pass; may hold ANSI colours
    sections: tuple[tuple[str, str], ...] = ()  # captured output: name and text
    changes: tuple[Change, ...] = ()  # of files
    processes: tuple[str, ...] = ()  # command lines of what was still running
    refused: tuple[str, ...] = ()  # what it tried on the network

    def to_json(self) -> dict[str, Any]:
        """Nothing but what JSON knows."""
        return {
            **vars(self),
            "sections": [{"name": name, "text": text} for name, text in self.sections],
            "changes": [asdict(change) for change in self.changes],
            "processes": list(self.processes),
            "refused": list(self.refused),
        }


@dataclass(frozen=True)
class RunRecord:
    """One run of pytest."""

    created: float  # when this was written, in seconds since the epoch
    wall: float  # seconds
    pytest: str  # version
    python: str  # version
    platform: str
    rootdir: str
    args: tuple[str, ...]  # as given on the command line
    jobs: int  # sandboxes at the same time, at most
    backend: str
    exitstatus: int
    tests: tuple[TestRecord, ...]

    def summary(self) -> dict[str, Any]:
        """The run in a few figures; None for what nobody measured."""
        cpu = [test.cpu for test in self.tests if test.cpu is not None]
        return {
            "outcomes": dict(Counter(test.outcome for test in self.tests)),
            "sandboxes": sum(test.sandbox > 0 for test in self.tests),
            "cpu": sum(cpu) if cpu else None,
            "memory": max((test.memory for test in self.tests if test.memory is not None), default=None),
        }

    def to_json(self) -> dict[str, Any]:
        """Nothing but what JSON knows."""
        return {
            "format": FORMAT,
            **vars(self),
            "args": list(self.args),
            "summary": self.summary(),
            "tests": [test.to_json() for test in self.tests],
        }
