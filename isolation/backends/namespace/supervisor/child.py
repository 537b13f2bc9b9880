"""Runs in a supervisor: what it takes to make one sandbox, and what is known of it then."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from typing import Any

from isolation.backends.namespace.checkpoints.session import KeptFiles
from isolation.backends.namespace.process import memory_watch
from isolation.backends.namespace.supervisor.deadlock import DeadlockWatch
from isolation.linux.cgroup import Cgroup
from isolation.plain import os, socket

LOOK_AGAIN = (0.001, 0.1)  # s: at first, and at most, for what has ended, but cannot be reaped yet


@dataclass
class SandboxRequest:
    """What it takes to make one sandbox.

    given    descriptors from the host
    ours     the supervisor's end of the control socket, on which a sandbox asks for what it cannot do itself; `theirs` is
    its own template whether the payload is to be forked itself
    """

    number: int
    given: list[int]
    ours: socket.socket
    theirs: socket.socket
    cgroup: Cgroup | None = None
    memory_files: tuple[int, int] | None = None
    template: bool = False
    account: bool = False
    deadlock: str = ""  # what to look for


class Child:
    """A sandbox, as its supervisor knows it."""

    def __init__(self, number: int, pid: int, pidfd: int, control_socket: socket.socket, cgroup: Cgroup | None) -> None:
        self.number = number
        # Of its payload, or of its PID 1 where it is one for commands; -1 for a payload that has yet to say who it is.
        self.pid = pid
        self.pidfd = pidfd
        self.control_socket = control_socket
        self.cgroup = cgroup
        self.init = -1  # pidfd of the PID 1 of a payload
        self.crash = -1
        self.account = False  # to be given at its end
        self.template = False
        self.proc = self.store = -1
        self.mounts = -1  # the mount namespace of a sandbox for commands, see init.py
        self.files: KeptFiles | None = None  # once they were to be kept
        self.memory_files: tuple[int, int] | None = None
        self.watch: memory_watch.Watch | None = None
        self.control = -1  # of one for commands whose memory is watched: the wire of its PID 1, to say why that was ended
        self.deadline: float | None = None
        self.timed_out = False
        self.dumps = 0
        self.next_dump = 0.0
        self.out_of_memory = False
        self.deadlock: DeadlockWatch | None = None
        self.deadlocked = False
        # It has ended, but cannot be reaped yet: when to look again, and how long to wait after that.
        self.look_again: float | None = None
        self.patience = LOOK_AGAIN[0]
        self.told_account: dict[str, Any] | None = None

    def kill(self) -> None:
        """End everything inside: the death of a PID 1 is that of its whole namespace (pid_namespaces(7))."""
        with contextlib.suppress(ProcessLookupError):  # it has ended, and was collected with others
            signal.pidfd_send_signal(self.init if self.init >= 0 else self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        self.control_socket.close()
        if self.files is not None:
            self.files.close()
        if self.watch is not None:
            self.watch.close()
        elif self.memory_files is not None:
            for fd in self.memory_files:
                os.close(fd)
        for fd in (self.control, self.crash, self.mounts, self.proc, self.store):
            if fd >= 0:
                os.close(fd)
