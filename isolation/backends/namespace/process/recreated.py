"""Descriptors of no file that a fork can have made anew, so that what owns their numbers goes on as before.

    a pipe, a pair of sockets   all of whose ends are this process's: a new one, in which the same bytes wait
    a socket that nobody knows  that has no address: a new one, with the same options, in the fork's own network
    an epoll instance           a new one, which waits for what the same numbers are in the fork
    an event, timer or signal   a new one, in the same state
    a device of memory          opened again (null(4), random(4))

What these are, recreatable.py finds out. In a process in which much may have been replaced (by gevent, say): so nothing of
`socket` and `select` is used that is not the kernel's own.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import fcntl
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from isolation.linux import syscalls
from isolation.plain import os

DOUBLED = ((_socket.SOL_SOCKET, _socket.SO_RCVBUF), (_socket.SOL_SOCKET, _socket.SO_SNDBUF))  # by who is told (socket(7))

Options = tuple[tuple[int, int, bytes], ...]
Numbers = tuple[int, ...]  # descriptors that are duplicates


class Object:
    """What a number, or several, stand for."""

    @property
    def numbers(self) -> Numbers:
        """All of them."""
        raise NotImplementedError

    def make(self) -> list[tuple[Numbers, int]]:
        """In a fork: a new descriptor for each end of it, and the numbers that want a duplicate. Raises OSError."""
        raise NotImplementedError

    def connect(self, numbers: Collection[int]) -> None:
        """When all are at their `numbers`."""


@dataclass(frozen=True, eq=False)
class Numbered(Object):
    """Of one descriptor: the kernel does not tell which others are its duplicates."""

    number: int

    @property
    def numbers(self) -> Numbers:
        return (self.number,)


@dataclass(frozen=True, eq=False)
class Device(Numbered):
    """Of memory, as every sandbox has it."""

    path: str
    flags: int

    def make(self) -> list[tuple[Numbers, int]]:
        return [((self.number,), os.open(self.path, self.flags | os.O_CLOEXEC))]


@dataclass(frozen=True, eq=False)
class Pipe(Object):
    """pipe(7)."""

    readers: Numbers
    writers: Numbers
    flags: tuple[int, int]  # of both ends
    size: int
    content: bytes

    @property
    def numbers(self) -> Numbers:
        return self.readers + self.writers

    def make(self) -> list[tuple[Numbers, int]]:
        ends = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # the default is enough, or others of this user have used up theirs
            if fcntl.fcntl(ends[0], fcntl.F_GETPIPE_SZ) != self.size:
                fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, self.size)
        os.set_blocking(ends[1], False)
        if self.content and os.write(ends[1], self.content) != len(self.content):
            raise OSError(errno.ENOSPC, "a pipe is too small")
        for fd, flags in zip(ends, self.flags, strict=True):
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return [(self.readers, ends[0]), (self.writers, ends[1])]


@contextlib.contextmanager
def _closed_on_failure(*made: _socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for sock in made:
            sock.close()
        raise


@dataclass(frozen=True)
class End:
    """A socket. `messages` wait to be received."""

    numbers: Numbers
    flags: int
    options: Options
    messages: tuple[bytes, ...] = ()

    def apply(self, made: _socket.socket) -> None:
        """All but the messages."""
        for level, name, value in self.options:
            with contextlib.suppress(OSError):  # one that this process may not have
                if (level, name) in DOUBLED:
                    made.setsockopt(level, name, struct.unpack("=i", value)[0] // 2)
                else:
                    made.setsockopt(level, name, value)

    def finish(self, made: _socket.socket) -> int:
        """Its number."""
        fcntl.fcntl(made.fileno(), fcntl.F_SETFL, self.flags)
        return made.detach()


@dataclass(frozen=True, eq=False)
class Pair(Object):
    """socketpair(2)."""

    kind: int
    ends: tuple[End, End]

    @property
    def numbers(self) -> Numbers:
        return self.ends[0].numbers + self.ends[1].numbers

    def make(self) -> list[tuple[Numbers, int]]:
        made = _socket.socketpair(_socket.AF_UNIX, self.kind)
        with _closed_on_failure(*made):
            for end, one, other in zip(self.ends, made, made[::-1], strict=True):
                end.apply(one)
                for message in end.messages:
                    if other.send(message, _socket.MSG_DONTWAIT) != len(message):
                        raise OSError(errno.ENOSPC, "a socket is too small")
            return [(end.numbers, end.finish(one)) for end, one in zip(self.ends, made, strict=True)]


@dataclass(frozen=True, eq=False)
class Single(Object):
    """A socket that has no peer and no address."""

    family: int
    kind: int
    protocol: int
    end: End

    @property
    def numbers(self) -> Numbers:
        return self.end.numbers

    def make(self) -> list[tuple[Numbers, int]]:
        made = _socket.socket(self.family, self.kind, self.protocol)
        with _closed_on_failure(made):
            self.end.apply(made)
            return [(self.end.numbers, self.end.finish(made))]


@dataclass(frozen=True, eq=False)
class Event(Object):
    """eventfd(2)."""

    same: Numbers
    flags: int
    count: int
    semaphore: bool

    @property
    def numbers(self) -> Numbers:
        return self.same

    def make(self) -> list[tuple[Numbers, int]]:
        # Not the count itself: that argument has 32 bits, and the counter 64.
        made = os.eventfd(0, os.EFD_CLOEXEC | (os.EFD_SEMAPHORE if self.semaphore else 0))
        if self.count:
            os.eventfd_write(made, self.count)
        fcntl.fcntl(made, fcntl.F_SETFL, self.flags)
        return [(self.same, made)]


@dataclass(frozen=True, eq=False)
class Timer(Numbered):
    """timerfd_create(2). `left` and `interval`: seconds and nanoseconds; `expired`, and nobody has read it."""

    flags: int
    clock: int
    left: tuple[int, int]
    interval: tuple[int, int]
    expired: bool

    def make(self) -> list[tuple[Numbers, int]]:
        made = syscalls.timerfd_create(self.clock, os.O_CLOEXEC)
        left = (0, 1) if self.expired else self.left
        if left != (0, 0):
            syscalls.timerfd_settime(made, left, self.interval)
        fcntl.fcntl(made, fcntl.F_SETFL, self.flags)
        return [((self.number,), made)]


@dataclass(frozen=True, eq=False)
class Signals(Numbered):
    """signalfd(2)."""

    flags: int
    mask: int

    def make(self) -> list[tuple[Numbers, int]]:
        made = syscalls.signalfd(self.mask)
        fcntl.fcntl(made, fcntl.F_SETFL, self.flags)
        return [((self.number,), made)]


@dataclass(frozen=True, eq=False)
class Poll(Numbered):
    """epoll(7). `entries`: a number, events, and what is told with them."""

    entries: tuple[tuple[int, int, int], ...]

    @property
    def watched(self) -> Numbers:
        """What it waits for."""
        return tuple(fd for fd, _events, _data in self.entries)

    def make(self) -> list[tuple[Numbers, int]]:
        return [((self.number,), syscalls.epoll_create(os.O_CLOEXEC))]

    def connect(self, numbers: Collection[int]) -> None:
        for fd, events, data in self.entries:
            if fd in numbers:
                with contextlib.suppress(OSError):  # what is lost, cannot be waited for (EPERM)
                    syscalls.epoll_add(self.number, fd, events, data)
