"""Text from inside, made fit for a terminal."""

from __future__ import annotations

import re
from typing import Any

_COLOUR = r"\x1b\[(?!(?:[0-9;:]*;)?0*8[;:m])[0-9;:]*m"  # any but "conceal"
_NO_TEXT = "\ud800-\udfff\ufffe\uffff"  # cannot be encoded, or stand in XML
_DIRECTION = "\u202a-\u202e\u2066-\u2069"  # the rest of the line is shown in another order (CVE-2021-42574)
# Control characters but tab and newline, and the C1 range. Colours (SGR sequences) are kept: they can do nothing but colour,
# and pytest shows captured colours. A return that ends no line would let the text overwrite what pytest has put before it.
_CONTROL = re.compile(rf"({_COLOUR}|\r(?=\n))|[\x00-\x08\x0b-\x1f\x7f-\x9f{_NO_TEXT}{_DIRECTION}]")
_CONTROL_OF_OUTPUT = re.compile(rf"({_COLOUR})|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_NO_TEXT}{_DIRECTION}]")
_ANY_CONTROL = re.compile(rf"[\x00-\x1f\x7f-\x9f{_NO_TEXT}{_DIRECTION}]")
_TEXT_AT_MOST = 8 << 20


def clean(text: str, limit: int = _TEXT_AT_MOST, *, control: re.Pattern[str] = _CONTROL) -> str:
    """`text` with control sequences made visible, and cut to `limit` characters, which is said."""
    if len(text) > limit:
        text = f"{text[:limit]}\n[… {len(text) - limit} more characters cut by pytest-isolation]"
    if text.isprintable():
        return text
    return control.sub(lambda match: match[1] or _visible(match[0]), text)


def clean_output(text: str, limit: int = _TEXT_AT_MOST) -> str:
    """For what a program has printed, which has lines of its own, and may go back in them (a progress bar)."""
    return clean(text, limit, control=_CONTROL_OF_OUTPUT)


def clean_name(text: str, limit: int = 4096) -> str:
    """For names: no control character at all, newlines included."""
    return _ANY_CONTROL.sub(lambda match: _visible(match[0]), text[:limit])


def _visible(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def clean_all(value: Any, depth: int = 24) -> Any:
    """Every string in a JSON value, cleaned; names, too, for who iterates over a list takes an object as well. Raises
    ValueError when it nests deeper than any report does."""
    if depth == 0:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [clean_all(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean_all(item, depth - 1) for key, item in value.items()}
    return value
