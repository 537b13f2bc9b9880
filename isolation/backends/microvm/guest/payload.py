"""A payload process of a virtual machine: runs a template's function, which waits to be forked with its memory."""

from __future__ import annotations

import faulthandler
import importlib
import sys
from collections.abc import Iterator

from isolation.backends.microvm.guest import renew
from isolation.backends.microvm.guest.warm_payload import DUMP_SIGNAL
from isolation.guest import streams
from isolation.guest.guest import Guest
from isolation.plain import json, os, socket
from isolation.wire import Wire


def main(payload: str, first: int) -> None:
    """`payload` is "package.module:function"; descriptors from `first` on: the wire, the agent's, and the stacks' file."""
    wire = Wire(socket.socket(fileno=first))
    agent = socket.socket(fileno=first + 1)
    crash = first + 2
    for fd in (first, first + 1, crash):
        os.set_inheritable(fd, False)

    def fork(guest: Guest) -> Iterator[Guest]:
        """The machine is what is forked: this process lives on in each of them, from this very line."""
        streams.flush()
        agent.send(b"w")
        line = b""
        while not line.endswith(b"\n"):
            part = agent.recv(1 << 16)
            if not part:
                guest.finish()
            line += part
        seed, job = json.loads(line)
        if seed is not None:
            renew.process(bytes.fromhex(seed))
        faulthandler.enable(file=crash, all_threads=True)  # whatever the warm-up made of it
        faulthandler.register(DUMP_SIGNAL, file=crash, all_threads=True)
        guest.hand(job)
        yield guest

    order = wire.receive()
    if order is None:
        return
    guest = Guest(wire, order["config"], fork)
    module, _, name = payload.partition(":")
    try:
        getattr(importlib.import_module(module), name)(guest)
    except SystemExit as error:
        guest.finish(error.code if isinstance(error.code, int) else 0 if error.code is None else 1)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        guest.finish(1)
    guest.finish(0)
