"""A directory of finished artefacts (kernels, images), each built once, by one process, and put in place whole.

    <root>/<kind>/<key>           an entry: a file or a directory, never changed once it is there
    <root>/<kind>/.<key>.lock     flock(2): exclusive while it is built or removed, shared while it is held
    <root>/<kind>/.<key>.tmp      being built; what a killed build left behind is removed by the next one

Nothing is fsynced: what a crash of the whole machine leaves half-written is found by its reader's own check (the
layers' superblock, the kernel's digest), and built again. Nothing is used where another user can write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from isolation.backends.microvm.artifacts import stamp
from isolation.backends.microvm.artifacts.progress import SILENT, Progress
from isolation.errors import LaunchError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]*")
OWN = "apt"  # a directory of apt's, which holds no entries
_LOCK, _BUILDING, _OLD = ".lock", ".tmp", ".old"


class CacheError(LaunchError):
    """The cache cannot be written or read; the message says which file, and what mends it."""


@dataclass(frozen=True)
class Entry:
    """size: allocated bytes; used: seconds since the epoch."""

    kind: str
    key: str
    path: Path
    size: int
    used: float


class Cache:
    """Makes its directories when they are first needed, for this user only (0700)."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(os.path.abspath(root))
        self._checked = False

    @classmethod
    def default(cls) -> Cache:
        """In $XDG_CACHE_HOME, or ~/.cache (XDG base directory specification: relative paths are ignored)."""
        base = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(base):
            base = os.path.join(os.path.expanduser("~"), ".cache")
        return cls(os.path.join(base, "isolation-kit", "microvm"))

    def path(self, kind: str, key: str) -> Path:
        """Where an entry is, or would be. Raises CacheError when somebody else can write there."""
        self.check()
        if not _NAME.fullmatch(key) or not _NAME.fullmatch(kind):
            raise ValueError(f"not a name for a cache entry: {kind}/{key}")
        return self.root / kind / key

    def check(self) -> None:
        """What is in the cache is run, on the host, too: only this user (or root) may have written it. Raises CacheError."""
        if self._checked:
            return
        for path in (self.root, self.root.parent, self.root.parent.parent):
            try:
                status = os.stat(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self.error(error) from error
            if status.st_uid not in (0, os.geteuid()):
                raise CacheError(
                    f"{path} belongs to another user ({_name(status.st_uid)}), who may have put anything into it: "
                    "with sudo, use 'sudo -H'; or set XDG_CACHE_HOME to a directory of your own"
                )
            others = 0o022 if path == self.root else 0o002
            if status.st_mode & others and not status.st_mode & stat.S_ISVTX:
                raise CacheError(f"other users can write to {path}: chmod go-w it, or set XDG_CACHE_HOME to another one")
            self._checked = path == self.root or self._checked

    def read(self, name: str) -> bytes:
        """One of the cache's own files. Raises CacheError, and OSError."""
        self.check()
        return (self.root / name).read_bytes()

    def get(self, kind: str, key: str) -> Path | None:
        """A finished entry, marked as just used; None when there is none."""
        path = self.path(kind, key)
        try:
            os.utime(path, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            if not os.path.lexists(path):
                raise self.error(error) from error
        return path

    def make(
        self, kind: str, key: str, build: Callable[[Path], None], progress: Progress = SILENT, *, refresh: bool = False
    ) -> Path:
        """The entry; when there is none (or to `refresh` it), `build` makes a file or directory at the path it is given.

        Of several processes at once one builds, and the others wait and take what it made. Raises CacheError, and what
        `build` raises; nothing is left behind then.
        """
        if not refresh and (found := self.get(kind, key)) is not None:
            return found
        path = self.path(kind, key)
        building = path.with_name(f".{key}{_BUILDING}")
        with self._errors():
            self._directory(path.parent)
            with self._lock(kind, key, progress):
                if not refresh and (found := self.get(kind, key)) is not None:
                    return found
                self.sweep(kind)
                _remove(building)
                try:
                    build(building)
                    if building.is_dir():
                        stamp.write(building)
                    if refresh and os.path.lexists(path):
                        old = path.with_name(f".{key}{_OLD}")
                        _remove(old)
                        os.rename(path, old)
                        os.rename(building, path)
                        _remove(old)
                    else:
                        os.rename(building, path)
                finally:
                    _remove(building)
        return path

    @contextlib.contextmanager
    def hold(self, kind: str, key: str) -> Iterator[Path | None]:
        """As `get`; and nobody removes the entry meanwhile."""
        with self._errors():
            self._directory(self.root / kind)
            lock = self._open_lock(kind, key, fcntl.LOCK_SH, SILENT)
        try:
            yield self.get(kind, key)
        finally:
            os.close(lock)

    def remove(self, kind: str, key: str) -> bool:
        """Remove an entry; False when it is held or being built."""
        path = self.path(kind, key)
        lock = self._try_lock(kind, key)
        if lock is None:
            return False
        try:
            with self._errors():
                for suffix in (_BUILDING, _OLD):
                    _remove(path.with_name(f".{key}{suffix}"))
                _remove(path)
                _remove(path.with_name(f".{key}{_LOCK}"))  # last: who waits for it looks again (_open_lock)
        finally:
            os.close(lock)
        return True

    def prune(self, kind: str, keep: int, prefix: str = "") -> None:
        """Remove the least recently used entries (whose key starts with `prefix`) but `keep`, except those in use."""
        entries = [entry for entry in self.entries(kind, sizes=False) if entry.key.startswith(prefix)]
        for entry in sorted(entries, key=lambda entry: entry.used, reverse=True)[keep:]:
            self.remove(kind, entry.key)

    def sweep(self, kind: str | None = None) -> None:
        """Remove what killed builds left behind (of one kind)."""
        for each in _names(self.root) if kind is None else [kind]:
            for name in _names(self.root / each):
                for suffix in (_BUILDING, _OLD):
                    key = name[1 : -len(suffix)]
                    if name.startswith(".") and name.endswith(suffix) and _NAME.fullmatch(key):
                        lock = self._try_lock(each, key)
                        if lock is not None:
                            _remove(self.root / each / name)
                            os.close(lock)

    def clean(self) -> list[Entry]:
        """Remove every entry that is not in use; returns those that are."""
        kept = [entry for entry in self.entries(sizes=False) if not self.remove(entry.kind, entry.key)]
        self.sweep()
        return kept

    def remove_empty(self) -> None:
        """Remove the cache's directories, as far as nothing is in them."""
        for kind in _names(self.root):
            for name in _names(self.root / kind):
                if name.endswith(_LOCK) and (lock := self._try_lock(kind, name[1 : -len(_LOCK)])) is not None:
                    _remove(self.root / kind / name)
                    os.close(lock)
            with contextlib.suppress(OSError):
                os.rmdir(self.root / kind)
        for name in _names(self.root):
            if name.endswith(_LOCK) and (lock := self._try_lock("", name[1 : -len(_LOCK)])) is not None:
                _remove(self.root / name)
                os.close(lock)
        with contextlib.suppress(OSError):
            os.rmdir(self.root)

    def discard(self, name: str) -> None:
        """Remove one of the cache's own files."""
        with self._errors():
            _remove(self.root / name)

    def entries(self, kind: str | None = None, *, sizes: bool = True) -> list[Entry]:
        """All finished entries (of one kind), by kind and key. Without `sizes` they are 0, and this is quick."""
        found = []
        kinds = sorted(name for name in _names(self.root) if name != OWN) if kind is None else [kind]
        for each in kinds:
            for key in sorted(_names(self.root / each)):
                path = self.root / each / key
                if not _NAME.fullmatch(key):
                    continue
                try:
                    used = os.lstat(path).st_mtime
                    found.append(Entry(each, key, path, _allocated(path) if sizes else 0, used))
                except FileNotFoundError:
                    continue  # removed meanwhile
        return found

    @contextlib.contextmanager
    def exclusive(self, name: str, progress: Progress = SILENT) -> Iterator[None]:
        """One process at a time, for what is no entry."""
        with self._errors():
            self._directory(self.root)
            lock = self._open_lock("", name, fcntl.LOCK_EX, progress)
        try:
            yield
        finally:
            os.close(lock)

    def write(self, name: str, data: bytes) -> None:
        """A small file of the cache's own, in place at once or not at all."""
        with self._errors():
            self._directory(self.root)
            building = self.root / f".{name}.{os.getpid()}{_BUILDING}"
            try:
                building.write_bytes(data)
                os.rename(building, self.root / name)
            finally:
                _remove(building)

    def error(self, error: OSError) -> CacheError:
        """What an error of the system means to the user."""
        where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(self.root)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CacheError(
                f"no space left for the microvm cache {self.root}: free some, run 'isolation microvm clean', or set "
                "XDG_CACHE_HOME to a directory on a larger disk"
            )
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return CacheError(
                f"cannot write to the microvm cache ({where}: {error.strerror}): make {self.root} writable, or set "
                "XDG_CACHE_HOME to a directory that is"
            )
        return CacheError(f"the microvm cache {self.root} cannot be used: {where}: {error.strerror}")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.error(error) from error

    def _directory(self, path: Path) -> None:
        self.check()
        missing = []
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        for each in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(each, 0o700)

    @contextlib.contextmanager
    def _lock(self, kind: str, key: str, progress: Progress) -> Iterator[None]:
        lock = self._open_lock(kind, key, fcntl.LOCK_EX, progress)
        try:
            yield
        finally:
            os.close(lock)

    def _open_lock(self, kind: str, key: str, how: int, progress: Progress) -> int:
        path = self.root / kind / f".{key}{_LOCK}"
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                try:
                    fcntl.flock(fd, how | fcntl.LOCK_NB)
                except BlockingIOError:
                    progress.note(f"waiting for another process that works on {kind or 'cache'}/{key}")
                    fcntl.flock(fd, how)
                if _is_at(fd, path):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # who had it has removed the file

    def _try_lock(self, kind: str, key: str) -> int | None:
        path = self.root / kind / f".{key}{_LOCK}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if not _is_at(fd, path):
            os.close(fd)
            return None
        return fd


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _names(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(path: Path) -> None:
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass


def _allocated(path: Path) -> int:
    total = os.lstat(path).st_blocks * 512
    for directory, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return total
