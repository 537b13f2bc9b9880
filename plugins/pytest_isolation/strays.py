"""A process that a test has forked, and that comes back from the test as if it were the test.

`os.fork()` gives the child all of pytest, too: a child that returns, or raises, where it should have ended would report in
the test's name, before or instead of the test itself, and then go on with the rest of the run.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Generator
from typing import NoReturn

import pytest

from pytest_isolation import streams

_getpid, _write, _exit = os.getpid, os.write, os._exit  # a test may replace them
_PYTEST = re.compile(r"/(?:_pytest|pluggy|pytest_isolation)/[^/]*\.py$")


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

    def _watch(self) -> Generator[None, object, object]:
        """Around a phase of a test, within pytest's capture: what is said of the child belongs to that test's output."""
        try:
            return (yield)
        except BaseException as error:
            if _getpid() != self._pid:
                self._end(error)
            raise
        finally:
            self.check()

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_setup(self) -> Generator[None, object, object]:
        return (yield from self._watch())

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        return (yield from self._watch())

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        return (yield from self._watch())

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
            streams.flush(self._config)
            _write(2, said.encode("utf-8", "backslashreplace"))
        finally:
            _exit(status & 255)


def _describe(error: BaseException) -> str:
    """Its traceback without pytest's part of it."""
    told = traceback.TracebackException.from_exception(error)
    told.stack[:] = [frame for frame in told.stack if not _PYTEST.search(frame.filename)]
    return "".join(told.format())
