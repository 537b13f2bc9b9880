"""What a kernel exports is bounded in all, takes no more room than inside, and holds up nothing."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from isolation_kernel.export import Copy, Partial, Room
from kernel.frontend import Kernel

from isolation.errors import GuestError

Kernels = Callable[..., Kernel]

pytestmark = pytest.mark.once("user")


def copied(data: bytes, target: Path, room: Room) -> int:
    copy = Copy(io.BytesIO(data), Partial(str(target), room))
    while (size := copy.go_on()) is None:
        pass
    return size


@pytest.mark.parametrize(
    "data", [b"", b"x", bytes(3 << 20), b"x" * 70_000 + bytes(200_000) + b"y", bytes(100_000) + b"z" * 5]
)
def test_it_is_the_same_file(tmp_path: Path, data: bytes) -> None:
    assert copied(data, tmp_path / "x", Room()) == len(data)
    assert (tmp_path / "x").read_bytes() == data
    assert os.listdir(tmp_path) == ["x"]


def test_zeros_take_no_room(tmp_path: Path) -> None:
    room = Room(in_all=1 << 20)
    for number in range(10):
        copied(bytes(8 << 20), tmp_path / str(number), room)
    assert sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512 < 1 << 20


def test_there_is_an_end_of_it(tmp_path: Path) -> None:
    room = Room(in_all=150_000, each=100_000)
    copied(b"x" * 100_000, tmp_path / "a", room)
    with pytest.raises(GuestError, match="all exports of one kernel"):
        copied(b"x" * 100_000, tmp_path / "b", room)
    with pytest.raises(GuestError, match="is all that one may"):
        copied(b"x", tmp_path / "c", room)
    with pytest.raises(GuestError, match="larger than"):
        copied(b"x" * 100_001, tmp_path / "d", Room(each=100_000))
    many = Room()
    for _ in range(1000):
        copied(b"", tmp_path / "e", many)
    with pytest.raises(GuestError, match="1000 files"):
        copied(b"", tmp_path / "f", many)
    assert sorted(os.listdir(tmp_path)) == ["a", "e"]


def test_a_target_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Partial(str(tmp_path / "no/x"), Room())


def test_a_kernel_answers_while_it_exports(kernels: Kernels, tmp_path: Path) -> None:
    """Its relay, and the clock of its cells, are the same process's."""
    (tmp_path / "out").mkdir()
    kernel = kernels("argv", "--export", str(tmp_path / "out"))
    kernel.run("open('big', 'wb').write(__import__('os').urandom(1 << 20) * 700)")
    sent = kernel.send("%isolation export big")
    answers = 0
    while not (tmp_path / "out/big").exists():
        began = time.monotonic()
        assert kernel.control("kernel_info_request", {})["status"] == "ok"
        answers += 1
        assert time.monotonic() - began < 60
    assert kernel.collect(sent).status == "ok"
    assert answers > 1
    assert (tmp_path / "out/big").stat().st_size == 700 << 20


def test_caches_are_counted_and_not_listed(kernels: Kernels) -> None:
    kernel = kernels("argv")
    kernel.run(
        "import os\nfor name in ('.cache/fontconfig', 'src/__pycache__'):\n"
        "    os.makedirs(os.path.expanduser(f'~/{name}'), exist_ok=True); open(os.path.expanduser(f'~/{name}/x'), 'w').close()\n"
        "open('/tmp/mine', 'w').close()"
    )
    told = kernel.run("%isolation changes").text
    assert "/tmp/mine" in told
    assert "fontconfig" not in told
    assert "__pycache__" not in told
    assert " in caches)" in told
