"""syrupy: which snapshots a test has used is counted (and unused ones deleted) where the run ends.

A sandbox tells of each assertion the file and the name of its snapshot, which protect what is there under these: no file is
opened for them.
The snapshots are written inside, at the end of each test, and reach the host through a writable
mount of their directory.
"""

from __future__ import annotations

from typing import Any

import pytest

from isolation.plain import os
from isolation.spec import Mount
from pytest_isolation.peers.carrier import Carrier, Refused, qualified, subclasses, text_of

_ASSERTIONS_AT_MOST = 10_000  # of one test
_CLASSES_AT_MOST = 50


class SyrupyCarrier(Carrier):
    """Makes the host's session one in which the assertions were made."""

    name = "syrupy"

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._session: Any = config._syrupy  # type: ignore[attr-defined]
        self._known = 0
        self._lost: set[str] = set()

    @classmethod
    def of(cls, config: pytest.Config) -> SyrupyCarrier | None:
        return cls(config) if hasattr(config, "_syrupy") else None

    # Inside.

    def begin(self) -> None:
        self._known = len(self._session._assertions)

    def collect(self, item: pytest.Item, phase: str) -> object | None:
        self._session.flush_snapshot_write_queue()
        new = self._session._assertions[self._known :]
        self._known += len(new)
        found = []
        for assertion in new:
            results = [
                [each.snapshot_location, each.snapshot_name, bool(each.created), bool(each.updated), bool(each.success)]
                for each in assertion.executions.values()
            ]
            classes = [qualified(kind) for kind in type(assertion.extension).__mro__[:_CLASSES_AT_MOST]]
            found.append([classes, results])
        return found or None

    # On the host.

    def check(self, item: pytest.Item, sent: Any) -> list[tuple[type, list[Any]]]:
        from syrupy.extensions.base import AbstractSyrupyExtension

        known = {qualified(kind): kind for kind in subclasses(AbstractSyrupyExtension)}
        if len(sent) > _ASSERTIONS_AT_MOST:
            raise Refused("syrupy: too many assertions")
        found = []
        for classes, results in sent:
            # The extension, or what it extends: a class is looked up among those that are loaded, never imported.
            kind = next((known[name] for name in classes[:_CLASSES_AT_MOST] if name in known), None)
            if kind is None or len(results) > _ASSERTIONS_AT_MOST:
                raise Refused("syrupy: no extension, or too many results")
            checked = []
            for location, name, *flags in results:
                if len(flags) != 3 or not all(type(flag) is bool for flag in flags):
                    raise Refused("syrupy: no result")
                checked.append((text_of(location, 4096), text_of(name, 4096), *flags))
            found.append((kind, checked))
        return found

    def apply(self, item: pytest.Item, value: list[tuple[type, list[Any]]]) -> None:
        from syrupy.assertion import AssertionResult, SnapshotAssertion
        from syrupy.location import PyTestLocation

        option = self._config.option
        for kind, results in value:
            place = PyTestLocation(item)
            made: Any = SnapshotAssertion(
                session=self._session, extension_class=kind, test_location=place,
                update_snapshots=option.update_snapshots,
            )  # fmt: skip
            for number, (location, name, created, updated, success) in enumerate(results):
                made._execution_results[number] = AssertionResult(
                    snapshot_location=location, snapshot_name=name, asserted_data="", recalled_data="", created=created,
                    updated=updated, success=success, exception=None, test_location=place,
                )  # fmt: skip
                if (created or updated) and not self._is_there(location):
                    self._lost.add(os.path.dirname(location))

    def _is_there(self, location: str) -> bool:
        """Whether what a sandbox writes there reaches this file."""
        mounts = [*self._config.getini("isolation_mount"), *self._config.getoption("isolation_mount")]
        roots = [os.path.realpath(mount.source) for mount in map(Mount.parse, mounts) if mount.mode == "rw"]
        return any(os.path.realpath(location).startswith(root.rstrip("/") + "/") for root in roots)

    def notes(self) -> list[str]:
        cwd = os.getcwd()
        return [
            f"snapshots were written in sandboxes only; to keep them: --isolation-mount={os.path.relpath(path, cwd)}:rw"
            for path in sorted(self._lost)
        ]
