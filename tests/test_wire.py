"""The wire carries messages, and bears whatever a hostile other end sends."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from isolation.errors import WireError
from isolation.wire import MAX_JSON, Wire

pytestmark = pytest.mark.once


@pytest.fixture
def ends() -> Iterator[tuple[Wire, Wire]]:
    first, second = Wire.pair()
    wires = Wire(first), Wire(second, accept_fds=True)
    yield wires
    for wire in wires:
        wire.close()


def test_messages_and_data(ends: tuple[Wire, Wire]) -> None:
    one, two = ends
    one.send({"text": "\udcff snow ☃"}, b"\0raw")
    one.send({"second": 2})
    assert two.receive(1) == {"text": "\udcff snow ☃", "data": b"\0raw"}
    assert two.receive(1) == {"second": 2}
    with pytest.raises(TimeoutError):
        two.receive(0.01)


def test_large_message(ends: tuple[Wire, Wire]) -> None:
    one, two = ends
    thread = threading.Thread(target=one.send, args=({"a": "x" * 5_000_000}, b"y" * 5_000_000))
    thread.start()
    message = two.receive(10)
    thread.join()
    assert message is not None
    assert len(message["a"]) == len(message["data"]) == 5_000_000


def test_descriptors_reach_only_who_asked(ends: tuple[Wire, Wire]) -> None:
    one, two = ends
    before = len(os.listdir("/proc/self/fd"))
    read, write = os.pipe()
    one.send({"fds": 1}, fds=[read])
    assert two.receive(1) == {"fds": 1}
    (fd,) = two.take_fds(1)
    os.write(write, b"through")
    assert os.read(fd, 10) == b"through"
    two.send({"unwanted": True}, fds=[read])
    assert one.receive(1) == {"unwanted": True}
    assert not one.fds
    for number in (fd, read, write):
        os.close(number)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">II", MAX_JSON + 1, 0),
        struct.pack(">II", 2, 1 << 31),
        struct.pack(">II", 4, 0) + b"nope",
        struct.pack(">II", 2, 0) + b"[]",
        struct.pack(">II", 200_000, 0) + b"[" * 200_000,
        struct.pack(">II", 3, 0) + b"\xff\xfe\xfd",
    ],
)
def test_garbage_is_an_error(ends: tuple[Wire, Wire], raw: bytes) -> None:
    one, two = ends
    one.sock.sendall(raw)
    with pytest.raises(WireError):
        two.receive(1)


def test_end_in_the_middle(ends: tuple[Wire, Wire]) -> None:
    one, two = ends
    one.sock.sendall(struct.pack(">II", 100, 0) + b"{")
    one.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(WireError, match="middle"):
        two.receive(1)


def test_end_between_messages(ends: tuple[Wire, Wire]) -> None:
    one, two = ends
    one.send({"last": 1})
    one.close()
    assert two.receive(1) == {"last": 1}
    assert two.receive(1) is None
    with pytest.raises(WireError, match="gone"):
        two.send({"a": "x" * 1_000_000})
