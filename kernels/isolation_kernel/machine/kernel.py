"""One machine, its kernel, and the stream to both."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Final

from isolation.errors import IsolationError, SandboxClosed
from isolation.hookspecs import Backend
from isolation.mux import Mux, MuxError
from isolation.result import Change, Ended, Verdict
from isolation.sandbox import Sandbox
from isolation.spec import SandboxSpec
from isolation.template import Branch, Template
from isolation.wire import Wire
from isolation_kernel.container.kernel import REQUEST_AT_MOST, send_order
from isolation_kernel.export import Partial, Room
from isolation_kernel.machine import snapshot_cache
from isolation_kernel.protocol.stream import CONTROL, EXITS, FIRST, WIRE, Lines, line

_PATIENCE: Final = 60.0  # s, with a machine that is to come to rest


class MachineBox:
    """A kernel in a machine. `wire` carries its requests, as that of a `KernelBox` does."""

    def __init__(self, spec: SandboxSpec, template: Template) -> None:
        self.sandbox = _About(spec)
        self.template = template
        self.mux: Mux
        self.exit: int | None = None
        self.on_unpacked: Callable[[], None] = lambda: None
        self._next = FIRST
        self._reads: dict[int, _Incoming] = {}
        self._begin(template.branch())

    def _begin(self, branch: Branch) -> None:
        """Speak to a machine that goes on."""
        self.branch = branch
        self.mux = Mux(branch.take_stream())
        self.mux.open(CONTROL, deliver=Lines(self._hear).feed)
        ours, theirs = Wire.pair()
        theirs.setblocking(False)
        fd = theirs.detach()
        self.mux.open(WIRE, source=fd, sink=fd)
        self.wire = Wire(ours, max_json=REQUEST_AT_MOST, max_data=0)
        self._next = FIRST

    def move_to(self, template: Template) -> None:
        """Go on in a fork of a template; this machine is ended. Raises IsolationError; then it is not."""
        branch = template.branch()
        self.close()
        self._begin(branch)

    def close(self) -> None:
        """End this machine, and all that was connected to it."""
        self._hang_up()
        self.branch.close()

    def _hang_up(self) -> None:
        self.mux.close()
        self.wire.close()
        for incoming in self._reads.values():
            incoming.abandon()
        self._reads.clear()

    # What the kernel is told.

    def say(self, message: dict[str, Any]) -> None:
        self.mux.write(CONTROL, line(message))

    def order(self, connection: Mapping[str, Any], arguments: Sequence[str], cwd: str, env: Mapping[str, str]) -> None:
        """Tell the kernel who it is. Raises WireError."""
        send_order(self.wire, self.sandbox.spec.limits, connection, arguments, cwd, env)

    def connect(self, channel: int, end: socket.socket) -> int:
        """A frontend's connection, which is the mux's from now on. Returns its number."""
        number, self._next = self._next, self._next + 1
        self.say({"open": number, "channel": channel})
        end.setblocking(False)
        fd = end.detach()
        self.mux.open(number, source=fd, sink=fd)
        return number

    def forward(self) -> None:
        """Start what takes the machine's connections to a proxy, on the last channel."""
        self.say({"forward": True})

    def send_files(self, archive: BinaryIO, directory: str, unpacked: Callable[[], None]) -> None:
        """Unpack an archive in a directory."""
        number, self._next = self._next, self._next + 1
        self.on_unpacked = unpacked
        self.say({"files": number, "directory": directory})
        fd = os.dup(archive.fileno())
        os.lseek(fd, 0, os.SEEK_SET)
        self.mux.open(number, source=fd)

    def signal(self, signum: int, *, group: bool = True) -> None:
        """To the kernel's group."""
        self.say({"signal": int(signum)})

    # What is heard of it.

    def _hear(self, message: dict[str, Any]) -> None:
        """The guest's word. Raises MuxError for what makes no sense, which ends it."""
        try:
            if "exit" in message:
                self.exit = int(message["exit"])
            elif "unpacked" in message:
                told, self.on_unpacked = self.on_unpacked, lambda: None  # once, however often it says so
                told()
            elif "size" in message:
                self._reads[message["of"]].begin(int(message["size"]))
            elif "gone" in message:
                self._reads.pop(message["gone"]).fail(str(message.get("why"))[:500])
        except (KeyError, OverflowError, TypeError, ValueError) as error:  # JSON of Python's knows Infinity
            raise MuxError(f"the guest sent something that makes no sense: {error!r}") from error

    def ended(self) -> Verdict | None:
        """Why the kernel ended; None while it runs."""
        if self.exit is not None:
            if self.exit < 0:
                return Verdict(Ended.SIGNALLED, -self.exit)
            return Verdict(Ended.EXITED, self.exit & 0xFF)
        return self.branch.wait(0)

    def changes(self) -> list[Change]:
        return self.branch.changes()

    def fetch(self, path: str, target: str, room: Room, done: Callable[[int | str], None]) -> None:
        """Copy a file out, while all goes on; `done` is called with its size, or with why it was not."""
        number, self._next = self._next, self._next + 1
        incoming = self._reads[number] = _Incoming(target, room, done)
        self.say({"read": number, "path": path})  # first: what it has not heard of, it does not expect
        self.mux.open(number, deliver=incoming.take, ended=lambda: self._arrived(number))
        self.mux.finish(number)

    def _arrived(self, number: int) -> None:
        incoming = self._reads.pop(number, None)
        if incoming is not None:
            incoming.finish()

    def checkpoint(self) -> tuple[Template, float]:
        """Save the machine as it is, and go on in a fork of what was saved. Returns that, and the seconds it took.

        The kernel waits for an answer meanwhile; connections of frontends have to be made anew. Raises IsolationError, and
        then there is no kernel any more.
        """
        begun = time.monotonic()
        self.say({"checkpoint": True})
        while self.mux.unsent:
            self.mux.flush()
        made = self.branch.template(_PATIENCE)
        if made is None:
            raise SandboxClosed("the machine did not come to rest")
        self._hang_up()
        self._begin(made.branch())
        return made, time.monotonic() - begun


class _Incoming:
    """A file on its way out."""

    def __init__(self, target: str, room: Room, done: Callable[[int | str], None]) -> None:
        self._target = target
        self._room = room
        self._done: Callable[[int | str], None] | None = done
        self._expected = -1
        self._partial: Partial | None = None

    def begin(self, size: int) -> None:
        self._expected = size
        try:
            self._partial = Partial(self._target, self._room)
        except (OSError, IsolationError) as error:
            self.fail(str(error))

    def take(self, data: bytes) -> None:
        if self._partial is not None:
            try:
                self._partial.write(data)
            except (OSError, IsolationError) as error:
                self.fail(str(error))

    def finish(self) -> None:
        if self._partial is None:
            return
        if self._partial.size != self._expected:
            self.fail("it changed while it was copied")
            return
        try:
            size = self._partial.finish()
        except OSError as error:
            self.fail(str(error))
            return
        self._tell(size)

    def fail(self, why: str) -> None:
        self.abandon()
        self._tell(why)

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        if self._partial is not None:
            self._partial.abandon()
            self._partial = None

    def _tell(self, what: int | str) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(what)


class _About:
    """What is known of the sandbox beside its handle."""

    def __init__(self, spec: SandboxSpec) -> None:
        self.spec = spec
        self.backend: Backend = Sandbox(spec).backend


def make(spec: SandboxSpec, arguments: Sequence[str]) -> MachineBox:
    """A machine with a warm kernel, forked from the saved one. Raises IsolationError."""
    return MachineBox(spec, snapshot_cache.template(spec, arguments))


__all__ = ["CONTROL", "EXITS", "FIRST", "WIRE", "MachineBox", "make"]
