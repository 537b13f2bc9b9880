"""Programs of the host that the images are built with; where one is not installed, it is fetched and run from the cache."""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from isolation.backends.microvm.artifacts.apt import Apt
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.progress import SILENT, Progress
from isolation.errors import LaunchError
from isolation.plain import subprocess

KIND = "tools"
_LIBRARIES_OF_SQUASHFS = r"lib(lz4-1|lzo2-2|lzma5|zstd1|z1g|lzma)"
_OLDEST = (4, 5)  # mksquashfs that reads a tar archive from its standard input


@dataclass(frozen=True)
class Program:
    """path, and the variables that it needs to run."""

    path: str
    env: dict[str, str]


def busybox(cache: Cache, progress: Progress = SILENT) -> Path:
    """A statically linked busybox: the host's, or a fetched one. Raises LaunchError."""
    for name in ("busybox", "busybox.static", "busybox-static"):
        path = shutil.which(name) or shutil.which(name, path="/bin:/usr/bin:/sbin:/usr/sbin")
        if path and is_static(path):
            return Path(path)

    def build(target: Path) -> None:
        progress.start("fetching busybox-static")
        with Apt(cache, progress) as apt:
            version = apt.fetch("busybox-static", target, "apt-get install busybox-static")
        progress.done(f"busybox-static {version}")

    place = cache.make(KIND, f"busybox-{platform.machine()}", build, progress)
    for candidate in ("bin/busybox", "usr/bin/busybox"):
        if is_static(str(place / candidate)):
            return place / candidate
    raise LaunchError(f"the fetched busybox in {place} is not static: apt-get install busybox-static")


def is_static(path: str) -> bool:
    """Whether this is an ELF program that needs no loader (no PT_INTERP)."""
    try:
        with open(path, "rb") as file:
            header = file.read(4096)
        if header[:5] != b"\x7fELF\x02":
            return False
        (phoff,) = struct.unpack_from("<Q", header, 32)
        phentsize, phnum = struct.unpack_from("<HH", header, 54)
        return all(struct.unpack_from("<I", header, phoff + index * phentsize)[0] != 3 for index in range(phnum))
    except (OSError, struct.error):
        return False


def mksquashfs(cache: Cache, progress: Progress = SILENT) -> Program:
    """mksquashfs that can read a tar archive and compress with lz4. Raises LaunchError."""
    path = shutil.which("mksquashfs") or shutil.which("mksquashfs", path="/usr/bin:/sbin:/usr/sbin:/usr/local/bin")
    wrong = ""
    if path is not None:
        program = Program(path, {})
        wrong = _unfit(program)
        if not wrong:
            return program
    try:
        program = _fetched(cache, progress)
    except LaunchError as error:
        if wrong:
            raise LaunchError(f"{path} {wrong}, and another cannot be had: {error}") from error
        raise
    wrong = _unfit(program)
    if wrong:
        raise LaunchError(f"mksquashfs of this distribution {wrong}: install squashfs-tools 4.5 or later")
    return program


def _fetched(cache: Cache, progress: Progress) -> Program:
    """squashfs-tools, with those of its libraries that the host might lack; not the C library."""
    instead = "apt-get install squashfs-tools"

    def build(target: Path) -> None:
        progress.start("fetching squashfs-tools")
        with Apt(cache, progress) as apt:
            apt.update(instead)
            names = [name for name in apt.dependencies("squashfs-tools") if re.fullmatch(_LIBRARIES_OF_SQUASHFS, name)]
            os.makedirs(target)
            version = apt.fetch("squashfs-tools", target / "squashfs-tools", instead)
            for name in names:
                apt.fetch(name, target / name, instead)
        progress.done(f"squashfs-tools {version}")

    place = cache.make(KIND, f"squashfs-tools-{platform.machine()}", build, progress)
    libraries = sorted({str(path.parent) for path in place.glob("**/lib*.so.*")})
    return Program(str(place / "squashfs-tools/usr/bin/mksquashfs"), {"LD_LIBRARY_PATH": ":".join(libraries)})


def _unfit(program: Program) -> str:
    """Why it cannot be used; "" if it can. A mksquashfs without lz4 says so when it is used."""
    try:
        env = os.environ | program.env
        done = subprocess.run(
            [program.path, "-version"], capture_output=True, stdin=subprocess.DEVNULL, check=False, env=env
        )
    except OSError as error:
        return f"cannot be run ({error.strerror})"
    found = re.search(rb"version (\d+)\.(\d+)", done.stdout)
    if found is None:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return f"does not run ({said[0] if said else 'it said nothing'})"
    if (int(found[1]), int(found[2])) < _OLDEST:
        return f"is version {found[1].decode()}.{found[2].decode()}, and 4.5 is needed"
    return ""
