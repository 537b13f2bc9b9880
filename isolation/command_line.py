"""Keeping secrets out of `ps`: the words that a process was started with can be read by every user of the machine.

Its environment can be read by the same user's processes. Where both are in memory, the kernel tells (proc(5), stat).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Final

# The fields of /proc/self/stat with their beginnings, counted as proc(5) does; the next one is the end.
ARGUMENTS: Final = 48
ENVIRONMENT: Final = 50
_FIRST = 3  # behind the command's name, which may have spaces and brackets


def hide(secrets: Iterable[str]) -> None:
    """Overwrite each of them in this process's own command line, and so in those of all that it forks. `sys.argv` stays as
    it is."""
    start, end = area(ARGUMENTS)
    if start == end:
        return
    line = ctypes.string_at(start, end - start)
    for secret in filter(None, secrets):
        word = secret.encode(errors="surrogateescape")
        place = line.find(word)
        while place >= 0:
            ctypes.memset(start + place, ord("*"), len(word))
            place = line.find(word, place + len(word))


def hide_values(pairs: Iterable[str]) -> None:
    """Of `--env NAME=VALUE`, each VALUE."""
    hide(pair.partition("=")[2] for pair in pairs)


def area(field: int) -> tuple[int, int]:
    """Where it is in this process's memory: ARGUMENTS or ENVIRONMENT. Empty where the kernel does not tell."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = (int(each) for each in fields[field - _FIRST : field - _FIRST + 2])
    return (start, end) if 0 < start < end else (0, 0)
