"""What long work tells the person who waits: one line that changes on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

from isolation.plain import time

_EVERY = 0.1  # seconds between two changes of the line


class Progress:
    """`stream` None: silent. All text is without control characters, whatever file name it holds."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._tty = stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._step = ""
        self._started = 0.0
        self._shown = 0.0

    @classmethod
    def stderr(cls) -> Progress:
        return cls(sys.stderr)

    def start(self, step: str) -> None:
        """A new step begins, e.g. "fetching the kernel"."""
        self._step = step
        self._started = self._shown = time.monotonic()
        if self._tty:
            self._rewrite(step + " …")
        else:
            self._line(step)

    def update(self, detail: str) -> None:
        """How far the step is. Cheap, and shown on a terminal only."""
        if self._tty and time.monotonic() - self._shown >= _EVERY:
            self._shown = time.monotonic()
            self._rewrite(f"{self._step}: {detail}")

    def done(self, result: str) -> None:
        """The step is done."""
        seconds = time.monotonic() - self._started
        self._line(f"{result}, {seconds:.1f} s" if seconds >= 0.1 else result)

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
        self._line(text)

    def close(self) -> None:
        """Leave no half line behind."""
        if self._tty and self._step:
            self._rewrite("")
            self._step = ""

    def _rewrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._write("\r\x1b[K" + _printable(text)[:width])

    def _line(self, text: str) -> None:
        self._write(("\r\x1b[K" if self._tty else "") + _printable(text) + "\n")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._stream = None  # nobody listens


SILENT = Progress(None)


def megabytes(size: int) -> str:
    """For people: "3.1 MB", "2.40 GB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
