"""Keeping secrets out of `ps`: the words that a process was started with can be read by every user of the machine."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable


def hide(secrets: Iterable[str]) -> None:
    """Overwrite each of them in this process's own command line, and so in those of all that it forks (proc(5), stat:
    arg_start and arg_end). `sys.argv` stays as it is."""
    start, end = bounds()
    if not 0 < start < end:
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


def bounds() -> tuple[int, int]:
    """Where the command line is in this process's memory."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[45]), int(fields[46])
