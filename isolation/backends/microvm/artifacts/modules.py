"""Which kernel modules a guest needs, in the order in which they can be loaded.

The order comes from `depends=` in each module's .modinfo: a kernel that was unpacked and not installed has no modules.dep.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from isolation.backends.microvm.artifacts.deb import unzstd
from isolation.errors import LaunchError

REQUIRED = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng", "squashfs", "overlay")
OPTIONAL = ("virtio_pci", "virtio_net")  # for machine types with PCI; for a guest with a network
# What a built-in one is called in the kernel's configuration, where there is no modules.builtin to look into.
_CONFIG = {
    "overlay": "OVERLAY_FS",
    "squashfs": "SQUASHFS",
    "virtio_blk": "VIRTIO_BLK",
    "virtio_console": "VIRTIO_CONSOLE",
    "virtio_mmio": "VIRTIO_MMIO",
    "virtio_net": "VIRTIO_NET",
    "virtio_pci": "VIRTIO_PCI",
    "virtio_rng": "HW_RANDOM_VIRTIO",
}
_SUFFIX = re.compile(r"(.+)\.ko(\.xz|\.gz|\.zst)?")


@dataclass(frozen=True)
class Module:
    """name: with underscores, as the kernel says it; data: the module, decompressed."""

    name: str
    data: bytes


def collect(directory: Path | None, config: Path | None, release: str) -> list[Module]:
    """The needed modules found beneath `directory` (a /lib/modules/<release>), each after those it depends on.

    Those that are built into the kernel, by modules.builtin or its configuration, are not there and not missed; None as
    the directory means that all are. Raises LaunchError for one that is missing, or a damaged one.
    """
    if directory is None:
        return []
    files = _files(directory)
    builtin = _builtin(directory)
    configured = _configured(config)
    found: dict[str, Module] = {}

    def add(name: str, wanted_by: str, on_the_way: tuple[str, ...]) -> None:
        if name in found or name in builtin or name in on_the_way:
            return
        if name not in files:
            if _CONFIG.get(name) in configured:
                return
            reason = f", which {wanted_by} needs," if wanted_by else ""
            raise LaunchError(
                f"the kernel module {name}{reason} is not in {directory}: give a kernel that has it (as a module or "
                "built in), with 'isolation microvm setup --kernel PATH --modules DIR'"
            )
        data = _read(files[name])
        for needed in depends(data, str(files[name]), release):
            add(needed, name, (*on_the_way, name))
        found[name] = Module(name, data)

    for name in REQUIRED:
        add(name, "", ())
    for name in OPTIONAL:
        before = dict(found)
        try:
            add(name, "", ())
        except LaunchError:
            found = before
    return list(found.values())


def depends(data: bytes, name: str, release: str = "") -> list[str]:
    """The modules that a module needs, by its .modinfo; checks that it is one of kernel `release`. Raises LaunchError."""
    info = _modinfo(data, name)
    built_for = info.get("vermagic", "").split(" ")[0]
    if release and built_for and built_for != release:
        raise LaunchError(f"the module {name} is for kernel {built_for}, and the kernel is {release}")
    return [each.replace("-", "_") for each in info.get("depends", "").split(",") if each]


def _modinfo(data: bytes, name: str) -> dict[str, str]:
    try:
        if data[:5] != b"\x7fELF\x02":
            raise ValueError("it is no 64-bit ELF file")
        (shoff,) = struct.unpack_from("<Q", data, 40)
        shentsize, shnum, shstrndx = struct.unpack_from("<HHH", data, 58)
        sections = [struct.unpack_from("<IIQQQQ", data, shoff + index * shentsize) for index in range(shnum)]
        names = data[sections[shstrndx][4] :]
        for section in sections:
            at = section[0]
            if names[at : names.index(b"\0", at)] == b".modinfo":
                offset, size = section[4], section[5]
                text = data[offset : offset + size]
                if len(text) != size:
                    raise ValueError("it is cut off")
                pairs = (part.decode("utf-8", "replace").partition("=") for part in text.split(b"\0") if part)
                return {key: value for key, _, value in pairs}
        raise ValueError("it has no .modinfo")
    except (ValueError, IndexError, struct.error) as error:
        raise LaunchError(f"the kernel module {name} is damaged: {error}") from error


def _files(directory: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for parent, _, names in os.walk(directory):
        for name in names:
            match = _SUFFIX.fullmatch(name)
            if match is not None:
                found[match[1].replace("-", "_")] = Path(parent, name)
    return found


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        if path.suffix == ".xz":
            return lzma.decompress(data)
        if path.suffix == ".gz":
            return gzip.decompress(data)
    except (lzma.LZMAError, OSError, EOFError) as error:
        raise LaunchError(f"the kernel module {path} is damaged: {error}") from error
    if path.suffix == ".zst":
        return unzstd(data, f"the kernel module {path}")
    return data


def _builtin(directory: Path) -> set[str]:
    try:
        lines = (directory / "modules.builtin").read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return set()
    return {os.path.basename(line).removesuffix(".ko").replace("-", "_") for line in lines}


def _configured(config: Path | None) -> set[str]:
    if config is None:
        return set()
    try:
        text = config.read_text("utf-8", "replace")
    except OSError:
        return set()
    return set(re.findall(r"^CONFIG_(\w+)=y$", text, re.MULTILINE))
