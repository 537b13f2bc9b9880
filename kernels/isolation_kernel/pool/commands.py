"""`isolation kernel warm`: starting the daemon, asking it, and ending it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from isolation.errors import IsolationError, WireError
from isolation.units import parse_count, parse_seconds
from isolation.wire import Wire
from isolation_kernel.pool import client
from isolation_kernel.pool.daemon import Daemon, warm_keys

_AT_MOST = 32
_PATIENCE = 10.0  # s


def start(names: Sequence[str], count: str, directory: str | None, idle: str, *, foreground: bool) -> int:
    """Become the daemon, or (in the background) leave one behind. Raises IsolationError."""
    number = parse_count(count, "count")
    if number > _AT_MOST:
        raise IsolationError(f"{number} kernels of each are too many to keep; {_AT_MOST} at most")
    cwd = os.path.abspath(directory or os.getcwd())
    if not os.path.isdir(cwd):
        raise IsolationError(f"{cwd} is not a directory")
    keys = warm_keys(names, cwd)
    daemon = Daemon(number, parse_seconds(idle, "idle time"))
    for key in reversed(keys):
        daemon.keep(key)
    if foreground:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            daemon.serve()
        except KeyboardInterrupt:
            pass
        return 0
    if os.fork() == 0:
        _detach(daemon)
    print("warm kernels are being kept; 'isolation kernel warm --status' tells which, '--stop' ends it")
    return 0


def _detach(daemon: Daemon) -> None:
    """Live on without the terminal."""
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.chdir("/")
        daemon.serve()
    except KeyboardInterrupt:
        pass
    finally:
        os._exit(0)


def status() -> int:
    """Tell what is ready."""
    said = _ask("list")
    if said is None:
        print("no warm kernels are kept ('isolation kernel warm' keeps some)")
        return 1
    for words, cwd, ready in said["shelves"]:
        print(f"{ready} ready in {cwd}  ({words or 'defaults'})")
    return 0


def stop() -> int:
    """End the daemon, and what waits. Kernels that were handed out go on."""
    if _ask("stop") is None:
        print("no warm kernels are kept")
        return 1
    deadline = time.monotonic() + _PATIENCE
    while os.path.exists(f"{client.place()}/daemon") and time.monotonic() < deadline:
        time.sleep(0.02)
    print("stopped")
    return 0


def _ask(op: str) -> dict[str, Any] | None:
    end = client.connect()
    if end is None:
        return None
    wire = Wire(end)
    try:
        wire.send({"op": op})
        return wire.receive(_PATIENCE)
    except (WireError, TimeoutError):
        return None
    finally:
        wire.close()
