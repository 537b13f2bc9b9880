"""`--pdb`, `--trace` and `breakpoint()`: the user's terminal, lent to a test in its sandbox while the debugger runs.

The test gets a terminal of its own, whose other end the host holds: keys go in, and what it shows comes out, as far as it
only shows something (screen.py). It is its controlling terminal, so that Ctrl-C interrupts what is debugged.
"""

from __future__ import annotations

import contextlib
import fcntl
import struct
import sys
import termios
import tty
from collections.abc import Callable, Iterator

from isolation.errors import WireError
from isolation.guest import Guest
from isolation.plain import os, select, time
from isolation.template import Fork
from isolation.wire import Message
from pytest_isolation.wire.sanitize import clean_name
from pytest_isolation.wire.screen import Screen

_CTRL_C = b"\x03"
_END_OF_FILE = b"\x04"
_ENOUGH = 5  # times Ctrl-C, one after the other
_KEYS_AT_MOST = 1 << 16
_LINE_AT_MOST = 1024
_WAIT_FOR_READER = 5  # ms
_LOOK_AT_SIZE = 500  # ms
_MESSAGES_AT_ONCE = 256  # then the keys are looked at, and the clock


# Inside.


class Terminal:
    """The test's side of it."""

    def __init__(self, guest: Guest) -> None:
        """Ask the host for it, and take it. Raises RuntimeError with the host's reason why there is none."""
        guest.send({"debugger": "enter"})
        answer = guest.receive()
        if answer is None or "error" in answer:
            raise RuntimeError(f"no debugger here: {answer['error'] if answer else 'the host is gone'}")
        (slave,) = guest.wire.take_fds(answer["fds"])
        self._guest = guest
        self._device = os.fstat(slave).st_rdev
        self._before = [os.dup(fd) for fd in (0, 1, 2)]
        with contextlib.suppress(OSError):
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for fd in (0, 1, 2):
            os.dup2(slave, fd)
        os.close(slave)

    def leave(self) -> None:
        """Give it back. What pytest's capture has put in its place meanwhile stays."""
        for fd, before in enumerate(self._before):
            if os.fstat(fd).st_rdev == self._device:
                os.dup2(before, fd)
            os.close(before)
        self._guest.send({"debugger": "leave"})


# On the host.


class Lender:
    """Has a terminal for one sandbox at a time. It stays open while that lives: a process whose controlling terminal goes
    away gets a SIGHUP."""

    def __init__(self) -> None:
        self._ends: tuple[int, int] | None = None
        self._fork: Fork | None = None

    def interact(self, fork: Fork, deadline: float | None, charge: Callable[[Message], None]) -> list[Message]:
        """Lend the terminal until the debugger is left, the test has ended, or (a monotonic time) `deadline`. Returns what
        else it said meanwhile, of which `charge` is told at once, and may raise. Raises KeyboardInterrupt."""
        if self._fork is not fork or self._ends is None:
            self.close()
            self._ends, self._fork = os.openpty(), fork
            os.set_blocking(self._ends[0], False)
            if not os.isatty(0):  # what comes out of a file or a pipe is not shown, as in plain pytest
                settings = termios.tcgetattr(self._ends[1])
                settings[3] &= ~termios.ECHO
                termios.tcsetattr(self._ends[1], termios.TCSANOW, settings)
        master, slave = self._ends
        others: list[Message] = []
        _copy_size(master)
        with contextlib.suppress(WireError), _raw_terminal():  # one that is gone is told of elsewhere
            fork.send({"terminal": True, "fds": 1}, fds=(slave,))
            _relay(fork, master, slave, others, deadline, charge)
        return others

    def close(self) -> None:
        """The sandbox is gone."""
        for fd in self._ends or ():
            os.close(fd)
        self._ends = self._fork = None


def _relay(
    fork: Fork, master: int, slave: int, others: list[Message], deadline: float | None, charge: Callable[[Message], None]
) -> None:
    screen = Screen()
    keys = _Keys(master, slave)
    more = False  # messages have arrived that no poll(2) will tell of
    while deadline is None or time.monotonic() < deadline:
        poller = select.poll()
        for fd in (master, *fork.filenos(), *keys.wanted()):
            poller.register(fd, select.POLLIN)
        left = keys.patience if deadline is None else min(keys.patience, 1 + int(1000 * (deadline - time.monotonic())))
        ready = {fd for fd, _event in poller.poll(0 if more else max(0, left))}
        _copy_size(master)
        if master in ready:
            _show(master, screen)
        keys.go_on(0 in ready, idle=not ready)
        more = True
        try:
            for _ in range(_MESSAGES_AT_ONCE):
                message = fork.receive(0)
                if message is None:
                    return  # it has ended
                charge(message)
                if "debugger" not in message:
                    others.append(message)
                elif message["debugger"] == "leave":
                    return
        except TimeoutError:
            more = False
        finally:
            for _ in range(_MESSAGES_AT_ONCE):
                if not select.select([master], [], [], 0)[0] or not _show(master, screen):
                    break


class _Keys:
    """From the user to the test's terminal. What comes from a file or a pipe: a line at a time, when what came before has
    been read, as a terminal would drop what is too much for it, and what comes while readline takes it over."""

    def __init__(self, master: int, slave: int) -> None:
        self._master = master
        self._slave = slave
        self._typed = b""
        self._over = False
        self._interrupts = 0
        self._at_terminal = os.isatty(0)

    def wanted(self) -> tuple[int, ...]:
        """The descriptor to read from, if there is room for more."""
        return () if self._over or len(self._typed) >= _KEYS_AT_MOST else (0,)

    @property
    def patience(self) -> int:
        """Milliseconds until `go_on` is to be called again."""
        return _WAIT_FOR_READER if self._typed else _LOOK_AT_SIZE

    def go_on(self, ready: bool, *, idle: bool) -> None:
        """Raises KeyboardInterrupt where the user wants out, and the test does not listen."""
        if ready:
            typed = os.read(0, _KEYS_AT_MOST)
            self._over = not typed
            self._interrupts = self._interrupts + typed.count(_CTRL_C) if typed.strip(_CTRL_C) == b"" else 0
            if self._interrupts >= _ENOUGH:
                raise KeyboardInterrupt
            self._typed += typed
        if not self._at_terminal and self._unread():
            return
        if self._typed:
            line = self._typed if self._at_terminal else self._typed[: self._typed.find(b"\n") + 1 or None][:_LINE_AT_MOST]
            with contextlib.suppress(BlockingIOError):
                self._typed = self._typed[os.write(self._master, line) :]
        elif self._over and idle:
            with contextlib.suppress(BlockingIOError):
                os.write(self._master, _END_OF_FILE)  # again whenever nothing happens, as one at the wrong time is lost

    def _unread(self) -> int:
        return int.from_bytes(fcntl.ioctl(self._slave, termios.FIONREAD, bytes(4)), sys.byteorder)


def _show(master: int, screen: Screen) -> bool:
    try:
        data = os.read(master, 1 << 16)
    except OSError:  # EIO: nobody has the other end
        return False
    view = memoryview(screen(data))
    while view:
        view = view[os.write(1, view) :]
    return bool(data)


def _copy_size(master: int) -> None:
    with contextlib.suppress(OSError, termios.error):
        size = os.get_terminal_size(1)
        if tuple(struct.unpack("HHHH", fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(8)))[:2]) != (size.lines, size.columns):
            termios.tcsetwinsize(master, (size.lines, size.columns))


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    if not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def refuse(fork: Fork, reason: str) -> None:
    """There is no terminal to lend."""
    with contextlib.suppress(WireError):
        fork.send({"error": clean_name(reason)})
