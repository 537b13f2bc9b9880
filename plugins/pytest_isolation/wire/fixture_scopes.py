"""Which fixtures wider than a function a test uses, and of which node of the collection tree they are.

Pytest tells a fixture's scope to hooks, when it is set up; what a test will use is only in attributes that plug-ins share by
custom (`_fixtureinfo`, `_request`; pytest-asyncio, pytest-cases and others rely on them). They are asked for here and in
shared_fixtures.py, and where one is missing, no fixture is shared: every fork sets up its own, which is slower, and as
right.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from isolation.plain import os

_SCOPES = ("session", "package", "module", "class")
_OURS = ("_pytest.", "pytest_isolation.")  # cheap, and used by so many tests that every one would need a template
_PACKAGE_FUNCTIONS = ("setup_module", "setUpModule", "teardown_module", "tearDownModule")
_DEEPEST = 4


@dataclass(frozen=True)
class Wide:
    """One fixture, for one parameter. Equal ones are the same set-up."""

    name: str
    fixturedef: int
    param: int | None


Needs = dict[pytest.Collector, dict[str, Wide]]


def needs_of(item: pytest.Item, *, unshared: Container[str] = (), within: type[pytest.Collector] | None = None) -> Needs:
    """By node, widest first: what has to be set up there before `item` can run, in its order. Without fixtures that are
    `unshared`, and those that are narrower than a node of type `within`."""
    needs: Needs = {}
    if _is_skipped(item):
        return needs
    found = list(_wide_fixtures(item, unshared))
    for node in item.listchain()[:-1]:
        if within is not None and isinstance(node, within):
            break
        here = {wide.name: wide for owner, wide in found if owner is node}
        if isinstance(node, pytest.Package) and _has_setup(str(node.path / "__init__.py")):
            here[f"setup_module of {node.nodeid}"] = Wide("", 0, None)
        if here and isinstance(node, pytest.Collector):
            needs[node] = here
    return dict(list(needs.items())[:_DEEPEST])


def _wide_fixtures(item: pytest.Item, unshared: Container[str]) -> Iterator[tuple[pytest.Collector | None, Wide]]:
    definitions: Mapping[str, Any] = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    indices = getattr(getattr(item, "callspec", None), "indices", {})
    kept_from = _not_carried(definitions, unshared)
    for name in getattr(item, "fixturenames", ()):
        if definitions.get(name) and name not in kept_from and hasattr(item, "_request"):
            definition = definitions[name][-1]
            module = getattr(definition.func, "__module__", None) or ""
            # Functions like setup_module and setUpClass are fixtures of pytest's own making, whose names begin so.
            if definition.scope in _SCOPES and (name.startswith("_") or not module.startswith(_OURS)):
                yield _owner(item, definition), Wide(name, id(definition), indices.get(name))


def _not_carried(definitions: Mapping[str, Any], unshared: Container[str]) -> set[str]:
    """The names of `unshared` fixtures, and of all that use them."""
    found = {name for name in definitions if name in unshared}
    grown = True
    while found and grown:
        more = {
            name for name, known in definitions.items()
            if name not in found and any(found.intersection(definition.argnames) for definition in known)
        }  # fmt: skip
        grown = bool(more)
        found |= more
    return found


def _owner(item: pytest.Item, definition: Any) -> pytest.Collector | None:
    """The node whose end is the fixture's."""
    if definition.scope == "class":
        return item.getparent(pytest.Class)  # for a function outside of classes, it is one of that function's
    if definition.scope == "module":
        return item.getparent(pytest.Module)
    if definition.scope == "package":
        for node in item.listchain():
            if isinstance(node, pytest.Directory) and node.nodeid == definition.baseid:
                return node
    return item.session


@functools.cache
def _has_setup(path: str) -> bool:
    """Whether a package's own `__init__` has functions for set-up (xunit style). Asked when all has been collected, which
    has imported it."""
    name = os.path.basename(os.path.dirname(path))
    for known, module in list(sys.modules.items()):
        if known.rpartition(".")[2] == name and getattr(module, "__file__", None) == path:
            return any(hasattr(module, each) for each in _PACKAGE_FUNCTIONS)
    return False


def _is_skipped(item: pytest.Item) -> bool:
    """By a mark that says so in any case; it sets up nothing."""
    if any(True for _ in item.iter_markers("skip")):
        return True
    conditions = [mark.args[0] for mark in item.iter_markers("skipif") if mark.args]
    return any(condition for condition in conditions if not isinstance(condition, str))
