"""Writing the ids of a user namespace below one that its keeper is not in, and does not enter: another process does."""

from __future__ import annotations

import signal

from isolation.backends.namespace import syscalls
from isolation.backends.namespace.apart import Apart
from isolation.backends.namespace.identity import RANGE_SIZE
from isolation.backends.namespace.script import Script
from isolation.plain import os


class Mapper:
    """Maps the whole range, as it is in the parent, into a process's new user namespace."""

    def __init__(self) -> None:
        self._script = script = Script()
        self._parent, self._process = script.slot(), script.slot()
        script.call("setns", self._parent.value(), syscalls.CLONE_NEWUSER, about="the parent user namespace")
        text = f"0 0 {RANGE_SIZE}"
        for name in ("uid_map", "gid_map"):
            file = script.call("openat", self._process.value(), name, os.O_WRONLY | os.O_CLOEXEC, 0, about=name)
            script.call("write", file, text, len(text), only=len(text), about=name)
            script.call("close", file)
        script.finish()
        self._apart = Apart(script)

    def map(self, parent: int, process: int) -> None:
        """`parent`: descriptor of the user namespace above; `process`: of a directory of /proc. Raises OSError."""
        self._script.set(self._parent, parent)
        self._script.set(self._process, process)
        self._apart.begin()
        flags = syscalls.CLONE_VM | syscalls.CLONE_FILES | signal.SIGCHLD
        pid, pidfd = syscalls.clone_function(self._apart.function, self._apart.stack, flags, self._apart.argument)
        os.waitpid(pid, 0)
        os.close(pidfd)
        self._apart.check()
