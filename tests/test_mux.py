"""Many streams over one: none keeps another waiting, and what is no frame ends the conversation."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from isolation.mux import WINDOW, Mux, MuxError

pytestmark = pytest.mark.once

DATA, END, CREDIT, REFUSE = range(4)


def frame(kind: int, number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">BII", kind, number, len(data) if length is None else length) + data


class Pair:
    """Two ends, moved by turns."""

    def __init__(self) -> None:
        self.socks = socket.socketpair()
        for sock in self.socks:
            sock.setblocking(False)
        self.a, self.b = (Mux(sock.fileno()) for sock in self.socks)

    def move(self, until: Callable[[], object] = lambda: False, rounds: int = 400) -> None:
        for _ in range(rounds):
            if until():
                return
            self.a.step(0)
            self.b.step(0)

    def close(self) -> None:
        self.a.close()
        self.b.close()
        for sock in self.socks:
            sock.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


class Raw:
    """A mux, and a socket in place of its other end."""

    def __init__(self) -> None:
        ours, self.other = socket.socketpair()
        ours.setblocking(False)
        self.ours = ours
        self.mux = Mux(ours.fileno())
        self.got = bytearray()
        self.mux.open(1, deliver=self.got.extend)

    def say(self, data: bytes) -> None:
        self.other.sendall(data)
        self.mux.step(0)

    def close(self) -> None:
        self.mux.close()
        self.ours.close()
        self.other.close()


@pytest.fixture
def raw() -> Iterator[Raw]:
    made = Raw()
    yield made
    made.close()


def pipe(*, blocking: bool = False) -> tuple[int, int]:
    reader, writer = os.pipe()
    os.set_blocking(reader, blocking)
    os.set_blocking(writer, blocking)
    return reader, writer


def read_all(fd: int) -> bytes:
    data = b""
    try:
        while part := os.read(fd, 1 << 16):
            data += part
    except BlockingIOError:
        pass
    return data


def test_bytes_and_ends_arrive(pair: Pair) -> None:
    source, into = pipe()
    out, sink = pipe()
    ended: list[str] = []
    pair.a.open(1, source=source, ended=lambda: ended.append("a"))
    pair.b.open(1, sink=sink, ended=lambda: ended.append("b"))
    os.write(into, b"hello")
    os.close(into)
    pair.move(lambda: len(ended) == 2)
    assert sorted(ended) == ["a", "b"]
    assert os.read(out, 100) == b"hello"
    assert os.read(out, 100) == b""
    assert pair.a.stream(1) is None
    os.close(out)


def test_a_stream_that_nobody_reads_blocks_no_other_and_holds_no_more_than_its_window(pair: Pair) -> None:
    stuck_source, stuck_into = pipe()
    stuck_out, stuck_sink = pipe()
    pair.a.open(1, source=stuck_source)
    pair.b.open(1, sink=stuck_sink)
    got = bytearray()
    pair.a.open(2, deliver=lambda _data: None)
    pair.b.open(2, deliver=got.extend)
    sent = 0
    for _ in range(300):
        try:
            sent += os.write(stuck_into, bytes(1 << 16))
        except BlockingIOError:
            pass
        pair.move(rounds=1)
    stream = pair.b.stream(1)
    assert stream is not None
    assert sent <= WINDOW + 3 * (1 << 16)  # its window, and three pipes
    assert len(stream.arrived) <= WINDOW
    pair.a.write(2, b"x" * (WINDOW * 3))
    pair.move(lambda: len(got) == WINDOW * 3)
    assert len(got) == WINDOW * 3
    rest = bytearray()
    pair.move(lambda: rest.extend(read_all(stuck_out)) or len(rest) == sent)
    assert len(rest) == sent  # and goes on when somebody reads
    os.close(stuck_into)
    os.close(stuck_out)


def test_blocking_sinks_are_not_blocked_on(pair: Pair) -> None:
    out, sink = pipe(blocking=True)
    pair.a.open(1, deliver=lambda _data: None)
    pair.b.open(1, sink=sink)
    pair.a.write(1, bytes(200 << 10))
    done = threading.Event()

    def move() -> None:
        pair.move(rounds=60)
        done.set()

    thread = threading.Thread(target=move, daemon=True)
    thread.start()
    thread.join(30)
    assert done.is_set()
    os.set_blocking(out, False)
    assert read_all(out)
    os.close(out)


def test_refused_when_the_reader_is_gone(pair: Pair) -> None:
    source, into = pipe()
    out, sink = pipe()
    os.close(out)
    pair.a.open(1, source=source)
    pair.b.open(1, sink=sink)
    os.write(into, b"for nobody")
    pair.move(lambda: pair.a.stream(1) is None and pair.b.stream(1) is None)
    assert pair.a.stream(1) is None
    assert pair.b.stream(1) is None
    with pytest.raises(BrokenPipeError):
        os.write(into, b"x")
    os.close(into)


def test_half_closed_sockets(pair: Pair) -> None:
    """The same descriptor as source and sink: an end in one direction is not one in the other."""
    left, its_left = socket.socketpair()
    right, its_right = socket.socketpair()
    for mux, sock in ((pair.a, its_left), (pair.b, its_right)):
        sock.setblocking(False)
        fd = sock.detach()
        mux.open(1, source=fd, sink=fd)
    left.sendall(b"question")
    left.shutdown(socket.SHUT_WR)
    right.setblocking(False)
    pair.move(rounds=20)
    assert right.recv(100) == b"question"
    assert right.recv(100) == b""
    right.setblocking(True)
    right.sendall(b"answer")
    right.close()
    pair.move(lambda: pair.a.stream(1) is None and pair.b.stream(1) is None)
    assert left.recv(100) == b"answer"
    assert left.recv(100) == b""
    assert pair.a.stream(1) is None
    left.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 100,
        frame(4, 1),
        frame(DATA, 1, length=(32 << 10) + 1),
        frame(DATA, 1, length=0xFFFFFFFF),
        frame(DATA, 2, b"x"),
        frame(CREDIT, 0xFFFFFFFF, b"\0\0\0\1"),
        frame(CREDIT, 1, b"\1"),
        frame(CREDIT, 1, b"\0\0\0\0\1"),
        frame(CREDIT, 1),
    ],
)
def test_garbage_is_an_error(raw: Raw, garbage: bytes) -> None:
    with pytest.raises(MuxError):
        raw.say(garbage)


def test_a_frame_in_pieces(raw: Raw) -> None:
    for byte in frame(DATA, 1, b"hello") + frame(DATA, 1) + frame(DATA, 1, b"!"):
        raw.say(bytes([byte]))
    assert raw.got == b"hello!"


def test_an_end_in_the_middle_of_a_frame(raw: Raw) -> None:
    raw.say(frame(DATA, 1, b"hello", length=100))
    raw.other.close()
    with pytest.raises(MuxError, match="gone"):
        raw.mux.step(0)
    assert raw.got == b""


def test_overdrawn_credit_is_an_error(raw: Raw) -> None:
    out, sink = pipe()
    raw.mux.open(2, sink=sink)
    flood = frame(DATA, 2, bytes(32 << 10))

    def say_it_all() -> None:
        for _ in range(2 * WINDOW // len(flood)):
            raw.say(flood)

    with pytest.raises(MuxError, match="more on stream 2"):
        say_it_all()
    os.close(out)


def test_credit_beyond_the_window_is_none(raw: Raw) -> None:
    source, into = pipe()
    raw.mux.open(2, source=source)
    raw.say(frame(CREDIT, 2, b"\xff\xff\xff\xff") * 100)
    stream = raw.mux.stream(2)
    assert stream is not None
    assert stream.credit == WINDOW
    os.close(into)


def test_data_after_the_end(raw: Raw) -> None:
    """Of a stream that holds bytes yet it is an error; one that is over hears nothing."""
    out, sink = pipe()
    raw.mux.open(2, sink=sink)
    raw.say(frame(DATA, 2, bytes(32 << 10)) * 4 + frame(END, 2))
    with pytest.raises(MuxError):
        raw.say(frame(DATA, 2, b"x"))
    os.close(out)
    raw.mux.open(3, deliver=lambda _data: None)
    raw.mux._in.clear()
    raw.say(frame(END, 3) + frame(DATA, 3, b"x") + frame(END, 3) + frame(REFUSE, 3) + frame(REFUSE, 3) + frame(END, 3))
    assert raw.mux.stream(3) is None


def test_what_comes_for_a_stream_that_is_over_is_dropped(raw: Raw) -> None:
    raw.mux.open(5, deliver=lambda _data: None)
    raw.mux.finish(5)
    raw.say(frame(END, 5))
    assert raw.mux.stream(5) is None
    raw.say(frame(DATA, 5, b"late") + frame(DATA, 4, b"never begun") + frame(END, 5) + frame(CREDIT, 5, b"xx"))
    raw.mux.expect(9)
    raw.say(frame(DATA, 9, b"announced"))
    with pytest.raises(MuxError, match="nobody opened"):
        raw.say(frame(DATA, 10, b"x"))


def test_thousands_of_streams(pair: Pair) -> None:
    total = 3000
    got = [bytearray() for _ in range(total)]
    ended: list[int] = []
    for number in range(total):
        pair.a.open(number, deliver=lambda _data: None)
        pair.b.open(number, deliver=got[number].extend, ended=lambda number=number: ended.append(number))  # type: ignore[misc]
        pair.a.write(number, str(number).encode() * 10)
        pair.a.finish(number)
        pair.b.finish(number)
    pair.move(lambda: not pair.a._streams and not pair.b._streams, rounds=5000)
    assert all(bytes(data) == str(number).encode() * 10 for number, data in enumerate(got))
    assert sorted(ended) == list(range(total))
    assert not pair.a._streams
    assert not pair.b._streams


def test_many_busy_sources_do_not_pile_up(raw: Raw) -> None:
    """While the other end does not read, little is taken from any source, whatever credit there is."""
    pipes = [pipe() for _ in range(100)]
    for number, (source, into) in enumerate(pipes, 2):
        os.write(into, bytes(60 << 10))
        raw.mux.open(number, source=source)
    for _ in range(20):
        raw.mux.step(0)
    assert raw.mux.unsent < 512 << 10
    for _source, into in pipes:
        os.close(into)


def test_urgent_streams_wait_for_no_credit(raw: Raw) -> None:
    raw.mux.open(2, deliver=lambda _data: None, urgent=True)
    raw.mux.open(3, deliver=lambda _data: None)
    raw.mux.write(2, bytes(2 * WINDOW))
    raw.mux.write(3, bytes(2 * WINDOW))
    assert 2 * WINDOW <= raw.mux.unsent - WINDOW < 2 * WINDOW + 10_000
    stream = raw.mux.stream(3)
    assert stream is not None
    assert len(stream.queued) == WINDOW


def test_patient_ends_outlive_the_other(raw: Raw) -> None:
    patient = Mux(raw.ours.fileno(), patient=True)
    raw.other.close()
    for _ in range(3):
        patient.step(0)
    patient.raw(b"x")
    patient.step(0)
    assert not patient.idle  # kept for who comes back
    with pytest.raises(MuxError):
        raw.mux.step(0)


def test_restart(pair: Pair) -> None:
    """One end is replaced: what was under way is gone, and credit is as in the beginning."""
    source, into = pipe()
    pair.a.open(1, source=source)
    pair.a.open(2, deliver=lambda _data: None)
    pair.b.open(1, deliver=lambda _data: None)
    os.write(into, bytes(60 << 10))
    for _ in range(4):
        pair.a.step(0)
    pair.a.write(2, bytes(WINDOW * 2))
    before = pair.a.stream(1)
    assert before is not None
    assert before.credit < WINDOW
    pair.a.restart()
    assert pair.a.idle
    assert before.credit == WINDOW
    other, theirs = socket.socketpair()
    other.setblocking(False)
    theirs.setblocking(False)
    got = bytearray()
    fresh = Mux(other.fileno())
    fresh.open(1, deliver=got.extend)
    fresh.expect(2)
    pair.a.fd = theirs.fileno()
    os.write(into, b"new")
    for _ in range(4):
        pair.a.step(0)
        fresh.step(0)
    assert got == b"new"
    for sock in (other, theirs):
        sock.close()
    os.close(into)


def test_marks(pair: Pair) -> None:
    source, into = pipe()
    pair.a.open(1, source=source)
    out, sink = pipe()
    pair.b.open(1, sink=sink)
    os.write(into, b"12345")
    marks = pair.a.marks([1, 7])
    assert marks == {1: 5}
    assert not pair.a.reached(marks)
    pair.move(rounds=3)
    os.write(into, b"later")
    assert pair.a.reached(marks)
    assert pair.a.reached({7: 100})  # a stream that is over
    assert pair.b.passed_on([1, 7])
    os.close(into)
    os.close(out)


def test_a_descriptor_number_that_was_closed_and_used_again(raw: Raw) -> None:
    """What poll(2) said of the old one is not believed of the new one, which blocks."""
    source, into = pipe()
    raw.mux.open(2, source=source)
    os.write(into, b"x")
    new_reader, new_writer = pipe(blocking=True)
    opened: list[int] = []

    def swap(_data: bytes) -> None:
        stream = raw.mux.stream(2)
        assert stream is not None
        raw.mux._stop_sending(stream)
        os.dup2(new_reader, source)
        os.close(new_reader)
        raw.mux.open(4, source=source)
        opened.append(source)

    raw.mux.open(3, deliver=swap)
    thread = threading.Thread(target=raw.say, args=(frame(DATA, 3, b"now"),), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert opened == [source]
    os.close(into)
    os.close(new_writer)


def test_a_descriptor_that_somebody_else_closed_ends_its_stream_only(raw: Raw) -> None:
    source, into = pipe()
    raw.mux.open(2, source=source)
    os.close(source)
    raw.mux.step(0.05)
    assert raw.mux.stream(2) is None
    raw.say(frame(DATA, 1, b"alive"))
    assert raw.got == b"alive"
    os.close(into)


def test_extra_descriptors(raw: Raw) -> None:
    reader, writer = pipe()
    assert raw.mux.step(0, [reader]) == set()
    os.write(writer, b"x")
    assert raw.mux.step(5, [reader]) == {reader}
    os.close(writer)
    os.close(reader)
    with pytest.raises(MuxError, match="open already"):
        raw.mux.open(1)
