"""Removing a directory that a guest has filled, and may still be changing.

No symlink is followed, two descriptors are open at a time, and nothing is recursive: a directory with something in it is
emptied by moving the directories in it up to the top, so however deep the guest has dug, there are only two levels. It ends
when nothing is left, which a guest that still writes there can put off for ever: whoever calls has a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import itertools

from isolation.plain import os

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(dirfd: int, name: str) -> None:
    """Remove the directory `name`, if there is one. The caller may do everything to what lies in it. Raises OSError."""
    try:
        top = os.open(name, _FLAGS, dir_fd=dirfd)
    except FileNotFoundError:
        return
    try:
        _empty(top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=dirfd)


def _empty(top: int) -> None:
    numbers = itertools.count()
    while names := os.listdir(top):
        for name in names:
            try:
                os.unlink(name, dir_fd=top)
            except IsADirectoryError:
                _flatten(top, name, numbers)
            except FileNotFoundError:
                pass


def _flatten(top: int, name: str, numbers: itertools.count[int]) -> None:
    """Remove a directory; what directories are in it are moved next to it."""
    with contextlib.suppress(FileNotFoundError):
        directory = os.open(name, _FLAGS, dir_fd=top)
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_dir(follow_symlinks=False):
                            _move(directory, entry.name, top, numbers)
                        else:
                            os.unlink(entry.name, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            os.rmdir(name, dir_fd=top)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # filled again meanwhile; the next round will find it
                raise


def _move(source: int, name: str, top: int, numbers: itertools.count[int]) -> None:
    while True:
        try:
            os.rename(name, f"moved.{next(numbers)}", src_dir_fd=source, dst_dir_fd=top)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):  # there is one of that name
                raise
