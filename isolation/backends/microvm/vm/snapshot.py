"""Saved machines on disk: a directory with the memory (sparse), the devices' state, and what both depend on.

QEMU promises nothing between versions or hosts for this kind of machine (QEMU: docs/system/i386/microvm), so a snapshot is
refused unless everything is as it was.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import shutil
import stat
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isolation.backends.microvm.vm import memory, qemu
from isolation.backends.microvm.vm.qemu import Hardware
from isolation.backends.microvm.vm.vm import STATE_AT_MOST, State
from isolation.errors import LaunchError
from isolation.plain import json

_FORMAT = 2
_NAMES = {
    "format": "was written by another version of isolation-kit",
    "qemu": "was saved by another QEMU",
    "hardware": "has other hardware",
    "kernel": "has another kernel",
    "initramfs": "has another agent, or was saved by another Python",
    "layers": "was made with other system files or another Python environment",
    "trees": "was made with other content of the mounted directories",
    "python": "was made with another Python",
    "host": "was saved on another kind of host (processor, or its clock rate)",
    "payload": "holds another payload",
}
_BLOCK = 1 << 16
_ABOUT_AT_MOST = 16 << 20  # bytes of snapshot.json
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not keep anybody


class SnapshotError(LaunchError):
    """A snapshot that cannot be used here; the message says why, and it is best made again."""


@dataclass(frozen=True)
class Key:
    """What a saved machine depends on, by name."""

    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(
        cls,
        hardware: Hardware,
        kernel: str,
        initramfs: str,
        layers: Sequence[str],
        python: str,
        trees: Sequence[str] = (),
        payload: str = "",
    ) -> Key:
        parts = {
            "format": str(_FORMAT),
            "qemu": qemu.find().identity,
            "hardware": json.dumps(asdict(hardware), sort_keys=True),
            "kernel": kernel,
            "initramfs": initramfs,
            "layers": " ".join(layers),
            "trees": " ".join(trees),
            "python": python,
            "host": _host(hardware.accel),
            "payload": payload,
        }
        return cls(tuple(parts.items()))

    @property
    def digest(self) -> str:
        """A name for the cache."""
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:32]

    def differs_from(self, parts: dict[str, str]) -> str:
        """Why a snapshot with these parts cannot be used; "" if it can."""
        return "; ".join(why for name, why in _NAMES.items() if dict(self.parts).get(name) != parts.get(name))


@dataclass(frozen=True)
class Snapshot:
    """A saved machine, and what it depends on."""

    state: State
    key: Key

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write it to a new directory, for this user only: it holds all that was in the machine's memory.

        Raises SnapshotError; nothing is left then.
        """
        path = Path(directory)
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise SnapshotError(f"the snapshot could not be written to {path}: {error.strerror}") from error
        try:
            (path / "devices").write_bytes(self.state.devices)
            fd = os.open(path / "memory", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, self.state.hardware.memory)
                check = _copy(self.state.memory, fd)
            finally:
                os.close(fd)
            about = {
                "key": dict(self.key.parts),
                "mark": self.state.mark.hex(),
                "devices": zlib.crc32(self.state.devices),
                "memory": check,
            }
            (path / "snapshot.json").write_text(json.dumps(about), encoding="ascii")
        except BaseException as error:
            shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError):
                raise SnapshotError(f"the snapshot could not be written to {path}: {error.strerror}") from error
            raise

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, key: Key, drives: Sequence[int]) -> Snapshot:
        """Read it back; its drives are given anew. Raises SnapshotError, with the reason, if it does not fit."""
        path = Path(directory)
        try:
            _check_owner(path)
            about: Any = json.loads(_read(path / "snapshot.json", _ABOUT_AT_MOST))
            saved = {str(name): str(value) for name, value in about["key"].items()}
            if why := key.differs_from(saved):
                raise SnapshotError(f"the snapshot in {path} {why}; make it again")
            # The key holds the hardware, too, and that is known to be as it should.
            hardware = Hardware(**json.loads(saved["hardware"]))
            mark = bytes.fromhex(about["mark"])
            checks = [int(about["devices"]), int(about["memory"])]
            devices = _read(path / "devices", STATE_AT_MOST)
            source = os.open(path / "memory", _READ)
        except FileNotFoundError as error:
            raise SnapshotError(f"there is no snapshot in {path} ({error.filename} is missing)") from error
        except OSError as error:
            raise SnapshotError(f"the snapshot in {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SnapshotError(f"the snapshot in {path} is damaged ({error}); make it again") from error
        try:
            status = os.fstat(source)
            whole = stat.S_ISREG(status.st_mode) and status.st_size == hardware.memory and len(mark) == 16
            if not whole or zlib.crc32(devices) != checks[0]:
                raise SnapshotError(f"the snapshot in {path} is damaged; make it again")
            ram = memory.empty(hardware.memory)
            try:
                if _copy(source, ram) != checks[1]:
                    raise SnapshotError(f"the snapshot in {path} is damaged; make it again")
                memory.seal(ram)
            except BaseException:
                os.close(ram)
                raise
        except OSError as error:
            raise SnapshotError(f"the snapshot in {path} cannot be read: {error.strerror}") from error
        finally:
            os.close(source)
        return cls(State(hardware, ram, devices, tuple(drives), mark), key)


def _check_owner(path: Path) -> None:
    """What is in it becomes the memory of machines, and QEMU's own: only who could change those may have written it."""
    status = os.stat(path)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise SnapshotError(f"the snapshot in {path} can be written by other users; chmod go-w, or make it again")


def _read(path: Path, most: int) -> bytes:
    with open(os.open(path, _READ), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path.name} is not a file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path.name} is too large")
    return data


def _copy(source: int, target: int) -> int:
    """Copy what is allocated; returns a checksum, which finds damage, not malice.

    It is over blocks that are not wholly zeros, and where they lie: file systems differ in which holes they keep.
    """
    size = os.fstat(source).st_size
    check = position = 0
    last = -1  # the last block in the checksum
    with mmap.mmap(source, size, prot=mmap.PROT_READ) as pages, memoryview(pages) as view:
        while position < size:
            try:
                begin = os.lseek(source, position, os.SEEK_DATA)
            except OSError:
                break  # ENXIO: only a hole is left
            position = os.lseek(source, begin, os.SEEK_HOLE)
            for number in range(begin // _BLOCK, -(-position // _BLOCK)):
                start = number * _BLOCK
                with view[start : start + _BLOCK] as block:
                    if block == _ZEROS[: len(block)]:
                        continue
                    if number > last:
                        check = zlib.crc32(block, check ^ number)
                        last = number
                with view[max(start, begin) : min(start + _BLOCK, position)] as part:
                    os.pwrite(target, part, max(start, begin))
    return check


_ZEROS = bytes(_BLOCK)


@functools.cache
def _host(accel: str) -> str:
    if accel == "tcg":
        return f"tcg {qemu.tsc_khz()}"
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = {line.strip() for line in file if line.startswith(("model name", "flags", "Features", "microcode"))}
    return f"{accel} {hashlib.sha256(' '.join(sorted(lines)).encode()).hexdigest()[:16]}"
