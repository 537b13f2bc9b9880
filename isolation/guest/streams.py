"""What Python has buffered of this process's output."""

from __future__ import annotations

import sys


def flush() -> None:
    """Write it out: before a fork, or both write it; and before an os._exit(), or nobody does.

    What cannot be written stays where it is, and is its owner's business: the disk is full, the reader has gone, there is no
    such stream, a signal handler is in the middle of a print(), or somebody's replacement of it raises what it likes.
    """
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()  # type: ignore[union-attr]
        except Exception:
            continue
