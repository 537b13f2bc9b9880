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
import errno
import fcntl
import re
import signal
import stat
import struct
import termios
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, Self

from isolation.control_strings import ControlStrings
from isolation.errors import SandboxClosed, SpecError
from isolation.plain import os, select, socket, time
from isolation.result import Verdict
from isolation.sandbox import Process
from isolation.signals import Signals

_BOUND: Final = 1 << 16  # bytes that wait in a pump, at most
_PTY_HOLDS: Final = 1 << 17  # more than the kernel keeps for the master of a terminal
_SURE: Final = 512  # bytes that a blocking descriptor takes when poll(2) says that it takes any
_AGAIN_WITHIN: Final = 2.0  # s, from the first SIGINT or SIGTERM to the one that ends the sandbox
_STREAMS: Final = ("standard input", "standard output", "standard error")
_NULL_DEVICE: Final = os.makedev(1, 3)

# What a terminal answers to as if it were typed (ECMA-48 DA and DSR, DECRQM, OSC queries, DCS requests, ENQ).
_QUESTIONS: Final = re.compile(
    rb"(?:\x1b\[|\xc2\x9b)[0-9;:?>=<]*[ !-/]*[Scnpqtuwxy]|[\x05\x9b]|\x1b[PZ]|\x1b\][^\x07\x1b]*\?"
)
# What a terminal reports unasked from then on, as if it were typed (DECSET): the mouse, its focus, pasted text in brackets.
_REPORTS: Final = frozenset(b"9 1000 1001 1002 1003 1004 1005 1006 1007 1015 1016 2004 2031 2048".split())
_MODES: Final = re.compile(rb"(?:\x1b\[|\xc2\x9b)\?([0-9;]{1,64})([hl])")
_QUESTION_AT_MOST: Final = 64
_ANSWERS: Final = 1.0  # s, to wait for them
_SILENCE: Final = 0.05  # s, after which there are no more
_IDENTIFY: Final = b"\x1b[c"  # primary device attributes: the last question, whose answer comes last

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


class Capture:
    """Output that is kept, up to a bound."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.truncated = False
        self._limit = limit

    def take(self, data: bytes) -> None:
        room = self._limit - len(self.data)
        self.data += data[:room]
        self.truncated = self.truncated or room < len(data)


class _Pump:
    """Bytes from one descriptor to another, of which it never sets O_NONBLOCK on the caller's: that is a flag of the open
    file, which the caller shares with its shell."""

    def __init__(
        self,
        name: str,
        source: int,
        sink: int | Capture,
        *,
        at_end: Callable[[], None] | None = None,
        at_loss: Callable[[], None] | None = None,
        screen: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self.sink = sink
        self.error: OSError | None = None  # of the sink, except that nobody reads it
        self._reading = True
        self._waiting = b""
        self._budget: int | None = None  # of what is still to be read, when draining
        self._at_end = at_end  # all was read, and written
        self._at_loss = at_loss  # nobody takes it any more
        self._screen = screen  # what it makes of the bytes is passed on
        self._most = _SURE
        self._socket: socket.socket | None = None
        self._pipes = False  # from one to another: bytes need not come here
        if isinstance(sink, int):
            if stat.S_ISSOCK(os.fstat(sink).st_mode):
                self._socket = socket.socket(fileno=os.dup(sink))
            if stat.S_ISFIFO(os.fstat(sink).st_mode):
                self._most = select.PIPE_BUF  # pipe(7): what has room, when it has any
                self._pipes = screen is None and stat.S_ISFIFO(os.fstat(source).st_mode)
            if self._socket or stat.S_ISREG(os.fstat(sink).st_mode) or not os.get_blocking(sink):
                self._most = _BOUND

    def wants(self) -> Iterator[tuple[int, int]]:
        """What to poll(2) for. Nothing is wanted of a source whose bytes have no room: that is the back-pressure."""
        if self._reading and len(self._waiting) < _BOUND:
            yield self.source, select.POLLIN
        if self._waiting and isinstance(self.sink, int):
            yield self.sink, select.POLLOUT

    def move(self, ready: dict[int, int]) -> None:
        """Read and write what goes without blocking."""
        if self._reading and len(self._waiting) < _BOUND and ready.get(self.source, 0) & ~select.POLLOUT:
            self._read()
        if self._waiting and isinstance(self.sink, int) and ready.get(self.sink, 0) & ~select.POLLIN:
            self._write(self.sink)

    def start_draining(self) -> None:
        """The command has ended: what it wrote is still wanted, what its background processes go on writing is not."""
        if not self._reading:
            return
        if os.isatty(self.source):
            self._budget = _PTY_HOLDS
        else:
            waiting = fcntl.ioctl(self.source, termios.FIONREAD, b"\0" * 4)
            self._budget = int(struct.unpack("i", waiting)[0])

    def drain(self) -> bool:
        """Read what has room, from a source that does not block. False when all of it is read and written."""
        while self._reading and len(self._waiting) < _BOUND:
            if self._budget == 0 or not self._read():
                self._end()
        return bool(self._waiting)

    def _splice(self, sink: int) -> bool | None:
        """As `_read`; None where it has to be done by hand."""
        try:
            count = os.splice(self.source, sink, _BOUND, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return None  # nothing to read, or no room
        except OSError as error:
            self._lose(error)
            return False
        if not count:
            self._end()
        return count > 0

    def _read(self) -> bool:
        if self._pipes and not self._waiting and self._budget is None and isinstance(self.sink, int):
            done = self._splice(self.sink)
            if done is not None:
                return done
        room = _BOUND - len(self._waiting)
        try:
            data = os.read(self.source, room if self._budget is None else min(room, self._budget))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # how a terminal says that nobody is left at its other end
                self.error = error
            data = b""
        if not data:
            self._end()
            return False
        if self._budget is not None:
            self._budget -= len(data)
        if isinstance(self.sink, Capture):
            self.sink.take(data)
        else:
            self._waiting += data if self._screen is None else self._screen(data)
        return True

    def _write(self, sink: int) -> None:
        data = self._waiting[: self._most]
        try:
            if self._socket is not None:
                count = self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                count = os.write(sink, data)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        self._waiting = self._waiting[count:]
        if not self._waiting and not self._reading:
            self._finish()

    def _lose(self, error: OSError) -> None:
        """Nobody takes it any more."""
        if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
            self.error = error
        self._waiting = b""
        self._end()
        if self._at_loss is not None:
            self._at_loss()

    def _end(self) -> None:
        self._reading = False
        if not self._waiting:
            self._finish()

    def _finish(self) -> None:
        if self._at_end is not None:
            self._at_end()
            self._at_end = None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


class _HostTerminal:
    """The caller's terminal: raw while the command runs, and always put back."""

    def __init__(self, fds: list[int], *, reads: bool, all_output: bool) -> None:
        self.fd = fds[0]
        self._reads = reads
        self._all_output = all_output
        self._before: list[Any] | None = None
        self._own = -1
        try:
            # An open file of our own can be non-blocking. Fails for a terminal that is another user's (su).
            self._own = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            pass
        self.source = self._own if self._own >= 0 else self.fd
        writable = [fd for fd in fds if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY]
        self.sink = self._own if self._own >= 0 else (writable or fds)[-1]

    def in_foreground(self) -> bool:
        """A background job may neither read its terminal nor change its mode: it would be stopped (SIGTTIN, SIGTTOU)."""
        try:
            return os.tcgetpgrp(self.fd) == os.getpgrp()
        except OSError:
            return True  # not our controlling terminal: nobody stops us

    def raw(self) -> None:
        """Give every key to the command's terminal, ^C and ^Z too."""
        if not self._reads or self._before is not None or not self.in_foreground():
            return
        try:
            before = termios.tcgetattr(self.fd)
            mode = termios.tcgetattr(self.fd)
        except termios.error:
            return
        _make_raw(mode)
        if not self._all_output:
            mode[1] |= before[1] & termios.OPOST  # what reads our pipe may write here, too: it expects newlines to work
        self._before = before
        self._set(mode)

    def restore(self) -> None:
        if self._before is not None:
            self._set(self._before)
            self._before = None

    def _set(self, mode: list[Any]) -> None:
        # With SIGTTOU blocked even a background job may do it: it must, to leave the terminal as it was.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        try:
            termios.tcsetattr(self.fd, termios.TCSANOW, mode)
        except termios.error:
            pass  # hung up
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    @property
    def is_raw(self) -> bool:
        return self._before is not None

    def swallow_answers(self, first: bytes = b"") -> None:
        """What the terminal answers to the command's questions is not for the shell that comes after it. `first` is written
        before it is asked for the last time."""
        if not self.is_raw:
            return
        heard = b""
        deadline = time.monotonic() + _ANSWERS
        with contextlib.suppress(OSError):
            os.write(self.sink, first + _IDENTIFY)
            poller = select.poll()
            poller.register(self.source, select.POLLIN)
            while (left := deadline - time.monotonic()) > 0:
                over = heard.endswith(b"c") and b"\x1b[?" in heard
                if not poller.poll(1000 * (_SILENCE if over else left)):
                    return
                data = os.read(self.source, 4096)
                if not data:
                    return
                heard = (heard + data)[-4096:]

    def give_size_to(self, process: Process) -> None:
        try:
            process.resize(*termios.tcgetwinsize(self.fd))
        except (termios.error, SandboxClosed):
            pass

    def close(self) -> None:
        self.restore()
        if self._own >= 0:
            os.close(self._own)


def _make_raw(mode: list[Any]) -> None:
    """cfmakeraw(3). `tty.cfmakeraw` came with Python 3.12."""
    mode[0] &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
        | termios.ICRNL | termios.IXON
    )  # fmt: skip
    mode[1] &= ~termios.OPOST
    mode[2] = mode[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0


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
        self._pumps: list[_Pump] = []  # from the command
        self._feeds: list[_Pump] = []  # to the command
        self._theirs: list[int] = []  # ends that only the command needs
        self._ours: set[int] = set()
        self._host: _HostTerminal | None = None
        self._master = -1
        self._screen = screen or self._listen
        self._said = b""  # by the command to its terminal, the end of it
        self._questions = False
        self._modes: frozenset[bytes] = frozenset()
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
            self._host = _HostTerminal(terminals, reads=0 in terminals, all_output={1, 2} <= set(terminals))
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
        self._feeds.append(_Pump(_STREAMS[0], 0, write, at_end=lambda: self._close_ours(write)))

    def _collect(self, fd: int, sink: int | Capture) -> None:
        read, write = self._pipe(ours=0)
        self.given[fd] = write
        self._pumps.append(_Pump(_STREAMS[fd], read, sink, at_end=lambda: self._close_ours(read)))

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
        if (self._questions or self._modes) and self._host is not None:
            self._host.swallow_answers(b"".join(b"\x1b[?%sl" % mode for mode in sorted(self._modes)))
        return verdict

    def _connect(self, host: _HostTerminal, process: Process) -> None:
        assert process.tty is not None
        master = self._master = process.tty
        os.set_blocking(master, False)
        host.give_size_to(process)
        self._pumps.append(_Pump("the terminal", master, host.sink, at_loss=self._hang_up, screen=self._screen))
        if host._reads:
            self._feeds.append(_Pump("the terminal", host.source, master, at_end=self._hang_up))
            host.raw()

    def _listen(self, data: bytes) -> bytes:
        """For questions to the terminal, which may come in pieces; and without what would do more than show."""
        self._said = self._said[-_QUESTION_AT_MOST:] + data
        self._questions = self._questions or _QUESTIONS.search(self._said) is not None
        for modes, switch in _MODES.findall(self._said):
            wanted = _REPORTS.intersection(modes.split(b";"))
            self._modes = self._modes | wanted if switch == b"h" else self._modes - wanted
        return self._control_strings(data)

    def _hang_up(self) -> None:
        """The caller's terminal is gone; so is the command's, then."""
        self._pumps = [pump for pump in self._pumps if pump.source != self._master]
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def _active_feeds(self) -> list[_Pump]:
        if self._host is not None and self._host._reads and not self._host.is_raw:
            return []  # in the background: not ours to read
        return self._feeds

    def _poll(self, pumps: list[_Pump], *others: int) -> dict[int, int]:
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
