"""What runs in one sandbox: a test, a class, or a module; and what must be set up for it beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from pytest_isolation.settings import Settings
from pytest_isolation.wire import fixture_scopes
from pytest_isolation.wire.fixture_scopes import Needs


@dataclass(eq=False)
class Unit:
    """Tests that follow each other, and share a sandbox.

    needs   by node: wide fixtures to set up in templates
    reruns  how often the (only) test has failed, see rerunfailures.py
    """

    items: list[pytest.Item]
    settings: Settings
    needs: Needs = field(default_factory=dict)
    reruns: int = 0

    @property
    def last(self) -> pytest.Item:
        return self.items[-1]


def group(items: Sequence[pytest.Item], settings: dict[pytest.Item, Settings], grain: str) -> list[Unit]:
    """Units in the order of their tests."""

    def key(item: pytest.Item) -> tuple[object, Settings]:
        node: object = item
        if grain == "module":
            node = item.getparent(pytest.Module) or item
        elif grain == "class":
            node = item.getparent(pytest.Class) or item
        return node, settings[item]

    return [Unit(list(found), chosen) for (_node, chosen), found in itertools.groupby(items, key)]


def needs_of(unit: Unit, grain: str, unshared: set[str]) -> Needs:
    """Those of all its tests, as far as they are wider than the unit."""
    grains: dict[str, type[pytest.Collector]] = {"class": pytest.Class, "module": pytest.Module}
    within = grains.get(grain)
    found: Needs = {}
    for item in unit.items:
        for node, wanted in fixture_scopes.needs_of(item, unshared=unshared, within=within).items():
            here = found.setdefault(node, {})
            for name, fixture in wanted.items():
                here.setdefault(name, fixture)
    return found
