"""The chain of templates: one for each node of the collection tree with wide fixtures, a fork of the next wider one's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from isolation.errors import IsolationError
from isolation.template import Branch, Template
from pytest_isolation.host.groups import Unit
from pytest_isolation.settings import Settings
from pytest_isolation.wire.fixture_scopes import Wide

_attempts = itertools.count(1)

Work = Callable[[Branch, "Level"], Template | None]


class Level:
    """One template of the chain: of a node, or (node None) the one that all others of these settings come from.

    done     what is set up in it
    attempt  a number of its own for each time that something is set up in it
    running  forks of it that are not done
    """

    def __init__(self, settings: Settings, node: pytest.Collector | None, parent: Level | None, template: Template) -> None:
        self.settings = settings
        self.node = node
        self.parent = parent
        self.template = template
        self.branch: Branch | None = None
        self.done: dict[str, Wide] = {}
        self.attempt = 0
        self.running = 0
        self.children: list[Level] = []
        self.last: pytest.Item | None = None  # that was started in it
        self.tearing: pytest.Item | None = None  # the test that it is torn down after
        self.told = False  # how that went
        self.warned: list[Any] = []  # what it has told, before it tells on account of which test
        self.broken = False
        self.fixtures: frozenset[str] | None = None  # all that it may ever be asked for, once somebody wanted to know

    def satisfies(self, wanted: dict[str, Wide]) -> bool:
        """Whether all of it is set up; for the parameters that are wanted."""
        return all(self.done.get(name) == fixture for name, fixture in wanted.items())

    def busy(self) -> bool:
        """Whether anything of it still runs."""
        return self.running > 0 or any(child.busy() for child in self.children)

    def above(self) -> Iterator[Level]:
        """This one, and those that it comes from."""
        level: Level | None = self
        while level is not None:
            yield level
            level = level.parent


class Chain:
    """All levels of one kind of settings."""

    def __init__(self, root: Template, settings: Settings, job: Callable[[Iterable[pytest.Item]], dict[str, Any]]) -> None:
        self.root = Level(settings, None, None, root)
        self._levels: dict[pytest.Collector, Level] = {}
        self._job = job

    def open_levels(self) -> list[Level]:
        """The narrowest first, as pytest tears down: of a class before that of its module, also where one is no fork of the
        other."""
        return sorted(self._levels.values(), key=lambda level: -len(level.node.listchain()) if level.node else 0)

    def find(self, node: pytest.Collector) -> Level | None:
        """The level of a node, if it is open."""
        return self._levels.get(node)

    def missing(self, unit: Unit) -> tuple[Level, pytest.Collector | None]:
        """Where the unit can be run as things stand, and the node that has to be set up first, or further (None: none)."""
        level = self.root
        for node, wanted in unit.needs.items():
            found = self._levels.get(node)
            if found is None or not found.satisfies(wanted):
                broken = found is not None and found.broken
                return level, None if broken else node
            level = found
        return level, None

    def set_up(self, level: Level, node: pytest.Collector, wanted: dict[pytest.Item, dict[str, Wide]], work: Work) -> bool:
        """Make the template of `node`, below `level`, or let it go on, so that it has what the items want. `work` sees the
        branch through, and returns the template, or None when there is none. False: its process has ended instead."""
        items = list(wanted)
        depth = items[0].listchain().index(node)
        job = self._job(items) | {"setup": depth}
        found = self._levels.get(node)
        template = None
        try:
            if found is None:
                found = self._levels[node] = Level(level.settings, node, level, level.template)
                level.children.append(found)
                found.branch = level.template.branch(job)
            else:
                found.branch = found.template.advance(job)
            found.attempt = next(_attempts)
            template = work(found.branch, found)
        except IsolationError:
            pass  # then the tests set all up themselves, and show what is wrong
        assert found is not None
        if template is None:
            found.broken = True
            return False
        found.template = template
        for fixtures in wanted.values():
            if any(found.done.get(name, fixture) != fixture for name, fixture in fixtures.items()):
                found.done.clear()  # with another parameter, what depends on it has ended; what has not, is asked for again
            found.done.update(fixtures)
        return True

    def drop(self, level: Level) -> None:
        """Its process has ended, or must: without teardown, as there is nobody to do that."""
        for child in list(level.children):
            self.drop(child)
        if level.node is not None and level.parent is not None and self._levels.pop(level.node, None) is not None:
            level.parent.children.remove(level)
            if level.branch is not None:
                level.branch.close()

    def give_up(self, level: Level) -> None:
        """Its process has ended, and is not to be made again."""
        assert level.parent is not None
        assert level.node is not None
        self.drop(level)
        level.broken, level.branch = True, None
        level.done.clear()
        self._levels[level.node] = level
        level.parent.children.append(level)

    def tear_down(self, level: Level, item: pytest.Item, work: Work, died: Callable[[Level, Branch], object]) -> None:
        """What is set up in it ends, in it, as an error (if it is one) of `item`, the last that it was for. `died` is told
        when its process ended without a word on that."""
        for child in list(level.children):
            last = item if child.node in item.listchain() or child.last is None else child.last
            self.tear_down(child, last, work, died)
        if level.node is None or self._levels.pop(level.node, None) is None:
            return
        assert level.parent is not None
        level.parent.children.remove(level)
        try:
            if not level.broken:
                above = level.parent.node
                depth = -1 if above is None else item.listchain().index(above)
                job = self._job([item]) | {"teardown": depth}
                level.tearing = item
                level.branch = level.template.advance(job)
                work(level.branch, level)
                if not level.told:
                    died(level, level.branch)
        except IsolationError:
            pass  # it has ended by itself, which its tests have told
        finally:
            if level.branch is not None:
                level.branch.close()

    def close(self) -> None:
        """End them all, at once."""
        for level in self.open_levels():
            if level.branch is not None:
                level.branch.close()
        self._levels.clear()
        self.root.template.close()
