"""From what a sandbox said to what pytest is told: reports wait where more is to be known of them."""

from __future__ import annotations

import getpass
import itertools
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from isolation.hookspecs import Backend
from isolation.plain import os, time
from isolation.result import Account
from pytest_isolation.host import details
from pytest_isolation.host.crash_reports import CrashRepr
from pytest_isolation.host.details import Details
from pytest_isolation.host.sandbox_run import Run
from pytest_isolation.peers.origin import is_pytests_own
from pytest_isolation.report.record import RunRecord, TestRecord
from pytest_isolation.settings import RunSettings


@dataclass
class Setup:
    """Of a node's wide fixtures, on behalf of a test. `attempt`: those of one are made in one go, in their template."""

    node: object
    attempt: int
    duration: float
    sections: list[tuple[str, str]]
    warned: list[dict[str, Any]]


class Emission:
    """Of one session. Tests come one after the other: `begin`, `take` each report, `end`."""

    def __init__(
        self,
        config: pytest.Config,
        settings: RunSettings,
        show: Callable[[int, bytes], None],
        warn: Callable[[Iterable[dict[str, Any]]], None],
        tell: Callable[[pytest.Item, pytest.TestReport], None],
    ) -> None:
        self._config = config
        self._settings = settings
        self._show = show
        self._warn = warn
        self._tell_others = tell
        self._at_once = False
        self._shown: list[tuple[int, int, bytes]] = []  # what comes behind so many of the reports that wait
        self._held: list[pytest.TestReport] = []
        self._told: list[pytest.TestReport] = []
        self._before: list[tuple[str, str]] = []  # what was captured while wide fixtures were set up for the test
        self._setups: dict[pytest.Item, list[Setup]] = {}
        self._warned: dict[object, Counter[str]] = {}  # by node: what has been told of its set-ups
        self._again: dict[object, Counter[str]] = {}  # what will come once more
        self._records: list[TestRecord] = []
        self._begun = time.time()
        self.lost = ""  # what tests do not have of the process that collected them

    def remember_setup(self, item: pytest.Item, setup: Setup) -> None:
        """Wide fixtures of a node were set up on behalf of a test, which so took that much longer."""
        again = self._again.get(setup.node)
        if again:
            setup.warned = [each for each in setup.warned if not _take_one(again, _key(each))]
        if 0 <= setup.duration < 1e9:
            self._setups.setdefault(item, []).append(setup)

    def forget_setup(self, node: object, attempt: int) -> None:
        """They are set up once more: it took its time, but what was captured will be captured again. And what was told of
        warnings before will not be told twice."""
        told = self._again[node] = Counter(self._warned.get(node, Counter()))
        for setup in itertools.chain.from_iterable(self._setups.values()):
            if setup.node is node and setup.attempt == attempt:
                setup.sections, setup.warned = [], []
            elif setup.node is node:
                told.update(map(_key, setup.warned))

    def begin(self, item: pytest.Item) -> None:
        self._held, self._told, self._before, self._shown = [], [], [], []
        self._at_once = False

    def show(self, fd: int, data: bytes) -> None:
        """Output past pytest's capture: in its place among the reports."""
        if self._held and not self._at_once:
            self._shown.append((len(self._held), fd, data))
        else:
            self._show(fd, data)

    def show_at_once(self) -> None:
        """Whoever debugs the current test wants to see what it prints."""
        self._at_once = True
        shown, self._shown = self._shown, []
        for _behind, fd, data in shown:
            self._show(fd, data)

    def take(self, item: pytest.Item, run: Run, report: pytest.TestReport) -> None:
        """One report of the current test."""
        if report.when == "setup":
            self._add_setup(item, report)
        if self._before:
            report.sections = _joined(self._before, report.sections)
        wait = report.failed or report.when == "teardown" or (self._settings.strict and report.when == "call")
        if wait or self._held:
            self._held.append(report)
        else:
            self._tell(item, run, report)

    def end(self, item: pytest.Item, run: Run, teardowns: Sequence[pytest.TestReport]) -> None:
        """The rest of it. `teardowns` are reports of wide fixtures that ended with it."""
        for later in teardowns:
            _merge(self._held, later)
        failed = any(report.failed for report in self._held)
        found = None
        if (failed or self._settings.wants_details) and item is run.unit.last:
            found = self._details(run, item)
            self._add_details(item, found)
        held, self._held = self._held, []
        for number, report in enumerate(held, 1):
            self._tell(item, run, report)
            for behind, fd, data in self._shown:
                if behind == number:
                    self._show(fd, data)
        self._shown = []
        if self._settings.report is not None:
            self._record(item, run, found)

    def _tell(self, item: pytest.Item, run: Run, report: pytest.TestReport) -> None:
        if run.has_made(report):
            self._tell_in_any_case(item, report)
            self._told.append(report)
            return
        try:
            self._tell_others(item, report)
            item.ihook.pytest_runtest_logreport(report=report)
            self._told.append(report)
        except pytest.exit.Exception:
            raise
        except Exception as error:
            what = (
                f"the test's process sent a report that pytest cannot use "
                f"({type(error).__name__} while it was reported: {error})"
            )
            self._held = []
            for other in run.spoil(item, what):
                self._tell_in_any_case(item, other)
                self._told.append(other)
            run.told[item].events.clear()

    def _tell_in_any_case(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """A report of our own making. Who cannot take that (a conftest, say, that wants an attribute which it has set on all
        others) is left out: no test ends the run by having died."""
        try:
            self._tell_others(item, report)
            item.ihook.pytest_runtest_logreport(report=report)
        except pytest.exit.Exception:
            raise
        except Exception:
            manager = self._config.pluginmanager
            others = [plugin for plugin in manager.get_plugins() if not is_pytests_own(plugin)]
            manager.subset_hook_caller("pytest_runtest_logreport", others)(report=report)

    def _add_setup(self, item: pytest.Item, report: pytest.TestReport) -> None:
        for setup in self._setups.pop(item, ()):
            report.duration += setup.duration
            report.start -= setup.duration
            self._before = _joined(self._before, setup.sections)
            self._warn(setup.warned)
            self._warned.setdefault(setup.node, Counter()).update(map(_key, setup.warned))

    def _details(self, run: Run, item: pytest.Item) -> Details:
        told = run.told[item]
        account = run.account() if self._settings.wants_details else Account()
        return Details(
            told.wall, run.usage(), details.relevant(account, self._ignored()), account.processes,
            told.counted.get("processes"), told.counted.get("refused", 0),
        )  # fmt: skip

    def _ignored(self) -> list[str]:
        """Where pytest keeps the directories of `tmp_path`."""
        given = self._config.getoption("basetemp", None)
        root = os.environ.get("PYTEST_DEBUG_TEMPROOT") or "/tmp"
        return [os.path.realpath(given) if given else os.path.join(root, f"pytest-of-{_user()}")]

    def _add_details(self, item: pytest.Item, found: Details) -> None:
        leak = found.leak() if self._settings.strict else ""
        for report in self._held:
            if leak and report.when == "call" and report.passed and not hasattr(report, "wasxfail"):
                report.outcome = "failed"
                what = "the test left something behind (--isolation-strict)"
                report.longrepr = CrashRepr.of(item, what, leak)  # type: ignore[assignment]
            if report.failed:
                lines = found.lines()
                if self.lost:
                    lines.append(f"not here, as it was started while tests were collected: {self.lost}")
                report.sections = [*report.sections, ("isolation", "\n".join(lines) + "\n")]
            if self._settings.names_details:
                report.user_properties = [*report.user_properties, *found.properties()]

    def _record(self, item: pytest.Item, run: Run, found: Details | None) -> None:
        told = run.told[item]
        outcome, message = _outcome(self._config, self._told)
        last = self._told[-1] if self._told else None
        self._records.append(TestRecord(
            nodeid=item.nodeid, outcome="rerun" if run.runs_again(item) else outcome, sandbox=run.sandbox, worker=run.worker,
            backend=run.unit.settings.spec.backend, start=told.started, wall=told.wall,
            cpu=found.usage.cpu if found and found.usage else None,
            memory=found.usage.memory_peak if found and found.usage else None,
            verdict=str(run.verdict()) if item is run.unit.last else "",
            message=message,
            sections=tuple((name, text) for name, text in last.sections if name != "isolation") if last else (),
            changes=found.changes if found else (),
            processes=found.processes if found else (),
            refused=(f"{found.refused} without a route",) if found and found.refused else (),
        ))  # fmt: skip

    def write(self, exitstatus: int, backend: Backend) -> None:
        """The report that was asked for, if one was."""
        if self._settings.report is None or hasattr(self._config, "workerinput"):
            return
        from pytest_isolation.report import page

        config = self._config
        tests = tuple(
            record if record.backend != "auto" else replace(record, backend=backend.name) for record in self._records
        )
        page.write(
            RunRecord(
                created=self._begun, wall=time.time() - self._begun, pytest=pytest.__version__,
                python=platform.python_version(), platform=f"{sys.platform} {platform.machine()}",
                rootdir=str(config.rootpath), args=tuple(config.invocation_params.args), jobs=self._settings.jobs,
                backend=backend.name, exitstatus=int(exitstatus), tests=tests,
            ),
            self._settings.report,
        )  # fmt: skip


def _key(warned: dict[str, Any]) -> str:
    return str(warned["warning_message"])


def _take_one(found: Counter[str], key: str) -> bool:
    """Whether there is one more of it."""
    found[key] -= 1
    return found[key] >= 0


def _joined(first: list[tuple[str, str]], then: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sections of both; those with the same title are one, as if they had been captured in one go."""
    texts: dict[str, str] = {}
    for title, text in (*first, *then):
        texts[title] = texts.get(title, "") + text
    return list(texts.items())


def _merge(held: list[pytest.TestReport], later: pytest.TestReport) -> None:
    """Add what the end of wide fixtures reported to the report of the test's own teardown, which plain pytest has it in."""
    for report in held:
        if report.when == "teardown":
            report.duration += later.duration
            report.sections = [*report.sections, *[pair for pair in later.sections if pair not in report.sections]]
            if later.failed and report.failed:
                report.longrepr = f"{report.longreprtext}\n\n{later.longreprtext}"
            elif later.failed:
                report.outcome, report.longrepr = later.outcome, later.longrepr
            return
    held.append(later)


def _outcome(config: pytest.Config, told: Sequence[pytest.TestReport]) -> tuple[str, str]:
    """A test's outcome in one word of pytest's, and what there is to say of it."""
    found = ("passed", "")
    for report in told:
        if type(report) is not pytest.TestReport:
            continue
        status: Any = config.hook.pytest_report_teststatus(report=report, config=config)
        word = status[0] if status else ""
        if word in ("failed", "error"):
            return word, report.longreprtext
        if word in ("skipped", "xfailed", "xpassed"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            found = word, str(reason)
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
