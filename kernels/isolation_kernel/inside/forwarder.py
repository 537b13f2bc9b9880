"""`python -I -m isolation_kernel.inside.forwarder`: where HTTP clients in the sandbox find a proxy.

It decides nothing: each connection to 127.0.0.1:3128 is joined to one that the host has dialled in, and the host decides
what becomes of it (proxy.py). Whoever in the sandbox takes its place gains nothing.
"""

from __future__ import annotations

import select
import signal
import socket

from isolation_kernel.inside.host_channel import FIRST_GIVEN
from isolation_kernel.protocol.relay import Relay

_PORT = 3128


def listen() -> socket.socket:
    """Where clients connect to."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", _PORT))
    listener.listen(128)
    return listener


def main(listener: socket.socket | None = None) -> None:
    """Until the sandbox ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dialled = socket.socket(fileno=FIRST_GIVEN)
    dialled.setblocking(True)
    dialled.settimeout(5)  # there is always one that waits, unless the host has too many at work

    def accept(_channel: int) -> socket.socket:
        while True:
            end, _ = dialled.accept()
            if not select.select([end], [], [], 0)[0]:
                end.setblocking(False)
                return end
            end.close()  # the host says nothing first: it is the end of one that waited in a machine before a rollback

    epoll = select.epoll()
    relay = Relay(epoll, [listener or listen()], accept)
    while True:
        for fd, events in epoll.poll():
            if relay.handles(fd):
                relay.handle(fd, events)


if __name__ == "__main__":
    main()
