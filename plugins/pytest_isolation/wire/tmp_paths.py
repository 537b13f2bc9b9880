"""`tmp_path` in a sandbox: where it is, so that it is the same path on the host, and no two tests' are the same.

The host makes the run's base directory, as pytest does when a test first asks for it. In a sandbox nothing is there, and the
first directory of every name would be number 0: so those of the tests before are made first, empty.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from isolation.plain import os

failed = pytest.StashKey[bool]()  # of an item, inside and on the host: a report of it says so


class TmpPaths:
    """Of one session, inside and on the host alike."""

    def __init__(self, config: pytest.Config, items: Iterable[pytest.Item]) -> None:
        self._factory: Any = getattr(config, "_tmp_path_factory", None)
        self._numbers: dict[pytest.Item, tuple[str, int]] = {}
        counts: dict[str, int] = {}
        for item in items:
            if "tmp_path" in getattr(item, "fixturenames", ()):
                name = re.sub(r"\W", "_", item.name)[:30]  # as pytest itself
                self._numbers[item] = name, counts.get(name, 0)
                counts[name] = counts.get(name, 0) + 1

    @property
    def base(self) -> Path | None:
        """The run's base directory, once it is known."""
        base = getattr(self._factory, "_basetemp", None)
        return base if isinstance(base, Path) else None

    def make_base(self) -> Path | None:
        """On the host, if any test may want it. Pytest clears what was given with --basetemp."""
        return self._factory.getbasetemp() if self._factory is not None else None

    def use_base(self, base: str) -> None:
        """Inside a machine, whose pytest has not chosen one yet."""
        if self._factory is not None:
            self._factory._basetemp = Path(base)

    def prepare(self, item: pytest.Item | None = None) -> None:
        """Inside, before `item` (or a wide fixture) may ask."""
        if self.base is None:
            if root := os.environ.get("PYTEST_DEBUG_TEMPROOT"):
                os.makedirs(root, 0o700, exist_ok=True)  # for a test that asks by name, which nobody could foresee
            return
        os.makedirs(self.base, 0o700, exist_ok=True)
        if item in self._numbers:
            name, number = self._numbers[item]
            if number:
                with contextlib.suppress(UnicodeEncodeError):  # in an ASCII locale; a test that wants it hears so itself
                    os.makedirs(self.base / f"{name}{number - 1}", 0o700, exist_ok=True)

    def path_of(self, item: pytest.Item) -> Path | None:
        """Where the test's own directory is, if it has asked for one."""
        if self.base is None or item not in self._numbers:
            return None
        name, number = self._numbers[item]
        return self.base / f"{name}{number}"
