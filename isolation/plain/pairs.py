"""Pairs of sockets of the class that there was first, where Python's own function takes whatever `socket.socket` is now; and
what goes by them."""

from __future__ import annotations

import _socket
from array import array
from collections.abc import Sequence
from errno import ETOOMANYREFS
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from socket import AF_UNIX, SCM_RIGHTS, SOCK_STREAM, SOL_SOCKET
from socket import socket as Socket
from time import monotonic, sleep
from typing import Any, Final

_PATIENCE: Final = 10.0  # s


class BlockingSocket(Socket):
    """That class, whatever `socket.setdefaulttimeout` says: in C, for all that are made in a process."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self.gettimeout() is not None:
            self.settimeout(None)


def socketpair(family: int = AF_UNIX, type: int = SOCK_STREAM, proto: int = 0) -> tuple[Socket, Socket]:
    """As `socket.socketpair`. Raises OSError."""
    one, other = _socket.socketpair(family, type, proto)
    return BlockingSocket(family, type, proto, one.detach()), BlockingSocket(family, type, proto, other.detach())


def send_fds(sock: Socket, buffers: Sequence[bytes | memoryview], fds: Sequence[int]) -> int:
    """As `socket.send_fds`, also while another process has many descriptors on their way. Raises OSError.

    No process may send one while its user has more in flight than that process may have open (unix(7), ETOOMANYREFS); and
    what runs in a sandbox may have been started by the same user. So the sender's own limit goes up, and then it is patient.
    """
    rights = [(SOL_SOCKET, SCM_RIGHTS, array("i", fds))]
    deadline = monotonic() + _PATIENCE
    before: tuple[int, int] | None = None
    try:
        while True:
            try:
                return sock.sendmsg(buffers, rights)
            except OSError as error:
                if error.errno != ETOOMANYREFS or monotonic() > deadline:
                    raise
            if before is None:
                before = getrlimit(RLIMIT_NOFILE)
                setrlimit(RLIMIT_NOFILE, (before[1], before[1]))
            else:
                sleep(0.01)
    finally:
        if before is not None:
            setrlimit(RLIMIT_NOFILE, before)
