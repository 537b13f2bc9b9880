"""pytest-dependency: the outcomes of tests that others depend on, which it keeps on the nodes of the collection tree.

They are known on the host, which is told of every test: it keeps them as that plug-in would, and tells a sandbox those that
its tests depend on. Such tests wait for the ones before them.
"""

from __future__ import annotations

import types
from typing import Any

import pytest

from pytest_isolation.peers.carrier import Carrier
from pytest_isolation.peers.origin import is_conftest, plugin_of

_SCOPE = "module"  # where a marker names none


class DependencyCarrier(Carrier):
    """Keeps that plug-in's records, on the host and in each fork."""

    name = "dependency"

    def __init__(self, config: pytest.Config, plugin: Any) -> None:
        self._plugin = plugin
        self._manager: Any = plugin.DependencyManager
        modules = [each for each in config.pluginmanager.get_plugins() if is_conftest(each)]
        self._asked_by_all = any(self._asks(module) for module in modules)
        self._asking: dict[object, bool] = {}

    @classmethod
    def of(cls, config: pytest.Config) -> DependencyCarrier | None:
        plugin = plugin_of(config, "pytest_dependency")
        return cls(config, plugin) if hasattr(plugin, "DependencyManager") else None

    def told(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """As its `pytest_runtest_makereport` does."""
        marker = item.get_closest_marker("dependency")
        if type(report) is not pytest.TestReport or (marker is None and not getattr(self._plugin, "_automark", False)):
            return
        for scope in self._manager.ScopeCls:
            manager = self._manager.getManager(item, scope=scope)
            if manager:
                manager.addResult(item, None if marker is None else marker.kwargs.get("name"), report)

    def waits(self, item: pytest.Item) -> bool:
        marker = item.get_closest_marker("dependency")
        return (marker is not None and bool(marker.kwargs.get("depends"))) or self._may_ask(item)

    def brief(self, item: pytest.Item) -> object | None:
        marker = item.get_closest_marker("dependency")
        found = {}
        if self._may_ask(item):
            for scope in self._manager.ScopeCls:
                found[scope] = self._results(item, scope, None)
        elif marker is not None and marker.kwargs.get("depends"):
            scope = str(marker.kwargs.get("scope", _SCOPE))
            found[scope] = self._results(item, scope, marker.kwargs["depends"])
        return {scope: results for scope, results in found.items() if results} or None

    def _results(self, item: pytest.Item, scope: str, names: Any) -> dict[str, Any]:
        """Those of `names`, or all."""
        manager = self._manager.getManager(item, scope=scope) if scope in self._manager.ScopeCls else None
        known: dict[str, Any] = manager.results if manager else {}
        return {name: known[name].results for name in (known if names is None else names) if name in known}

    def heed(self, item: pytest.Item, brief: Any) -> None:
        for scope, results in brief.items():
            manager = self._manager.getManager(item, scope=scope)
            for name, phases in results.items():
                status = manager.results[name] = self._plugin.DependencyItemStatus()
                status.results.update(phases)

    def _may_ask(self, item: pytest.Item) -> bool:
        """Whether a test may call `depends()` while it runs, which needs `request`: then all may be asked for."""
        if "request" not in getattr(item, "fixturenames", ()):
            return False
        module = getattr(item, "module", None)
        if module not in self._asking:
            self._asking[module] = self._asked_by_all or self._asks(module)
        return self._asking[module]

    def _asks(self, module: object) -> bool:
        if not isinstance(module, types.ModuleType):
            return False
        return any(value is self._plugin or value is self._plugin.depends for value in list(vars(module).values()))
