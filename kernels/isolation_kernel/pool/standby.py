"""`python -I -m isolation_kernel.pool.standby`: the host's part of a kernel that waits, and is then handed out."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any, Final

from isolation import command_line
from isolation.errors import IsolationError, WireError
from isolation.wire import Wire
from isolation_kernel.container.session import Hosting, say
from isolation_kernel.options import parse
from isolation_kernel.protocol.connection import CHANNELS, Connection, Doors

_WARMING: Final = 120.0  # s


def main() -> int:
    """Descriptor 0 is the daemon's, the arguments are JSON: {words, cwd, doors}."""
    wanted = json.loads(sys.argv[1])
    command_line.hide([sys.argv[1]])  # values of --env are in it
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # those come by wire
    daemon = Wire(socket.socket(fileno=os.dup(0)), accept_fds=True)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    try:
        line = parse([*wanted["words"], "-f", "none"])
        doors = Doors([f"{wanted['doors']}-{number}" for number in range(len(CHANNELS))])
        with Hosting(line.options, doors) as hosting:
            hosting.start(wanted["cwd"], {}, standby=True)
            hosting.wait_until_warm(_WARMING)
            daemon.send({"event": "ready"})
            message = daemon.receive()
            if message is None:
                return 0
            return _serve(hosting, message, daemon, wanted)
    except WireError:
        return 0  # the daemon is gone
    except IsolationError as error:
        say(str(error))
        return 1


def _serve(hosting: Hosting, message: Mapping[str, Any], daemon: Wire, wanted: Mapping[str, Any]) -> int:
    """Be the launcher of who has asked."""
    asker, stderr, *ports = daemon.take_fds(message["fds"])
    os.dup2(stderr, 2)
    os.close(stderr)
    adopter = _Adopter(Wire(socket.socket(fileno=asker)))
    connection = Connection.of(message["connection"])
    listeners = [socket.socket(fileno=fd) for fd in ports]
    for listener in listeners:
        listener.setblocking(False)
    if connection.transport == "ipc":
        for number, path in enumerate(connection.paths()):
            os.rename(f"{wanted['doors']}-{number}", path)  # the way to a socket is its inode, whatever its name
    else:
        for number in range(len(CHANNELS)):
            os.unlink(f"{wanted['doors']}-{number}")
    hosting.hand_over(connection, wanted["cwd"], message["env"])
    adopter.wire.send({"event": "adopted", "pid": os.getpid()})
    daemon.close()
    code = hosting.serve(listeners, adopter, adopter)
    hosting.close()
    try:
        adopter.wire.send({"event": "exit", "code": code})
    except WireError:
        pass  # nobody waits for it
    return 0


class _Adopter:
    """Who has the kernel now: signals come by wire, and its end is that of the kernel."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def fileno(self) -> int:
        return self.wire.fileno()

    def take(self) -> bytes:
        """As `launcher.Signals.take`."""
        try:
            alive = self.wire.fill()
            numbers = []
            while (message := self.wire.next_message()) is not None:
                numbers.append(int(message["signal"]))
        except WireError:
            alive = False
        return bytes(numbers) if alive else bytes([signal.SIGTERM])

    def gone(self) -> bool:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
