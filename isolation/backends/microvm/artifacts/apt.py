"""Packages of the distribution, downloaded without root and without being installed.

apt does the work, with lists and archives of its own in the cache: it checks the chain from the archive's signing key
to the package's hash. Installing a kernel would run hooks (initramfs, boot loader) on the host.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

from isolation.backends.microvm.artifacts import deb
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.progress import Progress, megabytes
from isolation.errors import LaunchError
from isolation.plain import subprocess, time

_ROOM = 256 << 20  # bytes: lists, a kernel's package, and what is in it
_LISTS_ARE_FRESH = 86400.0  # seconds
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9]+)?")


def available() -> bool:
    """Whether this is a distribution with apt."""
    return all(shutil.which(program) for program in ("apt-get", "apt-cache"))


class Apt:
    """One user's own view of the archive, to be used in a `with`: one process at a time downloads into it."""

    def __init__(self, cache: Cache, progress: Progress) -> None:
        self._cache = cache
        self._root = cache.root / "apt"
        self._progress = progress
        self._lock: contextlib.AbstractContextManager[None] | None = None

    def __enter__(self) -> Apt:
        self._lock = self._cache.exclusive("apt", self._progress)
        self._lock.__enter__()
        return self

    def __exit__(self, *_error: object) -> None:
        assert self._lock is not None
        self._lock.__exit__(None, None, None)

    def fetch(self, package: str, target: Path, instead: str) -> str:
        """Download `package` and unpack it into the directory `target`; returns its version.

        Raises LaunchError; `instead` says in the message what the user can do without a download.
        """
        self.update(instead)
        place = self._root / "archives" / package.replace(":", "_")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            self._download(package, place, instead)
            files = sorted(place.glob("*.deb"))
            if len(files) != 1:
                raise LaunchError(f"apt-get download {package} left {len(files)} files: {instead}")
            self._progress.update(f"unpacking {files[0].name}")
            deb.unpack(files[0], target)
            return files[0].name.split("_")[1].replace("%3a", ":")
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def dependencies(self, package: str) -> list[str]:
        """The packages that `package` depends on directly, by the lists that `update` has brought."""
        text = self._run(["apt-cache", *self._options(), "depends", "--important", package])
        return re.findall(r"^\s*\|?(?:Pre)?Depends: ([a-z0-9][a-z0-9+.:-]+)$", text, re.MULTILINE)

    def update(self, instead: str) -> None:
        """Bring the lists up to date, unless they are of today. Raises LaunchError, which says what to do `instead`."""
        if not available():
            raise LaunchError(f"there is no apt-get on this system to download with: {instead}")
        room = os.statvfs(self._cache.root)
        if room.f_bavail * room.f_frsize < _ROOM:  # on a full disk apt tries again and again, for minutes
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._cache.root))
        stamp = self._root / "updated"
        try:
            if time.time() - os.stat(stamp).st_mtime < _LISTS_ARE_FRESH:
                return
        except FileNotFoundError:
            pass
        for directory in ("lists/partial", "archives/partial"):
            (self._root / directory).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._progress.update("the archive's lists")
        try:
            self._run(["apt-get", *self._options(), "-q", "update"])
        except LaunchError as error:
            raise LaunchError(f"{error}: check the network, or {instead}") from error
        stamp.touch()

    def _download(self, package: str, place: Path, instead: str) -> None:
        command = ["apt-get", *self._options(), "-q", "download", package]
        process = subprocess.Popen(
            command, cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_env()
        )
        try:
            while True:
                try:
                    _, errors = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    arrived = sum(_size(path) for path in place.rglob("*"))
                    self._progress.update(f"{package}: {megabytes(arrived)}")
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.returncode:
            raise LaunchError(f"cannot download {package} ({_reason(errors)}): {instead}")

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=_env())
        # "update" succeeds even where nothing could be reached (apt-get(8)): it says so in warnings only
        if done.returncode or b"Some index files failed to download" in done.stderr:
            raise LaunchError(f"{' '.join((command[0], command[-1]))} failed ({_reason(done.stderr)})")
        return done.stdout.decode("utf-8", "replace")

    def _options(self) -> list[str]:
        """No root, no lock of the system's, nothing of it written; its sources and keys are read."""
        settings = {
            "Dir::State::Lists": self._root / "lists",
            "Dir::Cache": self._root,
            "Dir::Cache::archives": self._root / "archives",
            "APT::Sandbox::User": "",  # _apt may not read the user's cache, and setuid to it needs root
            "Debug::NoLocking": "true",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
        }
        lines = [f'{name} "{value}";' for name, value in settings.items()]
        # Hooks of the host's (container images have one that deletes the system's own archives) are not for us. Only a file
        # can clear them, and one given by -c is read last (apt.conf(5)).
        lines += ["#clear APT::Update::Pre-Invoke;", "#clear APT::Update::Post-Invoke;"]
        lines += ["#clear APT::Update::Post-Invoke-Success;"]
        file = self._root / "apt.conf"
        file.write_text("\n".join(lines) + "\n")
        return ["-c", str(file)]


def _env() -> dict[str, str]:
    return os.environ | {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _reason(errors: bytes) -> str:
    lines = [line.strip() for line in errors.decode("utf-8", "replace").splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith(("E:", "W:"))]
    return (wrong or lines or ["no reason given"])[0]
