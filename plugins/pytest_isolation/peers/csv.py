"""pytest-csv: a row for each test, which is on its report, and written when the run has ended."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_isolation.host.crash_reports import CrashRepr
from pytest_isolation.peers.carrier import Carrier, Refused

_ATTRIBUTE = "_csv_rows"


class CsvCarrier(Carrier):
    """Checks what crosses by itself: a row of another form would end the run with its last test. A test that has died has a
    row, too."""

    name = "csv"

    def __init__(self, columns: dict[str, Any]) -> None:
        self._columns = columns

    @classmethod
    def of(cls, config: pytest.Config) -> CsvCarrier | None:
        found = [plugin for plugin in config.pluginmanager.get_plugins() if type(plugin).__name__ == "CSVReporter"]
        return cls(found[0]._columns) if found and isinstance(getattr(found[0], "_columns", None), dict) else None

    def told(self, item: pytest.Item, report: pytest.TestReport) -> None:
        if isinstance(report.longrepr, CrashRepr):
            setattr(report, _ATTRIBUTE, {
                name: dict(column(item, report)) if callable(column) else {name: str(column)}
                for name, column in self._columns.items()
            })  # fmt: skip
            return
        rows = getattr(report, _ATTRIBUTE, None)
        if rows is None:
            return
        if not isinstance(rows, dict) or set(rows) != set(self._columns) or not all(map(_is_row, rows.values())):
            raise Refused("csv: no row")


def _is_row(found: object) -> bool:
    if not isinstance(found, dict):
        return False
    return all(isinstance(name, str) and isinstance(value, (str, int, float, type(None))) for name, value in found.items())
