"""`--pdb`, `--trace` and `breakpoint()`: the user's terminal, lent to a test in its sandbox while the debugger runs.

The test gets a terminal of its own, whose other end the host holds: keys go in, and what it shows comes out, as far as it
only shows something (sealed/screen.py). It is its controlling terminal, so that Ctrl-C interrupts what is debugged.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import termios
import time
import tty
from collections.abc import Iterator

from isolation.errors import WireError
from isolation.guest import Guest
from isolation.template import Fork
from isolation.wire import Message
from pytest_isolation.sealed.screen import Screen
from pytest_isolation.text import clean_name

_END_OF_FILE = b"\x04"
_INTERRUPT = b"\x03"
_ENOUGH = 5  # of it, one after the other
_LOOK_AT_SIZE = 500  # ms


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

    def interact(self, fork: Fork, deadline: float | None) -> list[Message]:
        """Lend the terminal until the debugger is left, the test has ended, or (a monotonic time) `deadline`. Returns what
        else it said meanwhile. Raises KeyboardInterrupt."""
        if self._fork is not fork or self._ends is None:
            self.close()
            self._ends, self._fork = os.openpty(), fork
        master, slave = self._ends
        others: list[Message] = []
        _copy_size(master)
        with contextlib.suppress(WireError), _raw_terminal():  # one that is gone is told of elsewhere
            fork.send({"terminal": True, "fds": 1}, fds=(slave,))
            _relay(fork, master, others, deadline)
        return others

    def close(self) -> None:
        """The sandbox is gone."""
        for fd in self._ends or ():
            os.close(fd)
        self._ends = self._fork = None


def _relay(fork: Fork, master: int, others: list[Message], deadline: float | None) -> None:
    screen = Screen()
    poller = select.poll()
    for fd in (0, master, *fork.filenos()):
        poller.register(fd, select.POLLIN)
    interrupts = 0
    while deadline is None or time.monotonic() < deadline:
        ready = {fd for fd, _event in poller.poll(_LOOK_AT_SIZE)}
        _copy_size(master)
        if master in ready:
            _show(master, screen)
        if 0 in ready:
            typed = os.read(0, 4096)
            if not typed:
                poller.unregister(0)
            interrupts = interrupts + typed.count(_INTERRUPT) if typed.strip(_INTERRUPT) == b"" else 0
            if interrupts >= _ENOUGH:
                raise KeyboardInterrupt  # whoever has the terminal does not listen
            os.write(master, typed or _END_OF_FILE)
        try:
            while (message := fork.receive(0)) is not None:
                if "debugger" not in message:
                    others.append(message)
                elif message["debugger"] == "leave":
                    return
        except TimeoutError:
            continue
        finally:
            while select.select([master], [], [], 0)[0] and _show(master, screen):
                pass
        return  # it has ended


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
