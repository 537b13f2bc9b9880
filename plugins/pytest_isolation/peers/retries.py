"""flaky and pytest-retry: what they say at the end of the run of the tests that they have run again."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pytest_isolation.peers.carrier import Carrier, Refused
from pytest_isolation.peers.origin import plugin_of
from pytest_isolation.wire.sanitize import clean

_TEXT_AT_MOST = 1 << 20  # characters, of one test
_PHASES = ("setup", "call", "teardown")
_RUNS_AT_MOST = 10_000


def _text(sent: Any) -> str:
    if not isinstance(sent, str):
        raise Refused("no text")
    return clean(sent, _TEXT_AT_MOST)


class FlakyCarrier(Carrier):
    """Its report, of which each test writes a piece."""

    name = "flaky"

    def __init__(self, plugin: Any) -> None:
        self._plugin = plugin
        self._known = 0

    @classmethod
    def of(cls, config: pytest.Config) -> FlakyCarrier | None:
        found = getattr(plugin_of(config, "flaky.flaky_pytest_plugin"), "PLUGIN", None)
        return None if found is None else cls(found)

    def begin(self) -> None:
        self._known = len(self._plugin.stream.getvalue())
        self._plugin._had_flaky_tests = False

    def collect(self, item: pytest.Item, phase: str) -> object | None:
        text = self._plugin.stream.getvalue()
        new, self._known = text[self._known :], len(text)
        return {"text": new[:_TEXT_AT_MOST]} if new or self._plugin._had_flaky_tests else None

    def check(self, item: pytest.Item, sent: Any) -> str:
        return _text(sent["text"])

    def apply(self, item: pytest.Item, value: str) -> None:
        self._plugin.stream.write(value)
        self._plugin._had_flaky_tests = True


class RetryCarrier(Carrier):
    """Its report, and its figures. (A worker of pytest-xdist sends its report to a server, which a sandbox cannot reach.)"""

    name = "retry"

    def __init__(self, plugin: Any) -> None:
        self._manager: Any = plugin.retry_manager
        self._plugin = plugin
        self._outside: object = None

    @classmethod
    def of(cls, config: pytest.Config) -> RetryCarrier | None:
        plugin = plugin_of(config, "pytest_retry.retry_plugin")
        return cls(plugin) if hasattr(plugin, "OfflineReporter") and hasattr(plugin, "retry_manager") else None

    def begin(self) -> None:
        self._outside = self._outside or self._manager.reporter
        self._manager.reporter = self._plugin.OfflineReporter()

    def collect(self, item: pytest.Item, phase: str) -> object | None:
        text = self._manager.reporter.stream.getvalue()
        if not text:
            return None
        self._manager.reporter = self._plugin.OfflineReporter()
        figures = self._manager.node_stats.get(item.nodeid, {})
        return {"text": text[:_TEXT_AT_MOST], "outcomes": figures["outcomes"], "durations": figures["durations"]}

    def check(self, item: pytest.Item, sent: Any) -> tuple[str, dict[str, Any]]:
        outcomes = {phase: list(sent["outcomes"][phase]) for phase in _PHASES}
        durations = {phase: list(sent["durations"][phase]) for phase in _PHASES}
        for phase in _PHASES:
            if len(outcomes[phase]) > _RUNS_AT_MOST or len(durations[phase]) > _RUNS_AT_MOST or not durations[phase]:
                raise Refused("retry: too many runs")
            if not all(each in ("passed", "failed", "skipped") for each in outcomes[phase]):
                raise Refused("retry: no outcome")
            if not all(type(time) in (int, float) and math.isfinite(time) for time in durations[phase]):
                raise Refused("retry: no duration")
        return _text(sent["text"]), {"outcomes": outcomes, "durations": durations}

    def apply(self, item: pytest.Item, value: tuple[str, dict[str, Any]]) -> None:
        text, figures = value
        self._manager.reporter.record_attempt([text, ""])
        self._manager.node_stats[item.nodeid] = figures
