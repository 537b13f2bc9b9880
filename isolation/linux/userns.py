"""Who the guest is. An ordinary user stays that user inside; real root is mapped to a range without host uid 0."""

from __future__ import annotations

import signal
from typing import NamedTuple

from isolation.linux import syscalls
from isolation.linux.script_process import ScriptProcess
from isolation.linux.syscall_script import SyscallScript
from isolation.plain import os

# Ids that no distribution hands out, 65536 at a time: above /etc/subuid's usual ranges (100000 up), and 64K-aligned within
# what systemd sets aside for containers (524288 to 1879048191, systemd's UIDS-GIDS.md).
RANGE_SIZE = 65536
_RANGES = range(20000 * RANGE_SIZE, 28672 * RANGE_SIZE, RANGE_SIZE)
_CAP_SYS_ADMIN = 1 << 21


class Identity(NamedTuple):
    """uid and gid inside, and whether they come from the mapped range of real root."""

    uid: int
    gid: int
    ranged: bool

    @classmethod
    def of_caller(cls) -> Identity:
        """The identity for sandboxes that this process makes."""
        if os.geteuid() == 0 and _is_initial_user_namespace() and _has_capabilities():
            return cls(0, 0, ranged=True)
        return cls(os.geteuid(), os.getegid(), ranged=False)

    def describe(self) -> str:
        """One line for `--explain`."""
        if self.ranged:
            return f"root inside, {RANGE_SIZE} ids of {_RANGES.start} and above on the host: never host uid 0"
        return f"uid {self.uid}, gid {self.gid}, inside and outside"


def _is_initial_user_namespace() -> bool:
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.read().split() == ["0", "0", "4294967295"]


def _has_capabilities() -> bool:
    """Root without any, as in some containers and inside of a microVM, can do no more than an ordinary user."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next((line.split()[1] for line in file if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) & _CAP_SYS_ADMIN)


def choose_range() -> int:
    """The first id of a supervisor's range. What the kernel counts by user (descriptors in flight, pipes, locked memory)
    one run then cannot use up for another. That two choose the same is unlikely, and harms nothing else: no file that
    outlives its sandbox belongs to such an id."""
    return _RANGES[int.from_bytes(os.urandom(4), "little") % len(_RANGES)]


def map_range(pid: int, base: int) -> None:
    """Write the maps of a process in a new user namespace; for real root, from outside."""
    for name in ("uid_map", "gid_map"):
        write_map(f"/proc/{pid}/{name}", f"0 {base} {RANGE_SIZE}")


# Inside, once the range is mapped: leave the host's ids behind. System calls, as steps of a script.
BECOME_MAPPED_ROOT = (("setresgid", 0, 0, 0), ("setgroups", 0, 0), ("setresuid", 0, 0, 0))


def become_mapped_root() -> None:
    """`BECOME_MAPPED_ROOT`, at once."""
    os.setresgid(0, 0, 0)
    os.setgroups([])
    os.setresuid(0, 0, 0)


def map_own_ids(inside_uid: int, inside_gid: int, uid: int, gid: int) -> None:
    """In a user namespace that this process just made: map its one uid and gid.

    setgroups must be denied first, else an ordinary user may not write gid_map (user_namespaces(7)); and the files
    belong to root while the process is not dumpable.
    """
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    write_map("/proc/self/setgroups", "deny")
    write_map("/proc/self/uid_map", f"{inside_uid} {uid} 1")
    write_map("/proc/self/gid_map", f"{inside_gid} {gid} 1")


def write_map_own_ids(script: SyscallScript, inside_uid: int, inside_gid: int, uid: int, gid: int) -> None:
    """`map_own_ids`, as steps of a script."""
    script.call("prctl", syscalls.PR_SET_DUMPABLE, 1, 0, 0, 0)
    for name, text in (
        ("setgroups", "deny"), ("uid_map", f"{inside_uid} {uid} 1"), ("gid_map", f"{inside_gid} {gid} 1")
    ):  # fmt: skip
        path = f"/proc/self/{name}"
        file = script.call("openat", syscalls.AT_FDCWD, path, os.O_WRONLY | os.O_CLOEXEC, 0, about=path)
        script.call("write", file, text, len(text), only=len(text), about=path)
        script.call("close", file)


def write_map(path: str, text: str) -> None:
    """One of the files uid_map, gid_map and setgroups, at once, as the kernel wants it."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)


class UsernsMapper:
    """Maps the whole range, as it is in the parent, into a process's new user namespace. The caller is not in that parent,
    and does not enter it: another process does."""

    def __init__(self) -> None:
        self._script = script = SyscallScript()
        self._parent, self._process = script.slot(), script.slot()
        script.call("setns", self._parent.value(), syscalls.CLONE_NEWUSER, about="the parent user namespace")
        text = f"0 0 {RANGE_SIZE}"
        for name in ("uid_map", "gid_map"):
            file = script.call("openat", self._process.value(), name, os.O_WRONLY | os.O_CLOEXEC, 0, about=name)
            script.call("write", file, text, len(text), only=len(text), about=name)
            script.call("close", file)
        script.finish()
        self._script_process = ScriptProcess(script)

    def map(self, parent: int, process: int) -> None:
        """`parent`: descriptor of the user namespace above; `process`: of a directory of /proc. Raises OSError."""
        self._script.set(self._parent, parent)
        self._script.set(self._process, process)
        self._script_process.begin()
        flags = syscalls.CLONE_VM | syscalls.CLONE_FILES | signal.SIGCHLD
        pid, pidfd = syscalls.clone_function(
            self._script_process.function, self._script_process.stack, flags, self._script_process.argument
        )
        os.waitpid(pid, 0)
        os.close(pidfd)
        self._script_process.check()
