"""What is the kernel's own, of all that it has running and open: known by who made it, or by having been there before the
first cell."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any, Final

from isolation_kernel.inside.checkpoint.process import address, addresses, descriptors, looked_at, processes, shared_maps
from isolation_kernel.inside.host_channel import FIRST_GIVEN

GIVEN: Final = range(FIRST_GIVEN, FIRST_GIVEN + 6)  # five listening sockets, and the wire


class Own:
    """What is the kernel's: taken when it is ready, and no cell has run."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.threads = {thread for thread in threading.enumerate() if thread is not threading.main_thread()}
        self.processes = set(processes())
        self.lost: list[Any] = []  # in a fork: event loops of threads that it does not have
        self.shared_maps = set(shared_maps())
        self.anonymous = {fd for fd, link in descriptors() if link.startswith("anon_inode:")}
        self.pipes = {link for _fd, link in descriptors() if link.startswith("pipe:")}
        self.inner = f"{app.ip}-inner"
        self.doors = [address(fd) for fd in GIVEN[:5]]

    def loops(self) -> list[Any]:
        """asyncio's, of the kernel's threads."""
        threads = (self.app.control_thread, self.app.iopub_thread, self.app.shell_channel_thread)
        more = [thread for thread in threading.enumerate() if is_subshell(thread)]
        found = [loop.asyncio_loop for loop in (self.app.io_loop, *(thread.io_loop for thread in (*threads, *more)))]
        script = script_magics(self.app.kernel.shell)
        return found if script is None or script.event_loop is None else [*found, script.event_loop]

    def helpers(self) -> list[Any]:
        """Threads that wait, and are started anew where there are none: of `%%bash` and its like, and of the event loop
        (`asyncio.to_thread`)."""
        found = []
        script = script_magics(self.app.kernel.shell)
        for thread in threading.enumerate():
            run = getattr(getattr(thread, "_target", None), "__self__", None)
            if script is not None and run is not None and run is script.event_loop:
                found.append(thread)
        executor = getattr(self.app.io_loop.asyncio_loop, "_default_executor", None)
        threads = list(getattr(executor, "_threads", ()))
        if executor is not None and executor._work_queue.empty() and executor._idle_semaphore._value == len(threads):
            found += threads
        return found

    def subshells(self) -> list[str]:
        """Their names. JupyterLab has one for its widgets."""
        found: list[str] = self.app.shell_channel_thread.manager.list_subshell()
        return found

    def loop_ends(self) -> Iterator[Any]:
        """The two ends by which each of these loops is woken, as Python objects."""
        for loop in self.lost or self.loops():
            yield from (end for end in (getattr(loop, "_ssock", None), getattr(loop, "_csock", None)) if end is not None)

    def streams(self) -> list[Any]:
        """stdout and stderr, as ipykernel made them."""
        kernel = self.app.kernel
        return [stream for stream in (kernel._stdout, kernel._stderr) if hasattr(stream, "_original_stdstream_copy")]

    def is_own_socket(self, fd: int) -> bool:
        """Of a frontend's connection, or the kernel's inner ones."""
        if fd in GIVEN or fd in {end.fileno() for end in self.loop_ends()}:
            return True
        with looked_at(fd) as end:
            ours, theirs = addresses(end)
            if end.family == socket.AF_UNIX:
                known = {*self.doors, self.inner}
                return ours in known or theirs in known
            # Where ipykernel hears what child processes print.
            port = getattr(self.app.iopub_thread, "_pipe_port", None)
            return isinstance(ours, tuple) and port is not None and port in (ours[1], theirs[1] if theirs else None)

    def connections(self, door: int) -> int:
        """How many frontends are connected to a channel."""
        found = 0
        for fd, link in descriptors():
            if link.startswith("socket:") and fd not in GIVEN:
                found += address(fd) == self.doors[door]
        return found


def is_subshell(thread: Any) -> bool:
    return type(thread).__module__ == "ipykernel.subshell"


def script_magics(shell: Any) -> Any:
    """Of IPython: `%%bash` and its like, which have an event loop of their own."""
    return shell.magics_manager.registry.get("ScriptMagics")
