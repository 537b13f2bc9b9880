"""Runs in the launcher, while a machine is made: for a minute or two where the system has changed since the last one.

Meanwhile the launcher's only loop waits for that. So a thread hears that the frontend has gone, or wants no kernel any more,
and says what takes so long.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from typing import Final

from isolation_kernel.container.session import TO_GROUP, ParentLike, SignalsLike, say

_QUIET: Final = 2.0  # s, that nobody wonders about
_AGAIN: Final = 30.0  # s


class Starting:
    """While in its `with` block, this process ends with its parent, and by a signal that asks for it."""

    def __init__(self, signals: SignalsLike, parent: ParentLike) -> None:
        self._signals, self._parent = signals, parent
        self._over, self._its_over = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name="starting", daemon=True)

    def _watch(self) -> None:
        poller = select.poll()
        for fd in (self._over, self._signals.fileno(), self._parent.fileno()):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        wait = _QUIET
        while True:
            ready = [fd for fd, _events in poller.poll(1000 * wait)]
            if self._over in ready:
                return
            if self._parent.gone() or self._parent.fileno() in ready:
                os._exit(128 + signal.SIGHUP)
            if not ready:
                if wait == _QUIET:
                    say("making the virtual machine that kernels are forked from, once for each change of the system:")
                    say("this takes a minute or two where machines are emulated")
                else:
                    say("still at it")
                wait = _AGAIN
            for number in self._signals.take():
                if number not in TO_GROUP:
                    os._exit(128 + number)  # what was begun ends with this process, and is swept by the next that begins it

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_details: object) -> None:
        os.close(self._its_over)
        self._thread.join()
        os.close(self._over)
