"""The streams of `isolation run`: which descriptors the command gets, and the relay of all the others.

terminal                        the sandbox's own terminal, relayed; the host's is raw meanwhile
/dev/null                       the very descriptor
pipe, FIFO as standard input    the very descriptor: a relay would take from it what was meant for whoever reads next
                                (`while read x; do isolation run …; done`); a command of the same user's can write to it
file, socket, device, anything  a pipe, relayed: whoever holds a file can reopen or truncate it, whoever holds a socket
                                may reach the network through it, a directory is a way out of the root, and a pipe for
                                output can be opened by /proc/self/fd, and read: what others have written, too
"""

from __future__ import annotations

import contextlib
import enum
import signal
import stat
import termios
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from isolation.errors import SandboxClosed, SpecError
from isolation.plain import os, select, time
from isolation.result import Verdict
from isolation.sandbox import Process
from isolation.signals import Signals
from isolation.terminal.control_strings import ControlStrings
from isolation.terminal.host_terminal import HostTerminal, Questions
from isolation.terminal.pump import Capture, Pump

_AGAIN_WITHIN: Final = 2.0  # s, from the first SIGINT or SIGTERM to the one that ends the sandbox
_STREAMS: Final = ("standard input", "standard output", "standard error")
_NULL_DEVICE: Final = os.makedev(1, 3)

_TO_PROCESS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_TO_GROUP: Final = (signal.SIGINT, signal.SIGQUIT)  # as a terminal sends them
_OURS: Final = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)


class Interrupted(Exception):
    """The user has asked twice: the sandbox is to end, whatever the command makes of it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Kind(enum.Enum):
    """What a descriptor of the caller's is, as far as it matters here."""

    TERMINAL = enum.auto()
    HARMLESS = enum.auto()
    RELAYED = enum.auto()
    DIRECTORY = enum.auto()
    CLOSED = enum.auto()


def classify(fd: int) -> Kind:
    """What to do with a descriptor of the caller's."""
    try:
        status = os.fstat(fd)
    except OSError:
        return Kind.CLOSED
    if os.isatty(fd):
        return Kind.TERMINAL
    if stat.S_ISFIFO(status.st_mode) and fd == 0:
        return Kind.HARMLESS
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL_DEVICE:
        return Kind.HARMLESS
    return Kind.DIRECTORY if stat.S_ISDIR(status.st_mode) else Kind.RELAYED


class Relay:
    """Between the caller's streams and those of one command. With `capture` (a bound in bytes), output is kept in
    `captured` instead of passed on, and nothing is a terminal. What a command writes to its terminal goes through `screen`,
    which may change it, on its way to the caller's.

        with Relay() as relay:
            process = box.popen(argv, tty=relay.tty, stdin=relay.given[0], …)
            verdict = relay.run(process, box.machine.fileno())

    Raises SpecError for streams that cannot be passed on, Interrupted when the user asks twice for the end.
    """

    def __init__(self, capture: int | None = None, screen: Callable[[bytes], bytes] | None = None) -> None:
        self.given: list[int | None] = [None, None, None]
        self.tty: bool | tuple[int, int] = False
        self.captured: list[Capture] = []
        self._pumps: list[Pump] = []  # from the command
        self._feeds: list[Pump] = []  # to the command
        self._theirs: list[int] = []  # ends that only the command needs
        self._ours: set[int] = set()
        self._host: HostTerminal | None = None
        self._master = -1
        self._screen = screen or self._screened
        self._questions = Questions()
        self._control_strings = ControlStrings()
        self._asked = -_AGAIN_WITHIN
        self._signals: Signals | None = None
        try:
            self._arrange(capture)
        except BaseException:
            self.close()
            raise

    def _arrange(self, capture: int | None) -> None:
        kinds = [classify(fd) for fd in (0, 1, 2)]
        if capture is None:
            terminals = [fd for fd in (0, 1, 2) if kinds[fd] is Kind.TERMINAL and _same_file(fd, kinds)]
        else:
            terminals = []
            kinds[1:] = [Kind.RELAYED, Kind.RELAYED]
            self.captured = [Capture(capture), Capture(capture)]
        if terminals:
            self.tty = termios.tcgetwinsize(terminals[0])
            self._host = HostTerminal(terminals, reads=0 in terminals, all_output={1, 2} <= set(terminals))
        for fd, kind in enumerate(kinds):
            if fd in terminals:
                continue
            if kind is Kind.DIRECTORY:
                raise SpecError(f"{_STREAMS[fd]} is a directory: the command could leave the sandbox through it")
            if kind is Kind.HARMLESS:
                self.given[fd] = fd
            elif kind is Kind.CLOSED:
                self.given[fd] = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                self._theirs.append(self.given[fd])  # type: ignore[arg-type]
            elif fd == 0:
                self._feed()
            elif fd == 2 and not self.captured and kinds[1] is Kind.RELAYED and os.path.sameopenfile(1, 2):
                self.given[2] = self.given[1]  # `> file 2>&1`: one pipe, so that the lines keep their order
            else:
                self._collect(fd, self.captured[fd - 1] if self.captured else fd)

    def _feed(self) -> None:
        read, write = self._pipe(ours=1)
        self.given[0] = read
        self._feeds.append(Pump(_STREAMS[0], 0, write, at_end=lambda: self._close_ours(write)))

    def _collect(self, fd: int, sink: int | Capture) -> None:
        read, write = self._pipe(ours=0)
        self.given[fd] = write
        self._pumps.append(Pump(_STREAMS[fd], read, sink, at_end=lambda: self._close_ours(read)))

    def _pipe(self, *, ours: int) -> tuple[int, int]:
        ends = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ends[ours], False)
        self._ours.add(ends[ours])
        self._theirs.append(ends[1 - ours])
        return ends

    def _close_ours(self, fd: int) -> None:
        """The half close: end of file for a command that reads, SIGPIPE for one that writes."""
        if fd in self._ours:
            self._ours.remove(fd)
            os.close(fd)

    def watch_signals(self) -> None:
        """From now on signals are for the command."""
        self._signals = Signals((*_TO_PROCESS, *_TO_GROUP, *_OURS), obedient=True)

    def run(self, process: Process, news: int) -> Verdict:
        """Pass everything on until the command has ended (`news` is readable then), and what it has left in its pipes."""
        while self._theirs:
            os.close(self._theirs.pop())  # or we would never see the end of what it writes
        if self._signals is None:
            self.watch_signals()
        assert self._signals is not None
        if self._host is not None and process.tty is not None:
            self._connect(self._host, process)
        while (verdict := process.poll()) is None:
            ready = self._poll([*self._pumps, *self._active_feeds()], news)
            if self._signals.fileno() in ready:
                for signum in self._signals.take():
                    self._pass_on(process, signum)
            for pump in (*self._pumps, *self._active_feeds()):
                pump.move(ready)
        self._drain()
        if self._host is not None:
            self._questions.settle(self._host)
        return verdict

    def _connect(self, host: HostTerminal, process: Process) -> None:
        assert process.tty is not None
        master = self._master = process.tty
        os.set_blocking(master, False)
        host.give_size_to(process)
        self._pumps.append(Pump("the terminal", master, host.sink, at_loss=self._hang_up, screen=self._screen))
        if host.reads:
            self._feeds.append(Pump("the terminal", host.source, master, at_end=self._hang_up))
            host.raw()

    def _screened(self, data: bytes) -> bytes:
        """What the command writes to its terminal, without what would do more than show."""
        return self._control_strings(self._questions(data))

    def _hang_up(self) -> None:
        """The caller's terminal is gone; so is the command's, then."""
        self._pumps = [pump for pump in self._pumps if pump.source != self._master]
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def _active_feeds(self) -> list[Pump]:
        if self._host is not None and self._host.reads and not self._host.is_raw:
            return []  # in the background: not ours to read
        return self._feeds

    def _poll(self, pumps: list[Pump], *others: int) -> dict[int, int]:
        assert self._signals is not None
        events = dict.fromkeys((self._signals.fileno(), *others), select.POLLIN)
        for pump in pumps:
            for fd, wanted in pump.wants():
                events[fd] = events.get(fd, 0) | wanted
        poller = select.poll()
        for fd, wanted in events.items():
            poller.register(fd, wanted)
        return dict(poller.poll())

    def _drain(self) -> None:
        assert self._signals is not None
        for pump in self._pumps:
            pump.start_draining()
        while busy := [pump for pump in self._pumps if pump.drain()]:
            ready = self._poll(busy)
            if any(number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) for number in self._signals.take()):
                return  # nobody is left to pass it on to: the reader is slow, and the user does not want to wait
            for pump in busy:
                pump.move(ready)

    def _pass_on(self, process: Process, signum: int) -> None:
        if signum == signal.SIGWINCH:
            if self._host is not None and self._master >= 0:
                self._host.give_size_to(process)
            return
        if signum in (signal.SIGINT, signal.SIGTERM):
            now = time.monotonic()
            if now - self._asked < _AGAIN_WITHIN:
                raise Interrupted(signum)
            self._asked = now
        with contextlib.suppress(SandboxClosed):  # poll() will tell why
            if signum == signal.SIGTSTP:
                self._stop(process)
            elif signum == signal.SIGCONT:
                process.send_signal(signal.SIGCONT, group=True)
                if self._host is not None and self._master >= 0:
                    self._host.raw()
                    self._host.give_size_to(process)
            else:
                process.send_signal(signum, group=signum in _TO_GROUP)

    def _stop(self, process: Process) -> None:
        """^Z where the terminal is not raw: the command stops (SIGSTOP: the kernel ignores SIGTSTP in a group that no
        shell watches), and so do we."""
        process.send_signal(signal.SIGSTOP, group=True)
        if self._host is not None:
            self._host.restore()
        os.kill(os.getpid(), signal.SIGSTOP)

    def errors(self) -> list[str]:
        """What could not be passed on, though somebody wanted it."""
        pumps = (*self._pumps, *self._feeds)
        return [f"{pump.name}: {pump.error.strerror}" for pump in pumps if pump.error is not None]

    def close(self) -> None:
        """Put the terminal and the signals back, and close what is ours. May be called again."""
        if self._host is not None:
            self._host.close()
            self._host = None
        if self._signals is not None:
            self._signals.close()
            self._signals = None
        for pump in (*self._pumps, *self._feeds):
            pump.close()
        for fd in (*self._theirs, *self._ours):
            os.close(fd)
        self._theirs.clear()
        self._ours.clear()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _same_file(fd: int, kinds: list[Kind]) -> bool:
    """A command has one terminal: the first of the caller's."""
    first = kinds.index(Kind.TERMINAL)
    return os.fstat(first).st_rdev == os.fstat(fd).st_rdev
