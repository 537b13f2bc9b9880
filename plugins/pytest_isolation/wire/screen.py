"""What a suite writes to the user's terminal, as far as it only shows something.

A terminal also does what it is told: answers as if the user had typed, fills the clipboard, renames its window, reports the
mouse. Colours, and moving and erasing on the screen, are passed on; all other control sequences are made visible.
"""

from __future__ import annotations

import codecs
import re
from typing import Final

_COLOUR: Final = r"\[(?!(?:[0-9;:]*;)?0*8[;:m])[0-9;:]*m"  # any but "conceal"
_MOVE_OR_ERASE: Final = r"\[[0-9]*(?:;[0-9]*)?[A-HJ-MPSTXd@f]"
_CURSOR_SHOWN: Final = r"\[\?25[hl]"
_BRACKETED_PASTE: Final = r"\x1b\[\?2004[hl]"  # readline asks for it; left on, it would be the shell's
_CONTROL: Final = re.compile(
    rf"(\x1b(?:{_COLOUR}|{_MOVE_OR_ERASE}|{_CURSOR_SHOWN}))|{_BRACKETED_PASTE}|[\x00-\x06\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)
_UNFINISHED: Final = re.compile(r"\x1b(?:\[[0-9;:?]{0,32})?\Z")


class Screen:
    """A filter for one stream of output."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def __call__(self, data: bytes) -> bytes:
        """What of it may be written now; the beginning of a sequence waits for its end."""
        text = self._held + self._decoder.decode(data)
        unfinished = _UNFINISHED.search(text)
        self._held = unfinished[0] if unfinished else ""
        text = text[: len(text) - len(self._held)]
        return _CONTROL.sub(_shown, text).encode()


def _shown(match: re.Match[str]) -> str:
    if match[1]:
        return match[1]
    return "" if len(match[0]) > 1 else f"\\x{ord(match[0]):02x}"
