"""On the host: tests that a marker keeps out of sandboxes, and what they have set up in this process.

Pytest tears down a module's fixtures at the end of its last test, wherever that runs; and a test of the next module that
runs here finds nothing of it left.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest


class Here:
    """Nodes that are set up in this process, as far as tests of ours come before their end."""

    def __init__(self, config: pytest.Config) -> None:
        self._manager = config.pluginmanager
        self._open: Sequence[object] = ()

    def ran(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """A test is being run by pytest itself, which leaves what the next one is beneath."""
        self._open = [] if nextitem is None else [node for node in item.listchain() if node in nextitem.listchain()]

    def end(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
        """After a test in a sandbox: tear down what the next test does not need. Returns how that went, if it had to be."""
        after = [] if nextitem is None else nextitem.listchain()
        kept = [node for node in self._open if node in after]
        if len(kept) == len(self._open):
            return []
        self._open = kept
        needed = [self._manager.getplugin(name) for name in ("runner", "capturemanager")]
        others = [plugin for plugin in self._manager.get_plugins() if plugin not in needed]  # they expect a test
        caller = self._manager.subset_hook_caller("pytest_runtest_teardown", others)
        call = pytest.CallInfo.from_call(
            lambda: caller(item=item, nextitem=nextitem), when="teardown", reraise=(KeyboardInterrupt, pytest.exit.Exception)
        )
        return [pytest.TestReport.from_item_and_call(item, call)]
