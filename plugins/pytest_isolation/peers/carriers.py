"""What other plug-ins would find in this process after a test, had it run here: carried out of its sandbox, as data.

Each plug-in that keeps such things has one `Carrier`. Its inside half makes JSON of what a test has left, its host half
checks that, and does what the plug-in itself would have done. Nothing is unpickled, imported or opened that a sandbox names.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import pytest

from isolation.plain import json
from pytest_isolation.peers.allure import AllureCarrier
from pytest_isolation.peers.bdd import BddCarrier
from pytest_isolation.peers.benchmark import BenchmarkCarrier
from pytest_isolation.peers.carrier import Carrier, Refused
from pytest_isolation.peers.coverage import CoverageCarrier
from pytest_isolation.peers.csv import CsvCarrier
from pytest_isolation.peers.dependency import DependencyCarrier
from pytest_isolation.peers.hypothesis import HypothesisCarrier
from pytest_isolation.peers.log_file import LogFileCarrier
from pytest_isolation.peers.retries import FlakyCarrier, RetryCarrier
from pytest_isolation.peers.syrupy import SyrupyCarrier
from pytest_isolation.peers.tmp_path import TmpPathCarrier
from pytest_isolation.wire.sanitize import clean_name

_KINDS: tuple[type[Carrier], ...] = (
    CoverageCarrier, HypothesisCarrier, BenchmarkCarrier, SyrupyCarrier, TmpPathCarrier, LogFileCarrier, FlakyCarrier,
    RetryCarrier, DependencyCarrier, BddCarrier, AllureCarrier, CsvCarrier,
)  # fmt: skip

_VALUES_AT_MOST = 1_000_000  # in one message
_NAMES_AT_MOST = 20

__all__ = ["Carriers", "Refused"]


class Carriers:
    """Those of one session, for one of the two sides."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._all: list[Carrier] | None = None
        self._lost: dict[str, str] = {}
        self._left_out: dict[str, None] = {}

    def _found(self) -> list[Carrier]:
        """Whether a plug-in is in use is known after collection, which may import it."""
        if self._all is None:
            self._all = [made for kind in _KINDS if (made := kind.of(self._config)) is not None]
        return self._all

    # Inside.

    def begin(self) -> None:
        """In a fresh fork: what there is by now is another's."""
        for carrier in self._found():
            carrier.begin()

    def collect(self, item: pytest.Item, phase: str = "") -> Iterator[tuple[str, bytes]]:
        """Name and JSON of what is new, on account of `item`; in `phase`, if only its wide fixtures have had one."""
        for carrier in self._found():
            try:
                found = carrier.collect(item, phase)
            except Exception as error:  # what a test has done to what the plug-in keeps is no reason for the test to fail
                found = None
                print(f"isolation: nothing is kept for {carrier.name}: {error!r}", file=sys.__stderr__)
            if found is not None:
                yield carrier.name, json.dumps(found, separators=(",", ":")).encode()

    def sent(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """A report is about to be sent."""
        for carrier in self._found():
            carrier.sent(item, report)

    def heed(self, items: list[pytest.Item], briefs: dict[str, list[Any]]) -> None:
        """What `briefs` said on the host."""
        for carrier in self._found():
            for number, brief in briefs.get(carrier.name, ()):
                carrier.heed(items[number], brief)

    # On the host.

    def told(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Pytest is about to be told of a report."""
        for carrier in self._found():
            carrier.told(item, report)

    def waits(self, item: pytest.Item) -> bool:
        """Whether all tests before must have ended before this one begins."""
        return any(carrier.waits(item) for carrier in self._found())

    def briefs(self, items: list[pytest.Item]) -> dict[str, list[Any]]:
        """By carrier: what a sandbox has to know to run these, each with its number."""
        found: dict[str, list[Any]] = {}
        for carrier in self._found():
            for number, item in enumerate(items):
                brief = carrier.brief(item)
                if brief is not None:
                    found.setdefault(carrier.name, []).append([number, brief])
        return found

    def check(self, name: object, item: pytest.Item, payload: object) -> tuple[Carrier, Any]:
        """Raises Refused."""
        for carrier in self._found():
            if carrier.name == name:
                text = payload if isinstance(payload, bytes) else b""
                if json.values(text) > _VALUES_AT_MOST:
                    raise Refused(f"{name}: more than {_VALUES_AT_MOST} values")
                try:
                    return carrier, carrier.check(item, json.loads(text))
                except Refused:
                    raise
                except Exception as error:
                    raise Refused(f"{carrier.name}: {type(error).__name__}") from error
        raise Refused("it is of no plug-in in use")

    def apply(self, item: pytest.Item, checked: tuple[Carrier, Any]) -> None:
        """What was checked before, when pytest is told of the test."""
        carrier, value = checked
        try:
            carrier.apply(item, value)
        except OSError as error:  # no place left, say: the tests go on
            self._lost[carrier.name] = clean_name(str(error))

    def leave_out(self, names: Iterable[str]) -> None:
        """Attributes of reports that were no plain values, and so stay where they were set."""
        for name in names:
            if len(self._left_out) < _NAMES_AT_MOST:
                self._left_out[name] = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self) -> None:
        for carrier in self._found():
            carrier.prepare()

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """Within the wrappers of all plug-ins: pytest-cov adds up in its own."""
        try:
            return (yield)
        finally:
            self.finish()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self.finish()  # templates may have ended since

    def finish(self) -> None:
        for carrier in self._found():
            carrier.finish()

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        notes = [f"{carrier.name}: {note}" for carrier in self._found() for note in carrier.notes()]
        if self._left_out:
            names = ", ".join(self._left_out)
            notes.append(f"attributes of reports that are no plain values stay in the tests' processes: {names}")
        notes += [f"{name}: something could not be kept: {error}" for name, error in self._lost.items()]
        if notes:
            terminalreporter.section("isolation: other plug-ins", sep="-")
        for note in notes:
            terminalreporter.line(note)
