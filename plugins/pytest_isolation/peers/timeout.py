"""On the host: what other plug-ins begin around a test is for the process in which it runs, and waits for that.

Such a plug-in wraps `pytest_runtest_protocol`, which pytest calls here as well as in the sandbox.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from isolation.result import Ended, Verdict


class Deferred:
    """`is_isolated` tells whether a test runs in a sandbox."""

    def __init__(self, is_isolated: Callable[[pytest.Item], bool]) -> None:
        self._is_isolated = is_isolated
        self._limits: dict[pytest.Item, float] = {}

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool | None:
        """pytest-timeout's: no alarm here, where it would end the whole run."""
        if not self._is_isolated(item):
            return None
        if settings.method == "thread":
            self._limits[item] = settings.timeout
        return True

    def explain(self, item: pytest.Item, verdict: Verdict, wall: float) -> str:
        """Which plug-in has ended a test's process; "" for none. pytest-timeout's thread does that, with status 1."""
        limit = self._limits.get(item)
        if limit is not None and wall >= limit and verdict.ended is Ended.EXITED and verdict.status == 1:
            return f"Timeout (>{limit}s) from pytest-timeout."
        return ""
