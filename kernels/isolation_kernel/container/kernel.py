"""Runs in a launcher: a kernel in its container, made, spoken to, and ended."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from isolation.errors import SandboxClosed
from isolation.result import Verdict
from isolation.sandbox import Process, Sandbox
from isolation.spec import Limits, SandboxSpec
from isolation.wire import Wire
from isolation_kernel.protocol.connection import Doors

REQUEST_AT_MOST: Final = 1 << 16  # bytes of JSON; a guest sends small things only
INSIDE: Final = "isolation_kernel.inside"
FORWARDER: Final = "isolation_kernel.inside.forwarder"


class KernelBox:
    """One kernel. Its channels are behind `doors`, its wire carries JSON, and what it prints past them is in `output`."""

    def __init__(self, spec: SandboxSpec, doors: Doors, *, standby: bool = False, exits: Doors | None = None) -> None:
        """Start it; with `standby`, up to where it needs its order. Where it has a way out to some hosts, that is by
        `exits`, the door of a program of ours in there. Raises IsolationError."""
        self.doors = doors
        self.exits = exits
        self.sandbox = Sandbox(spec)
        ours, theirs = Wire.pair()
        output, its_output = os.pipe2(os.O_CLOEXEC)
        self.output = output
        self.wire = Wire(ours, max_json=REQUEST_AT_MOST, max_data=0)
        os.set_blocking(output, False)
        try:
            argv = [sys.executable, "-I", "-m", INSIDE, *(["--standby"] if standby else [])]
            fds = [*(listener.fileno() for listener in doors.listeners), theirs.fileno()]
            self.process: Process = self.sandbox.popen(argv, stdout=its_output, stderr=its_output, pass_fds=fds)
            if exits is not None:
                fds = [listener.fileno() for listener in exits.listeners]
                self.sandbox.popen([sys.executable, "-I", "-m", FORWARDER], stderr=its_output, pass_fds=fds)
                exits.given_away()
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()
            os.close(its_output)
        doors.given_away()

    def order(self, connection: Mapping[str, Any], arguments: Sequence[str], cwd: str, env: Mapping[str, str]) -> None:
        """Tell it who it is. Raises WireError."""
        send_order(self.wire, self.sandbox.spec.limits, connection, arguments, cwd, env)

    @property
    def news(self) -> int:
        """A descriptor that is readable when `ended` may have something to say."""
        return self.sandbox.machine.fileno()

    def ended(self) -> Verdict | None:
        """Why the kernel ended; None while it runs."""
        return self.process.poll()

    def signal(self, signum: int, *, group: bool = True) -> None:
        """Send a signal; to a kernel that is no more it means nothing."""
        try:
            self.process.send_signal(signum, group=group)
        except SandboxClosed:
            pass

    def close(self) -> None:
        """End everything inside."""
        self.sandbox.close()
        self.wire.close()
        self.doors.close()
        if self.exits is not None:
            self.exits.close()
        if self.output >= 0:
            os.close(self.output)
            self.output = -1


def send_order(
    wire: Wire, limits: Limits, connection: Mapping[str, Any], arguments: Sequence[str], cwd: str, env: Mapping[str, str]
) -> None:
    """What a kernel, in a container or a machine, is told of who it is. Raises WireError."""
    wire.send({
        "connection": dict(connection), "arguments": list(arguments), "cwd": cwd, "env": dict(env),
        "memory": limits.memory, "cpus": limits.cpus,
    })  # fmt: skip
