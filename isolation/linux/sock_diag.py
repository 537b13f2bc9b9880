"""What the kernel tells of a socket of the family UNIX, but not by any call on it: who the other end is (sock_diag(7))."""

from __future__ import annotations

import _socket
import struct
from typing import NamedTuple

CLOSED = 7  # a state of sockets of all families (kernel: include/net/tcp_states.h)
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_SHOW_PEER_AND_LENGTHS = 0x4 | 0x10
_PEER, _LENGTHS, _SHUTDOWN = 2, 4, 6  # attributes of the answer
_HEADER, _MESSAGE = 16, 16  # bytes: struct nlmsghdr, struct unix_diag_msg
_ANY = 0xFFFFFFFF


class UnixSocket(NamedTuple):
    """`peer`: inode of the other end; 0 for none. `waiting`: bytes, or connections where it listens."""

    state: int
    peer: int
    waiting: int
    shut: bool


def unix_socket(inode: int) -> UnixSocket | None:
    """In this network namespace. None where the kernel does not tell."""
    body = struct.pack("=BBHIIIII", _socket.AF_UNIX, 0, 0, _ANY, inode, _SHOW_PEER_AND_LENGTHS, _ANY, _ANY)
    head = struct.pack("=IHHII", _HEADER + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    try:
        asked = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
    except OSError:
        return None
    try:
        asked.send(head + body)
        answer = asked.recv(1 << 16, _socket.MSG_DONTWAIT)  # it is there when send(2) returns
    except OSError:
        return None
    finally:
        asked.close()
    size, kind = struct.unpack_from("=IH", answer)
    if kind != _SOCK_DIAG_BY_FAMILY or not _HEADER + _MESSAGE <= size <= len(answer):
        return None
    attributes = _attributes(answer[_HEADER + _MESSAGE : size])
    return UnixSocket(
        answer[_HEADER + 2], _number(attributes.get(_PEER, b"")), _number(attributes.get(_LENGTHS, b"")[:4]),
        any(attributes.get(_SHUTDOWN, b"")),
    )  # fmt: skip


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        found[kind] = data[4:size]
        data = data[max(4, (size + 3) & ~3) :]
    return found


def _number(data: bytes) -> int:
    return int(struct.unpack("=I", data)[0]) if len(data) == 4 else 0
