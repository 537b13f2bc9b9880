"""Inside: runs one test in the forked session, and forwards what pytest's hooks say of it."""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections.abc import Generator, Iterable
from typing import Any

import pytest

from isolation.guest import Guest
from isolation.plain import os
from pytest_isolation.inside import renaming
from pytest_isolation.inside.counters import Counters
from pytest_isolation.inside.shared_fixtures import Stage
from pytest_isolation.inside.strays import Strays
from pytest_isolation.peers.carriers import Carriers
from pytest_isolation.peers.rerunfailures import Rerun, remember_reruns
from pytest_isolation.wire import flush, reports, tmp_paths
from pytest_isolation.wire.debugger import Terminal
from pytest_isolation.wire.tmp_paths import TmpPaths

COLLECTOR = "isolation-controller"
PAYLOAD = "pytest_isolation.inside.worker:main"


class Worker:
    """The payload of a template: called with its guest, it waits for jobs, which it does in forks of this process.

    lends  whether the host can hand descriptors to it, and so a sandbox
    env    what it is to have besides the environment of the host's pytest, of which it is a fork
    """

    def __init__(
        self, session: pytest.Session, items: list[pytest.Item] | None = None, env: Iterable[tuple[str, str]] = ()
    ) -> None:
        self.lends = items is None
        self._env = dict(env)
        self._session = session
        self._items = session.items if items is None else items
        self._config = session.config
        self._guest: Guest | None = None
        self._tell_capture = False
        self._runs_again = False
        self._item: pytest.Item | None = None
        self._stage: Stage | None = None
        self._strays: Strays = session.config.pluginmanager.getplugin("isolation-strays") or Strays(session.config)
        self._terminal: Terminal | None = None
        self._carriers = Carriers(session.config)
        self._paths = TmpPaths(session.config, self._items)
        self._shows_at_once = _shows_at_once(session.config)

    def __call__(self, guest: Guest) -> None:
        manager = self._config.pluginmanager
        for name in ("controller", "carriers", "deferred"):
            manager.unregister(name=f"isolation-{name}")
        quiet_terminal(manager)
        for plugin in [each for each in manager.get_plugins() if type(each).__name__ == "WorkerInteractor"]:
            manager.unregister(plugin)  # of pytest-xdist: its reports are made by the process that forks
        if not manager.is_registered(self._strays):
            manager.register(self._strays, "isolation-strays")
        manager.register(self, "isolation-worker")  # tells it the warnings of the past again (a historic hook)
        self._carriers.begin()
        renaming.install(["/tmp", "/var/tmp", tempfile.gettempdir(), str(self._config.rootpath), os.getcwd()])
        os.environ.update(self._env)
        found: dict[str, list[pytest.Item]] = {}
        for item in self._items:
            found.setdefault(item.nodeid, []).append(item)
        while True:
            for job in guest.forks():
                self._guest = guest
                self._strays.claim()
                self._carriers.begin()
                try:
                    items = [found[nodeid][nth] for nodeid, nth in job["items"]]
                except (KeyError, IndexError):
                    guest.send({"done": {"internal_error": _NOT_COLLECTED}})
                    continue
                if "basetemp" in job:
                    self._paths.use_base(job["basetemp"])
                if "setup" in job:
                    self._paths.prepare()
                    self._stage = self._stage or Stage(self._session, self._carriers)
                    try:
                        self._stage.set_up(items, job, self._send)
                    except pytest.exit.Exception as error:
                        guest.send({"done": {"exit": str(error.msg), "returncode": error.returncode}})
                        continue
                    flush.flush(self._config)
                    break  # this process is a template now
                if "teardown" in job:
                    assert self._stage is not None
                    self._stage.tear_down(items[0], job, self._send)
                    guest.send({"done": {}})
                else:
                    self._run_all(guest, items, job)
            else:
                return

    def _run_all(self, guest: Guest, items: list[pytest.Item], job: dict[str, Any]) -> None:
        self._carriers.heed(items, job.get("briefs", {}))
        self._tell_capture = job["tell_capture"]
        after = None if self._stage is None else self._stage.boundary()
        end: dict[str, Any] = {}
        for number, item in enumerate(items):
            if number:
                guest.send({"next": number})
            last = number == len(items) - 1
            if self._stage is not None:
                self._stage.begin(last=last)
            end = self._run(item, after if last else items[number + 1], job)
            if end:
                break
        guest.send({"done": end})

    def _run(self, item: pytest.Item, nextitem: pytest.Item | None, job: dict[str, Any]) -> dict[str, Any]:
        """One test. `nextitem` is what pytest tears down for: nothing that the template has set up, or all, where it has set
        up nothing: this fork is all that this test sees of the session then."""
        end: dict[str, Any] = {}
        counters = Counters()
        self._paths.prepare(item)
        self._item = item
        try:
            remember_reruns(item, int(job.get("reruns", 0)), int(job.get("reruns_made", 0)))
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
        except Rerun:
            end = {"rerun": True}
        except pytest.exit.Exception as error:
            end = {"exit": str(error.msg), "returncode": error.returncode}
        except KeyboardInterrupt:
            end = {"interrupt": True}
        except BaseException:
            end = {"internal_error": traceback.format_exc()}
        self._strays.check()
        for name in ("shouldstop", "shouldfail"):
            if getattr(self._session, name):
                end[name] = str(getattr(self._session, name))
        flush.flush(self._config)
        self._send({"counted": counters.since()})
        for name, data in self._carriers.collect(item):
            self._send({"carried": name}, data)
        return end

    def _send(self, message: dict[str, Any], data: bytes = b"") -> None:
        assert self._guest is not None
        self._strays.check()
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
        flush.flush(self._config)  # what it printed past the capture belongs before its report
        if self._item is not None:
            self._carriers.sent(self._item, report)
        waits = self._shows_at_once and self._terminal is None
        self._send({"report": True, "wait": waits}, reports.encode(self._config, report))
        if waits:
            self.guest.receive()  # else the host could see what is printed from here on together with what was before
        if report.failed and self._item is not None:
            self._item.stash[tmp_paths.failed] = True
        self._runs_again |= str(report.outcome) == "rerun"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_exception_interact(self, report: Any) -> Generator[None, object, object]:
        """A plug-in may change the report of a failure here, which has been sent, but not been shown."""
        if self._guest is None or not isinstance(report, pytest.TestReport):
            return (yield)
        before = report.longreprtext, list(report.sections)
        result = yield
        shown = hasattr(report, "_pdbshown")  # by the debugger: pytest's summary leaves it out (pytest: debugging.py)
        if shown or before != (report.longreprtext, report.sections):
            self._send({"amended": True, "shown": shown}, reports.encode(self._config, report))
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        """Told by the host, but for another run of the same test."""
        if self._runs_again:
            raise Rerun  # in a fork that nothing has happened in yet

    @pytest.hookimpl
    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: Any
    ) -> None:
        if self._guest is not None:
            self._send({"warning": reports.encode_warning(warning_message, when, nodeid, location)})

    @pytest.hookimpl
    def pytest_enter_pdb(self) -> None:
        """Capture is suspended: descriptors 0 to 2 are the sandbox's own."""
        if self._guest is not None and self._terminal is None:
            flush.flush(self._config)
            self._terminal = Terminal(self._guest)

    @pytest.hookimpl
    def pytest_leave_pdb(self) -> None:
        if self._terminal is not None:
            flush.flush(self._config)
            self._terminal.leave()
            self._terminal = None

    def record_suite_property(self, name: str, value: object) -> None:
        """For the fixture of that name, whose junit file is the host's to write."""
        self.guest.send({"suite_property": [name, str(value)]})

    def record_xml_attribute(self, name: str, value: object) -> None:
        """Likewise."""
        self.guest.send({"xml_attribute": [str(name), str(value)]})


def _shows_at_once(config: pytest.Config) -> bool:
    """Whether pytest, or what it does not capture, is printed while tests run."""
    option = config.option
    if getattr(option, "capture", "no") == "no" or getattr(option, "setupshow", False):
        return True
    logs = config.pluginmanager.hasplugin("logging-plugin")
    return logs and (option.log_cli_level is not None or bool(config.getini("log_cli")))


_NOT_COLLECTED = (
    "this test was collected on the host, but not inside of the sandbox: does its parametrization depend on something "
    "that is not there (a file outside of the project, the network), or on the order of a set?"
)


def order_for(config: pytest.Config) -> dict[str, Any]:
    """What a worker that collects by itself needs to know: the command line, as it was given here."""
    return {"args": list(config.invocation_params.args)}


def main(guest: Guest) -> None:
    """The payload where the host cannot be forked: pytest, started anew in the sandbox, which collects and waits."""
    status = pytest.main(guest.config["args"], plugins=[_Collector(guest)])
    raise SystemExit(int(status) or 1)  # it came to an end by itself, and so has no test to run


class _Collector:
    """Takes over when pytest has collected. Where it is registered, no controller is (plugin.py)."""

    __name__ = COLLECTOR  # what pluggy registers it as

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._items: list[pytest.Item] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Before anything is deselected: what is run is the host's choice."""
        self._items = list(items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        Worker(session, self._items)(self._guest)
        return True


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
