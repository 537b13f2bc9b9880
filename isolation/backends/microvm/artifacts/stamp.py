"""What is in a finished entry of the cache, so that what has happened to it since is noticed without reading it all.

Of each file its digest, and what stands for that from day to day: size, inode and times, of which nobody can set the time of
change (inode(7), ctime). Where these are not as they were (a cache that was restored from a copy, say), the digest is asked.
Who wants to deceive is kept out (cache.py).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from isolation.plain import json, os

NAME: Final = ".digests"


def write(entry: Path) -> None:
    """Of a directory that is about to be put in place. Raises OSError."""
    _write(entry, {name: [*_looks(entry / name), _digest(entry / name)] for name in _files(entry)})


def changed(entry: Path) -> str | None:
    """The first file that is not as it was, by its name below the entry. Raises OSError or ValueError."""
    try:
        made = json.loads((entry / NAME).read_bytes())
    except FileNotFoundError:
        return None  # of an earlier version
    if not isinstance(made, dict):
        return NAME
    found = set(_files(entry))
    if odd := sorted(found ^ set(made)):
        return odd[0]
    looks = {name: _looks(entry / name) for name in found}
    moved = sorted(name for name in found if made[name][:-1] != looks[name])
    for name in moved:
        if made[name][-1] != _digest(entry / name):
            return name
    if moved:
        with contextlib.suppress(OSError):
            _write(entry, {name: [*looks[name], made[name][-1]] for name in found})
    return None


def _write(entry: Path, made: dict[str, Any]) -> None:
    beside = entry / f"{NAME}.{os.getpid()}"
    beside.write_text(json.dumps(made))
    os.replace(beside, entry / NAME)


def _files(entry: Path) -> Iterator[str]:
    for directory, _, names in os.walk(entry):
        for name in names:
            relative = os.path.relpath(os.path.join(directory, name), entry)
            if not relative.startswith(NAME):
                yield relative


def _looks(path: Path) -> list[int]:
    status = os.lstat(path)
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _digest(path: Path) -> str:
    if os.path.islink(path):
        return os.readlink(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
