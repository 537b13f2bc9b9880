"""Text from inside, made fit for a terminal."""

from __future__ import annotations

import re
from typing import Any

_COLOUR = r"\x1b\[(?!(?:[0-9;:]*;)?0*8[;:m])[0-9;:]*m"  # any but "conceal"
_NO_TEXT = "\ud800-\udfff\ufffe\uffff"  # cannot be encoded, or stand in XML
# Control characters but tab, newline and return, and the C1 range. Colours (SGR sequences) are kept: they can do nothing
# but colour, and pytest shows captured colours.
_CONTROL = re.compile(rf"({_COLOUR})|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_NO_TEXT}]")
_ANY_CONTROL = re.compile(rf"[\x00-\x1f\x7f-\x9f{_NO_TEXT}]")
_TEXT_AT_MOST = 8 << 20


def clean(text: str, limit: int = _TEXT_AT_MOST) -> str:
    """`text` with control sequences made visible, and cut to `limit` characters, which is said."""
    if len(text) > limit:
        text = f"{text[:limit]}\n[… {len(text) - limit} more characters cut by pytest-isolation]"
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda match: match[1] or _visible(match[0]), text)


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
