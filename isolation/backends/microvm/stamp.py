"""What is in a finished entry of the cache, so that what has happened to it since is noticed without reading it all.

Size and time of each file: somebody's mistake changes them, and who wants to deceive is kept out (cache.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from isolation.plain import json

NAME: Final = ".made"


def write(entry: Path) -> None:
    """Of a directory that is about to be put in place. Raises OSError."""
    (entry / NAME).write_text(json.dumps(dict(_files(entry))))


def changed(entry: Path) -> str | None:
    """The first file that is not as it was, by its name below the entry. Raises OSError or ValueError."""
    try:
        made = json.loads((entry / NAME).read_bytes())
    except FileNotFoundError:
        return None  # of an earlier version
    found = dict(_files(entry))
    if not isinstance(made, dict) or made == found:
        return None
    return next((name for name in sorted({*made, *found}) if made.get(name) != found.get(name)), None)


def _files(entry: Path) -> Iterator[tuple[str, list[int]]]:
    for directory, _, names in os.walk(entry):
        for name in names:
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, entry)
            if relative != NAME:
                status = os.lstat(path)
                yield relative, [status.st_size, status.st_mtime_ns]
