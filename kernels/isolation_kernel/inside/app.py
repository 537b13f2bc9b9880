"""ipykernel's application, but for where its sockets come from."""

from __future__ import annotations

from typing import Any

import zmq
from ipykernel.heartbeat import Heartbeat
from ipykernel.kernelapp import IPKernelApp

from isolation_kernel.connection import CHANNELS


class KernelApp(IPKernelApp):
    """Takes over listening sockets. Their numbers stand where an ordinary kernel has the descriptors of its own."""

    given: dict[int, int]  # by a channel's port: the descriptor of its listening socket

    def _try_bind_socket(self, s: Any, port: int) -> int:
        take_over(s, self.given[port], f"{self.ip}-{port}")
        if port == CHANNELS.index("shell") + 1:
            # ipykernel's debugger sends requests to its own shell, which it finds by its last endpoint.
            s.bind(f"ipc://{self.ip}-inner")
        return port

    def init_heartbeat(self) -> None:
        """As the base class's, with the given socket."""
        address = (self.transport, self.ip, self.hb_port)
        found = ((name, getattr(self, name, None)) for name in ("curve_publickey", "curve_secretkey"))
        keys = {name: key for name, key in found if key is not None}  # ipykernel before 7.3 has none
        self.heartbeat = _Heartbeat(zmq.Context(), address, **keys)  # type: ignore[no-untyped-call]
        self.heartbeat.given = self.given[self.hb_port]
        self.heartbeat.start()


class _Heartbeat(Heartbeat):
    given: int

    def _try_bind_socket(self) -> None:
        take_over(self.socket, self.given, f"{self.ip}-{self.port}")


def take_over(s: Any, fd: int, path: str) -> None:
    """Let a socket accept its connections on a listening descriptor. The path is a name only: nothing is made there."""
    s.use_fd = fd
    s.bind(f"ipc://{path}")
    s.use_fd = -1
