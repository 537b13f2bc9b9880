"""PID 1 of a sandbox for commands: builds it, locks it, then reaps, starts and signals processes as the host says.

It is a fork of the supervisor that never runs anything of the guest's. The guest cannot harm it: signals from inside a PID
namespace do not reach its PID 1 (pid_namespaces(7)), it is not dumpable, so neither ptrace(2) nor /proc shows its
memory, environment or descriptors, and its wire is in no other process. So what it reports of the guest's end is
the truth, whatever the guest does. When it ends, the kernel ends everything inside.
"""

from __future__ import annotations

import fcntl
import signal
import struct
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import environment, inherited, memory_watch, messages, steps
from isolation.backends.namespace.process.steps import Construction
from isolation.errors import WireError
from isolation.hookspecs import FIRST_PASSED
from isolation.linux import syscalls
from isolation.plain import os, select, socket, subprocess
from isolation.wire import Message, Wire

# Made by itself, once it has joined its cgroup, which so is the root that is seen. Offsets of the time namespace are for
# children, and stay zero.
NAMESPACES = syscalls.CLONE_NEWCGROUP | syscalls.CLONE_NEWTIME
_SIGCHLD_MASK = 1 << (signal.SIGCHLD - 1)


@dataclass
class InitArgs:
    """What it needs besides the plan. Descriptors are numbers in the supervisor's table, which it inherits."""

    control: int  # the host's wire
    control_socket: socket.socket  # to the supervisor, which answers what it is asked; at its end: die
    construction: Construction | None  # None: it builds the base, too
    memory_files: tuple[int, int] | None
    signal_mask: frozenset[int]  # of the host, for commands
    umask: int


def live(plan: Plan, args: InitArgs) -> NoReturn:
    """Be PID 1."""
    control = Wire(socket.socket(fileno=args.control), accept_fds=True)
    try:
        store = _build(plan, args)
        _serve(plan, args, control, store)
    except BaseException as error:
        _give_up(control, error)


def _give_up(control: Wire, error: BaseException) -> NoReturn:
    number = error.errno if isinstance(error, OSError) else None
    text = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
    try:
        control.send({"event": "failed", "errno": number, "what": text})
    except WireError:
        pass
    os._exit(1)


def _build(plan: Plan, args: InitArgs) -> int:
    construction = args.construction
    if construction is not None:
        store = construction.enter_and_build()
    else:
        steps.die_with_supervisor()
        os.setsid()
        if plan.cgroup is not None:
            steps.ask_supervisor(args.control_socket, messages.JOIN_CGROUP)
        steps.become_root_of_namespace(plan, args.control_socket)
        steps.build_base(plan)
        syscalls.unshare(NAMESPACES)
        construction = Construction(plan, steps.with_modes(plan, steps.look_at_lowers(plan)), args.umask, first=True)
        construction.use_control_socket(args.control_socket.fileno())
        store = construction.build_fresh()
    _leave_mounts(args.control_socket)
    construction.seal()
    if "dumpable" in plan.defences:
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    return store


def _leave_mounts(control_socket: socket.socket) -> None:
    """Give the supervisor a share in the mount namespace: to take it apart waits for the whole machine twice (RCU), and the
    end of this process, for which the host waits, would wait with it. The supervisor lets go of it then, when nobody is in
    it."""
    mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    socket.send_fds(control_socket, [messages.MOUNTS], [mounts])
    os.close(mounts)


def _serve(plan: Plan, args: InitArgs, control: Wire, store: int) -> NoReturn:
    """The loop. Ends with the sandbox, when the host or the supervisor closes its end."""
    signals = syscalls.signalfd(_SIGCHLD_MASK)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        os.dup2(null, fd, inheritable=False)
    control_socket = args.control_socket.fileno()
    memory_files = args.memory_files
    if plan.watch_memory:
        _show_memory(args.control_socket, store)
    inherited.close_all_but({0, 1, 2, args.control, control_socket, signals, store, *(memory_files or ())})
    # The numbers from FIRST_PASSED up are for commands; a supervisor with many sandboxes has given us such.
    control_socket, signals, store = _low(control_socket), _low(signals), _low(store)
    control = Wire(socket.socket(fileno=_low(control.sock.detach())), accept_fds=True)
    if memory_files is not None:
        memory_files = (_low(memory_files[0]), _low(memory_files[1]))
    if "environment" in plan.defences:
        environment.scrub()
        environment.scrub_command_line()
    syscalls.set_name("isolation-init")
    _default_signals()
    server = _Server(plan, control, control_socket, args.signal_mask)
    control.send({"event": "ready"}, fds=[store])
    os.close(store)
    if memory_files is not None:
        server.watch = memory_watch.Watch(plan.limits.memory or 0, memory_files, -1, -1, kills=False)
    poller = select.poll()
    for fd in (control.fileno(), control_socket, signals):
        poller.register(fd, select.POLLIN)
    while True:
        ready = [fd for fd, _events in poller.poll()]
        if control_socket in ready:
            os._exit(0)
        if signals in ready:
            os.read(signals, 1024)
            server.reap()
        if control.fileno() in ready:
            if not control.fill():
                os._exit(0)
            while (message := control.next_message()) is not None:
                server.handle(message)


def _show_memory(control_socket: socket.socket, store: int) -> None:
    """To the supervisor, which watches it: this process is within the guest's sight, and could be hindered."""
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    socket.send_fds(control_socket, [messages.PLACES], [proc, store])
    os.close(proc)


def _low(fd: int) -> int:
    """The same, with a number below FIRST_PASSED."""
    if fd < FIRST_PASSED:
        return fd
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return moved


def _default_signals() -> None:
    """Handlers of the host's would make PID 1 reachable by signals from inside; without any, the kernel drops them."""
    for number in signal.valid_signals():
        if signal.getsignal(number) not in (signal.SIG_DFL, None) and number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)


class _Server:
    """What PID 1 knows of the guest's processes."""

    def __init__(self, plan: Plan, control: Wire, control_socket: int, signal_mask: frozenset[int]) -> None:
        self.watch: memory_watch.Watch | None = None  # only to know what the kernel has done
        self._control_socket = control_socket
        self._watched = plan.watch_memory
        self._env = plan.env
        self._control = control
        self._signal_mask = signal_mask
        self._commands: dict[int, int] = {}  # by process id: the host's number for it

    def handle(self, message: Message) -> None:
        op = message.get("op")
        if op == "spawn":
            self._spawn(message, self._control.take_fds(message["fds"]))
        elif op == "signal":
            self._signal(message["id"], message["signal"], group=message.get("group", False))
        elif op == "open":
            self._open(message)

    def _spawn(self, message: Message, given: list[int]) -> None:
        """Start a command. vfork(2) underneath (subprocess), so its cost does not grow with this process."""
        number = message["id"]
        tty = message.get("tty")
        reply: list[int] = []
        count = len(given) - message["passed"]
        given, passed = given[:count], given[count:]
        placed: list[int] = []
        try:
            for fd in passed:
                placed.append(os.dup2(fd, FIRST_PASSED + len(placed)))
            if tty:
                master, slave = os.openpty()
                if message.get("window"):
                    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *message["window"], 0, 0))
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
                pass_fds=placed,
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
            if self._watched:
                os.write(self._control_socket, messages.ACTIVE)  # now that there is something to watch
            self._control.send({"event": "spawned", "id": number, "pid": process.pid}, fds=reply)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        for fd in {*given, *reply, *passed, *placed}:
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

    def _was_oom(self, status: int) -> bool:
        return self.watch is not None and os.WIFSIGNALED(status) and self.watch.kernel_killed()

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
