"""The kinds of namespaces that a process enters (setns(2))."""

from __future__ import annotations

from isolation.linux import syscalls

# By the names in /proc/PID/ns, in the order in which they are entered: the owner of all first.
ENTERED = (
    ("user", syscalls.CLONE_NEWUSER),
    ("mnt", syscalls.CLONE_NEWNS),
    ("net", syscalls.CLONE_NEWNET),
    ("ipc", syscalls.CLONE_NEWIPC),
    ("uts", syscalls.CLONE_NEWUTS),
    ("cgroup", syscalls.CLONE_NEWCGROUP),
    ("pid", syscalls.CLONE_NEWPID),
)
