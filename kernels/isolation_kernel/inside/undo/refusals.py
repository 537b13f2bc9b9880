"""What a fork of this kernel would lose, or share with it: threads, processes, sockets, tasks, files open for writing.

The kernel has all of these itself, which is what makes this long. Its own are known by who made them, or by having been
there before the first cell; whatever is not certainly the kernel's is the user's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Final

from isolation_kernel.inside.host import FIRST_GIVEN

HOLDER_NAME: Final = "iso-check-"  # of the processes that keep checkpoints, and the slot; 15 bytes at most (prctl(2))
GIVEN: Final = range(FIRST_GIVEN, FIRST_GIVEN + 6)  # five listening sockets, and the wire
_LIBRARIES: Final = ("ipykernel", "IPython", "zmq", "tornado", "jupyter_client", "isolation_kernel")
# Modules whose threads are of no harm when they are lost, and start anew: pyzmq's comes with the first large message.
_RENEWED: Final = ("zmq.utils.garbage", "tqdm._monitor")
SEMAPHORE: Final = "/dev/shm/sem."  # of multiprocessing's locks, tqdm's among them; each is in a file that is deleted
_SHOWN: Final = 8
# Names of native threads that may be lost: libzmq's are the kernel's, jemalloc (in pyarrow) starts its own again.
_NATIVE: Final = ("ZMQbg", "jemalloc_bg_thd")


class Own:
    """What is the kernel's: taken when it is ready, and no cell has run."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.threads = {thread for thread in threading.enumerate() if thread is not threading.main_thread()}
        self.processes = set(processes())
        self.lost: list[Any] = []  # in a fork: event loops of threads that it does not have
        self.shared_maps = set(_shared_maps())
        self.anonymous = {fd for fd, link in descriptors() if link.startswith("anon_inode:")}
        self.pipes = {link for _fd, link in descriptors() if link.startswith("pipe:")}
        self.inner = f"{app.ip}-inner"
        self.doors = [_name(fd) for fd in GIVEN[:5]]

    def loops(self) -> list[Any]:
        """asyncio's, of the kernel's threads."""
        threads = (self.app.control_thread, self.app.iopub_thread, self.app.shell_channel_thread)
        more = [thread for thread in threading.enumerate() if _is_subshell(thread)]
        found = [loop.asyncio_loop for loop in (self.app.io_loop, *(thread.io_loop for thread in (*threads, *more)))]
        script = script_magics(self.app.kernel.shell)
        return found if script is None or script.event_loop is None else [*found, script.event_loop]

    def helpers(self) -> list[Any]:
        """Threads that wait, and are started anew where there are none: of `%%bash` and its like, and of the event loop
        (`asyncio.to_thread`)."""
        found = []
        script = script_magics(self.app.kernel.shell)
        for thread in threading.enumerate():
            run = getattr(getattr(thread, "_target", None), "__self__", None)
            if script is not None and run is not None and run is script.event_loop:
                found.append(thread)
        executor = getattr(self.app.io_loop.asyncio_loop, "_default_executor", None)
        threads = list(getattr(executor, "_threads", ()))
        if executor is not None and executor._work_queue.empty() and executor._idle_semaphore._value == len(threads):
            found += threads
        return found

    def subshells(self) -> list[str]:
        """Their names. JupyterLab has one for its widgets."""
        found: list[str] = self.app.shell_channel_thread.manager.list_subshell()
        return found

    def loop_ends(self) -> Iterator[Any]:
        """The two ends by which each of these loops is woken, as Python objects."""
        for loop in self.lost or self.loops():
            yield from (end for end in (getattr(loop, "_ssock", None), getattr(loop, "_csock", None)) if end is not None)

    def streams(self) -> list[Any]:
        """stdout and stderr, as ipykernel made them."""
        kernel = self.app.kernel
        return [stream for stream in (kernel._stdout, kernel._stderr) if hasattr(stream, "_original_stdstream_copy")]

    def is_own_socket(self, fd: int) -> bool:
        """Of a frontend's connection, or the kernel's inner ones."""
        if fd in GIVEN or fd in {end.fileno() for end in self.loop_ends()}:
            return True
        with _looked_at(fd) as end:
            ours, theirs = _names(end)
            if end.family == socket.AF_UNIX:
                known = {*self.doors, self.inner}
                return ours in known or theirs in known
            # Where ipykernel hears what child processes print.
            port = getattr(self.app.iopub_thread, "_pipe_port", None)
            return isinstance(ours, tuple) and port is not None and port in (ours[1], theirs[1] if theirs else None)

    def connections(self, door: int) -> int:
        """How many frontends are connected to a channel."""
        found = 0
        for fd, link in descriptors():
            if link.startswith("socket:") and fd not in GIVEN:
                found += _name(fd) == self.doors[door]
        return found


def script_magics(shell: Any) -> Any:
    """Of IPython: `%%bash` and its like, which have an event loop of their own."""
    return shell.magics_manager.registry.get("ScriptMagics")


def refusals(own: Own, ours: Iterable[int] = ()) -> list[str]:
    """Reasons, for people; none when nothing of the user's would be lost. `ours`: descriptors that checkpoints need."""
    found = [*_threads(own), *_subshells(own), *_native_threads(), *_processes(own), *_tasks(own)]
    found += [*_open_files(own, set(ours)), *_maps(own)]
    if any(signal.getitimer(which)[0] for which in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)):
        found.append("a timer (signal.setitimer, signal.alarm)")
    debugger = getattr(own.app.kernel, "debugger", None)
    if debugger is not None and (vars(debugger).get("_debugger") or vars(debugger).get("debugpy_initialized")):
        found.append("the debugger, which has been used")
    if getattr(own.app.kernel, "eventloop", None) is not None:
        found.append("the event loop of a graphical toolkit (%gui)")
    more = len(found) - _SHOWN
    return found if more <= 0 else [*found[:_SHOWN], f"and {more} more"]


def descriptors() -> list[tuple[int, str]]:
    """Numbers of what is open, and what that is."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except OSError:
            continue  # the one of listdir itself
    return sorted(found)


def processes() -> Iterator[int]:
    """Of the sandbox, but for those that keep checkpoints."""
    return (pid for pid, command in _commands() if not command.startswith(HOLDER_NAME))


def holders(slot: int) -> Iterator[int]:
    """Processes that keep the checkpoint of a slot: one, or none."""
    return (pid for pid, command in _commands() if command == f"{HOLDER_NAME}{slot}")


def _commands() -> Iterator[tuple[int, str]]:
    """Processes that have not ended, and their names."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    text = file.read()
            except OSError:
                continue
            if text[text.rindex(")") + 2] not in "ZX":
                yield int(name), text[text.index("(") + 1 : text.rindex(")")]


def _threads(own: Own) -> Iterator[str]:
    main = threading.main_thread()
    for thread in threading.enumerate():
        kind = type(thread)
        known = thread is main or thread in own.threads or _is_subshell(thread) or thread in own.helpers()
        if not known and kind.__module__ not in _RENEWED:
            yield f"thread {thread.name!r}" + (f" ({kind.__module__})" if kind.__module__ != "threading" else "")


def _is_subshell(thread: Any) -> bool:
    return type(thread).__module__ == "ipykernel.subshell"


def _subshells(own: Own) -> Iterator[str]:
    """Another kernel has them again, but not what they were about to do."""
    manager = own.app.shell_channel_thread.manager
    if any(manager.get_subshell_asyncio_lock(name).locked() for name in own.subshells()):
        yield "a subshell at work"


def _native_threads() -> Iterator[str]:
    """Those of libraries. OpenBLAS ends its own before a fork, and starts them again when they are needed (its
    pthread_atfork(3) handler); others, OpenMP's among them, would leave a fork waiting for threads that it does not have.
    So they are looked at after a fork that is for nothing else."""
    if _unknown_threads():
        fork_and_end()
        names = _unknown_threads()
        if names:
            named = sorted(set(names) - {_command("self")})  # one that has no name has the process's
            yield f"{len(names)} threads of a library, not Python's ({', '.join(named) or 'of OpenMP or Arrow, say'})"


def _unknown_threads() -> list[str]:
    python = {os.getpid(), *(thread.native_id for thread in threading.enumerate())}  # a fork's first may not know its own
    found = []
    for name in os.listdir("/proc/self/task"):
        try:
            command = _command(f"self/task/{name}")
        except OSError:
            continue
        if int(name) not in python and not command.startswith(_NATIVE):
            found.append(command)
    return found


def _command(which: str) -> str:
    with open(f"/proc/{which}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def fork() -> int:
    """Quietly: from Python 3.12 on it is said that the kernel has threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def fork_and_end() -> None:
    """For what handlers do before a fork."""
    pid = fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _processes(own: Own) -> Iterator[str]:
    for pid in processes():
        if pid not in own.processes and pid not in (os.getpid(), tracker()[0]):
            try:
                with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                    words = file.read().replace("\0", " ").strip()
            except OSError:
                continue
            yield f"process {pid} ({words[:60]})"


def tracker() -> tuple[int, int]:
    """multiprocessing's resource tracker, which stays once something has needed it, and may serve whoever has its pipe: its
    pid, and that descriptor; -1 where there is none."""
    module = sys.modules.get("multiprocessing.resource_tracker")
    found = getattr(module, "_resource_tracker", None)
    pid, fd = getattr(found, "_pid", None), getattr(found, "_fd", None)
    return (-1 if pid is None else pid, -1 if fd is None else fd)


def _tasks(own: Own) -> Iterator[str]:
    for loop in own.loops():
        for task in asyncio.all_tasks(loop):
            if not _is_of_library(_file_of(task.get_coro())):
                yield f"task {task.get_name()!r} ({getattr(task.get_coro(), '__qualname__', '?')})"
        for handle in list(getattr(loop, "_scheduled", ())):
            if not handle.cancelled() and not _is_of_library(_file_of(handle._callback)):
                yield f"a timer of the event loop ({getattr(handle._callback, '__qualname__', '?')})"


def _file_of(what: Any) -> str:
    """Where a coroutine or function comes from; "" where that cannot be said."""
    while hasattr(what, "func"):  # functools.partial
        what = what.func
    code = getattr(what, "cr_code", None) or getattr(what, "gi_code", None) or getattr(what, "__code__", None)
    if code is not None:
        return str(code.co_filename)
    module = sys.modules.get(getattr(what, "__module__", None) or "")
    return str(getattr(module, "__file__", None) or "")


def _is_of_library(path: str) -> bool:
    return path.startswith(_places())


def _places() -> tuple[str, ...]:
    files = (getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES)
    return (*(os.path.dirname(file) + "/" for file in files if file), os.path.dirname(asyncio.__file__) + "/")


def _open_files(own: Own, ours: set[int]) -> Iterator[str]:
    for fd, link in descriptors():
        if fd in ours or fd == tracker()[1]:
            continue
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISSOCK(mode) and not own.is_own_socket(fd):
                yield f"socket {_described(fd)}"
            elif stat.S_ISFIFO(mode) and link not in own.pipes:
                yield f"pipe (descriptor {fd})"
            elif stat.S_ISREG(mode) and _is_writable(fd):
                yield f"file open for writing: {link}"
        except OSError:
            continue  # closed meanwhile, by a thread of the kernel's


def _is_writable(fd: int) -> bool:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        flags = next(line for line in file if line.startswith("flags:"))
    return int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY


def _maps(own: Own) -> Iterator[str]:
    for path in _shared_maps():
        if path not in own.shared_maps and not path.startswith(SEMAPHORE):
            yield f"memory shared with a file: {path}"


def _shared_maps() -> Iterator[str]:
    seen = set()
    for permissions, path in _maps_of_files():
        if permissions[1] == "w" and permissions[3] == "s" and path not in seen:
            seen.add(path)
            yield path


def _maps_of_files() -> Iterator[tuple[str, str]]:
    """Permissions and path of what is mapped."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.rstrip("\n").split(None, 5)
            if len(fields) == 6:
                yield fields[1], fields[5]


def _looked_at(fd: int) -> socket.socket:
    """An object for a socket, which is not changed by that: it would be, by a user's default for time-outs."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    try:
        return socket.socket(fileno=os.dup(fd))
    finally:
        socket.setdefaulttimeout(before)


def _described(fd: int) -> str:
    with _looked_at(fd) as end:
        ours, theirs = _names(end)
        return f"{theirs or ours or '(unnamed)'} (descriptor {fd})"


def _name(fd: int) -> Any:
    with _looked_at(fd) as end:
        return _names(end)[0]


def _names(end: socket.socket) -> tuple[Any, Any]:
    found = []
    for ask in (end.getsockname, end.getpeername):
        try:
            found.append(ask())
        except OSError:
            found.append(None)
    return found[0], found[1]
