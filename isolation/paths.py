"""Comparing paths, as text."""

from __future__ import annotations

from collections.abc import Iterable


def is_within(path: str, directories: Iterable[str]) -> bool:
    """Whether `path` is one of `directories`, or beneath one. All are absolute and normalized; no link is followed."""
    return any(f"{path}/".startswith(f"{directory.rstrip('/')}/") for directory in directories)
