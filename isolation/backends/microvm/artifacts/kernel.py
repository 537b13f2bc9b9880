"""The guest's kernel: fetched from the distribution, given by the user, or the host's own.

A cache entry `kernel/<key>` is a directory with `vmlinux` (or `bzImage`), `modules/00-name.ko` … in load order, and
`kernel.json`, which is written last and tells what the rest is.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolation.backends.microvm.artifacts import modules, stamp, vmlinux
from isolation.backends.microvm.artifacts.apt import Apt
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.progress import Progress, megabytes
from isolation.errors import BackendUnavailable, LaunchError
from isolation.plain import json

KIND = "kernel"
_FORMAT = 1  # of kernel.json
INSTEAD = "give a kernel with 'isolation microvm setup --kernel PATH [--modules DIR]'"
_AGAIN = "run 'isolation microvm setup --refresh'"


@dataclass(frozen=True)
class Kernel:
    """image: what QEMU's -kernel takes; pvh: it is an ELF file; modules: .ko files, in load order; digest: of image and
    modules together (SHA-256, hex); source: where it came from, for people."""

    image: Path
    pvh: bool
    release: str
    modules: tuple[Path, ...]
    digest: str
    source: str
    key: str


def fetched(cache: Cache, progress: Progress, *, refresh: bool = False) -> Kernel:
    """The distribution's own small kernel for virtual machines. Raises LaunchError."""
    metapackage = _metapackage()
    key = f"fetched-{metapackage}-{_host()}"

    def build(target: Path) -> None:
        progress.start(f"fetching a kernel ({metapackage})")
        unpacked = target / "package"
        os.makedirs(target)
        with Apt(cache, progress) as apt:
            apt.update(INSTEAD)
            packages = _packages(apt, metapackage)
            for package in packages:
                apt.fetch(package, unpacked / package, INSTEAD)
        progress.update("unpacking")
        image, directory, config = _find(unpacked)
        _store(image, directory, config, target, packages[0], progress)
        shutil.rmtree(unpacked)
        progress.done(f"kernel {packages[0]}: {megabytes(_size(target))}")

    return _made(cache, key, build, progress, refresh=refresh)


def given(
    cache: Cache, image: Path, directory: Path | None, progress: Progress, *, refresh: bool = False, source: str = ""
) -> Kernel:
    """A kernel file of the user's, and the /lib/modules/<release> that belongs to it (None: all is built in).

    Raises LaunchError.
    """
    try:
        stamp = [os.stat(path) for path in (image, directory) if path is not None]
    except OSError as error:
        raise LaunchError(f"cannot read the kernel: {error.filename}: {error.strerror}") from error
    text = f"{_FORMAT} {image.resolve()} {directory and directory.resolve()} " + " ".join(
        f"{st.st_ino} {st.st_size} {st.st_mtime_ns}" for st in stamp
    )
    key = "given-" + hashlib.sha256(os.fsencode(text)).hexdigest()[:32]

    def build(target: Path) -> None:
        progress.start(f"reading the kernel {image}")
        os.makedirs(target)
        release = _release(image.read_bytes())
        config = image.with_name(f"config-{release}")
        found = directory
        if found is not None and release and (found / release).is_dir():
            found = found / release  # /lib/modules itself was given
        _store(image, found, config, target, source or str(image), progress)
        progress.done(f"kernel {source or image}: {megabytes(_size(target))}")

    try:
        return _made(cache, key, build, progress, refresh=refresh)
    except PermissionError as error:
        raise LaunchError(f"cannot read the kernel: {error.filename}: {error.strerror}") from error


def host(cache: Cache, progress: Progress, *, refresh: bool = False) -> Kernel:
    """The kernel that this machine runs, from /boot. Raises LaunchError."""
    release = platform.release()
    for image in (Path(f"/boot/vmlinuz-{release}"), Path(f"/lib/modules/{release}/vmlinuz")):
        if image.exists():
            if not os.access(image, os.R_OK):
                raise LaunchError(f"{image} cannot be read by this user: copy it, and {INSTEAD}")
            directory = Path("/lib/modules", release)
            return given(
                cache, image, directory if directory.is_dir() else None, progress, refresh=refresh, source=f"host {release}"
            )
    raise LaunchError(f"the running kernel {release} is not in /boot: leave out '--kernel host' to fetch one, or {INSTEAD}")


def load(cache: Cache, key: str) -> Kernel:
    """A kernel that is in the cache. Raises BackendUnavailable when it is gone, or damaged."""
    path = cache.get(KIND, key)
    if path is None:
        raise BackendUnavailable("the guest's kernel is gone from the cache: run 'isolation microvm setup'")
    try:
        data: Any = json.loads((path / "kernel.json").read_bytes())
        if data["format"] != _FORMAT:
            raise ValueError("it is of another version of isolation-kit")
        image = path / str(data["image"])
        files = tuple(path / "modules" / str(name) for name in data["modules"])
        if changed := stamp.changed(path):
            raise ValueError(f"{changed} is not as it was put there")
        return Kernel(image, bool(data["pvh"]), str(data["release"]), files, str(data["digest"]), str(data["source"]), key)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendUnavailable(f"the kernel in {path} is damaged ({error}): {_AGAIN}") from error


def _made(cache: Cache, key: str, build: Callable[[Path], None], progress: Progress, *, refresh: bool) -> Kernel:
    cache.make(KIND, key, build, progress, refresh=refresh)
    try:
        return load(cache, key)
    except BackendUnavailable:
        cache.make(KIND, key, build, progress, refresh=True)  # it was damaged since
        return load(cache, key)


def _store(image: Path, directory: Path | None, config: Path | None, target: Path, source: str, progress: Progress) -> None:
    data = image.read_bytes()
    arch = vmlinux.architecture(data, str(image))
    if arch != _host():
        raise vmlinux.NotAKernel(f"{image} is a kernel for {arch}, and this machine is {_host()}")
    release = _release(data)
    progress.update("decompressing")
    plain = vmlinux.extract(data, str(image))
    name = "bzImage" if plain is None else "vmlinux"
    data = data if plain is None else plain
    release = release or _release(data)
    if directory is not None and not release:
        release = directory.name
    digest = hashlib.sha256(data)
    (target / name).write_bytes(data)
    (target / "modules").mkdir()
    names = []
    for number, module in enumerate(modules.collect(directory, config, release)):
        names.append(f"{number:02}-{module.name}.ko")
        (target / "modules" / names[-1]).write_bytes(module.data)
        digest.update(b"\0%s\0" % module.name.encode() + hashlib.sha256(module.data).digest())
    description = {
        "format": _FORMAT, "image": name, "size": len(data), "pvh": plain is not None, "release": release, "modules": names,
        "digest": digest.hexdigest(), "source": source,
    }  # fmt: skip
    (target / "kernel.json").write_text(json.dumps(description))


def _metapackage() -> str:
    """Raises LaunchError where we know of no such package."""
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        system = {}
    likes = {system.get("ID", ""), *system.get("ID_LIKE", "").split()}
    if "ubuntu" in likes:
        return "linux-image-virtual"
    if "debian" in likes:
        arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(_host())
        if arch:
            return f"linux-image-cloud-{arch}"
    raise LaunchError(f"no kernel can be fetched for {system.get('PRETTY_NAME', 'this system')}: {INSTEAD}")


def _packages(apt: Apt, metapackage: str) -> list[str]:
    """The real packages behind the metapackage; the one with the kernel first.

    Debian: linux-image-<release>-cloud-amd64 has it all. Ubuntu: linux-image-<release>-generic has the kernel, and
    linux-modules-<release>-generic, on which it depends, has the modules (written by Ubuntu's documentation, and not tried).
    """
    image = _first(apt.dependencies(metapackage), r"linux-image-(unsigned-)?\d.*")
    if image is None:
        raise LaunchError(f"the package {metapackage} names no kernel: {INSTEAD}")
    extra = _first(apt.dependencies(image), r"linux-modules-\d.*")
    return [image] if extra is None else [image, extra]


def _first(names: list[str], pattern: str) -> str | None:
    return next((name for name in names if re.fullmatch(pattern, name)), None)


def _find(unpacked: Path) -> tuple[Path, Path | None, Path | None]:
    """(kernel, modules, configuration) in unpacked packages."""
    image = next(iter(sorted(unpacked.glob("*/boot/vmlinuz-*"))), None)
    if image is None:
        raise LaunchError(f"the kernel package has no /boot/vmlinuz-…: {INSTEAD}")
    directory = next((path for path in sorted(unpacked.glob("*/**/lib/modules/*")) if (path / "kernel").is_dir()), None)
    config = next(iter(sorted(unpacked.glob("*/boot/config-*"))), None)
    return image, directory, config


def _release(data: bytes) -> str:
    """As `uname -r` will say it; "" where the file does not tell."""
    if data[0x202:0x206] == b"HdrS":
        (at,) = struct.unpack_from("<H", data, 0x20E)
        text = data[at + 0x200 : at + 0x200 + 256].partition(b"\0")[0]
        return text.partition(b" ")[0].decode("ascii", "replace") if at else ""
    match = re.search(rb"Linux version (\d[!-~]*) \(", data)
    return match[1].decode("ascii") if match else ""


def _host() -> str:
    return platform.machine()


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
