"""The supervisor: a fork of the host that clones sandboxes, and sees to it that none outlives the host.

It is single-threaded, which is what makes a bare clone(2) of it safe, and it waits in the host's own namespaces, out of
every guest's reach. It ends its sandboxes when the host asks, and all of them when the host is gone: it holds a pidfd of
the host, so that neither `kill -9` nor a forgotten duplicate of its socket keeps it waiting.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import inherited as fds
from isolation.backends.namespace.process import messages, steps
from isolation.backends.namespace.rootfs import idmap
from isolation.backends.namespace.supervisor.forkserver import ForkServer
from isolation.backends.namespace.supervisor.handle import END_WAIT, SupervisorHandle, commands_only
from isolation.backends.namespace.supervisor.supervisor import Supervisor
from isolation.errors import LaunchError
from isolation.guest import Guest, streams
from isolation.linux import fork, syscalls, userns
from isolation.plain import os, select, socket
from isolation.wire import Wire, wait_readable


def start(plan: Plan, function: Callable[[Guest], object] | None = None) -> SupervisorHandle:
    """Fork a supervisor off this process. `function` is what its forks run; None for one sandbox for commands.

    Raises LaunchError, naming what could not be prepared.
    """
    if not syscalls.supported_machine():
        raise LaunchError("the namespace backend knows x86_64 and aarch64 processors only")
    ours, theirs = Wire.pair()
    streams.flush()
    host = os.pidfd_open(os.getpid())
    mask = frozenset(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))
    try:
        pid = fork.fork()
        if pid == 0:
            _become_supervisor(plan, function, theirs, ours, host, mask)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()
    os.close(host)
    return SupervisorHandle(pid, os.pidfd_open(pid), Wire(ours))


def _become_supervisor(
    plan: Plan,
    function: Callable[[Guest], object] | None,
    theirs: socket.socket,
    ours: socket.socket,
    host: int,
    mask: frozenset[int],
) -> NoReturn:
    status = 1
    try:
        if len(os.listdir("/proc/self/task")) > 1:
            # A hook has started threads in this fork. A fork of it, without hooks, has one; this one only waits.
            child = syscalls.fork()
            if child:
                ours.close()
                theirs.close()
                os.waitpid(child, 0)
                os._exit(0)
        ours.close()
        if function is None or function is commands_only:
            fds.close_all_but({0, 1, 2, theirs.fileno(), host})  # a pipe of the host's, say, whose reader waits for its end
        _open_stdio()
        syscalls.set_name("isolation-keep")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        wire = Wire(theirs, accept_fds=True)
        if function is None:
            Supervisor(plan, wire, host, mask).serve()
        else:
            serve_warm(plan, wire, host, mask, function)
        status = 0
    except BaseException as error:
        if os.environ.get("ISOLATION_DEBUG"):
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(status)


def serve_warm(plan: Plan, wire: Wire, host: int, mask: frozenset[int], function: Callable[[Guest], object]) -> None:
    """The supervisor of a template is itself PID 1 of a PID namespace, beneath which it makes its forks: so the kernel ends
    them all with it. Its parent only waits, and clears up."""
    inherited = fds.inventory(exclude=[wire.fileno(), host])
    cgroups = None
    base = userns.choose_range()
    try:
        if plan.staged:
            idmap.prepare(plan.staged, plan.mount_point, base)
        if plan.cgroup is not None:
            plan.cgroup.sweep()
            cgroups = plan.cgroup.subtree()
        ours, theirs = socket.socketpair()
        pid, pidfd = syscalls.clone(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID)
        if pid == 0:
            ours.close()
            steps.die_with_supervisor()
            steps.become_root_of_namespace(plan, theirs)
            theirs.close()
            supervisor = ForkServer(plan, wire, host, mask, cgroups, inherited)
            _run(Guest(wire, fork=lambda _guest: supervisor.forks()), function)
    except OSError as error:
        wire.send({"event": "failed", "errno": error.errno, "what": error.strerror or str(error)})
    else:
        theirs.close()
        wire.sock.close()
        if ours.recv(1) == messages.MAP_RANGE:
            userns.map_range(pid, base)
            ours.send(messages.MAP_RANGE)
        _see_end(pid, pidfd, host)
        ours.close()
    if cgroups is not None:
        cgroups.remove()


def _see_end(pid: int, pidfd: int, host: int) -> None:
    """Wait for a fork server. It ends with the host; should it not, it is ended."""
    poller = select.poll()
    for fd in (pidfd, host):
        poller.register(fd, select.POLLIN)
    poller.poll()
    if not wait_readable(pidfd, 0) and not wait_readable(pidfd, END_WAIT):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.waitpid(pid, 0)


def _run(guest: Guest, function: Callable[[Guest], object]) -> NoReturn:
    """In a template, and in its forks, which come to life inside of the function: status 0 only when it returned."""
    try:
        function(guest)
    except SystemExit as error:
        guest.finish(error.code if isinstance(error.code, int) else 0 if error.code is None else 1)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        guest.finish(1)
    guest.finish(0)


def _open_stdio() -> None:
    """Descriptors 0 to 2 must be taken, or the next file to be opened becomes somebody's stdout."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)
