"""pytest-benchmark: what was measured in a fork is in the table, and the files, that are made at the end of the run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_isolation.peers.carrier import Carrier, Refused, text_of
from pytest_isolation.wire.sanitize import clean_all

_BENCHMARKS_AT_MOST = 100  # of one test
_ROUNDS_AT_MOST = 5_000_000


class BenchmarkCarrier(Carrier):
    """A benchmark is its durations; what it is called is known here already."""

    name = "benchmark"

    def __init__(self, session: Any) -> None:
        self._session = session
        self._known = 0
        self._profiled = False

    @classmethod
    def of(cls, config: pytest.Config) -> BenchmarkCarrier | None:
        session = getattr(config, "_benchmarksession", None)
        return None if session is None else cls(session)

    # Inside.

    def begin(self) -> None:
        self._known = len(self._session.benchmarks)

    def collect(self, item: pytest.Item, phase: str) -> object | None:
        new = self._session.benchmarks[self._known :]
        self._known += len(new)
        return [_encode(bench) for bench in new] or None

    # On the host.

    def check(self, item: pytest.Item, sent: Any) -> list[Any]:
        from pytest_benchmark import stats

        make: Any = stats.Metadata
        if len(sent) > _BENCHMARKS_AT_MOST:
            raise Refused("benchmark: too many")
        made = []
        for each in sent:
            iterations, data = each["iterations"], each["data"]
            if type(iterations) is not int or not 1 <= iterations < 1 << 40 or len(data) > _ROUNDS_AT_MOST:
                raise Refused("benchmark: no such number of rounds")
            if not all(type(time) in (int, float) and math.isfinite(time) and 0 <= time < 1e9 for time in data):
                raise Refused("benchmark: no duration")
            callspec = getattr(item, "callspec", None)
            fixture = SimpleNamespace(
                name=item.name,
                fullname=item.nodeid,
                group=None if each["group"] is None else text_of(each["group"], 1000),
                param=None if callspec is None else callspec.id,
                params=None if callspec is None else callspec.params,
                extra_info=clean_all(dict(each["extra_info"])),
                cprofile_stats=None,
                has_error=bool(each["has_error"]),
            )
            bench = make(fixture, iterations=iterations, options=clean_all(dict(each["options"])))
            bench.stats.data = list(data)
            self._profiled |= bool(each["profiled"])
            made.append(bench)
        return made

    def apply(self, item: pytest.Item, value: list[Any]) -> None:
        self._session.benchmarks.extend(value)

    def notes(self) -> list[str]:
        if not self._profiled:
            return []
        return ["profiles (--benchmark-cprofile) stay in their sandboxes; but for @pytest.mark.isolation(enabled=False)"]


def _encode(bench: Any) -> dict[str, Any]:
    about = bench.as_dict(include_data=False, stats=False)
    return {
        "group": bench.group,
        "iterations": bench.iterations,
        "data": bench.stats.data,
        "has_error": bool(bench.has_error),
        "extra_info": _jsonable(bench.extra_info),
        "options": _jsonable(about["options"]),
        "profiled": bench.cprofile_stats is not None,
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _jsonable(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(each) for each in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
