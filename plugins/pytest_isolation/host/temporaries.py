"""Temporary files and directories that this process makes while it is configured and collects: tests are to see them.

Nothing else of the directories for such is shown, so it must be known who has made an entry. Python tells, by audit events
(sys.addaudithook): of what `tempfile` makes, and of other new names there. A hook can never be removed; from the first fork
on, it does nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

from isolation.paths import is_within
from isolation.plain import os
from isolation.spec import Mount

_AT_MOST = 100  # entries; each is a mount more in every sandbox
_EVENTS_AT_MOST = 100_000
_COPIED_AT_MOST, _BYTES_AT_MOST = 2000, 16 << 20  # of a directory
_OWN_NAMES = {"tempfile.mkdtemp", "tempfile.mkstemp"}  # random ones, so nobody else's
# Events, and which argument is the path.
_PATHS = {"os.mkdir": 0, "open": 0, "sqlite3.connect": 0, "os.rename": 1, **dict.fromkeys(_OWN_NAMES, 0)}
_listening: list[Temporaries] = []
_hooks: list[Any] = []


class Temporaries:
    """Of one session, from now on."""

    def __init__(self) -> None:
        roots = {os.path.realpath(root) for root in (tempfile.gettempdir(), "/tmp", "/var/tmp") if os.path.isdir(root)}
        roots_first = sorted(roots, key=len, reverse=True)  # one that lies in another comes before that
        self._before = {root: frozenset(os.listdir(root)) for root in roots_first if os.access(root, os.R_OK)}
        self._made: dict[tuple[str, bool], None] = {}
        _listening.append(self)
        if not _hooks:
            _hooks.append(_hook)
            sys.addaudithook(_hook)

    def note(self, path: str, *, own: bool) -> None:
        """It is made now, or was there."""
        if len(self._made) < _EVENTS_AT_MOST:
            self._made[path, own] = None

    def stop(self) -> None:
        """No more is of interest."""
        if self in _listening:
            _listening.remove(self)

    def take(self, base: str | None, shown: Sequence[str]) -> list[Mount]:
        """What there is of it, for tests; the last time. `base`: where pytest makes the directories of `tmp_path_factory`,
        which are shown one by one. `shown`: directories that tests see in any case."""
        self.stop()
        found: dict[str, None] = {}
        for path, own in self._made:
            real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            entry = real if own else self._entry(real, base)
            if entry is not None and _is_ours(entry) and not is_within(entry, shown):
                found[entry] = None
        outer: list[str] = []
        for entry in sorted(found, key=len):
            if not is_within(entry, outer):
                outer.append(entry)
        written = _open_for_writing()
        return [Mount(entry, mode="copy" if _can_be_copied(entry, written) else "overlay") for entry in outer[:_AT_MOST]]

    def _entry(self, path: str, base: str | None) -> str | None:
        """What of a directory for temporary files it is, or lies in, and was not there before."""
        if base is not None and path.startswith(f"{base}/"):
            name = path[len(base) + 1 :].partition("/")[0]
            return None if name == ".lock" else f"{base}/{name}"
        for root, before in self._before.items():
            if path.startswith(f"{root}/"):
                name = path[len(root) + 1 :].partition("/")[0]
                return None if name in before or name.startswith("pytest-of-") else f"{root}/{name}"
        return None


temporaries = pytest.StashKey[Temporaries]()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _listening or event not in _PATHS:
        return
    try:
        path = arguments[_PATHS[event]]
        if event == "open" and not (isinstance(path, (str, bytes)) and arguments[2] & os.O_CREAT):
            return
        path = os.path.join(os.getcwd(), os.fsdecode(path))
        for each in _listening:
            each.note(path, own=event in _OWN_NAMES)
    except Exception:  # whoever caused it is not to hear of it
        return


def _is_ours(path: str) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return status.st_uid == os.geteuid() and (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode))


def _open_for_writing() -> list[str]:
    """Files that this process has so."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
                found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


def _can_be_copied(entry: str, written: Iterable[str]) -> bool:
    """A copy can be removed, which a mount point cannot. But its files are others, by their numbers: SQLite would not write
    to a database that is open; and it takes time."""
    if not os.path.isdir(entry):
        return True
    if any(is_within(path, [entry]) for path in written):
        return False
    size = 0
    for number, path in enumerate(_walk(entry)):
        size += os.lstat(path).st_size
        if number >= _COPIED_AT_MOST or size > _BYTES_AT_MOST:
            return False
    return True


def _walk(top: str) -> Iterator[str]:
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            yield os.path.join(directory, name)
