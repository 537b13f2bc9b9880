"""`json.dumps` and `json.loads`, by the parts in C that they use: nothing is looked up when these are called.

Whoever replaces `json.dumps`, or a method of its classes, does so for his own code, and not for what carries his report.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from json import encoder as _encoder
from json import scanner as _scanner
from json.decoder import JSONDecodeError, JSONDecoder
from typing import Any

_make_encoder: Any = getattr(_encoder, "c_make_encoder", None)
_make_scanner: Any = _scanner.make_scanner
_ascii, _any_text = _encoder.encode_basestring_ascii, _encoder.encode_basestring
_scan = _make_scanner(JSONDecoder())
_Encoder = _encoder.JSONEncoder
_iterencode = _Encoder.iterencode
_FEW = 1000
_SPACE = " \t\n\r"
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')


def _refuse(value: object) -> Any:
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def dumps(
    value: Any,
    *,
    default: Callable[[Any], Any] = _refuse,
    separators: tuple[str, str] = (", ", ": "),
    skipkeys: bool = False,
    ensure_ascii: bool = True,
    allow_nan: bool = True,
    sort_keys: bool = False,
    indent: int | None = None,
) -> str:
    """Raises TypeError, ValueError or RecursionError for what is no JSON."""
    if indent is not None and separators[0] == ", ":
        separators = (",", separators[1])
    between, colon = separators
    if _make_encoder is None or indent is not None:  # an interpreter without that part, or what it does not do
        encoder = _Encoder(
            skipkeys=skipkeys,
            default=default,
            separators=separators,
            allow_nan=allow_nan,
            sort_keys=sort_keys,
            indent=indent,
            ensure_ascii=ensure_ascii,
        )
        return "".join(_iterencode(encoder, value))
    text = _ascii if ensure_ascii else _any_text
    return "".join(_make_encoder({}, default, text, None, colon, between, sort_keys, skipkeys, allow_nan)(value, 0))


def values(text: bytes) -> int:
    """How many values a JSON text holds, about, without decoding them: `[],[],…` is three bytes each there, and a hundred as
    objects of Python."""
    found = _separators(text)
    if found <= _FEW:  # those in strings included
        return found
    return _separators(_STRINGS.sub(b"", text))


def _separators(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def loads(text: str | bytes | bytearray) -> Any:
    """Raises ValueError or RecursionError."""
    if not isinstance(text, str):
        text = text.decode()
    start = len(text) - len(text.lstrip(_SPACE))
    try:
        value, end = _scan(text, start)
    except StopIteration as error:
        raise JSONDecodeError("Expecting value", text, error.value) from None
    rest = text[end:].lstrip(_SPACE)
    if rest:
        raise JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value
