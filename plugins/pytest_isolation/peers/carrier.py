"""What a carrier is, and what its host half checks with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from pytest_isolation.wire.sanitize import clean_name


class Refused(ValueError):
    """A sandbox sent something for a plug-in that cannot be."""


class Carrier:
    """For one plug-in. The same class is used on both sides, by an instance on each."""

    name: ClassVar[str]

    @classmethod
    def of(cls, config: pytest.Config) -> Carrier | None:
        """One, if the plug-in is in use."""
        raise NotImplementedError

    def prepare(self) -> None:
        """On the host, before anything is forked: what each fork would have to do by itself."""

    def begin(self) -> None:
        """Inside: forget what was there before the fork."""

    def collect(self, item: pytest.Item, phase: str) -> object | None:
        """Inside: what is new since, as JSON; None for nothing."""
        return None

    def check(self, item: pytest.Item, sent: Any) -> Any:
        """On the host: what of it can be believed. Raises Refused, or what Python raises for data of the wrong shape."""
        raise Refused(f"{self.name}: nothing is carried for it")

    def apply(self, item: pytest.Item, value: Any) -> None:
        """On the host: do as the plug-in would. `value` has been checked."""
        raise NotImplementedError

    def sent(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Inside: a report is about to be sent."""

    def told(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """On the host: pytest is about to be told of a report. What plug-ins have put on it has been checked by nobody."""

    def waits(self, item: pytest.Item) -> bool:
        """On the host: whether all tests before must have ended before this one begins."""
        return False

    def brief(self, item: pytest.Item) -> object | None:
        """On the host: what a sandbox has to know of the tests before, to run this one; as JSON, None for nothing."""
        return None

    def heed(self, item: pytest.Item, brief: Any) -> None:
        """Inside: know that."""

    def finish(self) -> None:
        """On the host: all tests have run. May come twice."""

    def notes(self) -> list[str]:
        """On the host: what could not be carried, for the summary."""
        return []


def text_of(value: object, at_most: int) -> str:
    """A string that is safe to show. Raises Refused."""
    if not isinstance(value, str):
        raise Refused("no text")
    return clean_name(value, at_most)


def qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def subclasses(kind: type) -> Iterator[type]:
    """All that are known in this process."""
    each: type
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)
