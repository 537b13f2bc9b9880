"""pytest-bdd: the steps of a scenario, for its own reporters, which it keeps beside a report.

Before version 8.1 they were on the report, and crossed by themselves.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from pytest_isolation.peers.carrier import Carrier

_ATTRIBUTE = "pytest_bdd_context"
_RULE: dict[str, Any] = {"keyword": str, "name": str, "description": str, "tags": list}
_FEATURE = _RULE | {"filename": str, "rel_filename": str, "language": str, "line_number": int}
_SCENARIO = _RULE | {"line_number": int, "steps": list, "feature": dict}
_STEP = {"name": str, "type": str, "keyword": str, "line_number": int, "failed": bool, "duration": (int, float)}


class BddCarrier(Carrier):
    """Has it cross as an attribute of the report."""

    name = "bdd"

    def __init__(self, reporting: Any) -> None:
        self._registry: Any = reporting.test_report_context_registry
        self._kind: Any = reporting.ReportContext

    @classmethod
    def of(cls, config: pytest.Config) -> BddCarrier | None:
        reporting = sys.modules.get("pytest_bdd.reporting")
        return cls(reporting) if hasattr(reporting, "ReportContext") else None

    def sent(self, item: pytest.Item, report: pytest.TestReport) -> None:
        found = self._registry.get(report)
        if found is not None:
            setattr(report, _ATTRIBUTE, {"scenario": found.scenario, "name": found.name})

    def told(self, item: pytest.Item, report: pytest.TestReport) -> None:
        found = report.__dict__.pop(_ATTRIBUTE, None)
        if isinstance(found, dict) and isinstance(found.get("name"), str) and _is_scenario(found.get("scenario")):
            self._registry[report] = self._kind(scenario=found["scenario"], name=found["name"])


def _is(value: object, form: dict[str, Any]) -> bool:
    """Whether it is an object with these members (of any others nothing is known: another version's), its tags text."""
    if not isinstance(value, dict) or not all(isinstance(value.get(name), kind) for name, kind in form.items()):
        return False
    return all(isinstance(tag, str) for tag in value.get("tags", ()))


def _is_scenario(found: Any) -> bool:
    """As far as its reporters rely on it."""
    if not _is(found, _SCENARIO) or not _is(found["feature"], _FEATURE):
        return False
    rule = found.get("rule")
    return all(_is(step, _STEP) for step in found["steps"]) and (rule is None or _is(rule, _RULE))
