"""Inside of a template: fixtures wider than a function are set up here, once, for all of its forks.

Pytest sets up a fixture when a test asks for it, as far as the nodes of the collection tree are set up that it belongs
to. So a boundary, an item of our own that runs no test, is set up beneath the node in question, and asks in the tests'
place. When it is torn down, its node stays: pytest tears down what the next item does not need, and the next item is a
boundary, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from pytest_isolation.inside.unforkable import Held
from pytest_isolation.peers.carriers import Carriers
from pytest_isolation.peers.origin import is_conftest, is_pytests_own
from pytest_isolation.wire import fixture_scopes, reports


class Boundary(pytest.Item):
    """Stands for tests beneath a node; for one of them, when it asks for what that needs."""

    work: Callable[[], object] | None = None
    protocol: Callable[[], object] | None = None
    funcargs: dict[str, Any]
    fixturenames: list[str]
    callspec: Any
    obj: Any
    _fixtureinfo: Any
    _item: pytest.Item | None = None

    def setup(self) -> None:
        if self.work is not None:
            self.work()

    def request_for(self, item: pytest.Item) -> Any:
        """A request for fixtures as `item` has one, of this node, which is the one that is set up now."""
        self.funcargs = {}
        self._item = item
        for name in ("_fixtureinfo", "fixturenames", "callspec", "obj"):
            if hasattr(item, name):
                setattr(self, name, getattr(item, name))
        return type(item._request)(self, _ispytest=True)  # type: ignore[attr-defined]

    def iter_parents(self) -> Iterator[Any]:
        """Which fixtures there are (for `request.getfixturevalue`) depends on where the test is."""
        return super().iter_parents() if self._item is None else self._item.iter_parents()

    def runtest(self) -> None:
        raise AssertionError("a boundary is no test")


class Stage:
    """The template's part of a session."""

    def __init__(self, session: pytest.Session, carriers: Carriers) -> None:
        self._session = session
        self._carriers = carriers
        self._node: pytest.Collector = session
        self._unshared: set[str] = set()
        self._shared: frozenset[str] = frozenset()
        self._carries_all = False
        self._watching = False
        self._left: list[tuple[str, str]] = []
        self._fresh: list[Any] = []
        self._of_fork: list[tuple[Any, Any]] = []  # fixtures that no template has set up, with the requests for them
        self._ends = False
        self._send: Callable[..., None] = lambda message, data=b"": None
        session.config.pluginmanager.register(self, "isolation-stage")

    def boundary(self) -> Boundary:
        """The next item, for who runs a test in a fork: all that is set up here stays so."""
        made: Boundary = Boundary.from_parent(self._node, name="isolation")
        return made

    def set_up(self, items: list[pytest.Item], job: dict[str, Any], send: Callable[..., None]) -> None:
        """The fixtures of the node at `job["setup"]` in the first item's chain that the items need, in their order.

        Tells for each item that needs any how long it took, and what was captured; and of each fixture that cannot be
        shared. An error is pytest's to report, for each test that uses what has failed.
        """
        self._send = send
        self._watching = True
        self._node = node = items[0].listchain()[job["setup"]]
        self._unshared = set(job["unshared"])
        self._shared = frozenset(job["share"])
        self._carries_all = job["carries_all"]
        for item, (nodeid, nth) in zip(items, job["items"], strict=True):
            names = list(fixture_scopes.needs_of(item, unshared=self._unshared).get(node, ()))
            boundary = Boundary.from_parent(node, name="isolation")
            boundary.work = functools.partial(self._ask_for, boundary, item, names)
            call = self._perform(boundary, lambda boundary: self._call("pytest_runtest_setup", "setup", item=boundary))
            told = [] if call.excinfo is not None else _sections(boundary, call)  # what went wrong, shows in the test
            self._perform(boundary, lambda boundary: self._call(
                "pytest_runtest_teardown", "teardown", item=boundary, nextitem=self.boundary()
            ))  # fmt: skip
            send({"wide": [nodeid, nth], "duration": call.duration, "sections": told})
            self._send_carried(item, "setup")
        self._watching = False

    def tear_down(self, item: pytest.Item, job: dict[str, Any], send: Callable[..., None]) -> None:
        """Everything down to the node at `job["teardown"]` in the item's chain, which stays (-1: nothing does); what goes
        wrong is an error of `item`, the last that used it."""
        after = None
        if job["teardown"] >= 0:
            after = Boundary.from_parent(item.listchain()[job["teardown"]], name="isolation")
        boundary = self.boundary()
        self._call("pytest_runtest_setup", "setup", item=boundary)
        call = self._perform(boundary, lambda boundary: self._call(
            "pytest_runtest_teardown", "teardown", item=boundary, nextitem=after
        ))  # fmt: skip
        report = self._report(item, call)
        report.sections = [pair for pair in _sections(boundary, call) if "teardown" in pair[0]]
        send({"teardown": True}, reports.encode(item.config, report))
        self._send_carried(item, "teardown")

    def begin(self, *, last: bool) -> None:
        """In a fork, before a test; `last`: nothing comes behind it."""
        self._ends = last

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """What was set up in this fork ends with it: pytest leaves the nodes alone that it belongs to."""
        try:
            return (yield)
        finally:
            if self._ends and not isinstance(item, Boundary):
                _finish(self._of_fork)

    def _report(self, item: pytest.Item, call: pytest.CallInfo[None]) -> pytest.TestReport:
        """By pytest and the project: others, as pytest-rerunfailures, must have seen the test begin here."""
        manager = self._session.config.pluginmanager
        others = [each for each in manager.get_plugins() if not is_pytests_own(each) and not is_conftest(each)]
        made: pytest.TestReport = manager.subset_hook_caller("pytest_runtest_makereport", others)(item=item, call=call)
        return made

    def _send_carried(self, item: pytest.Item, phase: str) -> None:
        for name, data in self._carriers.collect(item, phase):
            self._send({"carried": name, "of": item.nodeid}, data)

    def _perform(self, boundary: Boundary, work: Callable[[Boundary], pytest.CallInfo[None]]) -> pytest.CallInfo[None]:
        """Within what pytest wraps around a test: its warnings are caught, its assertions explained."""
        made: list[pytest.CallInfo[None]] = []
        boundary.protocol = lambda: made.append(work(boundary))
        self._caller("pytest_runtest_protocol", keep=self)(item=boundary, nextitem=None)
        return made[0]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if isinstance(item, Boundary) and item.protocol is not None:
            item.protocol()
            return True
        return None

    def _caller(self, hook: str, keep: object = None) -> Any:
        """A hook with pytest's own plug-ins only: others expect a test."""
        manager = self._session.config.pluginmanager
        others = [plugin for plugin in manager.get_plugins() if plugin is not keep and not is_pytests_own(plugin)]
        return manager.subset_hook_caller(hook, others)

    def _call(self, hook: str, when: Any, **arguments: Any) -> pytest.CallInfo[None]:
        caller = self._caller(hook)

        def call() -> None:
            __tracebackhide__ = True
            caller(**arguments)

        __tracebackhide__ = True
        return pytest.CallInfo.from_call(call, when=when, reraise=(KeyboardInterrupt, pytest.exit.Exception))

    def _ask_for(self, boundary: Boundary, item: pytest.Item, names: list[str]) -> None:
        request = boundary.request_for(item) if hasattr(item, "_request") else None
        for name in names:
            if request is None or name in self._unshared or name not in boundary.fixturenames:
                continue
            self._fresh, self._left = [], []
            try:
                request.getfixturevalue(name)
            except BaseException as error:
                if isinstance(error, (KeyboardInterrupt, pytest.exit.Exception)):
                    raise
                return  # kept in the fixture, for each test; this one would ask for no more
            finally:
                self._take_back(name, request)

    def _take_back(self, asked: str, request: Any) -> None:
        """End what a fork could not carry, and tell of it. What it has left in modules stays: the host makes this template
        anew without it."""
        if not self._left:
            return
        name, left = self._left[0]
        for definition in reversed(self._fresh):
            definition.finish(request)
        self._unshared |= {name, asked}
        self._send({"unshared": sorted({name, asked}), "name": name, "left": left})

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Generator[None, object, object]:
        """See what each leaves behind. In a test's fork that does not matter."""
        if not self._watching and fixturedef.scope != "function":
            self._of_fork.append((fixturedef, request))
        if not self._watching or self._carries_all or fixturedef.scope == "function" or fixturedef.argname in self._shared:
            return (yield)
        before = Held.now()
        try:
            return (yield)
        finally:
            self._fresh.append(fixturedef)
            left = Held.now(before).since(before).describe()
            if left:
                self._left.append((fixturedef.argname, left))


def _finish(fixtures: list[tuple[Any, Any]]) -> None:
    """The last one first; what one raises does not keep the others."""
    while fixtures:
        fixturedef, request = fixtures.pop()
        try:
            fixturedef.finish(request)
        finally:
            _finish(fixtures)


def _sections(boundary: Boundary, call: pytest.CallInfo[None]) -> list[tuple[str, str]]:
    """What was captured."""
    return pytest.TestReport.from_item_and_call(boundary, call).sections
