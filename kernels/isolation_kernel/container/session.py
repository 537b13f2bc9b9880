"""Runs in a launcher: a kernel's life from its order to its end, one loop over everything that may have news."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self

from isolation.errors import LaunchError
from isolation.result import Ended, Verdict
from isolation.spec import Limits
from isolation.units import format_size
from isolation.wire import wait_readable
from isolation_kernel.container.kernel import KernelBox
from isolation_kernel.options import Options, holds_home
from isolation_kernel.protocol.connection import CHANNELS, Connection, Doors, printable

if TYPE_CHECKING:
    from isolation_kernel.container.requests import Services
    from isolation_kernel.protocol.relay import Relay
    from isolation_kernel.proxy import Proxy

_OUTPUT_AT_MOST: Final = 64 << 10  # bytes that a kernel may print past its channels in a second; the rest is dropped
_DRAIN: Final = 0.3  # s, for the last bytes of a kernel that has ended
TO_GROUP: Final = (signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# Of a frontend's environment, what the core's allowlist has too, and a kernel that has started long ago can still heed.
_TOLD: Final = frozenset("COLORTERM COLUMNS FORCE_COLOR LANG LANGUAGE LINES NO_COLOR TERM TZ".split())


class SignalsLike(Protocol):
    def fileno(self) -> int: ...
    def take(self) -> bytes: ...


class ParentLike(Protocol):
    def fileno(self) -> int: ...
    def gone(self) -> bool: ...


class Hosting:
    """One kernel: `start`, `order`, `serve`. Ends it with the `with` block."""

    def __init__(self, options: Options, doors: Doors) -> None:
        self.options = options
        self._doors = doors
        self._box: KernelBox | None = None
        self._services: Services | None = None
        self._epoll = select.epoll()
        self._relay: Relay | None = None
        self._proxy: Proxy | None = None
        self._connection: Connection | None = None
        self._output = Output()

    @property
    def box(self) -> KernelBox:
        assert self._box is not None
        return self._box

    def start(self, cwd: str, environ: Mapping[str, str], *, standby: bool = False) -> None:
        """Make the sandbox, and start the kernel in it. Raises IsolationError."""
        spec = self.options.spec(cwd, environ)
        shown = cwd in {mount.target for mount in spec.mounts}
        if self.options.notebook != "none" and holds_home(cwd) and not shown:
            say(f"{cwd} is not shown to the kernel, because all of a home directory would be (--mount {cwd}:{cwd}:overlay)")
        hosts = self.options.allowed_hosts
        exits = Doors(count=1) if hosts else None
        self._box = KernelBox(spec, self._doors, standby=standby, exits=exits)
        for note in self._box.sandbox.backend.notes(spec):
            say(note)
        if exits is not None:
            from isolation_kernel.proxy import Proxy

            self._proxy = Proxy(hosts, exits)
        from isolation_kernel.container.requests import Services  # while the kernel starts

        self._services = Services(self._box, self.options, spec)

    def wait_until_warm(self, timeout: float) -> None:
        """For one that stands by: until it waits for its order. Raises LaunchError."""
        assert self._services is not None
        deadline = time.monotonic() + timeout
        wire = self.box.wire
        while not self._services.warm:
            ended = self.box.ended()
            if ended is not None or time.monotonic() > deadline:
                self._pass_output()
                raise LaunchError(f"the kernel did not become ready ({ended or 'it takes too long'})")
            if wait_readable(wire.fileno(), 0.1):
                self._services.read()

    def hand_over(self, connection: Connection, cwd: str, environ: Mapping[str, str]) -> None:
        """To who has asked for it: `order`, with the environment that a kernel of theirs would have had."""
        self._connection = connection
        spec = self.options.spec(cwd, environ)
        self.box.order(connection.told, (), spec.workdir, {**told_environment(environ), **dict(spec.env)})

    def order(self, connection: Connection, arguments: Sequence[str]) -> None:
        """Tell the kernel what it is to be. Raises IsolationError."""
        self._connection = connection
        spec = self.box.sandbox.spec
        self.box.order(connection.told, arguments, spec.workdir, dict(spec.env))

    def serve(self, listeners: Sequence[socket.socket], signals: SignalsLike, parent: ParentLike) -> int:
        """Until the kernel has ended, or has to. Returns its exit code, as a shell has it."""
        from isolation_kernel.protocol.relay import Relay

        gc.freeze()
        gc.enable()
        box, services, epoll = self.box, self._services, self._epoll
        assert services is not None
        self._relay = relay = Relay(epoll, listeners, self._doors.connect)
        wire, output, news = box.wire.fileno(), box.output, box.news
        for fd in {signals.fileno(), parent.fileno(), wire, output, news} - {-1}:
            epoll.register(fd, select.EPOLLIN)
        if parent.gone():
            return 128 + signal.SIGHUP  # it was before it could be watched
        while (verdict := box.ended()) is None:
            for fd, events in epoll.poll(services.patience()):
                if relay.handles(fd):
                    relay.handle(fd, events)
                elif fd == wire:
                    if not services.read():
                        epoll.unregister(wire)
                elif fd == output:
                    self._pass_output()
                elif fd == signals.fileno():
                    for number in signals.take():
                        if not self._signalled(number):
                            return 128 + number
                elif fd == parent.fileno():
                    return 128 + signal.SIGHUP
            services.go_on()
        self._finish(relay, output)
        self._explain(verdict, relay)
        return verdict.shell_code

    def _signalled(self, number: int) -> bool:
        """False when this one ends the kernel."""
        if number not in TO_GROUP:
            return False
        if number != signal.SIGINT or (self._services is not None and self._services.ready):
            self.box.signal(number)  # before it is ready, it would die of an interrupt
        return True

    def _finish(self, relay: Relay, output: int) -> None:
        """What the kernel said before it ended is passed on."""
        deadline = time.monotonic() + _DRAIN
        relay.accept_no_more()
        while relay.busy and (left := deadline - time.monotonic()) > 0:
            for fd, events in self._epoll.poll(left):
                if relay.handles(fd):
                    relay.handle(fd, events)
                elif fd == output:
                    self._pass_output()
                else:
                    self._look_away(fd)
        self._pass_output()

    def _pass_output(self) -> None:
        """What was printed past the channels."""
        if not self._output.pass_on(self.box.output):
            self._look_away(self.box.output)

    def _look_away(self, fd: int) -> None:
        try:
            self._epoll.unregister(fd)
        except OSError:
            pass  # it was met at the end already

    def _explain(self, verdict: Verdict, relay: Relay) -> None:
        """Ends that a user would wonder about: in the frontend's log, and in the cell that ran."""
        assert self._services is not None
        text = why_ended(verdict, self._services.reason, self.box.sandbox.spec.limits)
        if text:
            say(text)
            if self._connection is not None and self._services.cell:
                relay.close()
                publish_why(text, self._connection, self._services.cell)

    def close(self) -> None:
        """End the kernel, and everything in its sandbox."""
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        if self._proxy is not None:
            self._proxy.close()
            self._proxy = None
        if self._services is not None:
            self._services.close()
        if self._box is not None:
            self._box.close()
            self._box = None
        self._doors.close()
        if not self._epoll.closed:
            self._epoll.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def why_ended(verdict: Verdict, reason: str, limits: Limits) -> str:
    """For people; "" for an end that nobody wonders about. `reason`: why its host has ended it."""
    if reason:
        return f"the kernel was ended: {reason}"
    if verdict.ended is Ended.OUT_OF_MEMORY:
        limit = f" (its limit is {format_size(limits.memory)}: --memory)" if limits.memory is not None else ""
        return f"the kernel ran out of memory{limit}"
    if verdict.ended is Ended.TIMED_OUT:
        return f"the kernel's time was up after {limits.wall:g} s (--timeout)"
    return "" if verdict.ok else f"the kernel {verdict}"


def publish_why(text: str, connection: Connection, cell: Mapping[str, str]) -> None:
    """To the notebook, as the last words of the cell that ran. What listened on the iopub channel does so no more."""
    from isolation_kernel import exit_notice

    exit_notice.publish(connection.endpoint(CHANNELS.index("iopub")), connection.told, cell, f"isolation: {text}\n")


def told_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a kernel that has started long ago is told of a frontend's."""
    return {name: value for name, value in environ.items() if name in _TOLD or name.startswith("LC_")}


class Output:
    """What a kernel prints past its channels (a crash, say) is for the frontend's log. Bounded, and without control
    sequences: it may be a terminal."""

    def __init__(self) -> None:
        self._printed = 0
        self._second = 0.0

    def pass_on(self, fd: int) -> bool:
        """What there is now; False at the end."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        now = time.monotonic()
        if now - self._second >= 1:
            self._second, self._printed = now, 0
        room = max(0, _OUTPUT_AT_MOST - self._printed)
        self._printed += len(data)
        if room and data:
            _write(printable(data[:room].decode("utf-8", "replace"), room))
        return bool(data)


def say(text: str) -> None:
    """A line for the frontend's log."""
    _write(f"isolation: {printable(text)}\n")


def _write(text: str) -> None:
    try:
        os.write(2, text.encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # nobody listens
