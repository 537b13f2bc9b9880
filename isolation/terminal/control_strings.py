"""What a command writes to the user's terminal, without the control strings by which a terminal does more than show.

A control string (ECMA-48 §5.6: APC, DCS, OSC, PM, SOS) may fill the clipboard (OSC 52), save a file (OSC 1337), run
something (DCS of kitty's remote control), read or delete a file (APC of kitty's images), or carry another string to the
terminal around (DCS of tmux and screen). Those that only show are passed on: titles, colours, links, marks, sixel; and
questions, whose answers are taken off (terminal.py). The others are left out. All else is a command's own business: it may
be an editor.
"""

from __future__ import annotations

import re
from typing import Final

# As two characters, and as one (in UTF-8).
_BEGIN: Final = re.compile(rb"\x1b[]P_^X]|\xc2[\x90\x98\x9d\x9e\x9f]")
_END: Final = re.compile(rb"\x07|\x18|\x1a|\xc2\x9c|\x1b|\xc2[\x90\x98\x9d\x9e\x9f]")
_GIVEN_UP: Final = re.compile(rb"\x1b(?!\\)|\xc2[^\x9c]")  # for what begins here
_OSC: Final = (b"\x1b]", b"\xc2\x9d")
_DCS: Final = (b"\x1bP", b"\xc2\x90")
_SHOWS: Final = {
    "osc": re.compile(rb"(?:[0-24-8]|1[0-9]|10[45]|11[0-9]|133)(?![0-9])"),  # xterm's ctlseqs; 8: links; 133: prompts
    "dcs": re.compile(rb"[0-9;]*q|[$+]q"),  # sixel; DECRQSS and XTGETTCAP ask
}
_HEAD: Final = 24  # bytes, by which it is known which one it is


class ControlStrings:
    """A filter for one stream."""

    def __init__(self) -> None:
        self._held = b""  # too short to tell what it begins
        self._inside = False
        self._shown = False

    def __call__(self, data: bytes) -> bytes:
        """What of it may be written now; the beginning of a string waits until it is known which one it is."""
        data, self._held = self._held + data, b""
        passed = bytearray()
        place = 0
        while place < len(data):
            place = self._end(data, place, passed) if self._inside else self._begin(data, place, passed)
        return bytes(passed)

    def _begin(self, data: bytes, place: int, passed: bytearray) -> int:
        found = _BEGIN.search(data, place)
        if found is None:
            stop = len(data) - (data[-1:] in (b"\x1b", b"\xc2"))
            passed += data[place:stop]
            self._held = data[stop:]
            return len(data)
        passed += data[place : found.start()]
        head = data[found.end() : found.end() + _HEAD]
        if len(head) < _HEAD and _END.search(head) is None:
            self._held = data[found.start() :]
            return len(data)
        kind = "osc" if found[0] in _OSC else "dcs" if found[0] in _DCS else ""
        self._inside, self._shown = True, kind != "" and _SHOWS[kind].match(head) is not None
        if self._shown:
            passed += found[0]
        return found.end()

    def _end(self, data: bytes, place: int, passed: bytearray) -> int:
        found = _END.search(data, place)
        if found is None or (found[0] == b"\x1b" and found.end() == len(data)):
            stop = len(data) if found is None else found.start()
            stop -= found is None and data[-1:] == b"\xc2"
            if self._shown:
                passed += data[place:stop]
            self._held = data[stop:]
            return len(data)
        self._inside = False
        end = found.end()
        if _GIVEN_UP.match(data, found.start()):
            end = found.start()
        elif found[0] == b"\x1b":
            end += 1
        if self._shown:
            passed += data[place:end]
        return end
