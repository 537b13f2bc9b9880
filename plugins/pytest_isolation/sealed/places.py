"""Writing to the host, to places that the user named, in directories whose content the user may not trust.

A checkout can hold symbolic links as well as a guest can make them, so none is followed: every directory is opened from
the one above it. A file appears under its name when all of it is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Final, Self

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_MODE: Final = 0o644
_DIRECTORY_MODE: Final = 0o755


class BadPlace(Exception):
    """Nothing can be written there; the message says why."""


class Places:
    """Where artefacts go. `cwd` is the user's own choice; what is in it is not."""

    def __init__(self, cwd: str) -> None:
        self._cwd = cwd
        self._fd = os.open(cwd, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def check(self, path: str) -> None:
        """Raises BadPlace when it is certain already that `path`, or a directory on the way, cannot be written."""
        try:
            with self.directory(os.path.dirname(path), make=False) as parent:
                _look(parent, os.path.basename(path), path, directory=None)
        except FileNotFoundError:
            pass  # a directory that will be made

    @contextlib.contextmanager
    def directory(self, path: str, *, make: bool = True) -> Iterator[int]:
        """A descriptor of the directory `path`, which is made where there is none."""
        inside = os.path.relpath(path, self._cwd)
        if inside == os.pardir or inside.startswith(os.pardir + os.sep):
            # What lies in `/` is the system's: /tmp, /home or /var may be links there.
            first, *parts = path.split("/")[1:]
            start, where = os.open(os.path.realpath("/" + first), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), "/" + first
        else:
            parts = [] if inside == os.curdir else inside.split(os.sep)
            start, where = os.dup(self._fd), self._cwd
        fd = _descend(start, parts, where, make=make)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def file(self, path: str) -> Iterator[int]:
        """A descriptor to write `path` with. It is there when the block ends, and what it was before if that raises."""
        directory, name = os.path.split(path)
        with self.directory(directory) as parent:
            _look(parent, name, path, directory=False)
            partial = f".{secrets.token_hex(8)}.part"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(partial, flags, _FILE_MODE, dir_fd=parent)
            try:
                try:
                    yield fd
                finally:
                    os.close(fd)
                os.rename(partial, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(partial, dir_fd=parent)
                raise

    def keep_only(self, path: str, kept: Iterable[Sequence[str]]) -> None:
        """Remove every file in the directory `path` but these."""
        names = {"/".join(parts) for parts in kept}
        try:
            with self.directory(path, make=False) as fd:
                for folder, _directories, files, folder_fd in os.fwalk(".", dir_fd=fd):
                    for name in files:
                        if os.path.normpath(os.path.join(folder, name)) not in names:
                            os.unlink(name, dir_fd=folder_fd)
        except FileNotFoundError:
            pass


def _descend(fd: int, parts: Sequence[str], where: str, *, make: bool) -> int:
    """From the directory `fd`, which is closed, step by step."""
    for part in parts:
        where = os.path.join(where, part)
        try:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, _DIRECTORY_MODE, dir_fd=fd)
            following = os.open(part, _DIRECTORY, dir_fd=fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                _look(fd, part, where, directory=True)
            raise
        finally:
            os.close(fd)
        fd = following
    return fd


def _look(parent: int, name: str, path: str, *, directory: bool | None) -> None:
    """Raises BadPlace unless `name` can be what is wanted (None: file or directory), or is not there at all."""
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise BadPlace(f"{path} is a symbolic link, and nothing is written through one; remove it or name another place")
    if (stat.S_ISDIR(mode) and directory is not False) or (stat.S_ISREG(mode) and not directory):
        return
    wanted = "file" if directory is False else "directory" if directory else "file or directory"
    raise BadPlace(f"{path} is there, and is no {wanted}; remove it or name another place")
