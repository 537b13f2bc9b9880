"""Inside: runs one test in the forked session, and forwards what pytest's hooks say of it."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

import pytest

from isolation.guest import Guest
from pytest_isolation import reports


class Worker:
    """The payload of a template: called with its guest in each fork."""

    def __init__(self, session: pytest.Session) -> None:
        self._session = session
        self._config = session.config
        self._guest: Guest | None = None
        self._tell_capture = False

    def __call__(self, guest: Guest) -> None:
        manager = self._config.pluginmanager
        manager.unregister(name="isolation-controller")
        quiet_terminal(manager)
        manager.register(self, "isolation-worker")  # tells it the warnings of the past again (a historic hook)
        for job in guest.forks():
            self._guest = guest
            self._run(guest, self._session.items[job["index"]], tell_capture=job["tell_capture"])

    def _run(self, guest: Guest, item: pytest.Item, *, tell_capture: bool) -> None:
        self._tell_capture = tell_capture
        end: dict[str, Any] = {}
        try:
            # No next item: this fork is all that this test sees of the session, and everything is torn down in it.
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        except pytest.exit.Exception as error:
            end = {"exit": str(error.msg), "returncode": error.returncode}
        except KeyboardInterrupt:
            end = {"interrupt": True}
        except BaseException:
            end = {"internal_error": traceback.format_exc()}
        for name in ("shouldstop", "shouldfail"):
            if getattr(self._session, name):
                end[name] = str(getattr(self._session, name))
        self._flush()
        guest.send({"done": end})

    def _flush(self) -> None:
        for stream in (self._config.get_terminal_writer(), sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                continue

    def _send(self, message: dict[str, Any], data: bytes = b"") -> None:
        assert self._guest is not None
        self._guest.send(message, data)

    @property
    def guest(self) -> Guest:
        """For the `sandbox` fixture, which asks the host."""
        assert self._guest is not None
        return self._guest

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Inside of pytest's capture: descriptors 1 and 2 are its files, which the host reads if this test dies."""
        if self._tell_capture:
            self._send({"capture": [os.fstat(1).st_ino, os.fstat(2).st_ino]})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._flush()  # what it printed past the capture belongs before its report
        self._send({"report": True}, reports.encode(self._config, report))

    @pytest.hookimpl
    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: Any
    ) -> None:
        if self._guest is not None:
            self._send({"warning": reports.encode_warning(warning_message, when, nodeid, location)})

    def record_suite_property(self, name: str, value: object) -> None:
        """For the fixture of that name, whose junit file is the host's to write."""
        self._send({"suite_property": [name, str(value)]})


class _QuietTerminal:
    """The terminal reporter without its hooks. The host's prints; other plug-ins still find this one by its name."""

    def __init__(self, reporter: Any) -> None:
        self.__dict__["_reporter"] = reporter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_reporter"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_reporter"], name, value)

    def __dir__(self) -> list[str]:
        return []  # pluggy looks here for hooks


def quiet_terminal(manager: pytest.PytestPluginManager) -> None:
    """Let nothing of this fork's pytest be printed as pytest's own."""
    reporter = manager.unregister(name="terminalreporter")
    if reporter is not None:
        manager.register(_QuietTerminal(reporter), "terminalreporter")


