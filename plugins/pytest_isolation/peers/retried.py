"""Plug-ins that run a test again where it has failed, within its own process: flaky, and pytest-retry.

(pytest-rerunfailures is another matter: see rerunfailures.py.) How often they may is said by their own options and markers,
which are asked for here, on the host.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from pytest_isolation.peers.origin import plugin_of

_RUNS_AT_MOST = 100  # of one test in one sandbox, where no plug-in says: a conftest may do it as well
_RETRY = "pytest_retry.retry_plugin"
_FLAKY = "_flaky_max_runs"  # what its decorator sets
_RUNS_OF_FLAKY = 2  # unless said otherwise


@dataclass(frozen=True)
class Allowed:
    """What a test's reports may be.

    runs     how often it may run, all phases of it
    hides    whether a failure of a run that is not the last may have no report
    retries  how many reports may say that another one of their phase will come
    """

    runs: int = 1
    hides: bool = False
    retries: int = 0


def allowed(item: pytest.Item) -> Allowed:
    """To this test, by the plug-ins in use."""
    runs = _runs_of_flaky(item)
    retried = plugin_of(item.config, _RETRY) is not None and item.get_closest_marker("flaky") is not None
    # However often pytest-retry runs a test, it reports one retry.
    return Allowed(runs or _RUNS_AT_MOST, runs is not None, 1 if retried else 0)


def _runs_of_flaky(item: pytest.Item) -> int | None:
    """None where it is not in use, or the test not flaky."""
    if plugin_of(item.config, "flaky.flaky_pytest_plugin") is None:
        return None
    found = getattr(getattr(item, "obj", None), _FLAKY, None) or getattr(getattr(item, "cls", None), _FLAKY, None)
    marker = item.get_closest_marker("flaky")
    if found is None and item.config.getoption("force_flaky", False):
        found = item.config.getoption("max_runs", None) or _RUNS_OF_FLAKY
    elif found is None and marker is not None:
        found = marker.kwargs.get("max_runs") or (marker.args[0] if marker.args else None) or _RUNS_OF_FLAKY
    return found if isinstance(found, int) else None


def is_retry(item: pytest.Item, report: pytest.TestReport) -> bool:
    """Whether, by its outcome, another report of the same phase is to come: pytest-retry's."""
    if report.when != "call" or plugin_of(item.config, _RETRY) is None:
        return False
    defaults = getattr(sys.modules.get("pytest_retry.configs"), "Defaults", None)
    return str(report.outcome) == getattr(defaults, "RETRY_OUTCOME", None)
