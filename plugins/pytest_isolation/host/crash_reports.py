"""Reports for tests that could not report themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from isolation.plain import time
from isolation.result import Ended, Verdict
from isolation.spec import Limits
from isolation.units import format_size
from pytest_isolation.peers.retried import Allowed
from pytest_isolation.wire.sanitize import clean

_OWN_FRAMES = re.compile(
    r'^  File "[^"\n]*/(?:pytest_isolation|isolation/(?:backends|guest|linux|plain))/[^"\n]*", line .*\n?', re.MULTILINE
)
_PYTEST_FRAMES = re.compile(r'^  File "[^"\n]*/(?:_pytest|pluggy|pytest)/[^"\n]*", line .*\n?', re.MULTILINE)


@dataclass
class _Place:
    message: str
    path: str
    lineno: int

    def __str__(self) -> str:
        """As pytest's own: --tb=line prints a failure with this."""
        return f"{self.path}:{self.lineno}: {self.message.partition(chr(10))[0]}"


class CrashRepr:
    """A failure's representation, as pytest's terminal and junitxml expect one (reprcrash, toterminal, str)."""

    def __init__(self, message: str, text: str, path: str, lineno: int) -> None:
        self.reprcrash = _Place(message, path, lineno)
        self._text = text

    @classmethod
    def of(cls, item: pytest.Item, message: str, text: str) -> CrashRepr:
        """At the test's own place, as there is none of an exception."""
        path, line, _domain = item.location
        return cls(message, text, str(item.config.rootpath / path), (line or 0) + 1)

    def toterminal(self, tw: Any) -> None:
        """pytest prints a failure with this."""
        tw.line(self.reprcrash.message, red=True, bold=True)
        if self._text:
            tw.line()
            tw.line(self._text)

    def __str__(self) -> str:
        return f"{self.reprcrash.message}\n\n{self._text}".rstrip()


def explain(verdict: Verdict, limits: Limits, lost: str = "") -> str:
    """Why there is no result. `lost`: what a fork of pytest's process does not have of it."""
    if verdict.ended is Ended.DEADLOCKED:
        what = f": {lost}" if lost else ""
        return (
            f"the test waits for ever: each of its threads waits for another, and none is left to go on. It runs in a fork "
            f"of pytest's process, which has no threads or processes of it{what}. "
            f"Start them in a fixture, or use --isolation=microvm"
        )
    if verdict.ended is Ended.EXITED:
        return (
            f"the test's process ended with status {verdict.status} before the test was over "
            f"(os._exit, or an extension module that exits)"
        )
    if verdict.ended is Ended.SIGNALLED:
        return f"the test's process was {verdict}"
    if verdict.ended is Ended.TIMED_OUT:
        return f"the test timed out after {limits.wall or 0:g}s (isolation timeout)"
    if verdict.ended is Ended.OUT_OF_MEMORY:
        memory = format_size(limits.memory) if limits.memory else "none"
        return f"the test ran out of memory (isolation memory limit: {memory})"
    return f"the test's sandbox was lost: {verdict}"


def tidy_stacks(stacks: str, *, whole: bool) -> str:
    """faulthandler's text without the frames of this plug-in and, unless the test is not in it, of pytest's."""
    text = _OWN_FRAMES.sub("", stacks)
    shorter = _PYTEST_FRAMES.sub("", text)
    if not whole and '  File "' in shorter:
        text = shorter
    return clean(text.strip())


class Phases:
    """Which reports of a test have come, and so in which phase it died.

    A plug-in, or a conftest, may run a test several times, within what is `allowed`.
    """

    def __init__(self, allowed: Allowed) -> None:
        self.seen: list[str] = []
        self._again = allowed.runs - 1
        self._hides = allowed.hides
        self._retries = allowed.retries

    @property
    def all_seen(self) -> bool:
        """Nothing more is to be expected, but that the test runs once more."""
        return len(self.seen) == 3

    def note(self, phase: str, *, retry: bool = False) -> bool:
        """One has come; False: it cannot be. `retry`: it says that another one of its phase will come."""
        if retry and self._retries > 0:
            self._retries -= 1
            return True
        begins = phase == "setup" or (phase == "teardown" and self._hides)  # of the set-up, which failed, was no report
        if begins and "teardown" in self.seen and self._again > 0:
            self._again -= 1
            self.seen = []
        if phase in self.seen:
            return False
        self.seen.append(phase)
        return True

    @property
    def running(self) -> str:
        """The phase that has not been reported yet."""
        for phase in ("setup", "call", "teardown"):
            if phase not in self.seen:
                return phase
        return "teardown"


def crash_reports(
    item: pytest.Item,
    phases: Phases,
    message: str,
    text: str,
    sections: Sequence[tuple[str, str]],
    started: float,
) -> list[pytest.TestReport]:
    """What plain pytest would have reported had the test failed there: the phases before it passed, those after it did.

    A test that dies in its set-up has failed, too: an "error" would hide it from who counts failures.
    """
    failed = "call" if phases.running == "setup" else phases.running
    now = time.time()
    made = []
    for phase in ("setup", "call", "teardown"):
        if phase in phases.seen and not (phase == failed and phases.all_seen):
            continue  # and where all have come, what went wrong later must show, too
        report = pytest.TestReport(
            nodeid=item.nodeid, location=item.location, keywords={str(name): 1 for name in item.keywords},
            outcome="passed", longrepr=None, when=phase,
        )  # fmt: skip
        if phase == failed:
            report.outcome = "failed"
            report.longrepr = CrashRepr.of(item, message, text)  # type: ignore[assignment]
            report.sections = list(sections)
            report.start, report.stop, report.duration = started, now, now - started
            reason = _xfail_reason(item)
            if reason is not None:
                report.outcome = "skipped"
                report.wasxfail = reason
        made.append(report)
    return made


def teardown_report(item: pytest.Item, message: str, text: str) -> pytest.TestReport:
    """The end of wide fixtures, for the last test that used them, when it could not be reported."""
    return pytest.TestReport(
        nodeid=item.nodeid, location=item.location, keywords={str(name): 1 for name in item.keywords}, outcome="failed",
        longrepr=CrashRepr.of(item, message, text), when="teardown",  # type: ignore[arg-type]
    )  # fmt: skip


def _xfail_reason(item: pytest.Item) -> str | None:
    """A test that is expected to fail, without saying by which exception, may fail by dying."""
    for marker in item.iter_markers("xfail"):
        conditions = marker.args or ((marker.kwargs["condition"],) if "condition" in marker.kwargs else ())
        applies = not conditions or any(condition for condition in conditions if not isinstance(condition, str))
        if applies and marker.kwargs.get("run", True) and "raises" not in marker.kwargs:
            return str(marker.kwargs.get("reason", ""))
    return None
