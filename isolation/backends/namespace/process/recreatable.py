"""Which of a process's descriptors, of those that are of no file, a fork can have made anew (recreated.py).

What has an end elsewhere (a child process, a server, a terminal) cannot be had, nor what does not tell all of its state. A
socket with an address is left as well: if it was a thread that answered there, it is better to be refused than to wait for
ever. Nothing is read here that others could miss.
"""

from __future__ import annotations

import _socket
import contextlib
import fcntl
import re
import stat
import struct
import termios
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from isolation.backends.namespace.process.recreated import (
    Device,
    End,
    Event,
    Numbers,
    Object,
    Pair,
    Pipe,
    Poll,
    Signals,
    Single,
    Timer,
)
from isolation.linux import syscalls
from isolation.linux.sock_diag import CLOSED, unix_socket
from isolation.plain import os

_CONTENT_AT_MOST = 1 << 20
_MESSAGES_AT_MOST = 1000
_DEVICES = {5: "zero", 7: "full", 8: "random", 9: "urandom"}  # of major number 1; null is what anything else becomes
_CLOCKS = frozenset((0, 1, 7))  # those that are no alarms (timerfd_create(2))
_ENTRY = re.compile(r"^tfd:\s*(\d+) events:\s*([0-9a-f]+) data:\s*([0-9a-f]+) .*?ino:([0-9a-f]+)", re.MULTILINE)
_FLAGS = os.O_NONBLOCK | os.O_DIRECT
_SO_PEEK_OFF = 42
# A socket's options, with the size of each.
_OPTIONS = (
    *((_socket.SOL_SOCKET, name, 4) for name in (
        _socket.SO_REUSEADDR, _socket.SO_REUSEPORT, _socket.SO_KEEPALIVE, _socket.SO_BROADCAST, _socket.SO_OOBINLINE,
        _socket.SO_PASSCRED, _socket.SO_PRIORITY, _socket.SO_RCVBUF, _socket.SO_SNDBUF, _socket.SO_RCVLOWAT,
    )),
    (_socket.SOL_SOCKET, _socket.SO_LINGER, 8),
    *((_socket.SOL_SOCKET, name, 16) for name in (_socket.SO_RCVTIMEO, _socket.SO_SNDTIMEO)),
    *((_socket.IPPROTO_TCP, name, 4) for name in (
        _socket.TCP_NODELAY, _socket.TCP_KEEPIDLE, _socket.TCP_KEEPINTVL, _socket.TCP_KEEPCNT, _socket.TCP_DEFER_ACCEPT,
    )),
    *((_socket.IPPROTO_IP, name, 4) for name in (
        _socket.IP_TTL, _socket.IP_TOS, _socket.IP_MULTICAST_TTL, _socket.IP_MULTICAST_LOOP,
    )),
    *((_socket.IPPROTO_IPV6, name, 4) for name in (_socket.IPV6_V6ONLY, _socket.IPV6_UNICAST_HOPS)),
)  # fmt: skip


def look(numbers: Collection[int]) -> list[Object]:
    """Of open descriptors of this process: what can be made anew."""
    pipes: dict[int, list[int]] = {}
    sockets: dict[int, list[int]] = {}
    events: dict[str, list[int]] = {}
    found: list[Object | None] = []
    for fd in sorted(numbers):
        try:
            status = os.fstat(fd)
            if stat.S_ISFIFO(status.st_mode):
                pipes.setdefault(status.st_ino, []).append(fd)
            elif stat.S_ISSOCK(status.st_mode):
                sockets.setdefault(status.st_ino, []).append(fd)
            elif stat.S_ISCHR(status.st_mode):
                found.append(_device(fd, status.st_rdev))
            elif (kind := os.readlink(f"/proc/self/fd/{fd}")) == "anon_inode:[eventfd]":
                events.setdefault(_fields(fd)["eventfd-id"], []).append(fd)
            elif kind in _ANONYMOUS:
                found.append(_ANONYMOUS[kind](fd))
        except (OSError, ValueError, KeyError):
            continue
    found += [_tried(_pipe, ends) for ends in pipes.values()]
    found += [_tried(_event, tuple(ends)) for ends in events.values()]
    found += _sockets(sockets)
    return _without_blind([item for item in found if item is not None], numbers)


def _without_blind(found: list[Object], numbers: Collection[int]) -> list[Object]:
    """But for epoll instances that wait for something which is lost: who uses one would wait for ever, and not fail."""
    while True:
        lost = set(numbers).difference(*(item.numbers for item in found))
        blind = [item for item in found if isinstance(item, Poll) and not lost.isdisjoint(item.watched)]
        if not blind:
            return found
        found = [item for item in found if item not in blind]


def _tried(function: Callable[..., Object | None], *arguments: Any) -> Object | None:
    try:
        return function(*arguments)
    except (OSError, ValueError, KeyError, struct.error):
        return None


def _flags_of(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & _FLAGS


def _fdinfo(fd: int) -> str:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii", errors="replace") as file:
        return file.read()


def _fields(fd: int) -> dict[str, str]:
    lines = (line.partition(":") for line in _fdinfo(fd).splitlines())
    return {name.strip(): value.strip() for name, _colon, value in lines}


def _device(fd: int, device: int) -> Object | None:
    name = _DEVICES.get(os.minor(device)) if os.major(device) == 1 else None
    if name is None:
        return None
    return Device(fd, f"/dev/{name}", fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK))


def _poll(fd: int) -> Object:
    entries = []
    for words in _ENTRY.findall(_fdinfo(fd)):
        number, (events, data, inode) = int(words[0]), (int(word, 16) for word in words[1:])
        with contextlib.suppress(OSError):  # closed; but a duplicate of it is not
            if os.fstat(number).st_ino == inode:
                entries.append((number, events, data))
    return Poll(fd, tuple(entries))


def _signals(fd: int) -> Object:
    return Signals(fd, _flags_of(fd), int(_fields(fd)["sigmask"], 16))


def _timer(fd: int) -> Object | None:
    fields = _fields(fd)
    clock = int(fields["clockid"])
    left, interval = (_pair_of_numbers(fields[name]) for name in ("it_value", "it_interval"))
    return Timer(fd, _flags_of(fd), clock, left, interval, fields["ticks"] != "0") if clock in _CLOCKS else None


def _pair_of_numbers(text: str) -> tuple[int, int]:
    first, _comma, second = text.strip("()").partition(",")
    return int(first), int(second)


_ANONYMOUS: dict[str, Callable[[int], Object | None]] = {
    "anon_inode:[eventpoll]": _poll, "anon_inode:[signalfd]": _signals, "anon_inode:[timerfd]": _timer,
}  # fmt: skip


def _event(numbers: Numbers) -> Object:
    fields = _fields(numbers[0])
    semaphore = fields["eventfd-semaphore"] == "1"  # KeyError where the kernel does not tell (before Linux 6.5)
    return Event(numbers, _flags_of(numbers[0]), int(fields["eventfd-count"], 16), semaphore)


def _pipe(numbers: list[int]) -> Object | None:
    ends: dict[int, list[int]] = {}
    for fd in numbers:
        ends.setdefault(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE, []).append(fd)
    if set(ends) != {os.O_RDONLY, os.O_WRONLY}:
        return None
    readers, writers = tuple(ends[os.O_RDONLY]), tuple(ends[os.O_WRONLY])
    size = fcntl.fcntl(readers[0], fcntl.F_GETPIPE_SZ)
    flags = _flags_of(readers[0]), _flags_of(writers[0])
    waiting = _waiting(readers[0])
    if waiting > _CONTENT_AT_MOST or (waiting and flags[1] & os.O_DIRECT):  # packets, of which the bounds are not told
        return None
    content = _peek(readers[0], waiting, size) if waiting else b""
    return Pipe(readers, writers, flags, size, content) if len(content) == waiting else None


def _waiting(fd: int) -> int:
    """How many bytes could be read."""
    return int(struct.unpack("=i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0])


def _peek(pipe: int, waiting: int, size: int) -> bytes:
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) < size:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, size)
        syscalls.tee(pipe, writer, waiting)
        return os.read(reader, waiting)
    finally:
        os.close(reader)
        os.close(writer)


def _sockets(found: Mapping[int, list[int]]) -> list[Object | None]:
    objects: list[Object | None] = []
    paired: set[int] = set()
    for inode, numbers in found.items():
        if inode in paired:
            continue
        with contextlib.closing(_again(numbers)) as one:
            if one.family == _socket.AF_UNIX:
                told = unix_socket(inode)
                if told is None or told.shut:
                    continue
                if told.peer in found and told.peer != inode:
                    paired.add(told.peer)
                    objects.append(_tried(_pair, one, numbers, found[told.peer]))
                elif not told.peer and told.state == CLOSED and not told.waiting and not one.getsockname():
                    objects.append(_tried(_single, one, numbers))
            elif one.family in (_socket.AF_INET, _socket.AF_INET6) and _is_unknown(one):
                objects.append(_tried(_single, one, numbers))
    return objects


def _again(numbers: Iterable[int]) -> _socket.socket:
    """Another duplicate; the default time-out would set O_NONBLOCK, which all have in common."""
    default = _socket.getdefaulttimeout()
    _socket.setdefaulttimeout(None)
    try:
        return _socket.socket(fileno=os.dup(next(iter(numbers))))
    finally:
        _socket.setdefaulttimeout(default)


def _pair(one: _socket.socket, numbers: list[int], others: list[int]) -> Object | None:
    with contextlib.closing(_again(others)) as other:
        if one.getsockname() or other.getsockname():  # connected by name, which they would not tell any more
            return None
        ends = [_end(sock, fds, _messages(sock)) for sock, fds in ((one, numbers), (other, others))]
        return Pair(one.type, (ends[0], ends[1]))


def _end(sock: _socket.socket, numbers: Iterable[int], messages: tuple[bytes, ...] = ()) -> End:
    options = []
    with contextlib.closing(_socket.socket(sock.family, sock.type, sock.proto)) as fresh:
        for level, name, size in _OPTIONS:
            with contextlib.suppress(OSError):  # not of this family, or type
                value = sock.getsockopt(level, name, size)
                if value != fresh.getsockopt(level, name, size):
                    options.append((level, name, value))
    return End(tuple(numbers), _flags_of(sock.fileno()), tuple(options), messages)


def _messages(sock: _socket.socket) -> tuple[bytes, ...]:
    """What waits to be received. Raises ValueError for more than bytes."""
    found: list[bytes] = []
    before = sock.getsockopt(_socket.SOL_SOCKET, _SO_PEEK_OFF)
    sock.setsockopt(_socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
    try:
        while len(found) < _MESSAGES_AT_MOST and sum(map(len, found)) < _CONTENT_AT_MOST:
            # Without room for descriptors, they are not received, but told of. The same goes for credentials.
            data, _none, flags, _ = sock.recvmsg(_CONTENT_AT_MOST, 0, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
            if flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC) or not data:
                raise ValueError("more than bytes")
            found.append(data)
    except BlockingIOError:
        return (b"".join(found),) if found and sock.type == _socket.SOCK_STREAM else tuple(found)
    finally:
        sock.setsockopt(_socket.SOL_SOCKET, _SO_PEEK_OFF, before)
    raise ValueError("too much")


def _single(sock: _socket.socket, numbers: list[int]) -> Object:
    return Single(sock.family, sock.type, sock.proto, _end(sock, numbers))


def _is_unknown(sock: _socket.socket) -> bool:
    """Of INET and INET6: it has no address, its own or a peer's."""
    try:
        sock.getpeername()
    except OSError:
        host, port, *_more = sock.getsockname()
        return host in ("0.0.0.0", "::") and port == 0
    return False
