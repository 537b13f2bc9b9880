"""pytest-rerunfailures: each run of a test in a fork of its own.

That plug-in runs a test again in the process in which it has failed. Its report of outcome "rerun" is the moment at which
the fork can end instead; the next one is told how often the test has failed, in the way in which that plug-in itself tells
the next worker of pytest-xdist after a crash.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from pytest_isolation.peers.origin import plugin_of

_MODULE = "pytest_rerunfailures"


class Rerun(BaseException):
    """Ends a fork's run of a test: no `except Exception` of a plug-in's on the way must stop it."""


def remember_reruns(item: pytest.Item, reruns: int, before: int) -> None:
    """Inside, before the test runs: it has failed that often, and `before` reruns were made in the whole run."""
    known = getattr(sys.modules.get(_MODULE), "StatusDB", None)
    if known is None or not hasattr(item.config, "failures_db"):
        return
    failures: Any = _counting(known)
    for _ in range(reruns):
        failures.add_test_failure(item.nodeid)
    for _ in range(before):
        failures.increment_suite_reruns()
    item.config.failures_db = failures


def _counting(known: Any) -> Any:
    """One of that plug-in's, that needs no other process to remember."""
    kept: dict[tuple[str, str], int] = {}
    found = known()
    found._set = lambda test, key, value: kept.__setitem__((test, key), value)
    found._get = lambda test, key: kept.get((test, key), 0)
    return found


def is_used(config: pytest.Config) -> bool:
    """Whether that plug-in is there, by whatever name."""
    return plugin_of(config, _MODULE) is not None


def reruns_allowed(item: pytest.Item, before: int) -> int:
    """On the host: how often it may run again in all, by that plug-in's own options and markers; none where it is not there.
    It has done so `before` times."""
    plugin = plugin_of(item.config, _MODULE)
    if not hasattr(plugin, "get_reruns_count"):
        return 0
    allowed = plugin.get_reruns_count(item)
    if not isinstance(allowed, int):
        return 0
    in_all = item.config.getoption("max_suite_reruns", None)
    if isinstance(in_all, int):
        allowed = min(allowed, before + in_all - reruns_made(item.config))
    return allowed


def reruns_made(config: pytest.Config) -> int:
    """On the host: in the whole run, which --max-suite-reruns limits."""
    failures: Any = getattr(config, "failures_db", None)
    return 0 if failures is None or not hasattr(failures, "get_suite_reruns") else int(failures.get_suite_reruns())


def count_rerun(config: pytest.Config) -> None:
    """On the host: one more."""
    failures: Any = getattr(config, "failures_db", None)
    if hasattr(failures, "increment_suite_reruns"):
        failures.increment_suite_reruns()
