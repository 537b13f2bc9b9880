"""Saved machines on disk: a directory with the memory (sparse), the devices' state, and what both depend on.

QEMU promises nothing between versions or hosts for this kind of machine (QEMU: docs/system/i386/microvm), so a snapshot is
refused unless everything is as it was.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isolation.backends.microvm import memory, qemu
from isolation.backends.microvm.qemu import Hardware
from isolation.backends.microvm.vm import State
from isolation.errors import LaunchError

_FORMAT = 1
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
_CHUNK = 4 << 20


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
        """Write it to a new directory, for this user only: it holds all that was in the machine's memory. Raises LaunchError."""
        path = Path(directory)
        try:
            path.mkdir(mode=0o700)
            (path / "devices").write_bytes(self.state.devices)
            fd = os.open(path / "memory", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, self.state.hardware.memory)
                check = _copy(self.state.memory, fd)
            finally:
                os.close(fd)
            about = {
                "key": dict(self.key.parts),
                "hardware": asdict(self.state.hardware),
                "mark": self.state.mark.hex(),
                "devices": zlib.crc32(self.state.devices),
                "memory": check,
            }
            (path / "snapshot.json").write_text(json.dumps(about), encoding="ascii")
        except OSError as error:
            raise SnapshotError(f"the snapshot could not be written to {path}: {error.strerror}") from error

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, key: Key, drives: Sequence[int]) -> Snapshot:
        """Read it back; its drives are given anew. Raises SnapshotError, with the reason, when it does not fit or is damaged."""
        path = Path(directory)
        try:
            about: Any = json.loads((path / "snapshot.json").read_text(encoding="ascii"))
            saved = {str(name): str(value) for name, value in about["key"].items()}
            if why := key.differs_from(saved):
                raise SnapshotError(f"the snapshot in {path} {why}; make it again")
            hardware = Hardware(**about["hardware"])
            devices = (path / "devices").read_bytes()
            mark = bytes.fromhex(about["mark"])
            source = os.open(path / "memory", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise SnapshotError(f"there is no snapshot in {path} ({error.filename} is missing)") from error
        except OSError as error:
            raise SnapshotError(f"the snapshot in {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SnapshotError(f"the snapshot in {path} is damaged ({error}); make it again") from error
        try:
            ram = memory.empty(hardware.memory)
            try:
                whole = os.fstat(source).st_size == hardware.memory and len(mark) == 16
                if not whole or _copy(source, ram) != about["memory"] or zlib.crc32(devices) != about["devices"]:
                    raise SnapshotError(f"the snapshot in {path} is damaged; make it again")
                memory.seal(ram)
            except BaseException:
                os.close(ram)
                raise
        finally:
            os.close(source)
        return cls(State(hardware, ram, devices, tuple(drives), mark), key)


def _copy(source: int, target: int) -> int:
    """Copy what is allocated; returns a checksum over it and where it lay, which finds damage, not malice."""
    size = os.fstat(source).st_size
    check = position = 0
    with mmap.mmap(source, size, prot=mmap.PROT_READ) as pages, memoryview(pages) as view:
        while position < size:
            try:
                begin = os.lseek(source, position, os.SEEK_DATA)
            except OSError:
                break  # ENXIO: only a hole is left
            position = os.lseek(source, begin, os.SEEK_HOLE)
            while begin < position:
                end = min(begin + _CHUNK, position)
                with view[begin:end] as part:
                    # Blocks of zeros are skipped, since a file system may keep other holes than memory has.
                    for place in range(0, end - begin, 1 << 16):
                        with part[place : place + (1 << 16)] as block:
                            if block != _ZEROS[: len(block)]:
                                check = zlib.crc32(block, check ^ ((begin + place) >> 16))
                                os.pwrite(target, block, begin + place)
                begin = end
    return check


_ZEROS = bytes(1 << 16)


@functools.cache
def _host(accel: str) -> str:
    if accel == "tcg":
        return f"tcg {qemu.tsc_khz()}"
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = {line.strip() for line in file if line.startswith(("model name", "flags", "Features", "microcode"))}
    return f"{accel} {hashlib.sha256(' '.join(sorted(lines)).encode()).hexdigest()[:16]}"
