"""Runs in the kernel's process, when frontends have to connect again: after a rollback, and when a machine was saved.

What is said to a frontend that is not connected is lost, and it would wait for that for ever: a reply, or the word on iopub
that its cell has ended. So nothing is said before all that were connected are again.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import zmq

from isolation_kernel.protocol.connection import CHANNELS

_IOPUB: Final = CHANNELS.index("iopub")
_INNER: Final = b"-inner"  # end of the endpoint of what is no frontend (app.py)
_SUBSCRIPTION: Final = 5.0  # s; who does not look at iopub does not subscribe either, until it does
_UNTOLD: Final = 0.3  # s, for subscriptions that nobody tells of: before ipykernel 7
_numbers = itertools.count()


class Arrivals:
    """Counts them, from when a socket is watched."""

    def __init__(self) -> None:
        self._monitors: dict[int, tuple[Any, Any]] = {}
        self._iopub: Any = None
        self._subscribed = 0

    def watch(self, channel: int, socket: Any) -> None:
        """ZeroMQ tells when a frontend and a socket know each other. It is asked in any thread: libzmq has a lock for it."""
        address = f"inproc://isolation-arrivals-{channel}-{next(_numbers)}"
        self._monitors[channel] = socket, socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED, address)

    def watch_iopub(self, thread: Any) -> None:
        """Of who subscribes to what others have, too, ipykernel's thread of that name hears from now on."""
        if getattr(thread, "_xpub_stream", None) is not None:
            self._iopub = thread
            thread.io_loop.add_callback(self._listen)

    def _listen(self) -> None:
        self._iopub.socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._iopub._xpub_stream.on_recv(self._told)

    def _told(self, frames: Sequence[Any]) -> None:
        self._subscribed += sum(bytes(frame)[:1] == b"\1" for frame in frames)
        self._iopub._handle_subscription(frames)

    def wait(self, expected: Sequence[int], patience: float) -> None:
        """Until so many have come to each channel; no longer than so many seconds, for one of them may have gone."""
        deadline = time.monotonic() + patience
        for channel, (_socket, monitor) in self._monitors.items():
            missing = expected[channel]
            while missing > 0 and monitor.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                _event, endpoint = monitor.recv_multipart()
                missing -= not endpoint.endswith(_INNER)
        deadline = min(deadline, time.monotonic() + (_SUBSCRIPTION if self._iopub is not None else _UNTOLD))
        while self._subscribed < expected[_IOPUB] and time.monotonic() < deadline:
            time.sleep(0.002)

    def close(self) -> None:
        """Watch no more."""
        for socket, monitor in self._monitors.values():
            socket.disable_monitor()
            monitor.close()
        self._monitors.clear()
        if self._iopub is not None:
            self._iopub.io_loop.add_callback(_as_before, self._iopub)


def _as_before(iopub: Any) -> None:
    iopub.socket.setsockopt(zmq.XPUB_VERBOSE, 0)
    iopub._xpub_stream.on_recv(iopub._handle_subscription)


@contextlib.contextmanager
def of_running(app: Any) -> Iterator[Arrivals]:
    """Those to a kernel that runs."""
    arrivals = Arrivals()
    try:
        for name in ("shell", "control", "stdin"):
            arrivals.watch(CHANNELS.index(name), getattr(app, f"{name}_socket"))
        arrivals.watch(_IOPUB, app.iopub_thread.socket)
        arrivals.watch_iopub(app.iopub_thread)
        heard = threading.Event()
        app.iopub_thread.io_loop.add_callback(heard.set)
        heard.wait()
        yield arrivals
    finally:
        arrivals.close()
