"""Which unit runs when, and in a fork of which template: up to N at a time, as far ahead of pytest's own loop as need be.

Pytest asks for one test after the other, and takes what it is told of it: so order, progress, `-x` and all else are its own.
What it will ask for next runs meanwhile, and what is said of it waits for its turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from isolation.errors import LaunchError, WireError
from isolation.plain import os, select, time
from isolation.result import Ended, Verdict
from isolation.template import Branch, Fork, Template
from pytest_isolation.host import groups
from pytest_isolation.host.groups import Unit
from pytest_isolation.host.sandbox_run import Host, Run, size_of
from pytest_isolation.host.template_chain import Chain, Level
from pytest_isolation.settings import Settings
from pytest_isolation.wire.fixture_scopes import Wide

_AHEAD_AT_MOST = 2000  # units
_KEPT_AT_MOST = 256 << 20  # bytes
_SETUP_LOOKS_AHEAD = 500  # units
SAID_AT_MOST = 128 << 20  # bytes, by a template while it is set up
_MESSAGE = 100  # bytes that one counts for at least
_AT_ONCE = 500  # messages, or pieces of output


class Schedule:
    """The units of a session, in their order. `emit` is told of what arrives for the test that pytest waits for; `waits`
    tells which tests have to know of those before."""

    def __init__(
        self,
        host: Host,
        config: pytest.Config,
        chain_of: Callable[[Settings], Chain],
        *,
        jobs: int,
        grain: str,
        emit: Callable[[], None],
        waits: Callable[[pytest.Item], bool],
        fork_options: Callable[[Unit], dict[str, Any]],
        on_branch: Callable[[Branch, Level], Template | None],
        on_death: Callable[[Level, Branch], object],
        on_remake: Callable[[Level], object],
    ) -> None:
        self._host = host
        self._config = config
        self._chain_of = chain_of
        self._jobs = jobs
        self._grain = grain
        self._emit = emit
        self._waits = waits
        self._options = fork_options
        self._on_branch = on_branch
        self._on_death = on_death
        self._on_remake = on_remake
        self._units: list[Unit] = []
        self._next = 0
        self._running: list[tuple[Run, Level]] = []
        self._runs: dict[pytest.Item, Run] = {}
        self._kept = 0  # bytes of what waits for its turn
        self._waiting = 0  # runs
        self._sandboxes = 0
        self._poller = select.poll()
        self._owner: dict[int, Run] = {}
        self.unshared: set[str] = set()
        self.job_of: Callable[[Iterable[pytest.Item]], dict[str, Any]]

    def plan(self, found: list[Unit]) -> None:
        """What there is to run."""
        self._units, self._next = found, 0

    def pass_by(self, item: pytest.Item) -> None:
        """Pytest runs it itself."""
        if self._next < len(self._units) and item in self._units[self._next].items:
            self._next += 1

    def run_of(self, item: pytest.Item, settings: Settings) -> Run:
        """The run that `item` is part of; started now at the latest."""
        while item not in self._runs:
            if self._next >= len(self._units):
                self.again(Unit([item], settings))  # nobody has planned that, or it has run before
            self._fill(item)
            if item not in self._runs:
                self._step()
        return self._runs[item]

    def again(self, unit: Unit) -> None:
        """Run a unit (once more) before all others that have not begun."""
        self._units.insert(self._next, unit)
        for item in unit.items:
            self._runs.pop(item, None)

    def pump(self, done: Callable[[], bool]) -> None:
        """Let everything go on until `done`."""
        while not done():
            self._fill(None)
            self._step()

    def finish(self, item: pytest.Item) -> None:
        """Pytest has been told all of a test."""
        run = self._runs.pop(item)
        if all(other not in self._runs or self._runs[other] is not run for other in run.unit.items):
            self._kept -= run.size
            self._waiting -= 1
            run.close()

    def tear_down(self, chain: Chain, level: Level, item: pytest.Item) -> None:
        """End a level, whose last test is `item`."""
        self._wait_for(level)
        chain.tear_down(level, item, self._on_branch, self._on_death)

    def see_through(
        self, branch: Branch, wall: float | None, message: Callable[[Any], None], output: Callable[[int, bytes], None]
    ) -> Template | None:
        """Wait until a branch is a template, or has ended (None), while others run; `wall` seconds at most. `message` and
        `output` get what it says."""
        deadline = None if wall is None else time.monotonic() + wall
        streams = {branch.stdout: 1, branch.stderr: 2}
        said = 0
        fds = [*branch.filenos(), *streams]
        for fd in fds:
            self._poller.register(fd, select.POLLIN)
        try:
            while True:
                for fd, number in streams.items():
                    said += _relay(fd, functools.partial(output, number))
                over = False
                try:
                    template = branch.template(0)
                except LaunchError:
                    template, over = None, True
                more = _take(branch, message)
                said += more or 0
                while more and (over or template is not None) and said <= SAID_AT_MOST:  # what it said before
                    more = _take(branch, message)
                    said += more or 0
                if (over or template is not None or more is None) and said <= SAID_AT_MOST:
                    return template
                if said > SAID_AT_MOST:
                    if template is not None:
                        template.close()
                    branch.end(Verdict(Ended.KILLED))
                    return None
                if deadline is not None and time.monotonic() >= deadline:
                    branch.end(Verdict(Ended.TIMED_OUT))
                    return None
                self._step(deadline)
        finally:
            for fd in fds:
                self._poller.unregister(fd)

    def abandon(self) -> None:
        """The run is over: nobody waits for what runs, and nothing more is started."""
        self._next = len(self._units)
        for run, level in list(self._running):
            run.close()
            run.rest = []
            self._retire(run, level)

    def close(self) -> None:
        """End all that runs."""
        for run, _level in self._running:
            run.close()
        self._running.clear()
        for run in self._runs.values():
            run.close()

    # What runs.

    def _fill(self, wanted: pytest.Item | None) -> None:
        """Start what may be started."""
        while len(self._running) < self._jobs and self._next < len(self._units):
            unit = self._units[self._next]
            needed = wanted is not None and wanted not in self._runs
            if not needed and (self._kept > _KEPT_AT_MOST or self._waiting > _AHEAD_AT_MOST):
                return
            if not unit.settings.enabled and not needed:
                return  # pytest runs it itself, when its turn comes; others must not be ahead of it
            if not needed and self._runs and any(self._waits(item) for item in unit.items):
                return  # until pytest has been told of all before it
            self._next += 1
            try:
                self._start(unit)
            except BaseException:
                self._next -= 1
                raise

    def _start(self, unit: Unit) -> None:
        job = self.job_of(unit.items) | {"reruns": unit.reruns}
        level, fork = self._fork_for(unit, job)
        self._sandboxes += 1
        lane = min(set(range(self._jobs)) - {run.worker for run, _level in self._running})
        run = Run(
            self._host, unit, fork, worker=lane, sandbox=self._sandboxes, trusted=level.node is None, config=self._config
        )
        level.running += 1
        for each in level.above():
            each.last = unit.last
        self._running.append((run, level))
        for item in unit.items:
            self._runs[item] = run
        for fd in run.descriptors():
            self._poller.register(fd, select.POLLIN)
            self._owner[fd] = run

    def _fork_for(self, unit: Unit, job: dict[str, Any]) -> tuple[Level, Fork]:
        """A template may die while it waits, of an alarm that a fixture has set, say: then it is made once more; and if that
        one dies, too, each test sets up for itself what it needs."""
        died: set[pytest.Collector] = set()
        while True:
            level = self._level_for(unit)
            try:
                return level, level.template.fork(job, **self._options(unit))
            except LaunchError:
                if level.node is None:
                    raise
                self._wait_for(level)
                chain = self._chain_of(unit.settings)
                if level.node not in died:
                    died.add(level.node)
                    chain.drop(level)
                else:
                    chain.give_up(level)

    def _level_for(self, unit: Unit) -> Level:
        """With all that the unit needs set up."""
        chain = self._chain_of(unit.settings)
        unit.needs = groups.needs_of(unit, self._grain, self.unshared)
        while True:
            level, node = chain.missing(unit)
            if node is None:
                return level
            found = chain.find(node)
            if found is not None:
                self._wait_for(found)
                for child in list(found.children):
                    last = unit.items[0] if child.last is None else child.last
                    chain.tear_down(child, last, self._on_branch, self._on_death)
            wanted = self._wanted(unit, node, found)
            unshared = set(self.unshared)
            lives = chain.set_up(level, node, wanted, self._on_branch)
            made = chain.find(node)
            deadly = _names(wanted)
            deadly -= self.unshared if made is None else self.unshared.union(made.done)
            if not lives and made is not None and deadly:
                # The tests that use these show what is wrong with them; the others do without.
                self.unshared |= deadly
                chain.drop(made)
                made = None
            elif lives and made is not None and _names(wanted) & (self.unshared - unshared):
                # What such a fixture has left in modules (a pool without its threads, say) would be in every fork. Each time
                # a fixture less is wanted, so this comes to an end whatever the template says.
                chain.tear_down(made, unit.items[0], self._on_branch, self._on_death)
                self._on_remake(made)
                made = None
            unit.needs = groups.needs_of(unit, self._grain, self.unshared)
            if made is not None and not made.satisfies(unit.needs.get(node, {})):
                made.broken = True  # never twice the same: then the unit sets it up itself

    def _wanted(self, unit: Unit, node: pytest.Collector, found: Level | None) -> dict[pytest.Item, dict[str, Wide]]:
        """What to set up at `node` now: what this unit needs, when plain pytest would. And where a narrower level comes
        below it, what others beneath that one need: a template that goes on to set up more has no forks, so that level,
        which is one, would have to end."""
        nodes = list(unit.needs)
        scope = nodes[nodes.index(node) + 1] if node is not nodes[-1] else None
        done: dict[str, Wide] = {} if found is None or found.broken else dict(found.done)
        own = unit.needs[node]
        wanted: dict[pytest.Item, dict[str, Wide]] = {}
        start = self._next - 1  # where it stands
        for other in self._units[start : start + (_SETUP_LOOKS_AHEAD if scope is not None else 1)]:
            if scope is not None and scope not in other.items[0].listchain():
                break
            if other.settings != unit.settings:
                continue
            for item in other.items:
                needs = groups.needs_of(Unit([item], other.settings), self._grain, self.unshared).get(node, {})
                new = {
                    name: wide for name, wide in needs.items()
                    if wide == own.get(name, done.get(name, wide))
                }  # fmt: skip
                if any(done.get(name) != fixture for name, fixture in new.items()):
                    wanted[item] = new
                    done.update(new)
        return wanted

    def _wait_for(self, level: Level) -> None:
        while level.busy():
            self._step()

    def _step(self, deadline: float | None = None) -> None:
        """Wait for news, until `deadline` at most, and take them."""
        patience = [left for run, _level in self._running if (left := run.patience()) is not None]
        if deadline is not None:
            patience.append(max(0.0, deadline - time.monotonic()))
        ready: dict[Run, set[int]] = {}
        for fd, _event in self._poller.poll(min(patience) * 1000 if patience else None):
            if fd in self._owner:
                ready.setdefault(self._owner[fd], set()).add(fd)
        for run, level in list(self._running):
            for fd in run.look(ready.get(run, set())):
                self._poller.unregister(fd)
                del self._owner[fd]
            if run.over:
                self._retire(run, level)
        self._emit()

    def _retire(self, run: Run, level: Level) -> None:
        self._running.remove((run, level))
        level.running -= 1
        for fd in [fd for fd, owner in self._owner.items() if owner is run]:
            self._poller.unregister(fd)
            del self._owner[fd]
        self._kept += run.size
        self._waiting += 1
        if run.rest:
            self.again(Unit(run.rest, run.unit.settings))


def _names(wanted: dict[pytest.Item, dict[str, Wide]]) -> set[str]:
    return {wide.name for fixtures in wanted.values() for wide in fixtures.values() if wide.name}


def _relay(fd: int, output: Callable[[bytes], None]) -> int:
    """Pass on what there is, within reason; how many bytes that was."""
    count = 0
    for _ in range(_AT_ONCE):
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            break
        if not data:
            break
        count += len(data)
        output(data)
    return count


def _take(branch: Branch, message: Callable[[Any], None]) -> int | None:
    """Pass on what messages there are, within reason; how many bytes those were, or None at the end of them all."""
    count = 0
    for _ in range(_AT_ONCE):
        try:
            said = branch.receive(0)
        except TimeoutError:
            break
        except (WireError, LaunchError):
            return None
        if said is None:
            return None
        count += _MESSAGE + size_of(said)
        message(said)
    return count
