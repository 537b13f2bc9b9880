"""The host's part in the life of a kernel in a machine: one loop over the stream to it, and all else that has news."""

from __future__ import annotations

import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from isolation.errors import IsolationError, LaunchError
from isolation.mux import MuxError
from isolation.result import Ended, Verdict
from isolation.units import format_size
from isolation.wire import Message
from isolation_kernel.container.session import (
    TO_GROUP,
    Output,
    ParentLike,
    SignalsLike,
    publish_why,
    say,
    told_environment,
    why_ended,
)
from isolation_kernel.machine import kernel as boxes
from isolation_kernel.machine import notebook_archive, snapshot_cache
from isolation_kernel.machine.requests import MachineServices
from isolation_kernel.options import Options
from isolation_kernel.protocol.connection import CHANNELS, Connection, Doors

if TYPE_CHECKING:
    from isolation_kernel.proxy import Proxy

_CONNECTIONS_AT_MOST: Final = 512
_DRAIN: Final = 0.5  # s, for the last bytes of a kernel that has ended
_COME_BACK: Final = 15.0  # s, for frontends to connect to a machine that has taken another's place
_LONGEST: Final = 1.0  # s, between looks at whether the machine is there


class MachineHosting:
    """One kernel: `start`, `serve`. Ends it with the `with` block."""

    def __init__(self, options: Options, listeners: Sequence[socket.socket]) -> None:
        self._options = options
        self._listeners = {listener.fileno(): (number, listener) for number, listener in enumerate(listeners)}
        self._box: boxes.MachineBox | None = None
        self._services: MachineServices
        self._connection: Connection | None = None
        self._proxy: Proxy | None = None
        self._exits: Doors | None = None
        self._connected: dict[int, int] = {}  # streams, and the channel of each
        self._output = Output()
        self._silent: set[int] = set()  # of the machine's output, what has come to its end
        self._move: tuple[Callable[[], None], Message] | None = None
        self._waiting: tuple[Message, Counter[int], float] | None = None  # what the kernel is to be told, and when

    def start(self, cwd: str, environ: Mapping[str, str], connection: Connection, arguments: Sequence[str]) -> None:
        """Start it, and tell it who it is. Raises IsolationError."""
        if connection.encrypted:
            raise LaunchError(
                "a kernel in a virtual machine has no transport encryption: set transport_encryption to 'disabled', or "
                "install it with --provisioner, for sockets that are nobody else's"
            )
        self._connection = connection
        spec = self._options.spec(cwd, environ)
        machine_spec, copied = snapshot_cache.spec_for(spec.replace(env=self._options.machine_environment), cwd)
        self._box = box = boxes.make(machine_spec, arguments)
        self._services = MachineServices(box, self._options, spec, self._plan_move)

        hosts = self._options.allowed_hosts
        if hosts:
            from isolation_kernel.proxy import Proxy

            box.forward()
            self._exits = exits = Doors(count=1)
            (way,) = exits.listeners
            self._listeners[way.fileno()] = boxes.EXITS, way
            self._proxy = Proxy(hosts, exits)

        def order() -> None:
            box.order(connection.told, (), spec.workdir, told_environment(environ) | dict(spec.env))

        if copied:
            with tempfile.TemporaryFile() as archive:
                notebook_archive.pack(cwd, archive, writable=self._options.notebook != "ro")
                archive.flush()
                box.send_files(archive, cwd, order)
        else:
            order()

    def serve(self, signals: SignalsLike, parent: ParentLike) -> int:
        """Until the kernel has ended, or has to. Returns its exit code, as a shell has it."""
        assert self._box is not None
        if parent.gone():
            return 128 + signal.SIGHUP
        while (verdict := self._box.ended()) is None:
            try:
                told = self._turn(signals, parent)
            except MuxError as error:
                verdict = self._box.branch.wait(_LONGEST) or Verdict(Ended.LOST, detail=str(error))
                break
            if told is not None:
                return told
        self._finish()
        self._explain(verdict)
        return verdict.shell_code

    def _turn(self, signals: SignalsLike, parent: ParentLike) -> int | None:
        """Wait for something, and do what it asks for; the exit code when that is to end. Raises MuxError for what makes no
        sense."""
        assert self._box is not None
        box, services = self._box, self._services
        extra = [signals.fileno(), box.wire.fileno(), *self._outputs(), *box.branch.filenos()[1:]]
        if services.ready:  # before, it would speak to its frontends with the key that it stood by with
            extra += self._listeners
        if parent.fileno() >= 0:
            extra.append(parent.fileno())
        patience = services.patience()
        wait = _LONGEST if patience is None or patience < 0 else min(_LONGEST, patience)
        for fd in box.mux.step(0.05 if self._waiting else wait, extra):
            if fd in self._listeners:
                self._accept(*self._listeners[fd])
            elif fd == box.wire.fileno():
                services.read()
            elif fd in (box.branch.stdout, box.branch.stderr):
                if not self._output.pass_on(fd):
                    self._silent.add(fd)
            elif fd == signals.fileno():
                for number in signals.take():
                    if number not in TO_GROUP:
                        return 128 + number
                    if number != signal.SIGINT or services.ready:
                        box.signal(number)
            elif fd == parent.fileno():
                return 128 + signal.SIGHUP
        services.go_on()
        if self._move is not None:
            self._go_on_elsewhere()
        self._answer_when_they_are_back()
        return None

    def _outputs(self) -> list[int]:
        assert self._box is not None
        return [fd for fd in (self._box.branch.stdout, self._box.branch.stderr) if fd not in self._silent]

    def _accept(self, channel: int, listener: socket.socket) -> None:
        assert self._box is not None
        try:
            end, _ = listener.accept()
        except OSError:
            return
        self._forget_closed()
        if len(self._connected) >= _CONNECTIONS_AT_MOST:
            end.close()
            return
        if end.family != socket.AF_UNIX:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connected[self._box.connect(channel, end)] = channel

    def _forget_closed(self) -> None:
        assert self._box is not None
        for number in [number for number in self._connected if self._box.mux.stream(number) is None]:
            del self._connected[number]

    # Checkpoint and rollback.

    def _plan_move(self, move: Callable[[], None], answer: Message) -> None:
        """Not from within the handling of what the machine said."""
        self._move = move, answer

    def _go_on_elsewhere(self) -> None:
        assert self._box is not None
        assert self._move is not None
        (move, answer), self._move = self._move, None
        self._forget_closed()
        before = Counter(channel for channel in self._connected.values() if channel != boxes.EXITS)
        try:
            move()
        except IsolationError as error:
            if self._box.mux.stream(boxes.WIRE) is None:
                raise  # there is no machine any more
            self._box.wire.send({"error": str(error)})
            return
        self._connected.clear()
        self._silent.clear()
        self._waiting = answer, before, time.monotonic() + _COME_BACK

    def _answer_when_they_are_back(self) -> None:
        """Then the kernel waits until it knows them (inside/arrivals.py). One that has gone is not waited for for ever."""
        if self._waiting is None:
            return
        assert self._box is not None
        answer, before, deadline = self._waiting
        back = Counter(self._connected.values()) & before
        if back == before or time.monotonic() >= deadline:
            self._waiting = None
            answer["answer"]["connected"] = [back[channel] for channel in range(len(CHANNELS))]
            self._box.wire.send(answer)

    # The end.

    def _finish(self) -> None:
        """What the kernel said before it ended is passed on."""
        assert self._box is not None
        deadline = time.monotonic() + _DRAIN
        for _number, listener in self._listeners.values():
            listener.close()
        self._listeners.clear()
        try:
            while time.monotonic() < deadline and self._connected:
                self._box.mux.step(0.05)
                self._forget_closed()
        except MuxError:
            pass
        for fd in self._outputs():
            self._output.pass_on(fd)

    def _explain(self, verdict: Verdict) -> None:
        """Ends that a user would wonder about: in the frontend's log, and in the cell that ran."""
        limits = self._options.spec(None, {}).limits
        text = why_ended(verdict, self._services.reason, limits)
        if verdict.ended is Ended.SIGNALLED and verdict.status == signal.SIGKILL and limits.memory is not None:
            text = f"the kernel was killed, for memory perhaps (its limit is {format_size(limits.memory)}: --memory)"
        if text:
            say(text)
            if self._connection is not None and self._services.cell:
                assert self._box is not None
                self._box.mux.close()
                publish_why(text, self._connection, self._services.cell)

    def close(self) -> None:
        """End the machine, and forget its checkpoints."""
        if self._proxy is not None:
            self._proxy.close()
            self._proxy = None
        if self._exits is not None:
            self._exits.close()
            self._exits = None
        if self._box is not None:
            self._box.close()
            self._services.close()
            self._box.template.close()
            self._box = None
        for _number, listener in self._listeners.values():
            listener.close()
        self._listeners.clear()

    def __enter__(self) -> MachineHosting:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()
