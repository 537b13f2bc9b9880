"""Sizes and times as people write them: "512M", "1.5G", "2s", "5min"."""

from __future__ import annotations

import math
import re

from isolation.errors import SpecError

_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TIME_UNITS = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "min": 60.0, "h": 3600.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h)?", re.IGNORECASE)
_LARGEST_SIZE = 1 << 62


def parse_size(value: str | int, what: str = "size") -> int:
    """Bytes in `value`: an integer, or a string such as "512M" (powers of 1024, as docker and systemd do).

    Raises SpecError for anything else, zero, negative and absurdly large sizes included.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise SpecError(f"{what} must be a number of bytes or a string such as '512M', not {value!r}")
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise SpecError(f"{what} {value!r} is not a size; write a number of bytes or e.g. '64K', '512M', '1.5G'")
        size = int(float(match[1]) * _SIZE_UNITS[match[2].upper()])
    if not 0 < size <= _LARGEST_SIZE:
        raise SpecError(f"{what} {value!r} must be more than zero and at most 4E bytes")
    return size


def parse_seconds(value: str | int | float, what: str = "time") -> float:
    """Seconds in `value`: a number, or a string such as "2s", "500ms", "5min", "1h".

    Raises SpecError for anything else, zero, negative and infinite times included.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise SpecError(f"{what} must be a number of seconds or a string such as '2s', not {value!r}")
    if isinstance(value, str):
        match = _TIME.fullmatch(value.strip())
        if match is None:
            raise SpecError(f"{what} {value!r} is not a time; write seconds or e.g. '500ms', '2s', '5min', '1h'")
        seconds = float(match[1]) * _TIME_UNITS[(match[2] or "").lower()]
    else:
        seconds = float(value)
    if not math.isfinite(seconds) or seconds <= 0:
        raise SpecError(f"{what} {value!r} must be more than zero, and finite")
    return seconds


def parse_count(value: str | int, what: str = "count") -> int:
    """A whole number of at least one. Raises SpecError otherwise."""
    try:
        count = int(value) if isinstance(value, str) else value
    except ValueError:
        count = 0
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SpecError(f"{what} must be a whole number of at least 1, not {value!r}")
    return count


def unless_none(value: str | None, default: str | int | None) -> str | int | None:
    """A limit as a command line says it: `default` where nothing is said, None (no limit) for "none"."""
    if value is None:
        return default
    return None if value == "none" else value


def format_size(size: float) -> str:
    """The reverse of `parse_size`, for people: 536870912 → "512M"."""
    for unit, factor in reversed(_SIZE_UNITS.items()):
        if unit and size >= factor:
            number = size / factor
            return f"{number:.0f}{unit}" if number == int(number) or number >= 100 else f"{number:.1f}{unit}"
    return f"{size:.0f}B"
