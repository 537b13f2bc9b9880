"""Unpacking a .deb with the standard library: ar(5) around tar archives (deb(5)). Nothing of it is run."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import IO

from isolation.errors import LaunchError
from isolation.plain import subprocess

_MAGIC = b"!<arch>\n"
_HEADER = 60
_AT_MOST = 4 << 30  # bytes; the largest kernel packages are below 1 GiB


def unpack(package: Path, target: Path) -> None:
    """Put the files of `package` into the directory `target`, which is made. Owners are not kept, and nothing is
    written outside. Raises LaunchError for a broken package."""
    try:
        with open(package, "rb") as file:
            name, member = _data(file, package)
            with _decompressed(name, member, package) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
                os.makedirs(target)
                _extract(archive, target)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise LaunchError(f"the package {package} is damaged ({error}): remove it, and try again") from error
    except OSError as error:
        if error.errno is None:  # of bz2 and gzip, about their input
            raise LaunchError(f"the package {package} is damaged ({error}): remove it, and try again") from error
        raise


def _extract(archive: tarfile.TarFile, target: Path) -> None:
    """By tarfile's "data" filter (PEP 706), which came with Python 3.11.4; before, files and directories with harmless
    names, and links to what lies beside them (libraries have such). Raises TarError for a member that would lie outside."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(target, filter="data")
        return
    for member in archive:
        parts = member.name.split("/")
        if member.name.startswith("/") or ".." in parts:
            raise tarfile.TarError(f"{member.name!r} would lie outside")
        path = target / member.name
        if member.isdir():
            path.mkdir(parents=True, exist_ok=True)
        elif member.issym() and "/" not in member.linkname and member.linkname != "..":
            path.symlink_to(member.linkname)
        elif member.isfile():
            path.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None
            with content, open(path, "xb") as file:
                shutil.copyfileobj(content, file)
            path.chmod(member.mode & 0o755)


def _data(file: IO[bytes], package: Path) -> tuple[str, bytes]:
    """The member data.tar.*, whole (a kernel's is 30 MB)."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("not an ar archive")
    while header := file.read(_HEADER):
        if len(header) < _HEADER or header[58:] != b"`\n":
            raise ValueError("a broken ar header")
        name = header[:16].decode("ascii", "replace").rstrip(" /")
        size = int(header[48:58])
        if not 0 <= size <= _AT_MOST:
            raise ValueError("a member of impossible size")
        if name.startswith("data.tar"):
            data = file.read(size)
            if len(data) != size:
                raise ValueError("it ends too early")
            return name, data
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it has no data.tar")


def _decompressed(name: str, data: bytes, package: Path) -> IO[bytes]:
    raw = io.BytesIO(data)
    if name == "data.tar":
        return raw
    if name.endswith(".xz"):
        return lzma.open(raw)
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if name.endswith(".bz2"):
        return bz2.open(raw)
    if name.endswith(".zst"):
        return io.BytesIO(unzstd(data, f"the package {package}"))
    raise ValueError(f"{name} is compressed in an unknown way")


def unzstd(data: bytes, what: str) -> bytes:
    """Decompressed by the program `zstd`: Python's own module comes with 3.14. Raises LaunchError."""
    program = shutil.which("zstd") or shutil.which("unzstd")
    if program is None:
        raise LaunchError(f"{what} is compressed with zstd, and there is no program for it: apt-get install zstd")
    done = subprocess.run([program, "-d", "-c", "-q"], input=data, capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip()
        raise LaunchError(f"{what} is damaged ({reason}): remove it, and try again")
    return done.stdout
