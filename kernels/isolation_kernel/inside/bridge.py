"""In a virtual machine: the kernel's process, and the one stream to the host that carries its five channels.

The payload of a template (isolation.guest). It starts a kernel that stands by, and is forked when that is warm; and again
at each checkpoint: what is forked is the machine, with the kernel, its threads and its child processes as they are.

On the stream, each connection of a frontend is a mux stream of its own, so that none keeps another waiting. Two are special:

    0  this program's own: lines of JSON. From the host: open, read, signal, files, forward, checkpoint; to it: gone, exit
    1  the kernel's wire, as bytes
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from typing import Any, BinaryIO, Final

from isolation.guest import Guest
from isolation.mux import Mux, MuxError
from isolation.wire import Wire
from isolation_kernel.inside import forwarder
from isolation_kernel.inside.host_channel import FIRST_GIVEN
from isolation_kernel.protocol.stream import CONTROL, EXITS, WIRE, Lines, line

_CHANNELS: Final = 5
_LAST_WORDS: Final = 2.0  # s


class Bridge:
    """Lives as long as its kernel."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._directory = tempfile.mkdtemp(prefix=".isolation-", dir="/tmp")
        self._listeners = [self._listen(number) for number in range(_CHANNELS)]
        ours, theirs = Wire.pair()
        self._wire = ours
        given = [*(listener.fileno() for listener in self._listeners), theirs.fileno()]
        self._kernel = _start(_PROGRAM, ["--standby", *guest.config], given)
        for listener in self._listeners:
            listener.close()
        theirs.close()
        self._ended = os.pidfd_open(self._kernel.pid)
        self._mux: Mux
        self._checkpoint = False
        self._forwarder: subprocess.Popen[bytes] | None = None
        self._archive: BinaryIO | None = None
        self._place = "/"

    def _listen(self, number: int) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self._directory}/{number}")
        listener.listen(128)
        listener.setblocking(False)
        return listener

    def wait_until_warm(self) -> None:
        """Until the kernel waits for its order."""
        wire = Wire(self._wire)
        while (message := wire.receive()) is not None:
            if message.get("op") == "warm":
                return
        raise SystemExit(f"the kernel ended while it warmed up, with status {self._kernel.wait()}")

    def run(self) -> bool:
        """Carry bytes, until the machine is to be forked again (True), or the kernel has ended."""
        stream = self._guest.wire.sock
        stream.setblocking(False)
        self._mux = mux = Mux(stream.fileno())
        self._checkpoint = False
        mux.open(CONTROL, deliver=Lines(self._obey).feed, urgent=True)
        wire = os.dup(self._wire.fileno())
        os.set_blocking(wire, False)
        mux.open(WIRE, source=wire, sink=wire)
        try:
            while not self._checkpoint:
                ready = mux.step(None, [self._ended])
                if self._ended in ready:
                    self._say_last_words()
                    return False
            self._settle()
            return True
        except MuxError:
            return False  # the host is gone, and soon this machine
        finally:
            mux.close()  # frontends connect anew, whichever machine goes on

    def _say(self, message: dict[str, Any]) -> None:
        self._mux.write(CONTROL, line(message))

    def _settle(self) -> None:
        """What was read from the kernel leaves before the machine is saved."""
        poller = select.poll()
        poller.register(self._mux.fd, select.POLLOUT)
        while not self._mux.idle:
            poller.poll()
            self._mux.flush()

    def _say_last_words(self) -> None:
        self._mux.drain()
        self._say({"exit": self._kernel.wait()})
        try:
            while not self._mux.idle:
                self._mux.step(_LAST_WORDS)
            self._mux.step(_LAST_WORDS)  # until the host has ended this machine
        except MuxError:
            pass

    def _obey(self, message: dict[str, Any]) -> None:
        if "open" in message:
            self._open(message["open"], message["channel"])
        elif "signal" in message:
            try:
                os.killpg(self._kernel.pid, message["signal"])
            except ProcessLookupError:
                pass
        elif "read" in message:
            self._read(message["read"], message["path"])
        elif "files" in message:
            self._archive, self._place = tempfile.TemporaryFile(), message["directory"]
            self._mux.open(message["files"], deliver=self._take, ended=self._unpack)
            self._mux.finish(message["files"])
        elif "forward" in message:
            self._forward()
        elif "checkpoint" in message:
            self._checkpoint = True

    def _forward(self) -> None:
        if self._forwarder is None:
            given = [self._listen(EXITS), forwarder.listen()]  # from now on: the kernel may be faster than that program
            second = str(FIRST_GIVEN + 1)
            self._forwarder = _start(_FORWARDER, [second], [listener.fileno() for listener in given])
            for listener in given:
                listener.close()

    def _take(self, data: bytes) -> None:
        assert self._archive is not None
        self._archive.write(data)

    def _unpack(self) -> None:
        """The notebook's directory has arrived."""
        assert self._archive is not None
        with self._archive as file:
            file.seek(0)
            os.makedirs(self._place, exist_ok=True)
            with tarfile.open(fileobj=file) as archive:
                archive.extractall(self._place)
        self._archive = None
        self._say({"unpacked": True})

    def _open(self, number: int, channel: int) -> None:
        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(f"{self._directory}/{channel}")
        except OSError:
            end.close()
            end, other = socket.socketpair()  # so its end is seen there
            other.close()
        end.setblocking(False)
        fd = end.detach()
        self._mux.open(number, source=fd, sink=fd)

    def _read(self, number: int, path: str) -> None:
        """A regular file, for the host."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            status = os.fstat(fd)
            if not os.path.isfile(path):
                os.close(fd)
                raise OSError(22, "it is no regular file")
        except OSError as error:
            self._mux.expect(number)
            self._say({"gone": number, "why": error.strerror or str(error)})
            return
        self._say({"size": status.st_size, "of": number})
        self._mux.open(number, source=fd)

    def end(self) -> None:
        """Whatever it left running."""
        try:
            os.killpg(self._kernel.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _start(program: str, arguments: Sequence[str], given: Sequence[int]) -> subprocess.Popen[bytes]:
    """Run one of ours, with descriptors under the numbers that it expects, which are above all that is open here."""
    wanted = range(FIRST_GIVEN, FIRST_GIVEN + len(given))
    for fd, number in zip(given, wanted, strict=True):
        os.dup2(fd, number)
    argv = [sys.executable, "-c", program, json.dumps(sys.path), *arguments]
    started = subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=wanted, start_new_session=True)
    for number in wanted:
        os.close(number)
    return started


# `-I -m` would look in this interpreter's own places only, and this program may have been found in others.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from isolation_kernel.inside.start import main; main(sys.argv[2:])"
)
_FORWARDER = (
    "import json, socket, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from isolation_kernel.inside.forwarder import main; main(socket.socket(fileno=int(sys.argv[2])))"
)


def main(guest: Guest) -> None:
    """The payload."""
    bridge = Bridge(guest)
    bridge.wait_until_warm()
    goes_on = True
    while goes_on:
        goes_on = False
        for _job in guest.forks():
            goes_on = bridge.run()
            break
    bridge.end()
