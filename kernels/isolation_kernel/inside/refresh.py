"""Before each cell: what has changed on the host since the last one is seen, by the file system, and by Python's import."""

from __future__ import annotations

import contextlib
import os
import sys

from isolation.errors import WireError
from isolation_kernel.inside.host_channel import Host, Refused


class Refresh:
    """Asks for it, as long as there is something to see."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._wanted = True

    def before_cell(self) -> None:
        """The cell runs in any case, but that of an interrupt."""
        if not self._wanted or not self._host.owns:  # a child that was forked off the kernel
            return
        with contextlib.suppress(Refused, WireError, TimeoutError):
            self._wanted = self._host.ask("refresh") is not False
        if self._wanted:
            _look_for_modules_again()


def _look_for_modules_again() -> None:
    """Python looks for modules in what a directory held when its time last changed; that of an overlay's directory does not
    change with what is below. Where packages are installed, nothing changes."""
    installed = (os.path.dirname(os.path.dirname(os.__file__)) + os.sep, sys.prefix + os.sep)
    for path, finder in list(sys.path_importer_cache.items()):
        forget = getattr(finder, "invalidate_caches", None)
        if forget is not None and not path.startswith(installed):
            with contextlib.suppress(Exception):  # somebody else's finder
                forget()
