"""socketpair(2), of sockets of the class that there was first. Python's own function takes whatever `socket.socket` is."""

from __future__ import annotations

import _socket
from socket import AF_UNIX, SOCK_STREAM
from socket import socket as Socket


def socketpair(family: int = AF_UNIX, type: int = SOCK_STREAM, proto: int = 0) -> tuple[Socket, Socket]:
    """As `socket.socketpair`. Raises OSError."""
    one, other = _socket.socketpair(family, type, proto)
    return Socket(family, type, proto, one.detach()), Socket(family, type, proto, other.detach())
