"""QMP, with a QEMU that was taken over: nonsense and silence are errors, in bounded time and memory."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from isolation.backends.microvm.vm import vm as vms
from isolation.backends.microvm.vm.qmp import Qmp, QmpError
from isolation.backends.microvm.vm.vm import Vm
from isolation.errors import LaunchError

pytestmark = pytest.mark.once


@pytest.fixture
def ends() -> Iterator[tuple[Qmp, socket.socket]]:
    ours, theirs = socket.socketpair()
    qmp = Qmp(ours)
    yield qmp, theirs
    qmp.close()
    theirs.close()


def flood(theirs: socket.socket, data: bytes) -> None:
    def run() -> None:
        try:
            while True:
                theirs.sendall(data)
        except OSError:
            pass

    threading.Thread(target=run, daemon=True).start()


def test_answers_and_events(ends: tuple[Qmp, socket.socket]) -> None:
    qmp, theirs = ends
    theirs.sendall(
        b'{"QMP": {}}\n{"return": {}}\n{"event": "RESUME"}\n{"return": {"status": "ok"}}\n{"error": {"desc": "bad\\u001b[2J"}}\n'
    )
    qmp.wait_for("RESUME", 10)
    assert qmp.answer(10) == {}
    assert qmp.execute("query-x") == {"status": "ok"}
    with pytest.raises(QmpError, match=r"refused: bad\?\[2J$"):
        qmp.answer(10)
    assert json.loads(theirs.recv(1000)) == {"execute": "query-x"}


def test_a_descriptor_goes_along(ends: tuple[Qmp, socket.socket]) -> None:
    qmp, theirs = ends
    reader, writer = os.pipe()
    qmp.send("getfd", {"fdname": "x"}, fd=writer)
    _data, fds, _flags, _address = socket.recv_fds(theirs, 1000, 1)
    os.write(fds[0], b"through")
    assert os.read(reader, 100) == b"through"
    for fd in (reader, writer, *fds):
        os.close(fd)


@pytest.mark.parametrize(
    "said",
    [
        b"{]}\n",
        b"[]\n",
        b"5\n",
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
        b'{"error": "text"}\n',
        b'{"error": []}\n',
        b'{"error": {}}\n',
    ],
)
def test_nonsense(ends: tuple[Qmp, socket.socket], said: bytes) -> None:
    qmp, theirs = ends
    threading.Thread(target=theirs.sendall, args=(said,), daemon=True).start()
    with pytest.raises(QmpError):
        qmp.answer(10)


def test_silence(ends: tuple[Qmp, socket.socket]) -> None:
    qmp, _theirs = ends
    with pytest.raises(QmpError, match="does not answer"):
        qmp.wait_for("RESUME", 0.1)
    with pytest.raises(QmpError, match="does not answer"):
        qmp.answer(0.1)


@pytest.mark.parametrize("said", [b'{"event": "X"}\n', b'{"return": 1}\n', b"x" * 1000])
def test_floods(ends: tuple[Qmp, socket.socket], said: bytes) -> None:
    qmp, theirs = ends
    flood(theirs, said)
    with pytest.raises(QmpError):
        qmp.wait_for("RESUME", 0.5)
    assert len(qmp._kept) < 1000


def test_the_end(ends: tuple[Qmp, socket.socket]) -> None:
    qmp, theirs = ends
    theirs.close()
    with pytest.raises(QmpError, match="gone"):
        qmp.answer(10)
    with pytest.raises(QmpError, match="gone"):
        qmp.send("x")
    qmp.close()
    with pytest.raises(QmpError, match="gone"):
        qmp.answer(10)


def test_a_qemu_that_does_not_read(ends: tuple[Qmp, socket.socket]) -> None:
    qmp, _theirs = ends

    def send() -> None:
        for _ in range(100_000):
            qmp.send("x" * 1000)

    with pytest.raises(QmpError):
        send()


@pytest.mark.parametrize(
    ("status", "match"),
    [
        (b'{"return": {"status": "active"}}\n', "active"),
        (b'{"return": []}\n', "nothing"),
        (b'{"return": {"status": "\\u001b"}}\n', r"'\?'"),
    ],
)
def test_saving_with_a_qemu_that_lies(monkeypatch: pytest.MonkeyPatch, status: bytes, match: str) -> None:
    monkeypatch.setattr(vms, "_SAVE_PATIENCE", 0.5)
    ours, theirs = socket.socketpair()
    vm = Vm.__new__(Vm)
    vm._unanswered, vm.qmp = 0, Qmp(ours)

    def lie() -> None:
        try:
            for _ in range(3):
                theirs.recv(1000)
                theirs.sendall(b'{"return": {}}\n')
            while data := theirs.recv(1000):
                theirs.sendall(b'{"return": {}}\n' if b'"migrate"' in data else status)
        except OSError:
            pass

    thread = threading.Thread(target=lie, daemon=True)
    thread.start()
    with pytest.raises(LaunchError, match=match):
        vm._migrate()
    vm.qmp.close()
    thread.join(10)
    theirs.close()
