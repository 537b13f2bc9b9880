"""JSON that nobody replaces, beside Python's own; and the copies of modules."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
from typing import Any

import pytest

from isolation import plain

pytestmark = pytest.mark.once
VALUES = [
    None, True, 1.5, float("inf"), "é\ud800\n\"\\", [1, [2, {"a": {}}]], {"a": 1, "b": [None]}, {2: 1, None: 3, True: 4, 1.5: 5},
    (1, 2), {}, [], "", {"b": [1, {"x": 2}], "a": 1},
]  # fmt: skip
WAYS: list[dict[str, Any]] = [
    {}, {"indent": 1}, {"indent": 2}, {"separators": (",", ":")}, {"default": repr}, {"skipkeys": True}, {"allow_nan": True},
    {"ensure_ascii": False}, {"ensure_ascii": False, "indent": 1},
]  # fmt: skip
BAD = ["", " ", "[1", "{", "1 2", "nul", "[1,]", '"\x01"', b"\xff", "[" * 100_000]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_the_same_as_python_s_json(value: Any, way: dict[str, Any]) -> None:
    assert plain.json.dumps(value, **way) == json.dumps(value, **way)
    assert repr(plain.json.loads(json.dumps(value, **way))) == repr(json.loads(json.dumps(value, **way)))


def test_keys_in_their_order() -> None:
    assert plain.json.dumps({"b": 1, "a": 2}, sort_keys=True) == '{"a": 2, "b": 1}'


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[:8]))
def test_what_is_no_json(text: str | bytes) -> None:
    with pytest.raises((ValueError, RecursionError)) as expected:
        json.loads(text)
    with pytest.raises(expected.type) as found:
        plain.json.loads(text)
    assert str(found.value) == str(expected.value)


def test_what_json_does_not_have() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for value, error in ((circle, ValueError), (object(), TypeError), ({(1, 2): 3}, TypeError), ({1, 2}, TypeError)):
        with pytest.raises(error):
            plain.json.dumps(value)
    with pytest.raises(ValueError, match="Out of range"):
        plain.json.dumps(float("nan"), allow_nan=False)
    assert plain.json.dumps({(1, 2): 3, "a": 4}, skipkeys=True) == '{"a": 4}'


def test_modules_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(select, "poll", None)
    one, other = plain.socket.socketpair()
    with one, other:
        one.send(b"x")
        poller = plain.select.poll()
        poller.register(other, select.POLLIN)
        assert poller.poll(0)


def test_descriptors_are_sent_while_others_have_many_on_their_way() -> None:
    """As an ordinary user's: for real root there is no such limit."""
    code = """
import os, resource, sys
from isolation.plain import socket
if os.geteuid() == 0:
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
one, other = socket.socketpair()
more, its_other = socket.socketpair()
for end in (one, more):
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
for _ in range(20):
    socket.send_fds(one, [b"x"], [0] * 100)
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    more.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"\\0\\0\\0\\0")])
except OSError as error:
    print(error.strerror)
socket.send_fds(more, [b"x"], [0])
print(len(socket.recv_fds(its_other, 1, 1)[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout.splitlines() == ["Too many references: cannot splice", "1 1000"], done.stderr
