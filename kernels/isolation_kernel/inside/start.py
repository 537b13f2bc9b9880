"""From the start of the process to the kernel's loop."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

from isolation_kernel.inside.host import FIRST_GIVEN, Host

_CHANNELS: Final = ("shell", "iopub", "stdin", "control", "hb")
_RUNTIME: Final = "/tmp/.isolation-kernel"


def main(argv: Sequence[str]) -> None:
    """Be a kernel until the frontend, or the host, wants no more."""
    given = [FIRST_GIVEN + number for number in range(len(_CHANNELS))]
    for fd in given:
        os.set_inheritable(fd, False)  # not for programs that a cell starts
    host = Host(FIRST_GIVEN + len(_CHANNELS))
    order = host.receive()
    if order is None:
        return
    os.makedirs(_RUNTIME, mode=0o700, exist_ok=True)
    os.environ.setdefault("IPYTHONDIR", f"{_RUNTIME}/ipython")  # history is this kernel's alone
    path = _write_connection_file(order["connection"])
    # As `python -m ipykernel_launcher` has it. Here it is the sandbox's own directory; on the host it would not be safe.
    sys.path.insert(0, "")
    sys.argv = ["ipykernel_launcher", "-f", path, *order["arguments"]]
    app = _application(given)
    app.initialize(sys.argv[1:])
    _finish(app, host, order)
    app.start()


def _application(given: Sequence[int]) -> Any:
    from isolation_kernel.inside import deferred

    deferred.client_side()
    from isolation_kernel.inside.app import KernelApp

    KernelApp.given = {number + 1: fd for number, fd in enumerate(given)}
    return KernelApp.instance(kernel_class=deferred.kernel_class())


def _finish(app: Any, host: Host, order: dict[str, Any]) -> None:
    """What an ordinary kernel does not have."""
    from isolation_kernel.inside import usage
    from isolation_kernel.inside.magic import Magic

    usage.show_limits(order["memory"], order["cpus"])
    Magic(host).register(app.shell)
    app.shell.events.register("pre_run_cell", lambda _info: host.tell("cell", busy=True))
    app.shell.events.register("post_run_cell", lambda _result: host.tell("cell", busy=False))
    host.tell("ready")


def _write_connection_file(told: dict[str, Any]) -> str:
    """For %connect_info, and for ipykernel, which reads its keys there."""
    ports = {f"{name}_port": number + 1 for number, name in enumerate(_CHANNELS)}
    path = f"{_RUNTIME}/connection.json"
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump({"transport": "ipc", "ip": f"{_RUNTIME}/k", **ports, **told}, file)
    return path
