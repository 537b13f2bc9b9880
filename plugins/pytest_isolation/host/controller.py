"""On the host: hands tests to forks, and tells pytest what came back, as if it had run here."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from isolation import registry
from isolation.backends.showing import SYSTEM, python_environment
from isolation.errors import IsolationError, LaunchError, WireError
from isolation.hookspecs import FORK, FORK_ACCOUNT, FORK_DEADLOCK, FORK_HERE, Backend
from isolation.paths import is_within
from isolation.plain import os, time
from isolation.result import Ended, Verdict
from isolation.template import Branch, Fork, Template
from isolation.wire import Message
from pytest_isolation.host import crash_reports, groups
from pytest_isolation.host.in_process_nodes import Here
from pytest_isolation.host.reporter import Emission, Setup
from pytest_isolation.host.sandbox_run import Run, size_of
from pytest_isolation.host.scheduler import SAID_AT_MOST, Schedule
from pytest_isolation.host.template_chain import Chain, Level
from pytest_isolation.host.temporaries import temporaries
from pytest_isolation.inside.strays import Strays
from pytest_isolation.inside.unforkable import Held, initially
from pytest_isolation.inside.worker import PAYLOAD, Worker, order_for
from pytest_isolation.peers import kept
from pytest_isolation.peers.carriers import Carriers
from pytest_isolation.peers.rerunfailures import count_rerun, reruns_made
from pytest_isolation.peers.timeout import Deferred
from pytest_isolation.settings import Reader, Settings
from pytest_isolation.wire import debugger, fixture_scopes, flush, reports
from pytest_isolation.wire.sanitize import clean, clean_name, clean_output
from pytest_isolation.wire.tmp_paths import TmpPaths

_OUTPUT_AT_MOST = 256 << 10
_SECTIONS_AT_MOST = 100
_UNSEEN_AT_MOST = 5
_WARNINGS_AT_MOST = 10_000  # of one set-up, or teardown


class Controller:
    """Registered only when isolation is asked for."""

    def __init__(self, config: pytest.Config, backend: str) -> None:
        self._config = config
        try:
            self._reader = Reader(config, backend)
            self._backend = registry.choose(self._reader.default.spec, {FORK})
        except IsolationError as error:
            raise pytest.UsageError(f"--isolation: {error}") from None
        if FORK_HERE in self._backend.features():
            self._reader.show_repository()
        run = self._reader.run
        if config.getoption("usepdb", False) or config.getoption("trace", False):
            if FORK_HERE not in self._backend.features():
                raise pytest.UsageError(
                    f"--pdb and --trace cannot hand the terminal into a sandbox of the {self._backend.name} backend; "
                    f"use --isolation=namespace, or leave --isolation out"
                )
            if run.jobs > 1:
                raise pytest.UsageError("--pdb and --trace need --isolation-jobs=1: there is one terminal")
        if run.strict and FORK_ACCOUNT not in self._backend.features():
            name = self._backend.name
            raise pytest.UsageError(f"--isolation-strict: the {name} backend does not tell what a test leaves behind")
        # A worker of pytest-xdist is told what to run; what it runs ahead would be another's.
        self._told_what_to_run = hasattr(config, "workerinput")
        self.carriers = Carriers(config)
        self._schedule = Schedule(
            self, config, self._chain_of, jobs=1 if self._told_what_to_run else run.jobs, grain=run.grain,
            emit=self._emit, waits=self.carriers.waits, fork_options=self._fork_options, on_branch=self._on_branch,
            on_death=self._on_death, on_remake=self._on_remake,
        )  # fmt: skip
        self._schedule.job_of = self._job_of
        self._emission = Emission(config, run, self.print_raw, self._tell_warnings, self.carriers.told)
        config.pluginmanager.register(self.carriers, "isolation-carriers")
        self.deferred = Deferred(self._is_isolated)
        config.pluginmanager.register(self.deferred, "isolation-deferred")
        config.pluginmanager.register(Strays(config), "isolation-strays")  # of tests that run here
        self._here = Here(config)
        # What plug-ins have started while they were configured, is theirs, and in no test's way.
        self._of_plugins = Held.now(own=True).since(config.stash[initially][1]) if initially in config.stash else None
        self.lost = ""
        self._chains: dict[Settings, Chain] = {}
        self._settings: dict[pytest.Item, Settings] = {}
        self._nth: dict[pytest.Item, int] = {}  # among the items of the same node id
        self._captures: dict[Settings, tuple[int, int]] = {}
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self._current: tuple[pytest.Item, Run] | None = None
        self._basetemp: Path | None = None
        self._lender = debugger.Lender()
        self._ended: list[tuple[Level, pytest.TestReport, list[dict[str, Any]]]] = []  # how that went, with its warnings
        self._unshared: dict[str, str] = {}
        self._late: list[str] = []
        self._end: dict[str, Any] = {}

    def pytest_report_header(self) -> list[str]:
        spec = self._reader.default.spec
        network = "own loopback only" if spec.network.mode == "none" else f"{spec.network} (NOT isolated)"
        limits = spec.limits.describe()
        run = self._reader.run
        per = "test" if run.grain == "function" else run.grain
        jobs = f", {run.jobs} at a time" if run.jobs > 1 else ""
        what = f"{self._backend.describe()}, a fresh sandbox for every {per}{jobs}; network: {network}; {limits}"
        return [f"isolation: {each}" for each in (what, *kept.by_config(self._config))]

    def pytest_report_collectionfinish(self, items: Sequence[pytest.Item]) -> list[str]:
        """What there is to say before the first test. (With -q, there was no header.)"""
        found = kept.by_items(self._config, items)
        if self._config.getoption("verbose", 0) < 0:
            found = [*kept.by_config(self._config), *found]
        lost = self._find_lost()
        return [f"isolation: {each}" for each in (*found, *([lost] if lost else []))]

    def _find_lost(self) -> str | None:
        """What the project has started while its tests were collected, and its tests will not have."""
        held = self._held_by_project()
        if held is None:
            return None
        self.lost = held.describe()
        self._emission.lost = self.lost
        if not self.lost:
            return None
        return (
            f"started while tests were collected: {self.lost}. Tests run in forks of this process, which do not "
            f"have that; one that waits for it will fail. Start it in a fixture, or use --isolation=microvm."
        )

    def _held_by_project(self) -> Held | None:
        """What it has made in this process; None where that is of no interest to its tests."""
        if self._of_plugins is None or FORK_HERE not in self._backend.features():
            return None
        begin = self._config.stash[initially][0]
        return Held.now(begin, own=True, carries=self._backend.carries).since(begin).since(self._of_plugins)

    def _find_unseen(self) -> Iterator[str]:
        """Files that the project has open, and that are to its tests as /dev/null is."""
        held = self._held_by_project()
        if held is None or not held.files:
            return
        system = (f"/{name}" for name in (*SYSTEM, "dev", "proc", "sys"))
        places = [os.path.realpath(path) for path in (*self._reader.places, *system, *python_environment())]
        unseen = sorted(path for path in held.files if not is_within(path, places))
        for path in unseen[:_UNSEEN_AT_MOST]:
            yield (
                f"{path} was opened while tests were collected, and is empty to them; "
                f"--isolation-mount={os.path.dirname(path)} shows it"
            )
        if len(unseen) > _UNSEEN_AT_MOST:
            yield f"so are {len(unseen) - _UNSEEN_AT_MOST} more"

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Within what others wrap around it: pytest's handlers of log records are then in the forks, too."""
        try:
            if not session.testsfailed or session.config.option.continue_on_collection_errors:
                self._warm_up(session)
            result = yield
            self._end_open_levels(session)
            return result
        except (KeyboardInterrupt, pytest.exit.Exception, session.Failed, session.Interrupted):
            self._schedule.abandon()
            self._end_open_levels(session)  # as plain pytest tears down what is set up, however the session ends
            raise
        finally:
            self._close()

    def _warm_up(self, session: pytest.Session) -> None:
        """Fork the templates off the session as it is after collection, before any test has run in it."""
        items = list(getattr(session, "items", ()))
        seen: dict[str, int] = {}
        for item in items:
            self._nth[item] = seen.get(item.nodeid, 0)
            seen[item.nodeid] = self._nth[item] + 1
        self._show_temporaries()
        self._say(self._find_unseen())
        try:
            self._settings = {item: self._reader.of_item(item) for item in items}
        except IsolationError as error:
            raise pytest.UsageError(str(error)) from None
        wanted = any("tmp_path_factory" in getattr(item, "fixturenames", ()) for item in items)
        self._basetemp = TmpPaths(self._config, ()).make_base() if wanted else None
        flush.flush(self._config)
        for settings in dict.fromkeys(self._settings.values()):
            if settings.enabled:
                self._open_chain(session, settings)
        if not self._told_what_to_run:
            self._schedule.plan(groups.group(items, self._settings, self._reader.run.grain))

    def _show_temporaries(self) -> None:
        """What plug-ins and modules have put aside in directories for temporary files is there in forks of this process."""
        made = self._config.stash.get(temporaries, None)
        if made is not None and FORK_HERE in self._backend.features():
            base = TmpPaths(self._config, ()).base
            self._reader.show(made.take(None if base is None else str(base), self._reader.shown))

    def _open_chain(self, session: pytest.Session, settings: Settings) -> None:
        if settings in self._chains:
            return
        try:
            backend = self.backend_of(settings)
            self._say(backend.notes(settings.spec))
            if FORK_HERE in backend.features():
                root = backend.template(settings.spec, Worker(session, env=settings.spec.env), None)
            else:
                root = backend.template(settings.spec, PAYLOAD, order_for(session.config))
        except IsolationError as error:
            raise pytest.UsageError(f"--isolation: {error}") from None
        if FORK_DEADLOCK in backend.features():
            root.watch_for_deadlock(loops=bool(self.lost or self._reader.run.share))
        carries_all = FORK_HERE not in backend.features()  # a machine, with all that runs in it
        job = functools.partial(self._setup_job, settings, carries_all)
        self._chains[settings] = Chain(root, settings, job)

    def _say(self, notes: Iterable[str]) -> None:
        """Before the first test."""
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        for note in notes:
            if reporter is not None:
                reporter.write_line(f"isolation: {clean_name(note)}")

    def _is_isolated(self, item: pytest.Item) -> bool:
        return item in self._settings and self._settings[item].enabled

    def _chain_of(self, settings: Settings) -> Chain:
        return self._chains[settings]

    def _job_of(self, items: Iterable[pytest.Item]) -> dict[str, Any]:
        briefs = self.carriers.briefs(list(items))
        return self._base_job_of(items) | ({"briefs": briefs} if briefs else {})

    def _base_job_of(self, items: Iterable[pytest.Item]) -> dict[str, Any]:
        items = list(items)
        base = {} if self._basetemp is None else {"basetemp": str(self._basetemp)}
        return base | {
            "items": [[item.nodeid, self._nth[item]] for item in items],
            "tell_capture": self._settings[items[0]] not in self._captures,
            "reruns_made": reruns_made(self._config),
        }

    def _setup_job(self, settings: Settings, carries_all: bool, items: Iterable[pytest.Item]) -> dict[str, Any]:
        share = sorted(self._reader.run.share)
        return self._base_job_of(items) | {
            "unshared": sorted(self._schedule.unshared), "share": share, "carries_all": carries_all, "tell_capture": False,
        }  # fmt: skip

    def _fork_options(self, unit: groups.Unit) -> dict[str, Any]:
        wanted = self._reader.run.wants_details and FORK_ACCOUNT in self.backend_of(unit.settings).features()
        return {"account": True} if wanted else {}

    def backend_of(self, settings: Settings) -> Backend:
        """The run's, or what a marker names."""
        spec = settings.spec
        return registry.choose(spec, {FORK}) if spec.backend != "auto" else self._backend

    def launch_beside(self, settings: Settings) -> tuple[Any, str]:
        """A sandbox for the commands of a test."""
        backend = self.backend_of(settings)
        return backend.launch(settings.spec.replace(inherit_env=False)), backend.name

    def debug(self, fork: Fork, name: str, deadline: float | None, charge: Callable[[Message], None]) -> list[Message]:
        """A test has come to a debugger. Returns what else it says until it leaves it, or until `deadline`."""
        if self._reader.run.jobs > 1 or self._told_what_to_run:
            debugger.refuse(fork, "tests run at the same time, and there is one terminal: leave out --isolation-jobs and -n")
            return []
        self._emit()
        self._emission.show_at_once()
        flush.flush(self._config)
        capture: Any = self._config.pluginmanager.getplugin("capturemanager")
        if capture is None:
            return self._lend_keys(fork, name, deadline, charge)
        capture.suspend_global_capture(in_=True)  # pytest has put /dev/null in the place of the user's keys
        try:
            return self._lend_keys(fork, name, deadline, charge)
        finally:
            capture.resume_global_capture()
            capture.suspend_global_capture(in_=False)

    def _lend_keys(self, fork: Fork, name: str, deadline: float | None, charge: Callable[[Message], None]) -> list[Message]:
        """Any test may say that it has come to a debugger, when nobody debugs it: so it is said whose the keys are."""
        if os.isatty(0) and not (self._config.getoption("usepdb", False) or self._config.getoption("trace", False)):
            told = f"\n[isolation: {name} has come to a debugger: what you type is its own, until it leaves that]\n"
            self.print_raw(1, clean(told).encode())
        return self._lender.interact(fork, deadline, charge)

    def _close(self) -> None:
        self._schedule.close()
        self._lender.close()
        for chain in self._chains.values():
            chain.close()
        self._chains.clear()

    def pytest_unconfigure(self) -> None:
        self._close()

    # One test.

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if item not in self._nth:  # another plug-in's own loop
            self._warm_up(item.session)
        settings = self._settings[item]
        if not settings.enabled:
            self._schedule.pass_by(item)
            self._here.ran(item, nextitem)
            return None
        ihook = item.ihook
        ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reruns = 0
        while True:
            run = self._run(item, settings)
            if not run.runs_again(item):
                break
            self._emission.end(item, run, [])
            self._schedule.finish(item)
            reruns += 1
            count_rerun(self._config)
            self._schedule.again(groups.Unit([item], settings, reruns=reruns))
        if item is run.unit.last and any(self._ends(level, item, nextitem) for _, level in self._open_levels()):
            run.settle()
        # What follows the run's last test of a wide fixture is part of that test's own teardown.
        self._emission.end(item, run, [*self._end_levels(item, nextitem), *self._here.end(item, nextitem)])
        end = run.told[item].end or {}
        self._schedule.finish(item)
        ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        self._obey(item.session, {**end, **self._end})
        return True

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
        """Of a test that runs here: what ends with it in templates is part of its teardown."""
        try:
            return (yield)
        finally:
            wrong = [report.longreprtext for report in self._end_levels(item, nextitem) if report.failed]
            if wrong:
                pytest.fail("\n\n".join(wrong), pytrace=False)

    def _run(self, item: pytest.Item, settings: Settings) -> Run:
        """Until it is done; told to pytest but for its end."""
        try:
            run = self._schedule.run_of(item, settings)
            self._current = item, run
            self._emission.begin(item)
            self._emit()
            self._schedule.pump(lambda: run.told[item].end is not None or bool(self._end))
            self._emit()
            return run
        except LaunchError as error:
            raise RuntimeError(f"isolation: no sandbox for {item.nodeid}: {error}") from error
        finally:
            self._current = None

    def _emit(self) -> None:
        """Tell pytest what there is of the test that it waits for."""
        if self._current is None:
            return
        item, run = self._current
        told = run.told[item]
        while told.events:
            kind, value = told.events.pop(0)
            if kind == "output":
                self._emission.show(*value)
            elif kind == "warning":
                self._config.hook.pytest_warning_recorded.call_historic(kwargs=value)
            elif kind == "carried":
                self.carriers.apply(item, value)
            elif kind == "suite_property":
                for plugin in self._config.pluginmanager.get_plugins():
                    add = getattr(plugin, "add_global_property", None)
                    if add is not None:
                        add(*value)
            elif kind == "xml_attribute":
                for plugin in self._config.pluginmanager.get_plugins():
                    reporter_of = getattr(plugin, "node_reporter", None)
                    if reporter_of is not None:
                        reporter_of(getattr(item, "id", item.nodeid)).add_attribute(*value)
            else:
                self.carriers.leave_out(value.__dict__.pop("_isolation_left", ()))
                self._emission.take(item, run, value)

    def _end_levels(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
        """Tear down what the next test does not need, as pytest would now. Returns what went wrong, or was said."""
        for chain, level in self._open_levels():
            if self._ends(level, item, nextitem):
                self._schedule.tear_down(chain, level, item)
        return self._tell_ended()

    def _tell_ended(self) -> list[pytest.TestReport]:
        ended, self._ended = self._ended, []
        for _level, _report, warned in ended:
            self._tell_warnings(warned)
        return [report for _level, report, _warned in ended]

    def _tell_warnings(self, warned: Iterable[dict[str, Any]]) -> None:
        for arguments in warned:
            self._config.hook.pytest_warning_recorded.call_historic(kwargs=arguments)

    @staticmethod
    def _ends(level: Level, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        return level.node in item.listchain() and (nextitem is None or level.node not in nextitem.listchain())

    def _open_levels(self) -> Iterator[tuple[Chain, Level]]:
        return ((chain, level) for chain in self._chains.values() for level in chain.open_levels())

    def _end_open_levels(self, session: pytest.Session) -> None:
        """The run is over before its last test (-x, a test of another process at the end, …)."""
        for chain, level in self._open_levels():
            if level.last is not None and chain.find(level.node) is level:  # type: ignore[arg-type]
                self._schedule.tear_down(chain, level, level.last)
        for report in self._tell_ended():
            if report.failed:
                self._late.append(f"error at teardown, after {report.nodeid}: {report.longreprtext}")

    def _on_branch(self, branch: Branch, level: Level) -> Template | None:
        """A template is being made, or set up further, or torn down."""
        wall = level.settings.spec.limits.wall
        return self._schedule.see_through(branch, wall, functools.partial(self._hear, level), self.print_raw)

    def _on_death(self, level: Level, branch: Branch) -> None:
        """A template's process has ended while what was set up in it was torn down."""
        assert level.tearing is not None
        verdict = branch.wait(1.0) or Verdict(Ended.LOST)
        stacks = crash_reports.tidy_stacks(branch.stacks(), whole=self._config.getoption("fulltrace", False))
        limits = level.settings.spec.limits
        report = crash_reports.teardown_report(level.tearing, crash_reports.explain(verdict, limits, self.lost), stacks)
        self._ended.append((level, report, []))

    def _on_remake(self, level: Level) -> None:
        """A template has ended, to be made anew without a fixture that a fork cannot carry."""
        self._emission.forget_setup(level.node, level.attempt)
        self._ended = [each for each in self._ended if level not in each[0].above()]

    def _hear(self, level: Level, message: Mapping[str, Any]) -> None:
        """What a template says. It is as little believed as a test."""
        try:
            if "wide" in message:
                nodeid, nth = message["wide"]
                told = message["sections"][:_SECTIONS_AT_MOST]
                sections = [(clean_name(str(name), 200), clean_output(str(text))) for name, text in told]
                item = self._item_of(level, nodeid, nth)
                warned = self._warnings_of(level, item)
                setup = Setup(level.node, level.attempt, float(message["duration"]), sections, warned)
                self._emission.remember_setup(item, setup)
            elif "carried" in message:
                item = self._item_of(level, message["of"], 0)
                self.carriers.apply(item, self.carriers.check(message["carried"], item, message.get("data")))
            elif "warning" in message:
                if len(level.warned) < _WARNINGS_AT_MOST:
                    level.warned.append(message["warning"])
            elif "debugger" in message:
                wall = level.settings.spec.limits.wall
                if level.branch is not None:
                    whose = f"a fixture of {getattr(level.node, 'nodeid', '') or 'the session'}"
                    deadline = None if wall is None or os.isatty(0) else time.monotonic() + wall
                    self.debug(level.branch, whose, deadline, _Allowance(level.branch))
            elif "unshared" in message:
                names = self._fixtures_of(level).intersection(map(str, message["unshared"]))
                self._schedule.unshared |= names
                if names and len(self._unshared) < _SECTIONS_AT_MOST:
                    name = clean_name(str(message["name"]), 200)
                    self._unshared.setdefault(name, clean_name(str(message["left"]), 200))
            elif "teardown" in message and level.tearing is not None and not level.told:
                warned = self._warnings_of(level, level.tearing)
                report = reports.decode(self._config, level.tearing, message.get("data"))
                self._ended.append((level, report, warned))
                level.told = True
            elif "done" in message and isinstance(message["done"], dict):
                self._end = message["done"] if "exit" in message["done"] else {}
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError):
            return

    @staticmethod
    def _warnings_of(level: Level, item: pytest.Item) -> list[dict[str, Any]]:
        """Those of wide fixtures are of the test that these were set up for, or end with. Raises BadReport."""
        warned, level.warned = level.warned, []
        return [reports.decode_warning(item, each) for each in warned]

    def _fixtures_of(self, level: Level) -> frozenset[str]:
        """The names of those that its template may set up: what it says of others is not its to say."""
        if level.fixtures is None:
            found: set[str] = set()
            for item in self._nth:
                if level.node in item.listchain():
                    found.update(fixture_scopes.needs_of(item).get(level.node, ()))
            level.fixtures = frozenset(found)
        return level.fixtures

    def _item_of(self, level: Level, nodeid: object, nth: object) -> pytest.Item:
        """Of those whose template it is. Raises KeyError."""
        for item, number in self._nth.items():
            if item.nodeid == nodeid and number == nth and level.node in item.listchain():
                return item
        raise KeyError(nodeid)

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

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._unshared or self._late:
            terminalreporter.section("isolation", sep="-")
        for name, left in self._unshared.items():
            terminalreporter.line(
                f"fixture {name!r} leaves {left} behind, which a fork of a process cannot carry: it was set up anew for "
                f"every test. Use --isolation=microvm, or list it in 'isolation_share' if tests do not need that."
            )
        for text in self._late:
            terminalreporter.line(text, red=True)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        try:
            self._emission.write(exitstatus, self._backend)
        except OSError as error:
            self._late.append(f"the report could not be written: {error}")
            if session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.USAGE_ERROR

    # Output.

    def print_raw(self, fd: int, data: bytes) -> None:
        """What a test wrote past pytest's capture (-s, capsys.disabled()) goes where it would have gone."""
        flush.flush(self._config)
        if os.isatty(fd):
            decoder = self._decoders.setdefault(fd, codecs.getincrementaldecoder("utf-8")("replace"))
            data = clean_output(decoder.decode(data)).encode()
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
                sections.append((f"Captured {name} call", clean_output(content.decode("utf-8", "replace"), _OUTPUT_AT_MOST)))
        return sections


class _Allowance:
    """How much a template may say while it is debugged. Raises WireError."""

    def __init__(self, branch: Branch) -> None:
        self._branch = branch
        self._said = 0

    def __call__(self, message: Message) -> None:
        self._said += size_of(message)
        if self._said > SAID_AT_MOST:
            self._branch.end(Verdict(Ended.KILLED))
            raise WireError("it says too much")
