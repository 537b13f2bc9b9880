"""Checkpoints of a kernel in a container: what the magic asks for, and what happens between two cells.

A checkpoint is taken when its cell has ended: the kernel's loop stops in the middle of the request, whose reply waits, and
`run` forks with next to nothing on the stack. A rollback happens at once, in the middle of its cell, which nobody
will end: the kernel that comes back replies in its place.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import os
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ipykernel import _version
from IPython.core.error import UsageError

from isolation.errors import WireError
from isolation_kernel.inside.checkpoint import request
from isolation_kernel.inside.checkpoint.own import Own
from isolation_kernel.inside.checkpoint.refusals import refusals
from isolation_kernel.inside.host_channel import Host, Refused, uninterrupted
from isolation_kernel.inside.refresh import Refresh
from isolation_kernel.protocol.connection import CHANNELS

if TYPE_CHECKING:
    from isolation_kernel.inside.checkpoint.holder import Lineage, Wake

_LAST_WORDS: Final = 1.0  # s


@dataclass
class _Wish:
    """A checkpoint that is to be taken when the cell has ended."""

    name: str
    slot: int
    replaced: int | None  # slot of the one that had this name
    done: asyncio.Future[str] | None = None


class Undo:
    """Of one kernel. Runs its application."""

    def __init__(self, app: Any, host: Host, arguments: list[str]) -> None:
        self._app = app
        self._host = host
        self._arguments = arguments
        self._lineage: Lineage | None = None
        self._wish: _Wish | None = None
        self._own: Own
        self._refresh = Refresh(host)

    def run(self) -> None:
        """Until the kernel has ended. In a kernel that has come back it does not return: what is left in memory of the ones
        before must not be taken down."""
        self._adopt(self._app)
        self._app.start()
        while self._wish is not None:
            wake = self._take()
            if wake is None:
                self._app.io_loop.start()
            else:
                self._come_back(wake)
                self._app.start()
        if self._app.kernel._shutdown_message is not None:
            # The control thread has still to say so; ipykernel may end the thread that says it first, and then waits long.
            self._app.control_thread.join(_LAST_WORDS)
        if self._lineage is not None and not self._lineage.first:
            atexit._run_exitfuncs()
            os._exit(0)

    def _adopt(self, app: Any) -> None:
        """One whose loop is about to run, and of which nothing is a user's yet."""
        from tornado.ioloop import IOLoop

        app.kernel.at_cell_begin = self._refresh.before_cell
        app.kernel.at_cell_end = self._cell_ended
        app.io_loop = app.kernel.io_loop = IOLoop.current()
        self._app, self._own = app, Own(app)

    # The magic's side.

    @property
    def holds(self) -> bool:
        """There are checkpoints here, in a container."""
        return self._lineage is not None

    def wish(self, name: str, said: dict[str, Any]) -> None:
        """The host allows for a checkpoint. Raises UsageError."""
        if _version.version_info < (7,):
            raise UsageError(f"checkpoints of a container need ipykernel 7; this is {_version.__version__}")
        if not self._app.kernel.in_cell:
            raise UsageError("a checkpoint is taken when a cell has ended; this is none (a widget's callback?)")
        if self._wish is not None:
            raise UsageError(f"this cell takes a checkpoint already ({self._wish.name}), when it has ended")
        self._refuse()
        self._wish = _Wish(name, said["slot"], said["replaced"])

    def _refuse(self) -> None:
        ours = self._lineage.fds() if self._lineage is not None else set()
        found = refusals(self._own, ours)
        if found:
            gc.collect()  # a pool's pipes, say, that nobody holds any more
            found = refusals(self._own, ours)
        if found:
            raise UsageError(
                "a checkpoint is a fork of this kernel, which would lose or share: " + "; ".join(found) + ". End that "
                "first. (A kernel in a virtual machine keeps it all: isolation kernel install --backend microvm)"
            )

    def forget(self, slot: int) -> None:
        """The host knows of a checkpoint no more."""
        if self._lineage is not None:
            self._lineage.forget(slot)

    def roll_back(self, name: str, slot: int) -> None:
        """Does not return, but to raise UsageError."""
        from isolation_kernel.inside.checkpoint import holder

        lineage, own, kernel = self._lineage, self._own, self._app.kernel
        if lineage is None:
            raise UsageError(f"there is no checkpoint {name!r}")
        asked, idents = request.current(kernel)
        if asked.get("header", {}).get("msg_type") != "execute_request":
            raise UsageError("only a cell can go back; this is none (a widget's callback?)")
        with uninterrupted():
            expected = [own.connections(number) for number in range(len(CHANNELS))]
            message = {"name": name, "request": asked, "idents": idents, "expected": expected, "subshells": own.subshells()}
            try:
                successor = lineage.wake(slot, message)
            except holder.Gone as error:
                raise UsageError(f"cannot go back to checkpoint {name!r}: {error}") from None
            try:
                waiting = request.waiting(kernel)
                self._say_all()
                successor.take_over(own.streams(), waiting)
            except BaseException:
                successor.stop()
                raise

    def _say_all(self) -> None:
        """What was printed is on its way, and libzmq's threads end with this process: they are waited for."""
        self._flush()
        closing = threading.Thread(target=self._app.close, daemon=True)
        closing.start()
        closing.join(_LAST_WORDS)

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr, *self._own.streams()):
            with contextlib.suppress(Exception):  # it may be a user's
                stream.flush()

    # Between two cells.

    async def _cell_ended(self, reply: dict[str, Any]) -> dict[str, Any]:
        """Called with what a cell's request will be answered, when nothing interrupts any more; returns what it is to be
        answered."""
        wish = self._wish
        if wish is None:
            return reply
        if reply.get("status") != "ok":
            self._wish = None
            return reply
        began = time.monotonic()
        wish.done = asyncio.get_running_loop().create_future()
        self._app.io_loop.stop()
        error = await wish.done
        if not error:
            print(f"checkpoint {wish.name} in {time.monotonic() - began:.2f} s")
            return reply
        return reply | _failed(error)

    def _take(self) -> Wake | None:
        """Returns None; and in each kernel that comes back here, what woke that one."""
        from isolation_kernel.inside.checkpoint import holder
        from isolation_kernel.inside.checkpoint.state import State

        wish, self._wish = self._wish, None
        assert wish is not None
        assert wish.done is not None
        error = ""
        try:
            self._refuse()
            if self._lineage is None:
                self._lineage = holder.Lineage()
            self._flush()
            state = State()
            wake = self._lineage.hold(wish.slot, self._own)
            if wake is not None:
                wake.state = state
                return wake
            try:
                self._host.ask("keep", name=wish.name)
            except BaseException:
                self._lineage.forget(wish.slot)
                raise
            state.go_back()  # the same place, in the new layer
            if wish.replaced is not None:
                self._lineage.forget(wish.replaced)
        except (UsageError, Refused, WireError, OSError, TimeoutError) as problem:
            error = str(problem)
        wish.done.get_loop().call_soon(wish.done.set_result, error)
        return None

    def _come_back(self, wake: Wake) -> None:
        """Another application, which answers the request that has led here."""
        from isolation_kernel.inside.checkpoint import holder, rebuild

        os.chdir("/")
        waiting = holder.become_kernel(wake, self._own)
        self._host.adopt()
        message = wake.message
        try:
            self._host.ask("restore", name=message["name"])
        except (Refused, WireError, TimeoutError) as error:
            message["error"] = f"variables are those of checkpoint {message['name']!r}, but files could not go back: {error}"
        wake.state.restore()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a user may have made errors of them
            app = rebuild.application(self._own, self._arguments, message["expected"])
        app.kernel.subshells = message["subshells"]
        self._adopt(app)
        app.io_loop.add_callback(self._answer, message)
        request.wait_again(app.kernel, waiting)

    async def _answer(self, message: dict[str, Any]) -> None:
        kernel = self._app.kernel
        idents = request.senders(message["idents"])
        asked = message["request"]
        kernel.set_parent(idents, asked, channel="shell")
        content: dict[str, Any] = {"execution_count": kernel.shell.execution_count - 1, "user_expressions": {}}
        if "error" in message:
            content |= _failed(message["error"])
        else:
            print(f"back at checkpoint {message['name']}")
            content |= {"status": "ok", "payload": []}
        sys.stdout.flush()
        channel = kernel.shell_channel_thread.manager.get_subshell_to_shell_channel_socket(None)
        kernel.session.send(channel, "execute_reply", content, parent=asked, ident=idents)
        kernel._publish_status("idle", "shell")
        self._host.tell("cell", parent=None)


def _failed(error: str) -> dict[str, Any]:
    """To be merged into a reply. Says it, too, as IPython does for a UsageError."""
    print(f"UsageError: {error}", file=sys.stderr)
    return {"status": "error", "ename": "UsageError", "evalue": error, "traceback": [f"UsageError: {error}"]}
