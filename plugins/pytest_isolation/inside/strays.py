"""A process that a test has forked, and that comes back from the test as if it were the test.

`os.fork()` gives the child all of pytest, too: a child that returns, or raises, where it should have ended would report in
the test's name, before or instead of the test itself, and then go on with the rest of the run.
"""

from __future__ import annotations

import re
import traceback
from typing import NoReturn

import pytest

from isolation.plain import os
from pytest_isolation.wire import flush

_getpid, _write, _exit = os.getpid, os.write, os._exit  # a test may replace them
_PYTEST = re.compile(r"/(?:_pytest|pluggy|pytest_isolation)/.*\.py$")


class Strays:
    """Ends such processes: all but the one that has claimed to be the test."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._pid = _getpid()

    def claim(self) -> None:
        """This process may report from here on."""
        self._pid = _getpid()

    def check(self) -> None:
        """End this process if it is not the one that may report."""
        if _getpid() != self._pid:
            self._end(None)

    # Within pytest's capture, whose files a child has in common with its test; and behind what runs the phase, not around
    # it: that would show in tracebacks.

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_setup(self) -> None:
        """It came back from a fixture."""
        self.check()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_call(self) -> None:
        """It came back from the test."""
        self.check()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        """It came back from the end of a fixture."""
        self.check()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        """It has raised. What was captured so far, it has taken out of the files: its test wants to have that."""
        if _getpid() == self._pid:
            return
        captured = dict(pytest.TestReport.from_item_and_call(item, call).sections)
        capture = self._config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.resume_global_capture()
            for number, name in ((1, "stdout"), (2, "stderr")):
                _write_all(number, captured.get(f"Captured {name} {call.when}", ""))
        self._end(None if call.excinfo is None else call.excinfo.value)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self) -> None:
        """A report that is made within a phase, as subtests' are."""
        self.check()

    def _end(self, error: BaseException | None) -> NoReturn:
        """With the status that Python would end with. Neither the test's teardown nor other tests run here."""
        said, status = "", 0
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        elif error is not None and not isinstance(error, pytest.skip.Exception):
            said, status = _describe(error), 1
        said += f"process {_getpid()}, which this test has forked, came back from it: ended with status {status & 255}\n"
        try:
            flush.flush(self._config)
            _write_all(2, said)
        finally:
            _exit(status & 255)


def _write_all(fd: int, text: str) -> None:
    data = text.encode("utf-8", "backslashreplace")
    while data:
        data = data[_write(fd, data) :]


def _describe(error: BaseException) -> str:
    """Its traceback without pytest's part of it."""
    told = traceback.TracebackException.from_exception(error)
    told.stack[:] = [frame for frame in told.stack if not _PYTEST.search(frame.filename)]
    return "".join(told.format())
