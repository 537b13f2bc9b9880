"""The caller's terminal, while a command in a sandbox has one of its own: its mode, its size, and what it answers."""

from __future__ import annotations

import contextlib
import fcntl
import re
import signal
import termios
from typing import Any, Final

from isolation.errors import SandboxClosed
from isolation.plain import os, select, time
from isolation.sandbox import Process

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


class Questions:
    """What a command has asked its terminal, and told it to report: heard in what it writes, which comes in pieces."""

    def __init__(self) -> None:
        self._said = b""  # the end of it
        self._asked = False
        self._modes: frozenset[bytes] = frozenset()

    def __call__(self, data: bytes) -> bytes:
        """Listen, and change nothing."""
        self._said = self._said[-_QUESTION_AT_MOST:] + data
        self._asked = self._asked or _QUESTIONS.search(self._said) is not None
        for modes, switch in _MODES.findall(self._said):
            wanted = _REPORTS.intersection(modes.split(b";"))
            self._modes = self._modes | wanted if switch == b"h" else self._modes - wanted
        return data

    def settle(self, terminal: HostTerminal) -> None:
        """Switch off what is still reported, and take off all answers: they are not for the shell that comes after."""
        if self._asked or self._modes:
            terminal.swallow_answers(b"".join(b"\x1b[?%sl" % mode for mode in sorted(self._modes)))


class HostTerminal:
    """The caller's terminal: raw while the command runs, and always put back."""

    def __init__(self, fds: list[int], *, reads: bool, all_output: bool) -> None:
        self.fd = fds[0]
        self.reads = reads
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
        if not self.reads or self._before is not None or not self.in_foreground():
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
