"""A template that is itself in a sandbox: warm-up code that is not trusted. Run there as `python -m …inside`.

The outer sandbox may nest; in it, this program becomes the supervisor of forks in namespaces below its own, by the same code
that serves templates on the host. The host talks to it over its stdin, a socket, and believes nothing that it says.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable
from typing import Any

from isolation.backends.namespace.planner import make_plan
from isolation.backends.namespace.supervisor import start
from isolation.backends.showing import python_environment
from isolation.errors import IsolationError
from isolation.guest import Guest
from isolation.plain import os, socket
from isolation.spec import Mount, SandboxSpec
from isolation.wire import Wire


def main() -> None:
    """Serve forks of the function that the host names, until it has had enough."""
    wire = Wire(socket.socket(fileno=os.dup(0)), accept_fds=True)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    order = wire.receive()
    if order is None:
        return
    sys.path[:0] = order["path"]
    spec = SandboxSpec(
        mounts=[Mount.overlay(path) for path in order["writable"] if os.path.isdir(path)],
        workdir=order["workdir"],
        inherit_env=True,  # this process's, which is what the outer sandbox allows
    )
    try:
        plan = make_plan(spec, python=python_environment())
        function = _resolve(order["payload"])
    except (IsolationError, ImportError, AttributeError) as error:
        wire.send({"event": "failed", "errno": 0, "what": f"{type(error).__name__}: {error}"})
        return
    mask = frozenset(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))

    def warm(guest: Guest) -> None:
        guest.config = order["config"]
        function(guest)

    start.serve_warm(plan, wire, os.pidfd_open(os.getppid() or os.getpid()), mask, warm)


def _resolve(name: str) -> Callable[[Guest], Any]:
    """ "package.module:function" """
    module, _, function = name.partition(":")
    found: Callable[[Guest], Any] = getattr(importlib.import_module(module), function)
    return found


if __name__ == "__main__":
    main()
