"""Passing bytes between the frontend's TCP connections and the kernel's unix sockets.

ZMTP is the same stream of bytes over both, so nothing is parsed and no key is needed; what is encrypted (CurveZMQ) stays so
from end to end. Each connection is independent: one that is not read holds up itself alone, and costs a bounded buffer.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence
from typing import Final

_CHUNK: Final = 1 << 18
_CONNECTIONS_AT_MOST: Final = 512
_IN: Final = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR
_OUT: Final = select.EPOLLOUT
_ASLEEP: Final = -1

Dial = Callable[[int], socket.socket]


class _End:
    """One socket, and what has been read from its peer but is not yet written to it."""

    __slots__ = ("asked", "fd", "open", "peer", "sock", "waiting")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.peer: _End = self
        self.waiting: memoryview | None = None
        self.open = True  # may still be read
        self.asked = 0


class Relay:
    """Accepts on `listeners`, one for each channel, and dials the kernel for every connection.

    Shares an epoll object with its owner: what `handles` knows is for `handle`.
    """

    def __init__(self, epoll: select.epoll, listeners: Sequence[socket.socket], dial: Dial) -> None:
        self._epoll = epoll
        self._dial = dial
        self._listeners = {listener.fileno(): (number, listener) for number, listener in enumerate(listeners)}
        self._ends: dict[int, _End] = {}
        self._buffer = bytearray(_CHUNK)
        for fd in self._listeners:
            epoll.register(fd, select.EPOLLIN)

    def handles(self, fd: int) -> bool:
        """Whether the descriptor is one of this relay's."""
        return fd in self._ends or fd in self._listeners

    def handle(self, fd: int, events: int) -> None:
        """Move what can be moved."""
        if fd in self._listeners:
            self._accept(*self._listeners[fd])
            return
        end = self._ends.get(fd)
        if end is None:
            return  # closed by what came before in the same round
        if events & _OUT and end.waiting is not None:
            self._write(end)
        if events & _IN and end.open and end.peer.waiting is None and fd in self._ends:
            self._read(end)
        elif events & (select.EPOLLHUP | select.EPOLLERR) and fd in self._ends:
            if end.open and end.peer.waiting is not None:
                self._epoll.unregister(fd)  # its last words are still to be read, and epoll would not be silent meanwhile
                end.asked = _ASLEEP
            else:
                self._drop(end)

    def _accept(self, channel: int, listener: socket.socket) -> None:
        try:
            outer, _ = listener.accept()
        except OSError:
            return
        if len(self._ends) >= 2 * _CONNECTIONS_AT_MOST:
            outer.close()
            return
        try:
            inner = self._dial(channel)
        except OSError:
            outer.close()  # the kernel is gone, or does not accept; a client tries again
            return
        outer.setblocking(False)
        outer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        a, b = _End(outer), _End(inner)
        a.peer, b.peer = b, a
        for end in (a, b):
            self._ends[end.fd] = end
            self._epoll.register(end.fd, _IN)
            end.asked = _IN

    def _read(self, end: _End) -> None:
        try:
            count = end.sock.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(end)
            return
        if count == 0:
            end.open = False
            try:
                end.peer.sock.shutdown(socket.SHUT_WR)  # the half close
            except OSError:
                pass
            if not end.peer.open:
                self._drop(end)
            else:
                self._ask(end)
            return
        try:
            sent = end.peer.sock.send(memoryview(self._buffer)[:count])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._drop(end)
            return
        if sent < count:
            end.peer.waiting = memoryview(bytes(memoryview(self._buffer)[sent:count]))
            self._ask(end.peer)
            self._ask(end)

    def _write(self, end: _End) -> None:
        assert end.waiting is not None
        try:
            sent = end.sock.send(end.waiting)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(end)
            return
        end.waiting = end.waiting[sent:] if sent < len(end.waiting) else None
        if end.waiting is None:
            self._ask(end)
            self._ask(end.peer)

    def _ask(self, end: _End) -> None:
        """Of epoll, what this end waits for now."""
        wanted = (select.EPOLLIN if end.open and end.peer.waiting is None else 0) | (_OUT if end.waiting is not None else 0)
        if wanted == end.asked:
            return
        if end.asked == _ASLEEP:
            self._epoll.register(end.fd, wanted)
        else:
            self._epoll.modify(end.fd, wanted)
        end.asked = wanted

    def _drop(self, end: _End) -> None:
        for each in (end, end.peer):
            if self._ends.pop(each.fd, None) is not None:
                if each.asked != _ASLEEP:
                    self._epoll.unregister(each.fd)
                each.sock.close()

    @property
    def busy(self) -> bool:
        """There are connections."""
        return bool(self._ends)

    def accept_no_more(self) -> None:
        """New connections are refused from now on."""
        for fd, (_number, listener) in self._listeners.items():
            self._epoll.unregister(fd)
            listener.close()
        self._listeners.clear()

    def close(self) -> None:
        """Drop every connection, and listen no more."""
        for end in list(self._ends.values()):
            self._drop(end)
        self.accept_no_more()
