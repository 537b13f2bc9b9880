"""/proc/self/mountinfo, read and asked (proc(5))."""

from __future__ import annotations

import re
from typing import NamedTuple


class MountPoint(NamedTuple):
    """One mount as this process sees it."""

    path: str
    fstype: str
    options: frozenset[str]


class MountTable:
    """Where something is mounted."""

    def __init__(self, points: list[MountPoint]) -> None:
        self.points = points
        self._by_path = {point.path: point for point in points}  # the last mount on a path is the visible one

    @classmethod
    def read(cls) -> MountTable:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            return cls([_parse(line) for line in file])

    def beneath(self, path: str) -> list[str]:
        """Mount points strictly below `path`, sorted, each once."""
        prefix = path.rstrip("/") + "/"
        return sorted({point.path for point in self.points if point.path.startswith(prefix) and point.path != "/"})

    def containing(self, path: str) -> MountPoint | None:
        """The mount that `path` (absolute, without symlinks) lies on."""
        while True:
            if path in self._by_path:
                return self._by_path[path]
            if path == "/":
                return None
            path = path.rpartition("/")[0] or "/"


def _parse(line: str) -> MountPoint:
    before, _, after = line.partition(" - ")
    fields = before.split(" ")
    return MountPoint(_unescape(fields[4]), after.split(" ", 1)[0], frozenset(fields[5].split(",")))


def _unescape(path: str) -> str:
    """Space, tab, newline and backslash stand as octal escapes in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
