"""Machines on disk: nothing is believed that does not fit, and each refusal says why. Without any machine."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isolation.backends.microvm.vm import memory, qemu, snapshot
from isolation.backends.microvm.vm.qemu import Hardware, Qemu
from isolation.backends.microvm.vm.snapshot import Key, Snapshot, SnapshotError
from isolation.backends.microvm.vm.vm import State
from isolation.errors import LaunchError

pytestmark = pytest.mark.once

SIZE = 8 << 20
HARDWARE = Hardware("microvm", "tcg", SIZE, 1, 1, 0)


@pytest.fixture(autouse=True)
def _no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "find", lambda: Qemu("/bin/qemu", (7, 2, 0), "qemu 7.2"))


def key(**changes: object) -> Key:
    fields = {
        "hardware": HARDWARE,
        "kernel": "k",
        "initramfs": "i",
        "layers": ["l"],
        "python": "p",
        "trees": ["t"],
        "payload": "x",
    }
    return Key.of(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    fd = memory.empty(SIZE)
    for place in (4096, 100_000, 1 << 20, SIZE - 5000):  # not where blocks begin
        os.pwrite(fd, os.urandom(4096), place)
    memory.seal(fd)
    Snapshot(State(HARDWARE, fd, b"devices" * 1000, (), bytes(16)), key()).save(tmp_path / "s")
    shutil.copyfile(f"/proc/self/fd/{fd}", tmp_path / "original")
    os.close(fd)
    before = len(os.listdir("/proc/self/fd"))
    yield tmp_path / "s"
    assert len(os.listdir("/proc/self/fd")) == before


def load(path: Path, wanted: Key | None = None) -> Snapshot:
    return Snapshot.load(path, key=wanted or key(), drives=())


def test_round_trip(saved: Path, tmp_path: Path) -> None:
    found = load(saved)
    assert found.state.devices == b"devices" * 1000
    assert Path(f"/proc/self/fd/{found.state.memory}").read_bytes() == (tmp_path / "original").read_bytes()
    assert os.fstat(found.state.memory).st_blocks * 512 < SIZE // 2
    assert fcntl.fcntl(found.state.memory, fcntl.F_GET_SEALS) == 0xF
    found.state.close()


def test_it_is_for_its_user_only(saved: Path) -> None:
    assert saved.stat().st_mode & 0o777 == 0o700
    assert (saved / "memory").stat().st_mode & 0o777 == 0o600
    assert (saved / "memory").stat().st_blocks * 512 < SIZE // 2


def test_a_file_system_without_holes(saved: Path) -> None:
    """What was a hole may come back as zeros."""
    data = (saved / "memory").read_bytes()
    (saved / "memory").write_bytes(data)
    load(saved).state.close()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kernel": "other"}, "another kernel"),
        ({"initramfs": "other"}, "another agent"),
        ({"layers": ["other"]}, "other system files"),
        ({"trees": ["other"]}, "mounted directories"),
        ({"python": "other"}, "another Python"),
        ({"payload": "other"}, "another payload"),
        ({"hardware": dataclasses.replace(HARDWARE, memory=SIZE * 2)}, "other hardware"),
        ({"kernel": "other", "payload": "other"}, "another kernel; holds another payload"),
    ],
)
def test_what_differs_is_named(saved: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(SnapshotError, match=reason):
        load(saved, key(**changes))


def test_another_host_or_qemu(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "find", lambda: Qemu("/bin/qemu", (8, 0, 0), "qemu 8.0"))
    with pytest.raises(SnapshotError, match="another QEMU"):
        load(saved)
    monkeypatch.setattr(snapshot, "_host", lambda _accel: "another")
    with pytest.raises(SnapshotError, match="another QEMU; was saved on another kind of host"):
        load(saved)
    monkeypatch.setattr(snapshot, "_FORMAT", snapshot._FORMAT + 1)
    with pytest.raises(SnapshotError, match="another version of isolation-kit"):
        load(saved)


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def edit(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        about = json.loads((path / "snapshot.json").read_text()) | changes
        (path / "snapshot.json").write_text(json.dumps({name: value for name, value in about.items() if value != "-"}))

    return change


def replace(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(text) and None  # type: ignore[return-value]


def fifo(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path / "memory", SIZE - 4096),
        lambda path: os.truncate(path / "memory", 0),
        lambda path: os.truncate(path / "memory", SIZE * 2),
        lambda path: flip(path / "memory", 4096 + 17),
        lambda path: flip(path / "memory", SIZE // 2),  # where a hole was
        lambda path: flip(path / "devices", 30),
        lambda path: os.truncate(path / "devices", 30),
        lambda path: (path / "memory").unlink(),
        lambda path: (path / "devices").unlink(),
        lambda path: (path / "snapshot.json").unlink(),
        fifo("memory"),
        fifo("devices"),
        fifo("snapshot.json"),
        replace("snapshot.json", ""),
        replace("snapshot.json", "[]"),
        replace("snapshot.json", "{]"),
        replace("snapshot.json", "[" * 200_000),
        replace("snapshot.json", '{"key": 5}'),
        replace("snapshot.json", "\u1234"),
        edit(key={}),
        edit(key="-"),
        edit(memory="-"),
        edit(memory=[]),
        edit(memory="x"),
        edit(devices="-"),
        edit(devices={}),
        edit(mark="-"),
        edit(mark="xx"),
        edit(mark="00"),
        edit(mark=5),
    ],
)
def test_damage(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(SnapshotError, match=r"damaged|there is no snapshot|another version") as caught:
        load(saved)
    assert str(saved) in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="there is no snapshot"):
        load(tmp_path / "none")
    (tmp_path / "file").touch(mode=0o600)
    with pytest.raises(SnapshotError, match="cannot be read"):
        load(tmp_path / "file")


def test_what_others_can_write_is_refused(saved: Path) -> None:
    saved.chmod(0o777)
    with pytest.raises(SnapshotError, match="other users"):
        load(saved)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_cannot_be_read(saved: Path) -> None:
    (saved / "memory").chmod(0)
    with pytest.raises(SnapshotError, match="cannot be read"):
        load(saved)


def test_saving_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = memory.empty(SIZE)
    made = Snapshot(State(HARDWARE, fd, b"devices", (), bytes(16)), key())
    with pytest.raises(SnapshotError, match="could not be written"):
        made.save(tmp_path / "no" / "parent")
    (tmp_path / "there").mkdir()
    with pytest.raises(SnapshotError, match="could not be written"):
        made.save(tmp_path / "there")

    def full(_source: int, _target: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "_copy", full)
    with pytest.raises(SnapshotError, match="No space left"):
        made.save(tmp_path / "full")
    assert not (tmp_path / "full").exists()
    os.close(fd)


def test_sealed_memory() -> None:
    """Nobody can change it, not even who has a descriptor that is open for writing."""
    import mmap

    fd = memory.empty(SIZE)
    os.pwrite(fd, b"template", 0)
    mapped = mmap.mmap(fd, SIZE)
    with pytest.raises(LaunchError, match="cannot be sealed"):
        memory.seal(fd)
    mapped.close()
    memory.seal(fd)
    for change in (
        lambda: os.pwrite(fd, b"x", 0),
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, SIZE * 2),
        lambda: mmap.mmap(fd, SIZE),
        lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0),
        lambda: os.posix_fallocate(fd, SIZE, 4096),
    ):
        with pytest.raises(OSError):  # noqa: PT011
            change()
    private = mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE)
    private[0:4] = b"mine"
    assert os.pread(fd, 8, 0) == b"template"
    private.close()
    other = memory.empty(SIZE)
    assert memory.copy(fd, other) < SIZE // 2
    assert os.pread(other, 8, 0) == b"template"
    os.close(fd)
    os.close(other)
