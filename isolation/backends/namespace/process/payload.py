"""A fork's payload: a clone of the supervisor that builds its own sandbox, locks itself in, and becomes the guest."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import environment, finish, messages, shared_memory
from isolation.backends.namespace.process.fork_point import ForkPoint
from isolation.backends.namespace.process.inherited import Inherited
from isolation.backends.namespace.process.steps import Construction
from isolation.guest import Guest
from isolation.linux import syscalls
from isolation.plain import os, socket
from isolation.wire import Wire

DUMP_SIGNAL = signal.SIGRTMAX - 1  # makes a payload write the stacks of its threads


@dataclass
class PayloadArgs:
    """What a payload needs besides the plan. Descriptors are numbers in the supervisor's table, which it inherits."""

    control_socket: socket.socket  # to the supervisor, which answers what it is asked
    construction: Construction
    wire: int  # to the host
    stdio: Sequence[int]
    crash: int  # where it writes the stacks of its threads, once that is
    stacks: int  # (see write_stacks_to)
    scratch: Sequence[int]  # private copies of unlinked files
    inherited: Sequence[Inherited]
    shared: Sequence[shared_memory.Object]
    signal_mask: frozenset[int]  # of the host
    umask: int
    fork_channel: socket.socket | None = None  # of a template: to the supervisor of its forks
    account: bool = False


def write_stacks_to(fd: int) -> None:
    """In the supervisor, once: in it and in every fork, the stacks of all threads go to descriptor `fd` at a crash, and
    when it gets DUMP_SIGNAL. A fork finds its own file there."""
    faulthandler.enable(file=fd, all_threads=True)
    faulthandler.register(DUMP_SIGNAL, file=fd, all_threads=True)


def become(plan: Plan, args: PayloadArgs) -> Guest:
    """In the clone. Returns with everything sealed, and nothing of the host's left in reach."""
    try:
        return _become(plan, args)
    except BaseException as error:
        finish.give_up(args.control_socket, error)


def _become(plan: Plan, args: PayloadArgs) -> Guest:
    store = args.construction.enter_and_build()
    if plan.watch_memory or args.account:
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        socket.send_fds(args.control_socket, [messages.PLACES], [proc, store])  # for the supervisor to look at
        os.close(proc)
    os.close(store)
    args.construction.seal()
    descent = None
    if args.fork_channel is not None:
        descent = ForkPoint(plan, args.fork_channel, args.stacks)
        descent.introduce(args.construction.mounts())
    keep = [args.wire, *([args.fork_channel.fileno()] if args.fork_channel is not None else [])]
    finish.take_descriptors(
        plan, args.inherited, args.shared, args.stdio, args.scratch, args.crash, args.stacks, args.control_socket, keep
    )
    if not plan.inherit_env:
        if "environment" in plan.defences:
            environment.scrub()
        os.environ.update(plan.env)
    finish.set_process_name()
    syscalls.fork_after_child()
    signal.pthread_sigmask(signal.SIG_SETMASK, args.signal_mask)
    wire = Wire(socket.socket(fileno=args.wire), accept_fds=True)
    return Guest(wire, fork=None if descent is None else descent.forks)
