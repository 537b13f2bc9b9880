"""The one stream between a kernel's virtual machine and its host: numbers of what is in it, and lines of JSON.

Used on both sides; on the host against a guest that may send anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from isolation.mux import MuxError

CONTROL, WIRE, FIRST = 0, 1, 2  # numbers of streams; those from FIRST on are the host's to give
EXITS: Final = 5  # the number of one more channel, behind which is forwarder.py
_LINE_AT_MOST: Final = 1 << 20


class Lines:
    """Objects out of bytes: a line of JSON each."""

    def __init__(self, handle: Callable[[dict[str, Any]], None]) -> None:
        self._handle = handle
        self._rest = bytearray()

    def feed(self, data: bytes) -> None:
        """Raises MuxError for what is no such object, or too long."""
        first, *more = data.split(b"\n")
        self._rest += first  # which copies nothing of what was there: it may come a byte at a time
        if len(self._rest) > _LINE_AT_MOST:
            raise MuxError("the other end sent a line without an end")
        if not more:
            return
        *lines, rest = more
        lines.insert(0, bytes(self._rest))
        self._rest = bytearray(rest)
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise MuxError(f"the other end sent something that is not JSON: {error}") from error
            if not isinstance(message, dict):
                raise MuxError("the other end sent JSON that is not an object")
            self._handle(message)


def line(message: dict[str, Any]) -> bytes:
    """For `Lines`."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
