"""The kernel's wire to its host. In every cell's reach: the host believes nothing that comes by it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any, Final

from isolation.wire import Message, Wire

FIRST_GIVEN: Final = 64  # number of the first descriptor that the host passes: five listening sockets, and the wire
_ANSWER: Final = 60.0  # s


class Refused(Exception):
    """The host says no; the message says why."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Neither here nor there, an interrupt would leave what is done meanwhile. Threads but the main one get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """An interrupt that comes meanwhile is raised afterwards; where none are wanted, none is."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    came = threading.Event()
    handler = signal.signal(signal.SIGINT, lambda *_details: came.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came.is_set():
            raise KeyboardInterrupt


class Host:
    """Requests, and their answers. May be used by several threads."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._wire = Wire(socket.socket(fileno=fd))
        self._lock = threading.RLock()
        self._owner = os.getpid()

    def adopt(self) -> None:
        """This process is the kernel now; see undo."""
        self._owner = os.getpid()

    @property
    def owns(self) -> bool:
        """This process is the kernel, not a child that was forked off it."""
        return os.getpid() == self._owner

    def receive(self) -> Message | None:
        """The next message: the order. None when the host is gone."""
        return self._wire.receive()

    def tell(self, op: str, **details: Any) -> None:
        """Say something that has no answer."""
        if self.owns:
            with self._lock:
                self._wire.send({"op": op, **details})

    def ask(self, op: str, **details: Any) -> Any:
        """The answer. Raises Refused; WireError or TimeoutError when the host has none."""
        with self._lock, interrupted_later():  # or the answer would be the next one's
            self._wire.send({"op": op, **details})
            message = self._wire.receive(_ANSWER)
        if message is None:
            raise Refused("the host is gone")
        if "error" in message:
            raise Refused(str(message["error"]))
        return message["answer"]
