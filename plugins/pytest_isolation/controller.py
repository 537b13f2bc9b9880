"""On the host: hands each test to a fork, and tells pytest what came back, as if it had run here."""

from __future__ import annotations

import codecs
import os
import select
import sys
import time
from collections.abc import Generator, Mapping
from typing import Any

import pytest

from isolation import registry
from isolation.errors import IsolationError, LaunchError, WireError
from isolation.hookspecs import FORK, FORK_HERE, Backend
from isolation.result import Ended, Verdict
from isolation.template import Fork, Template
from isolation.units import format_size
from isolation.wire import Message
from pytest_isolation import crash, reports
from pytest_isolation.settings import Reader, Settings
from pytest_isolation.text import clean
from pytest_isolation.worker import PAYLOAD, Worker, order_for

_OUTPUT_AT_MOST = 256 << 10
_MESSAGES_AT_ONCE = 256
_SANDBOXES_AT_MOST = 16
_MESSAGES_AT_MOST = 200_000
_BYTES_AT_MOST = 128 << 20
_CHUNKS_AT_MOST = 64  # of output in one turn: a flood must not keep the rest waiting


class Controller:
    """Registered only when isolation is asked for."""

    def __init__(self, config: pytest.Config, backend: str) -> None:
        self._config = config
        try:
            self._reader = Reader(config, backend)
            self._backend = registry.choose(self._reader.default.spec, {FORK})
        except IsolationError as error:
            raise pytest.UsageError(f"--isolation: {error}") from None
        for option in ("usepdb", "trace"):
            if config.getoption(option, False):
                raise pytest.UsageError(
                    "--isolation cannot hand the terminal to a debugger inside a sandbox; leave out --isolation "
                    "(or say --isolation=no) for --pdb and --trace"
                )
        self._templates: dict[Settings, Template] = {}
        self._settings: dict[pytest.Item, Settings] = {}
        self._nth: dict[pytest.Item, int] = {}  # among the items of the same node id
        self._captures: dict[Settings, tuple[int, int]] = {}
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}

    def pytest_report_header(self) -> str:
        spec = self._reader.default.spec
        network = "own loopback only" if spec.network.mode == "none" else f"{spec.network} (NOT isolated)"
        limits = spec.limits.describe()
        return f"isolation: {self._backend.describe()}, a fresh sandbox for every test; network: {network}; {limits}"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        try:
            if not session.testsfailed or session.config.option.continue_on_collection_errors:
                self._warm_up(session)
            return (yield)
        finally:
            self._close()

    def _warm_up(self, session: pytest.Session) -> None:
        """Fork the templates off the session as it is after collection, before any test has run in it."""
        seen: dict[str, int] = {}
        for item in session.items:
            self._nth[item] = seen.get(item.nodeid, 0)
            seen[item.nodeid] = self._nth[item] + 1
        try:
            self._settings = {item: self._reader.of_item(item) for item in session.items}
        except IsolationError as error:
            raise pytest.UsageError(str(error)) from None
        self._flush()
        for settings in dict.fromkeys(self._settings.values()):
            if settings.enabled:
                self._template(session, settings)

    def _template(self, session: pytest.Session, settings: Settings) -> Template:
        if settings not in self._templates:
            spec = settings.spec
            try:
                backend = self.backend_of(settings)
                if FORK_HERE in backend.features():
                    self._templates[settings] = backend.template(spec, Worker(session), None)
                else:
                    self._templates[settings] = backend.template(spec, PAYLOAD, order_for(session.config))
            except IsolationError as error:
                raise pytest.UsageError(f"--isolation: {error}") from None
        return self._templates[settings]

    def backend_of(self, settings: Settings) -> Backend:
        """The run's, or what a marker names."""
        spec = settings.spec
        return registry.choose(spec, {FORK}) if spec.backend != "auto" else self._backend

    def _close(self) -> None:
        for template in self._templates.values():
            template.close()
        self._templates.clear()

    def pytest_unconfigure(self) -> None:
        self._close()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if item not in self._nth:  # another plug-in's own loop
            self._warm_up(item.session)
        settings = self._settings[item]
        if not settings.enabled:
            return None
        ihook = item.ihook
        ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        job = {"nodeid": item.nodeid, "nth": self._nth[item], "tell_capture": settings not in self._captures}
        try:
            fork = self._template(item.session, settings).fork(job)
        except LaunchError as error:
            raise RuntimeError(f"isolation: no sandbox for {item.nodeid}: {error}") from error
        with fork:
            end = _Run(self, item, fork, settings).to_end()
        ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        self._obey(item.session, end)
        return True

    def _obey(self, session: pytest.Session, end: Mapping[str, Any]) -> None:
        """What a test may ask of the whole run, in plain pytest as here."""
        for name in ("shouldstop", "shouldfail"):
            if isinstance(end.get(name), str) and not getattr(session, name):
                setattr(session, name, clean(end[name], 2000))
        if "exit" in end:
            code = end.get("returncode")
            # Never a status of success: tests that were not run have not passed.
            honest = code if isinstance(code, int) and 1 <= code <= 255 else None
            pytest.exit(clean(str(end["exit"]), 2000), returncode=honest)
        if "interrupt" in end:
            raise KeyboardInterrupt

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> None:
        """The change that a plug-in made here in the sandbox (see reports.encode); the reporter asks in the same place."""
        after = report.__dict__.pop("_isolation_after", None)
        if after is not None:
            report.outcome, report.longrepr = after

    def _flush(self) -> None:
        """What is buffered must be written before a fork, or every fork writes it again."""
        for stream in (self._config.get_terminal_writer(), sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            try:
                stream.flush()  # type: ignore[union-attr]
            except (OSError, ValueError, AttributeError):
                continue

    def print_raw(self, fd: int, data: bytes) -> None:
        """What a test wrote past pytest's capture (-s, capsys.disabled()) goes where it would have gone."""
        self._flush()
        if os.isatty(fd):
            decoder = self._decoders.setdefault(fd, codecs.getincrementaldecoder("utf-8")("replace"))
            data = clean(decoder.decode(data)).encode()
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def remember_capture(self, settings: Settings, fork: Fork, inodes: object) -> None:
        """Which private files are pytest's capture, the same in every fork; as far as the guest may tell."""
        if settings not in self._captures and isinstance(inodes, list) and len(inodes) == 2:
            found = [fork.scratch_index(inode) if isinstance(inode, int) else None for inode in inodes]
            self._captures[settings] = (
                -1 if found[0] is None else found[0],
                -1 if found[1] is None else found[1],
            )

    def captured(self, settings: Settings, fork: Fork) -> list[tuple[str, str]]:
        """Output of the phase in which a test died."""
        if settings not in self._captures:
            return []
        sections = []
        for name, index in zip(("stdout", "stderr"), self._captures[settings], strict=True):
            content = fork.scratch(index) if index >= 0 else b""
            if content:
                sections.append((f"Captured {name} call", clean(content.decode("utf-8", "replace"), _OUTPUT_AT_MOST)))
        return sections


class _Run:
    """One test's way through its sandbox."""

    def __init__(self, controller: Controller, item: pytest.Item, fork: Fork, settings: Settings) -> None:
        self._controller = controller
        self._item = item
        self._fork = fork
        self._limits = settings.spec.limits
        self._settings = settings
        self._phases = crash.Phases()
        self._started = time.time()
        self._end: Mapping[str, Any] | None = None
        self._lent: list[Any] = []
        self._more = False  # messages have arrived that no poll(2) will tell of
        self._messages = self._bytes = 0

    def to_end(self) -> Mapping[str, Any]:
        """Relay until the test is done, or dead. A KeyboardInterrupt here is the user's: the fork ends with it."""
        wall = self._limits.wall
        deadline = None if wall is None else time.monotonic() + wall
        poller = select.poll()
        streams = {self._fork.stdout: 1, self._fork.stderr: 2}
        for fd in (*self._fork.filenos(), *streams):
            poller.register(fd, select.POLLIN)
        try:
            while self._end is None:
                left = None if deadline is None else (deadline - time.monotonic()) * 1000
                if self._more and (left is None or left > 0):
                    left = 0.001
                if left is not None and left <= 0:
                    self._fork.end(Verdict(Ended.TIMED_OUT))
                    self._die(Verdict(Ended.TIMED_OUT))
                    break
                ready = [fd for fd, _event in poller.poll(left)]
                for fd, number in streams.items():
                    if fd in ready and not self._relay(fd, number):
                        poller.unregister(fd)
                if self._more or any(fd not in streams for fd in ready):
                    self._take_messages()
            self._relay_all()
        finally:
            for machine in self._lent:
                machine.close()
        return self._end or {}

    def _relay_all(self) -> None:
        self._relay(self._fork.stdout, 1)
        self._relay(self._fork.stderr, 2)

    def _relay(self, fd: int, number: int) -> bool:
        """What there is now, within reason; False at the end of the stream."""
        for _ in range(_CHUNKS_AT_MOST):
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._controller.print_raw(number, data)
        return True

    def _take_messages(self) -> None:
        self._more = False
        for _ in range(_MESSAGES_AT_ONCE):
            if self._end is not None:
                return
            try:
                message = self._fork.receive(0)
            except TimeoutError:
                return
            except WireError as error:
                self._spoilt(f"the test's process sent something that is not a message: {error}")
                return
            # What was written before this message: plain pytest would have shown it before what the message causes.
            self._relay_all()
            if message is None:
                verdict = self._fork.wait(5.0) or Verdict(Ended.LOST)
                self._die(verdict)
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
        self._bytes += len(message.get("data", b"")) + len(str(message.get("warning", "")))
        if self._messages > _MESSAGES_AT_MOST or self._bytes > _BYTES_AT_MOST:
            raise reports.BadReport(f"more than {_MESSAGES_AT_MOST} messages or {_BYTES_AT_MOST >> 20}M of them")

    def _handle(self, message: Message) -> None:
        item = self._item
        if "report" in message:
            report = reports.decode(item.config, item, message.get("data"))
            if type(report) is pytest.TestReport:
                if report.when in self._phases.seen and not hasattr(report, "rerun"):
                    raise reports.BadReport(f"a second report of its {report.when}")
                self._phases.seen.append(str(report.when))
            try:
                item.ihook.pytest_runtest_logreport(report=report)
            except pytest.exit.Exception:
                raise
            except Exception as error:
                raise reports.BadReport(f"{type(error).__name__} while it was reported: {error}") from error
        elif "warning" in message:
            arguments = reports.decode_warning(item, message["warning"])
            item.config.hook.pytest_warning_recorded.call_historic(kwargs=arguments)
        elif "capture" in message:
            self._controller.remember_capture(self._settings, self._fork, message["capture"])
        elif "suite_property" in message:
            self._suite_property(message["suite_property"])
        elif "sandbox" in message:
            self._lend_sandbox()
        elif "done" not in message:
            raise reports.BadReport("a message of no known kind")
        else:
            if isinstance(message["done"], dict) and "internal_error" in message["done"]:
                self._spoilt(f"pytest failed inside the sandbox:\n{clean(str(message['done']['internal_error']), 20_000)}")
                return
            if "teardown" not in self._phases.seen and not message["done"]:
                self._spoilt("the test's process said that it was done, without a report of its teardown")
                return
            self._end = message["done"] if isinstance(message["done"], dict) else {}

    def _suite_property(self, pair: object) -> None:
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
            for plugin in self._item.config.pluginmanager.get_plugins():
                add = getattr(plugin, "add_global_property", None)
                if add is not None:
                    add(clean(pair[0], 4096), clean(pair[1], 1 << 16))

    def _lend_sandbox(self) -> None:
        """A sandbox beside the test's own, for its commands; the test gets the wire to it, and no more."""
        if len(self._lent) >= _SANDBOXES_AT_MOST:
            raise reports.BadReport(f"a request for more than {_SANDBOXES_AT_MOST} sandboxes")
        spec = self._settings.spec.replace(inherit_env=False)
        backend = self._controller.backend_of(self._settings)
        try:
            machine = backend.launch(spec)
        except IsolationError as error:
            self._fork.send({"error": str(error)})
            return
        self._lent.append(machine)
        token, fds = machine.lend()
        self._fork.send({"sandbox": token, "backend": backend.name, "fds": len(fds)}, fds=tuple(fds))

    def _die(self, verdict: Verdict) -> None:
        limits = {
            "timeout": f"{self._limits.wall:g}s" if self._limits.wall else "",
            "memory": format_size(self._limits.memory) if self._limits.memory else "none",
        }
        self._report_crash(crash.explain(verdict, limits))

    def _spoilt(self, message: str) -> None:
        self._fork.end(Verdict(Ended.KILLED))
        self._report_crash(message)

    def _report_crash(self, message: str) -> None:
        whole = self._item.config.getoption("fulltrace", False)
        stacks = crash.tidy_stacks(self._fork.stacks(), whole=whole)
        made = crash.crash_reports(
            self._item, self._phases, message, stacks, self._controller.captured(self._settings, self._fork), self._started
        )
        for report in made:
            self._item.ihook.pytest_runtest_logreport(report=report)
        self._end = {}
