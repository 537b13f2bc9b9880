"""A kernel around what another has left: its shell, and the user's variables.

Everything of the application before is kept, and not touched again: objects of libzmq's and of event loops that are not
theirs any more must neither be used nor end.
"""

from __future__ import annotations

import asyncio
import atexit
import sys
from typing import Any

from isolation_kernel.inside.app import RenewedApp
from isolation_kernel.inside.checkpoint.own import Own, script_magics

_KEPT: list[Any] = []


def application(own: Own, arguments: list[str], expected: list[int]) -> Any:
    """Another one; its sockets are those that this process was given. `expected` are the connections that
    each of its channels had."""
    before = own.app
    kernel, shell = before.kernel, before.kernel.shell
    _KEPT.append((own, before, kernel, list(shell.configurables), [asyncio.all_tasks(loop) for loop in own.lost]))
    for function in (before.close, before.iopub_thread.stop, before.cleanup_connection_file):
        atexit.unregister(function)
    # As the kernel's own were made: a user may have installed others since (uvloop), which do not go with libzmq.
    policy = asyncio.get_event_loop_policy()
    loop = type(before.io_loop.asyncio_loop)()
    asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
    asyncio.set_event_loop(loop)
    user_streams = sys.stdout, sys.stderr
    streams = {"stdout": kernel._stdout, "stderr": kernel._stderr}
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__

    type(before).clear_instance()
    type(kernel).clear_instance()
    RenewedApp.given, RenewedApp.streams = before.given, streams
    RenewedApp.expected = expected
    sys.argv, argv = ["ipykernel_launcher", *arguments], sys.argv
    try:
        app: Any = RenewedApp.instance(kernel_class=type(kernel))
        app.initialize(arguments)
    finally:
        sys.argv = argv
        asyncio.set_event_loop_policy(policy)
        asyncio.set_event_loop(loop)
    app.session.session = before.session.session
    atexit.unregister(shell.atexit_operations)
    atexit.register(shell.atexit_operations)  # the last to be registered is the first to run: before sockets are closed
    for (name, stream), user in zip(streams.items(), user_streams, strict=True):
        if user is not stream:
            setattr(sys, name, user)  # redirected by the user

    app.kernel.context = kernel.context
    script = script_magics(shell)
    if script is not None:
        script.event_loop = None  # its thread is gone
        finalizer = getattr(script, "_event_loop_finalizer", None)
        if finalizer is not None:
            finalizer.detach()
    shell.kernel = app.kernel
    seen: list[Any] = []
    for item in shell.configurables:
        if item is not before and all(item is not other for other in seen):
            seen.append(item)
    shell.configurables[:] = seen
    for comm in app.kernel.comm_manager.comms.values():
        if getattr(comm, "kernel", None) is not None:
            comm.kernel = app.kernel
    return app
