"""One sandbox's run of its tests: what it says is checked here, and told to pytest when its turn has come."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest

from isolation.errors import IsolationError, LaunchError, WireError
from isolation.plain import json, os, time
from isolation.result import Account, Ended, Usage, Verdict
from isolation.template import Fork
from isolation.wire import Message
from pytest_isolation.host import crash_reports
from pytest_isolation.host.groups import Unit
from pytest_isolation.peers import retried
from pytest_isolation.peers.carriers import Carriers, Refused
from pytest_isolation.peers.rerunfailures import reruns_allowed
from pytest_isolation.peers.timeout import Deferred
from pytest_isolation.settings import Settings
from pytest_isolation.wire import reports, tmp_paths
from pytest_isolation.wire.sanitize import clean

_MESSAGES_AT_ONCE = 256
_MESSAGES_AT_MOST = 200_000
_BYTES_AT_MOST = 128 << 20
_VALUE = 64  # bytes, of the smallest that is decoded
_CHUNKS_AT_MOST = 64  # of output in one turn: a flood must not keep the rest waiting
_SANDBOXES_AT_MOST = 16
_XML_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,199}")
_XML_IDENTITY = ("classname", "file", "line", "name", "url")
_END_WAIT = 5.0  # s, for a process that has said that it is done


class Host(Protocol):
    """What a run needs of the controller."""

    @property
    def carriers(self) -> Carriers: ...
    @property
    def deferred(self) -> Deferred: ...
    @property
    def lost(self) -> str: ...
    def print_raw(self, fd: int, data: bytes) -> None: ...
    def remember_capture(self, settings: Settings, fork: Fork, inodes: object) -> None: ...
    def captured(self, settings: Settings, fork: Fork) -> list[tuple[str, str]]: ...
    def launch_beside(self, settings: Settings) -> tuple[Any, str]: ...
    def debug(self, fork: Fork, name: str, deadline: float | None, charge: Callable[[Message], None]) -> list[Message]: ...


@dataclass
class Told:
    """What is known of one test.

    events  not yet told to pytest, in their order
    end     what the test's process said when it was done with it; None before that
    last    its last report, which pytest is not told of before the end if it is a failure
    """

    phases: crash_reports.Phases
    events: list[tuple[str, Any]] = field(default_factory=list)
    end: Mapping[str, Any] | None = None
    last: pytest.TestReport | None = None
    started: float = 0.0
    wall: float = 0.0
    counted: Mapping[str, int] = field(default_factory=dict)
    size: int = 0


class Run:
    """A unit's way through its sandbox.

    worker, sandbox  numbers: which of the sandboxes that run at a time, which of all
    trusted          its template is: a fork that cannot be made is no test's doing then
    rest             the tests that have not run, because the process died before them
    """

    def __init__(
        self, host: Host, unit: Unit, fork: Fork, *, worker: int, sandbox: int, trusted: bool, config: pytest.Config
    ) -> None:
        self._host = host
        self._trusted = trusted
        self.unit = unit
        self.fork = fork
        self.worker = worker
        self.sandbox = sandbox
        self._config = config
        self._limits = unit.settings.spec.limits
        self.told = {item: Told(crash_reports.Phases(retried.allowed(item))) for item in unit.items}
        self._at = 0
        self._more = False  # messages have arrived that no poll(2) will tell of
        self._messages = 0
        self._lent: list[Any] = []
        self._made: list[pytest.TestReport] = []
        self.rest: list[pytest.Item] = []
        self.over = False
        self._verdict: Verdict | None = None
        self.begun = time.monotonic()
        self._begin_item()

    # Time and descriptors, for who polls.

    def descriptors(self) -> tuple[int, ...]:
        """To poll(2)."""
        return (*self.fork.filenos(), self.fork.stdout, self.fork.stderr)

    def patience(self) -> float | None:
        """Seconds until it must be looked at in any case."""
        if self._more:
            return 0.0
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def look(self, ready: set[int]) -> list[int]:
        """Take what there is. Returns descriptors that have come to their end."""
        if self.over:
            return []  # ended by who was told of it, in the middle: its descriptors may be closed
        finished = [
            fd for fd, number in ((self.fork.stdout, 1), (self.fork.stderr, 2))
            if fd in ready and not self._relay(fd, number)
        ]  # fmt: skip
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if self._more or late or ready.intersection(self.fork.filenos()):
            self._take_messages()  # a test that was done in time, while this process was busy with others, says so here
        if self._deadline is not None and time.monotonic() >= self._deadline and not self.over:
            self.fork.end(Verdict(Ended.TIMED_OUT))
            self._die(Verdict(Ended.TIMED_OUT))
        return finished

    @property
    def size(self) -> int:
        """Bytes kept for later."""
        return sum(told.size for told in self.told.values())

    def close(self) -> None:
        """End it, if it has not ended."""
        for machine in self._lent:
            machine.close()
        self._lent.clear()
        self.fork.close()

    def settle(self) -> None:
        """Hear how its process ended, and what it left behind, before what it was forked of ends: nobody says so then."""
        self.fork.wait(_END_WAIT)

    def verdict(self) -> Verdict:
        """How its process ended; waits a moment."""
        return self._verdict or self.fork.wait(_END_WAIT) or Verdict(Ended.LOST)

    def runs_again(self, item: pytest.Item) -> bool:
        """Whether what is known of it is not the last word."""
        return "rerun" in (self.told[item].end or {})

    def has_made(self, report: pytest.TestReport) -> bool:
        """Whether a report is the host's own, on a test that could not report itself."""
        return any(report is made for made in self._made)

    def usage(self) -> Usage | None:
        """What it used, when it has ended."""
        return self.fork.usage() if self.fork.wait(_END_WAIT) is not None else None

    def account(self) -> Account:
        """What it left behind."""
        return self.fork.account() if self.fork.wait(_END_WAIT) is not None else Account()

    # Messages.

    @property
    def _item(self) -> pytest.Item:
        return self.unit.items[self._at]

    @property
    def _told(self) -> Told:
        return self.told[self._item]

    def _begin_item(self) -> None:
        wall = self._limits.wall
        self._deadline = None if wall is None else time.monotonic() + wall
        self._told.started = time.time()

    def _keep(self, kind: str, value: Any, size: int = 0) -> None:
        self._told.events.append((kind, value))
        self._told.size += size

    def _relay_all(self) -> None:
        self._relay(self.fork.stdout, 1)
        self._relay(self.fork.stderr, 2)

    def _relay(self, fd: int, number: int) -> bool:
        """What there is now, within reason; False at the end of the stream."""
        for _ in range(_CHUNKS_AT_MOST):
            if self._told.size > _BYTES_AT_MOST:
                self._spoilt(f"the test printed more than {_BYTES_AT_MOST >> 20}M")
                return False
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._keep("output", (number, data), len(data))
        return True

    def _take_messages(self) -> None:
        self._more = False
        for _ in range(_MESSAGES_AT_ONCE):
            if self.over:
                return
            try:
                message = self.fork.receive(0)
            except TimeoutError:
                return
            except WireError as error:
                self._spoilt(f"the test's process sent something that is not a message: {error}")
                return
            except LaunchError as error:
                if self._trusted:
                    raise
                self._spoilt(f"a wide fixture has left a process that cannot be forked any more: {error}")
                return
            # What was written before this message: plain pytest would have shown it before what the message causes.
            self._relay_all()
            if message is None:
                self._die(self.fork.wait(_END_WAIT) or Verdict(Ended.LOST))
                return
            try:
                self._charge(message)
                self._handle(message)
            except reports.BadReport as error:
                self._spoilt(f"the test's process sent a report that pytest cannot use ({error})")
                return
            except WireError as error:
                self._spoilt(f"the test's process does not read what it asked for: {error}")
                return
        self._more = True

    def _charge(self, message: Message) -> None:
        """A test may say much, but not without end: what it says is kept until the end of the run."""
        self._messages += 1
        data = message.get("data", b"")
        size = size_of(message) + _VALUE * json.values(data)
        self._told.size += size
        if self._messages > _MESSAGES_AT_MOST * len(self.unit.items) or self._told.size > _BYTES_AT_MOST:
            raise reports.BadReport(f"more than {_MESSAGES_AT_MOST} messages or {_BYTES_AT_MOST >> 20}M of them")

    def _handle(self, message: Message) -> None:
        item = self._item
        if "report" in message:
            report = reports.decode(self._config, item, message.get("data"))
            if type(report) is pytest.TestReport:
                if not self._told.phases.note(str(report.when), retry=retried.is_retry(item, report)):
                    raise reports.BadReport(f"a second report of its {report.when}")
            if report.failed:
                item.stash[tmp_paths.failed] = True
            self._told.last = report
            self._keep("report", report)
            if message.get("wait") is True:
                self.fork.send({"taken": True})
        elif "amended" in message:
            self._amend(reports.decode(self._config, item, message.get("data")), shown=message.get("shown") is True)
        elif "warning" in message:
            self._keep("warning", reports.decode_warning(item, message["warning"]))
        elif "capture" in message:
            self._host.remember_capture(self.unit.settings, self.fork, message["capture"])
        elif "suite_property" in message:
            self._suite_property(message["suite_property"])
        elif "xml_attribute" in message:
            self._xml_attribute(message["xml_attribute"])
        elif "sandbox" in message:
            self._lend_sandbox()
        elif "debugger" in message:
            begun = time.monotonic()
            others = self._host.debug(self.fork, item.nodeid, None if os.isatty(0) else self._deadline, self._charge)
            if os.isatty(0) and self._deadline is not None:
                self._deadline += time.monotonic() - begun  # people think longer than tests
            for other in others:
                self._handle(other)
        elif "counted" in message:
            self._told.counted = _counts(message["counted"])
        elif "carried" in message:
            try:
                self._keep("carried", self._host.carriers.check(message["carried"], item, message.get("data")))
            except Refused as error:
                raise reports.BadReport(f"something for another plug-in that is none: {error}") from None
        elif "next" in message:
            self._end_item({})
            if message["next"] != self._at + 1 or self._at + 1 >= len(self.unit.items):
                raise reports.BadReport("a test out of turn")
            self._at += 1
            self._begin_item()
        elif "done" in message:
            self._done(message["done"])
        else:
            raise reports.BadReport("a message of no known kind")

    def _amend(self, changed: pytest.TestReport, *, shown: bool) -> None:
        """What a failure looks like has changed since its report. (That waits: see reporter.py.)"""
        last = self._told.last
        if last is None or not last.failed or (last.when, last.outcome) != (changed.when, changed.outcome):
            raise reports.BadReport("a change of no report")
        if shown and self._config.getoption("usepdb", False):
            last._pdbshown = True  # type: ignore[attr-defined]
        last.longrepr = changed.longrepr
        last.sections = [*last.sections, *[pair for pair in changed.sections if pair not in last.sections]]

    def _done(self, end: Any) -> None:
        end = end if isinstance(end, dict) else {}
        if "internal_error" in end:
            self._spoilt(f"pytest failed inside the sandbox:\n{clean(str(end['internal_error']), 20_000)}")
        elif "rerun" in end and self.unit.reruns >= reruns_allowed(self._item, self.unit.reruns):
            self._spoilt("the test's process asked to run once more, which no option or marker allows")
        elif self._end_item(end):
            self.rest = [] if end else self.unit.items[self._at + 1 :]
            self._stop()

    def _end_item(self, end: Mapping[str, Any]) -> bool:
        """Done with one test."""
        told = self._told
        if "teardown" not in told.phases.seen and not end:
            self._spoilt("the test's process said that it was done, without a report of its teardown")
            return False
        told.end = end
        told.wall = time.time() - told.started
        return True

    def _stop(self) -> None:
        self.over = True
        for machine in self._lent:
            machine.close()
        self._lent.clear()

    def _suite_property(self, pair: object) -> None:
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
            self._keep("suite_property", (clean(pair[0], 4096), clean(pair[1], 1 << 16)))

    def _xml_attribute(self, pair: object) -> None:
        """In junit's file, which attributes' names get into as they are. Which test it is, is not its to change."""
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise reports.BadReport("an attribute that is none")
        if _XML_NAME.fullmatch(pair[0]) and pair[0] not in _XML_IDENTITY:
            self._keep("xml_attribute", (pair[0], clean(pair[1], 1 << 16)))

    def _lend_sandbox(self) -> None:
        """A sandbox beside the test's own, for its commands; the test gets the wire to it, and no more."""
        if len(self._lent) >= _SANDBOXES_AT_MOST:
            raise reports.BadReport(f"a request for more than {_SANDBOXES_AT_MOST} sandboxes")
        try:
            machine, name = self._host.launch_beside(self.unit.settings)
        except IsolationError as error:
            self.fork.send({"error": str(error)})
            return
        self._lent.append(machine)
        token, fds = machine.lend()
        self.fork.send({"sandbox": token, "backend": name, "fds": len(fds)}, fds=tuple(fds))

    # A test that cannot report itself.

    def _die(self, verdict: Verdict) -> None:
        self._verdict = verdict
        wall = time.time() - self._told.started
        by_plugin = self._host.deferred.explain(self._item, verdict, wall)
        self._crash(by_plugin or crash_reports.explain(verdict, self._limits, self._host.lost))

    def _spoilt(self, message: str) -> None:
        if not self.over:
            self.fork.end(Verdict(Ended.KILLED))
            self._crash(message)

    def spoil(self, item: pytest.Item, message: str) -> list[pytest.TestReport]:
        """Pytest could not take what `item` reported: reports to give it instead."""
        if not self.over:
            self.fork.end(Verdict(Ended.KILLED))
            self.rest = self.unit.items[self.unit.items.index(item) + 1 :]
            self._stop()
        told = self.told[item]
        told.end = {}
        return crash_reports.crash_reports(item, told.phases, message, "", [], told.started)

    def _crash(self, message: str) -> None:
        item, told = self._item, self._told
        stacks = crash_reports.tidy_stacks(self.fork.stacks(), whole=self._config.getoption("fulltrace", False))
        sections = self._host.captured(self.unit.settings, self.fork)
        for report in crash_reports.crash_reports(item, told.phases, message, stacks, sections, told.started):
            self._made.append(report)
            self._keep("report", report)
        told.end = {}
        told.wall = time.time() - told.started
        self.rest = self.unit.items[self._at + 1 :]
        self._stop()


def size_of(message: Message) -> int:
    """Bytes, about, that it takes to keep it."""
    return sum(len(value) if isinstance(value, bytes) else len(str(value)) for value in message.values())


def _counts(value: object) -> dict[str, int]:
    """Numbers by name, as far as the guest can be believed to count."""
    if not isinstance(value, dict):
        return {}
    return {
        name: number for name in ("processes", "refused")
        if isinstance(number := value.get(name), int) and not isinstance(number, bool) and 0 <= number < 1 << 32
    }  # fmt: skip
