"""Hypothesis: the examples that it saves (or drops) inside reach the example database of whoever runs the tests.

Only the database that is the default there, and only if it is a directory: where another one is, a test alone knows.
"""

from __future__ import annotations

import base64
import collections
import sys
from typing import Any

import pytest

from pytest_isolation.peers.carrier import Carrier, Refused

_CHANGES_AT_MOST = 2000  # by one test
_KEY_AT_MOST = 4096
_VALUE_AT_MOST = 1 << 20
_BYTES_AT_MOST = 128 << 20  # in one run, on the disk
_BLOCK = 4096  # bytes, which an example has there at least

Change = tuple[bool, bytes, bytes]  # saved (or deleted), key, value


class HypothesisCarrier(Carrier):
    """Examples are bytes under keys, which Hypothesis itself reads with distrust: the file names are hashes of both."""

    name = "hypothesis"

    def __init__(self, database: Any) -> None:
        self._database = database
        self._changes: list[Change] = []
        self._room = _BYTES_AT_MOST
        self._counted: collections.Counter[str] = collections.Counter()
        self._watching = False
        self._full = False

    @classmethod
    def of(cls, config: pytest.Config) -> HypothesisCarrier | None:
        if "hypothesis.database" not in sys.modules:
            return None
        import hypothesis
        from hypothesis.database import DirectoryBasedExampleDatabase

        database = hypothesis.settings.default.database if hypothesis.settings.default is not None else None
        return cls(database) if isinstance(database, DirectoryBasedExampleDatabase) else None

    def prepare(self) -> None:
        """A table of all characters takes longer than most tests: it is a file after the first run that has needed it."""
        from hypothesis.internal import charmap

        charmap.charmap()

    # Inside.

    def begin(self) -> None:
        self._changes = []
        if not self._watching:
            self._watching = True
            self._watch()
            self.prepare()

    def _watch(self) -> None:
        """Note what its two ways to change a directory are called with; `move` uses rename(2), and is the two in one."""
        kind: Any = type(self._database)
        path = self._database.path.absolute()
        changes = self._note

        def wrap(plain: Any, kinds: tuple[bool, ...]) -> Any:
            def noted(database: Any, *arguments: bytes) -> Any:
                if database.path.absolute() == path and arguments[0] != kind._metakeys_name:
                    value = arguments[-1]
                    for saved, key in zip(kinds, arguments, strict=False):
                        changes((saved, key, value))
                return plain(database, *arguments)

            return noted

        kind.save = wrap(kind.save, (True,))
        kind.delete = wrap(kind.delete, (False,))
        kind.move = wrap(kind.move, (False, True))

    def _note(self, change: Change) -> None:
        self._changes.append(change)

    def collect(self, item: pytest.Item, phase: str) -> object | None:
        last = {(key, value): saved for saved, key, value in self._changes}  # a search for the smallest saves many
        self._changes = []
        kept = [
            [saved, base64.b64encode(key).decode(), base64.b64encode(value).decode()] for (key, value), saved in last.items()
        ]
        return kept[-_CHANGES_AT_MOST:] or None

    # On the host.

    def check(self, item: pytest.Item, sent: Any) -> list[Change]:
        if not isinstance(sent, list) or len(sent) > _CHANGES_AT_MOST:
            raise Refused("hypothesis: too many examples")
        found = []
        for saved, key, value in sent:
            change = bool(saved), base64.b64decode(key, validate=True), base64.b64decode(value, validate=True)
            if not change[1] or len(change[1]) > _KEY_AT_MOST or len(change[2]) > _VALUE_AT_MOST:
                raise Refused("hypothesis: an example that is too large")
            found.append(change)
        return found

    def apply(self, item: pytest.Item, value: list[Change]) -> None:
        for saved, key, example in value:
            if key == self._database._metakeys_name:
                continue
            if not saved:
                self._database.delete(key, example)
            elif self._counted[item.nodeid] < 2 * _CHANGES_AT_MOST and (size := len(example) + 2 * _BLOCK) <= self._room:
                self._room -= size
                self._counted[item.nodeid] += 1
                self._database.save(key, example)
            else:
                self._full = True

    def notes(self) -> list[str]:
        return [f"examples beyond {_BYTES_AT_MOST >> 20}M were not saved"] if self._full else []
