"""What other plug-ins keep in a test's process, so that nobody has it when that has ended: said before the first test.

What can be carried out is (see carriers); this is for the rest. A plug-in says it of itself by the hook
`pytest_isolation_keeps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from pytest_isolation.peers.origin import plugin_of
from pytest_isolation.wire.sanitize import clean_name

_INSTEAD = "run it with --isolation=no for that"
_LINES_AT_MOST = 50


@dataclass(frozen=True)
class Kept:
    """A plug-in, by its module; what it keeps; and whether it does so in this run."""

    plugin: str
    module: str
    what: str
    in_use: Callable[[pytest.Config], bool]


def _option(name: str, *but: object) -> Callable[[pytest.Config], bool]:
    """Whether it is given, and is none of `but`."""
    return lambda config: config.getoption(name, None) not in (None, False, "", *but)


_WRITES = "writes its files in the test's process; to keep them, mount their directory (--isolation-mount=DIRECTORY:rw)"
_KNOWN = (
    Kept("inline-snapshot", "inline_snapshot.pytest_plugin", f"keeps new snapshots in the test's process; {_INSTEAD}",
         _option("inline_snapshot", "disable")),
    Kept("pytest-testmon", "testmon.pytest_testmon", f"keeps in the test's process what a test depends on; {_INSTEAD}",
         _option("testmon")),
    Kept("pytest-snapshot", "pytest_snapshot.plugin", _WRITES, _option("snapshot_update")),
    Kept("pytest-regressions", "pytest_regressions.plugin", _WRITES, _option("force_regen")),
    Kept("pytest-regressions", "pytest_regressions.plugin", _WRITES, _option("regen_all")),
    Kept("pytest-recording", "pytest_recording.plugin", _WRITES, _option("record_mode", "none")),
    Kept("pytest-vcr", "pytest_vcr", _WRITES, _option("vcr_record", "none")),
)  # fmt: skip
_OF_HARVEST = frozenset((
    "results_bag", "fixture_store", "session_results_dct", "module_results_dct", "session_results_df", "module_results_df",
))  # fmt: skip
_HARVEST = f"keeps results in the test's process, where no other test finds them; {_INSTEAD}"


def by_config(config: pytest.Config) -> list[str]:
    """What the options of the run tell; and what plug-ins say of themselves."""
    found = {each.plugin: each.what for each in _KNOWN if each.in_use(config) and plugin_of(config, each.module) is not None}
    said = [line for lines in config.hook.pytest_isolation_keeps(config=config) for line in _lines(lines)]
    return [f"{plugin} {what}" for plugin, what in found.items()] + said[:_LINES_AT_MOST]


def by_items(config: pytest.Config, items: Sequence[pytest.Item]) -> list[str]:
    """What the fixtures tell that tests use."""
    if plugin_of(config, "pytest_harvest.plugin") is None:
        return []
    used = any(not _OF_HARVEST.isdisjoint(getattr(item, "fixturenames", ())) for item in items)
    return [f"pytest-harvest {_HARVEST}"] if used else []


def _lines(said: object) -> list[str]:
    lines = [said] if isinstance(said, str) else said if isinstance(said, (list, tuple)) else []
    return [clean_name(str(line)) for line in lines]
