"""pytest-rerunfailures: each run of a test in a fork of its own.

That plug-in runs a test again in the process in which it has failed. Its report of outcome "rerun" is the moment at which
the fork can end instead; the next one is told how often the test has failed, in the way in which that plug-in itself tells
the next worker of pytest-xdist after a crash.
"""

from __future__ import annotations

from typing import Any

import pytest


class Rerun(BaseException):
    """Ends a fork's run of a test: no `except Exception` of a plug-in's on the way must stop it."""


def remember_reruns(item: pytest.Item, reruns: int) -> None:
    """Before the test runs: it has failed that often."""
    failures: Any = getattr(item.config, "failures_db", None)
    for _ in range(reruns if failures is not None else 0):
        failures.add_test_failure(item.nodeid)
