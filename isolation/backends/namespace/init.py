"""PID 1 of a sandbox: builds it, locks it, then reaps, starts and signals processes as the host says.

It is a fork of the keeper that never ran anything of the guest's. The guest cannot harm it: signals from inside a PID
namespace do not reach its PID 1 (pid_namespaces(7)), it is not dumpable, so neither ptrace(2) nor /proc shows its
memory, environment or descriptors, and its wire is in no other process. So what it reports of the guest's end is
the truth, whatever the guest does. When it ends, the kernel ends everything inside.
"""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import os
import resource
import select
import signal
import socket
import subprocess
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from isolation.backends.namespace import environment, fds, identity, lockdown, memory, network, syscalls, tree
from isolation.backends.namespace.fds import Inherited
from isolation.backends.namespace.plan import Plan
from isolation.errors import WireError
from isolation.guest import Guest
from isolation.wire import Message, Wire

DUMP_SIGNAL = signal.SIGRTMAX - 1  # makes a payload write the stacks of its threads; see `_prepare_payload`
_SIGCHLD_MASK = 1 << (signal.SIGCHLD - 1)


@dataclass
class Birth:
    """What a clone needs besides the plan. Descriptors are numbers in the keeper's table, which it inherits."""

    control: int  # the host's wire to PID 1
    leash: int  # readable or at its end: go, then (at its end) die
    wire: int | None = None  # the host's wire to a payload that is a fork of the keeper; None: commands only
    stdio: tuple[int, int, int] | None = None  # the payload's
    crash: int | None = None  # where the payload writes the stacks of its threads
    scratch: tuple[int, ...] = ()  # private copies of unlinked files
    inherited: Sequence[Inherited] = ()
    memory_files: tuple[int, int] | None = None
    signal_mask: frozenset[int] = frozenset()  # of the host, for the payload
    umask: int = 0o022
    spawn: Message | None = None  # a first command, to save the way to the host and back
    spawn_fds: tuple[int, ...] = ()


def live(plan: Plan, birth: Birth) -> Guest:
    """Be PID 1. Returns only in the payload's process (when the birth has a wire), as a new guest."""
    control = Wire(socket.socket(fileno=birth.control), accept_fds=True)
    payload = None
    try:
        store = _build(plan, birth)
        if birth.wire is not None:
            payload = _fork_payload(plan, birth)
            if payload == 0:
                return _prepare_payload(plan, birth)
    except BaseException as error:
        _give_up(control, error)
    _serve(plan, birth, control, store, payload)


def _give_up(control: Wire, error: BaseException) -> NoReturn:
    try:
        number = error.errno if isinstance(error, OSError) else None
        text = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        control.send({"event": "failed", "errno": number, "what": text})
    except WireError:
        pass
    os._exit(1)


def _build(plan: Plan, birth: Birth) -> int:
    """Everything between being cloned and being sealed; the order is explained at each step."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    who = plan.identity
    if os.read(birth.leash, 1) != b"g":  # the keeper has put this process into its cgroup, and mapped the range
        os._exit(1)
    if who.ranged:
        identity.become_mapped_root()
    else:
        identity.map_own_ids(0, 0, who.uid, who.gid)  # devpts wants a mapped root (bubblewrap)
    # After the cgroup was joined, so that it is the root that is seen; offsets of the new time namespace are for
    # children, and stay zero.
    syscalls.unshare(syscalls.CLONE_NEWCGROUP | syscalls.CLONE_NEWTIME)
    os.setsid()
    if "keyring" in plan.defences:
        _fresh_keyring()
    os.umask(0)
    store = tree.build(plan.operations, plan.limits.disk, plan.mount_point)
    os.umask(birth.umask)
    if plan.own_network:
        network.loopback_up()
        network.open_low_ports()
    for number, value in plan.rlimits:
        _set_rlimit(number, value)
    if not who.ranged and (who.uid, who.gid) != (0, 0):
        # The guest's own user namespace, below the one that owns the mounts: even with capabilities in its own, it
        # has none over them.
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        identity.map_own_ids(who.uid, who.gid, 0, 0)
    if "capabilities" in plan.defences:
        lockdown.drop_capabilities()
    lockdown.no_new_privileges()
    if plan.landlock:
        lockdown.restrict_to_root(plan.landlock)
    if "seccomp" in plan.defences:
        lockdown.filter_system_calls(plan.filter)
    if "dumpable" in plan.defences:
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    return store


def _fresh_keyring() -> None:
    """Keyrings are in no namespace (keyrings(7)): leave the host's session keyring. A kernel without keys has none to
    leave, and an outer sandbox may have refused the call along with all others on keys."""
    try:
        syscalls.join_session_keyring()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise


def _set_rlimit(number: int, value: int) -> None:
    _soft, hard = resource.getrlimit(number)
    lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(number, (lower, lower))


def _fork_payload(plan: Plan, birth: Birth) -> int:
    syscalls.fork_before()
    try:
        return syscalls.fork()
    finally:
        if os.getpid() == 1:
            syscalls.fork_after_parent()


def _prepare_payload(plan: Plan, birth: Birth) -> Guest:
    """In the forked payload: from here on everything is the guest's, and only the guest's."""
    assert birth.wire is not None
    assert birth.stdio is not None
    os.setsid()
    keep = [birth.wire] if birth.crash is None else [birth.wire, birth.crash]
    if "fds" in plan.defences:
        fds.adopt(birth.inherited, birth.stdio, birth.scratch, keep)
    if not plan.inherit_env:
        if "environment" in plan.defences:
            environment.scrub()
        os.environ.update(plan.env)
    os.chdir(plan.workdir)
    syscalls.set_name("isolation")
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    syscalls.fork_after_child()
    signal.pthread_sigmask(signal.SIG_SETMASK, birth.signal_mask)
    if birth.crash is not None:
        faulthandler.enable(file=birth.crash, all_threads=True)
        faulthandler.register(DUMP_SIGNAL, file=birth.crash, all_threads=True)
    return Guest(Wire(socket.socket(fileno=birth.wire), accept_fds=True))


def _serve(plan: Plan, birth: Birth, control: Wire, store: int, payload: int | None) -> NoReturn:
    """The loop. Ends with the sandbox, when the host or the keeper closes its end."""
    try:
        signals = syscalls.signalfd(_SIGCHLD_MASK)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1, 2):
            os.dup2(null, fd, inheritable=False)
        keep = sorted({0, 1, 2, birth.control, birth.leash, signals, store, *(birth.memory_files or ()), *birth.spawn_fds})
        for below, above in zip([-1, *keep], [*keep, 1 << 31], strict=True):
            if above - below > 1:
                syscalls.close_range(below + 1, above - 1)
        if "environment" in plan.defences:
            environment.scrub()
        syscalls.set_name("isolation-init")
        _default_signals()
        server = _Server(plan, control, payload, birth.signal_mask)
        if plan.limits.memory is not None:
            server.watch = memory.Watch(plan.limits.memory, birth.memory_files, store, kills=plan.watch_memory)
        control.send({"event": "ready"}, fds=[store])
        os.close(store) if server.watch is None else None
        if birth.spawn is not None:
            server.spawn(birth.spawn, list(birth.spawn_fds))
        poller = select.poll()
        for fd in (birth.control, birth.leash, signals):
            poller.register(fd, select.POLLIN)
        while True:
            ready = [fd for fd, _events in poller.poll(server.poll_interval())]
            if birth.leash in ready:
                os._exit(0)
            if signals in ready:
                os.read(signals, 1024)
                server.reap()
            if birth.control in ready:
                if not control.fill():
                    os._exit(0)
                while (message := control.next_message()) is not None:
                    server.handle(message)
            server.look_at_memory()
    except BaseException as error:
        _give_up(control, error)


def _default_signals() -> None:
    """Handlers of the host's would make PID 1 reachable by signals from inside; without any, the kernel drops them."""
    for number in signal.valid_signals():
        if signal.getsignal(number) not in (signal.SIG_DFL, None) and number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)


class _Server:
    """What PID 1 knows of the guest's processes."""

    def __init__(self, plan: Plan, control: Wire, payload: int | None, signal_mask: frozenset[int]) -> None:
        self._signal_mask = signal_mask
        self.watch: memory.Watch | None = None
        self._env = plan.env
        self._control = control
        self._payload = payload
        self._commands: dict[int, int] = {}  # by process id: the host's number for it
        if payload is not None:
            self._commands[payload] = 0

    def poll_interval(self) -> int | None:
        """Milliseconds for poll(2)."""
        return None if self.watch is None or not self._commands else self.watch.interval

    def handle(self, message: Message) -> None:
        op = message.get("op")
        if op == "spawn":
            self.spawn(message, self._control.take_fds(message["fds"]))
        elif op == "signal":
            self._signal(message["id"], message["signal"], group=message.get("group", False))
        elif op == "dump":
            self._dump()
        elif op == "open":
            self._open(message)

    def spawn(self, message: Message, given: list[int]) -> None:
        """Start a command. vfork(2) underneath (subprocess), so its cost does not grow with the template."""
        number = message["id"]
        tty = message.get("tty")
        reply: list[int] = []
        try:
            if tty:
                master, slave = os.openpty()
                given = [slave if fd is None else fd for fd in _spread(tty, given)]
                reply = [master]
            signal.pthread_sigmask(signal.SIG_SETMASK, self._signal_mask)  # a child inherits it through execve(2)
            process = subprocess.Popen(
                message["argv"],
                stdin=given[0],
                stdout=given[1],
                stderr=given[2],
                env=self._env | (message.get("env") or {}),
                cwd=message["cwd"],
                start_new_session=True,
                preexec_fn=_take_terminal if tty else None,
            )
        except OSError as error:
            missing_cwd = error.filename == message["cwd"] and not os.path.isdir(message["cwd"])
            self._control.send({
                "event": "unspawned", "id": number, "errno": error.errno, "what": error.strerror or str(error),
                "cwd": missing_cwd,
            })  # fmt: skip
        else:
            process.returncode = 0  # reaped here, not by subprocess
            self._commands[process.pid] = number
            self._control.send({"event": "spawned", "id": number, "pid": process.pid}, fds=reply)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        for fd in {*given, *reply}:
            os.close(fd)
        self.reap()  # its SIGCHLD may have come while it was not blocked, and is lost then

    def reap(self) -> None:
        """Collect everything that has ended; orphans too, which nobody asks for."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            number = self._commands.pop(pid, None)
            if number is None:
                continue
            event = {"event": "exit", "id": number, "status": status, "oom": self._was_oom(status)}
            event["usage"] = [usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024]
            self._control.send(event)

    def look_at_memory(self) -> None:
        """Have the stacks written before the limit is reached; where no cgroup holds it, end what is over it."""
        if self.watch is None or not self._commands:
            return
        state = self.watch.look()
        if state == "near" and self._payload in self._commands:
            self._dump()
        elif state == "over":
            self._dump()
            self._control.send({"event": "oom"})
            time.sleep(0.05)  # a moment for the stacks to be written
            os._exit(0)

    def _was_oom(self, status: int) -> bool:
        return self.watch is not None and os.WIFSIGNALED(status) and self.watch.kernel_killed()

    def _dump(self) -> None:
        if self._payload in self._commands:
            os.kill(self._payload, DUMP_SIGNAL)

    def _signal(self, number: int, signum: int, *, group: bool) -> None:
        for pid, known in self._commands.items():
            if known == number:
                try:
                    os.killpg(pid, signum) if group else os.kill(pid, signum)
                except ProcessLookupError:
                    pass

    def _open(self, message: Message) -> None:
        """Open a path as the guest sees it; symlinks cannot lead out, since there is no out."""
        try:
            fd = os.open(message["path"], message["flags"] | os.O_CLOEXEC | os.O_NONBLOCK, message.get("mode", 0o644))
        except OSError as error:
            self._control.send({"event": "opened", "errno": error.errno, "what": error.strerror})
            return
        self._control.send({"event": "opened"}, fds=[fd])
        os.close(fd)


def _spread(tty: Sequence[bool], given: list[int]) -> list[int | None]:
    """The three streams: None for the terminal, the next descriptor for the others."""
    rest = iter(given)
    return [None if terminal else next(rest) for terminal in tty]


def _take_terminal() -> None:
    for fd in (0, 1, 2):
        if os.isatty(fd):
            fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
            return

