"""A pytest plug-in that writes down every report of a run, one JSON object a line; `suites.py` compares them.

Load it with `-p _outcomes`, this folder on PYTHONPATH, and OUTCOMES_FILE naming the file to append to. Lines
are written as they come, so a run that hangs or is killed still tells how far it got. Only the process that
configured pytest writes: in a forked child the same hooks run again, and its copy of a report must not count
as a second one.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from json import dumps
from typing import TextIO

import pytest

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
_LONGEST_TEXT = 4000


class Recorder:
    """Appends what pytest reports to one file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._owner = os.getpid()

    def _write(self, event: str, **fields: object) -> None:
        if os.getpid() == self._owner:
            self._file.write(dumps({"event": event, **fields}) + "\n")
            self._file.flush()  # a child forked later must not inherit half a line

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._write(
                "collect",
                nodeid=str(report.nodeid),
                outcome=report.outcome,
                text=report.longreprtext[-_LONGEST_TEXT:],
            )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write("start", nodeid=str(nodeid))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write("finish", nodeid=str(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        fields: dict[str, object] = {}
        if hasattr(report, "wasxfail"):
            fields["wasxfail"] = str(report.wasxfail)
        if (subtest := _subtest(report)) is not None:
            fields["subtest"] = subtest
        if report.failed:
            fields["text"] = report.longreprtext[-_LONGEST_TEXT:]
        elif report.skipped:
            fields["reason"] = _skip_reason(report.longrepr)
        self._write("report", nodeid=str(report.nodeid), when=report.when, outcome=report.outcome, **fields)

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, when: str) -> None:
        self._write("warning", when=when, text=str(warning_message.message)[:_LONGEST_TEXT])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self._write("end", exitstatus=int(exitstatus), collected=session.testscollected)


def pytest_configure(config: pytest.Config) -> None:
    # Taken out of the environment, so that a pytest started by one of the tests does not record too.
    if path := os.environ.pop("OUTCOMES_FILE", None):
        config.pluginmanager.register(Recorder(open(path, "a", encoding="utf-8")), "outcomes-recorder")


def _subtest(report: pytest.TestReport) -> str | None:
    """The message and parameters of a subtest's report; None for the report of a whole test.

    The attribute `context` is told by its presence: the class has a public name only since pytest 9.
    """
    context = getattr(report, "context", None)
    if context is None:
        return None
    parts = [f"[{context.msg}]"] if context.msg is not None else []
    parts += [f"{name}={value}" for name, value in context.kwargs.items()]
    return _ADDRESS.sub("0x…", " ".join(parts))


def _skip_reason(longrepr: object) -> str:
    """The text of a skip: a real report has (file, line, reason), an xfail's a traceback."""
    if isinstance(longrepr, Sequence) and not isinstance(longrepr, str) and len(longrepr) == 3:
        return str(longrepr[2])
    return ""
