"""Signals for a loop of poll(2)."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Any

from isolation.plain import os


class Signals:
    """Signals as bytes in a pipe. With `obedient`, what whoever started this process ignores (nohup) stays ignored."""

    def __init__(self, numbers: Iterable[int], *, obedient: bool) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before: dict[int, Any] = {}
        for number in numbers:
            if not obedient or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, _noted)

    def fileno(self) -> int:
        """Readable when one has come."""
        return self._read

    def take(self) -> bytes:
        """The numbers of those that came."""
        try:
            return os.read(self._read, 64)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """All is as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)


def _noted(_number: int, _frame: object) -> None:
    """The pipe has it already."""
