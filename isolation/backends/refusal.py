"""What a user is told when a command could not be started: the same from every backend."""

from __future__ import annotations

import errno

from isolation.errors import CommandNotFound, LaunchError
from isolation.plain import os


def not_started(command: str, cwd: str, number: int | None, what: str, failure: str, *, missing_cwd: bool) -> LaunchError:
    """The error for `number` (an errno) and `what` the guest's kernel said of it; `failure` is told of any other cause."""
    if missing_cwd:
        return LaunchError(f"the working directory {cwd!r} does not exist inside the sandbox")
    if number in (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR):
        verb = "is not" if number == errno.ENOENT else "cannot be executed"
        hint = ""
        if command.startswith("/") and os.path.exists(command):
            hint = f"; it exists on the host: show it with Mount({command!r}) or --mount"
        error = CommandNotFound(f"{command!r} {verb} in the sandbox ({what}){hint}")
        error.missing = number == errno.ENOENT
        return error
    return LaunchError(f"{command!r} could not be started: {failure}")
