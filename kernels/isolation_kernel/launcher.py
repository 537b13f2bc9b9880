"""What a frontend starts: one process for each kernel, on the host."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import Final

from isolation.errors import IsolationError, SpecError
from isolation.signals import Signals
from isolation_kernel.pool import client

_FAILED: Final = 125
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the kernel's exit code, or 125 when there is none."""
    # First: a manager interrupts before every restart, and perhaps before this has begun.
    signals = Signals(_SIGNALS, obedient=False)
    parent = Parent()
    try:
        return _launch(sys.argv[1:] if argv is None else argv, signals, parent)
    except IsolationError as error:
        from isolation_kernel.container.session import say

        say(str(error))
        return _FAILED


def _launch(argv: Sequence[str], signals: Signals, parent: Parent) -> int:
    from isolation_kernel.protocol.connection import Connection, Doors

    if "-f" not in argv[:-1]:
        raise SpecError("no connection file (… -f FILE): this is what a kernelspec runs; see 'isolation kernel --help'")
    place = list(argv).index("-f")
    connection = Connection.read(argv[place + 1])
    # Before all that takes time: a client that is refused waits a tenth of a second before it tries again.
    listeners = connection.listen_tcp() if connection.transport == "tcp" else []
    adopted = client.ask(argv[:place], os.getcwd(), os.environ, connection.raw, argv[place + 2 :], listeners)
    if adopted is not None:
        for listener in listeners:
            listener.close()
        return _accompany(adopted, signals, parent)

    from isolation import command_line
    from isolation_kernel.container.session import Hosting
    from isolation_kernel.options import parse

    line = parse(argv)
    command_line.hide_values(line.options.env)
    doors = Doors(connection.paths() if connection.transport == "ipc" else None)
    if line.options.in_machine:
        from isolation_kernel.machine.session import MachineHosting
        from isolation_kernel.machine.starting import Starting

        with MachineHosting(line.options, listeners or doors.listeners) as machine:
            with Starting(signals, parent):
                machine.start(os.getcwd(), os.environ, connection, line.forwarded)
            return machine.serve(signals, parent)
    with Hosting(line.options, doors) as hosting:
        hosting.start(os.getcwd(), os.environ)
        hosting.order(connection, line.forwarded)
        return hosting.serve(listeners, signals, parent)


def _accompany(adopted: client.Adopted, signals: Signals, parent: Parent) -> int:
    """Stand for a kernel of the pool: it gets our signals, and ends with us; we end with it."""
    poller = select.poll()
    for fd in (adopted.fileno(), signals.fileno(), parent.fileno()):
        if fd >= 0:
            poller.register(fd, select.POLLIN)
    while (code := adopted.poll()) is None:
        ready = [fd for fd, _events in poller.poll()]
        if parent.fileno() in ready or parent.gone():
            return 128 + signal.SIGHUP
        if signals.fileno() in ready:
            for number in signals.take():
                adopted.send_signal(number)
    return code if code >= 0 else 128 - code


class Parent:
    """Who started this. The process, not the thread of it, as PR_SET_PDEATHSIG would have it: frontends start kernels from
    threads that end."""

    def __init__(self) -> None:
        self._pid = os.getppid()
        self._fd = -1
        if self._pid > 1:
            try:
                self._fd = os.pidfd_open(self._pid)
            except OSError:
                pass

    def fileno(self) -> int:
        """Readable when it is gone; -1 when there is nobody to watch."""
        return self._fd

    def gone(self) -> bool:
        """It ended before it could be watched."""
        return self._pid > 1 and os.getppid() != self._pid
