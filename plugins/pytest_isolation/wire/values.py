"""Plain values of Python's (numbers, text, lists, tuples, sets, dictionaries of such) as JSON, and back.

JSON alone has no tuples, no sets, and no keys but text. Neither side builds anything else.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from isolation.plain import os
from pytest_isolation.wire.sanitize import clean

_KIND = "$"  # of a value that JSON has no form for: an object with this name and "items"
_KINDS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_DEEPEST = 24
_VALUES_AT_MOST = 50_000
_TEXT_AT_MOST = 4 << 20  # characters, in all
_INT_AT_MOST = 1 << 512
_SAME_HASH_AT_MOST = 16  # values that have one hash; among many of them, each look-up would be a search


class NotPlain(ValueError):
    """It is of another kind, or too much."""


class _Room:
    """For one value, with all that is in it."""

    def __init__(self) -> None:
        self._values = _VALUES_AT_MOST
        self._text = _TEXT_AT_MOST

    def take(self, depth: int, text: int = 0) -> None:
        self._values -= 1
        self._text -= text
        if depth > _DEEPEST or self._values < 0 or self._text < 0:
            raise NotPlain("too large")


def pack(value: object) -> Any:
    """In the sandbox: as JSON. Raises NotPlain; but what within a list or a dictionary is of another kind becomes its
    repr()."""
    return _pack(value, _Room(), 0)


def _pack(value: object, room: _Room, depth: int) -> Any:
    if value is None or value is True or value is False:
        room.take(depth)
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        room.take(depth, len(value))
        return str.__str__(value)  # of a class that is derived from it, what Python's own makes of it
    if isinstance(value, int) and abs(value) < _INT_AT_MOST:
        room.take(depth)
        return int.__index__(value)
    if isinstance(value, float):
        room.take(depth)
        return float.__float__(value)
    room.take(depth)
    if isinstance(value, list):
        return [_pack(each, room, depth + 1) for each in value]
    if isinstance(value, dict):
        if _KIND not in value and all(type(name) is str for name in value):
            for name in value:
                room.take(depth, len(name))
            return {name: _pack(each, room, depth + 1) for name, each in value.items()}
        pairs = [[_pack(name, room, depth + 1), _pack(each, room, depth + 1)] for name, each in value.items()]
        return {_KIND: "dict", "items": pairs}
    for name, kind in _KINDS.items():
        if isinstance(value, kind):
            return {_KIND: name, "items": [_pack(each, room, depth + 1) for each in value]}
    if depth == 0:
        raise NotPlain(type(value).__name__)
    try:
        text = repr(value)
    except BaseException as error:  # somebody's __repr__ may raise anything
        text = f"<{type(error).__name__} in __repr__ of {type(value).__name__}>"
    room.take(depth, len(text))
    return text


def unpack(sent: object) -> Any:
    """On the host: the value, its text cleaned. Raises NotPlain, or TypeError for a key that cannot be one."""
    return _unpack(sent, _Room(), 0)


def _unpack(sent: object, room: _Room, depth: int) -> Any:
    room.take(depth, len(sent) if isinstance(sent, str) else 0)
    if sent is None or isinstance(sent, (bool, float)):
        return sent
    if isinstance(sent, str):
        return clean(sent)
    if isinstance(sent, int) and abs(sent) < _INT_AT_MOST:
        return sent
    if isinstance(sent, list):
        return [_unpack(each, room, depth + 1) for each in sent]
    if not isinstance(sent, dict):
        raise NotPlain("no such value")
    if _KIND not in sent:
        for name in sent:
            room.take(depth, len(name))
        return {clean(name): _unpack(each, room, depth + 1) for name, each in sent.items()}
    kind, items = sent[_KIND], sent.get("items")
    if not isinstance(items, list) or not isinstance(kind, str):
        raise NotPlain("no such value")
    if kind == "dict":
        names = [_unpack(name, room, depth + 1) for name, _each in items]
        _check_hashes(names)
        return dict(zip(names, [_unpack(each, room, depth + 1) for _name, each in items], strict=True))
    if kind not in _KINDS:
        raise NotPlain("no such value")
    found = [_unpack(each, room, depth + 1) for each in items]
    if _KINDS[kind] is not tuple:
        _check_hashes(found)
    return _KINDS[kind](found)


def _check_hashes(keys: list[Any]) -> None:
    """Numbers that differ by a multiple of `sys.hash_info.modulus` have the same; and what holds them. Raises NotPlain."""
    if len(keys) > _SAME_HASH_AT_MOST and max(Counter(map(hash, keys)).values()) > _SAME_HASH_AT_MOST:
        raise NotPlain("too many values of one hash")
