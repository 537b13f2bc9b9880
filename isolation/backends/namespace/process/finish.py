"""The last steps of a payload, once it is sealed: its descriptors, its directory, its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import inherited as fds
from isolation.backends.namespace.process import shared_memory
from isolation.backends.namespace.process.inherited import Inherited
from isolation.linux import syscalls
from isolation.plain import os, socket


def take_descriptors(
    plan: Plan,
    inherited: Sequence[Inherited],
    shared: Sequence[shared_memory.Object],
    stdio: Sequence[int],
    scratch: Sequence[int],
    crash: int,
    stacks: int,
    control_socket: socket.socket,
    keep: Sequence[int],
) -> None:
    """Leave nothing in the table of descriptors, nor in memory, that is not the sandbox's own, and start where commands
    start. Stacks are written to `stacks`, whose file is `crash` from now on. `control socket` is closed."""
    os.chdir(plan.workdir)
    os.dup2(crash, stacks, inheritable=False)
    if "fds" in plan.defences:
        fds.adopt(inherited, stdio, scratch, [*keep, stacks, control_socket.fileno(), *shared_memory.sources(shared)])
    shared_memory.adopt(shared, inherited)  # after that: what is mapped is what the descriptors are, too
    shared_memory.forget(shared)
    control_socket.close()


def set_process_name() -> None:
    """What ps(1) shows; and let debuggers inside have it."""
    syscalls.set_name("isolation")
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)


def give_up(control_socket: socket.socket, error: BaseException) -> NoReturn:
    """Tell the supervisor why there will be no sandbox, and end."""
    send_error(control_socket, error)
    os._exit(1)


def send_error(control_socket: socket.socket, error: BaseException) -> None:
    """Tell the supervisor what went wrong."""
    number = error.errno if isinstance(error, OSError) else 0
    text = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
    try:
        control_socket.send(f"x{number or 0} {text}".encode("utf-8", "replace")[:4000])
    except OSError:
        pass  # the supervisor is gone, or the control socket is closed already
