"""On the host: what other plug-ins begin around a test is for the process in which it runs, and waits for that.

Such a plug-in wraps `pytest_runtest_protocol`, which pytest calls here as well as in the sandbox.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest


class Deferred:
    """`is_isolated` tells whether a test runs in a sandbox."""

    def __init__(self, is_isolated: Callable[[pytest.Item], bool]) -> None:
        self._is_isolated = is_isolated

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item) -> bool | None:
        """pytest-timeout's: no alarm here, where it would end the whole run."""
        return True if self._is_isolated(item) else None
