"""What a fork of this kernel would lose, or share with it: threads, processes, sockets, tasks, files open for writing.

The kernel has all of these itself (own.py); whatever is not certainly the kernel's is the user's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Final

from isolation_kernel.inside.checkpoint.own import Own, is_subshell
from isolation_kernel.inside.checkpoint.process import (
    SEMAPHORE,
    addresses,
    command_of,
    descriptors,
    fork_and_end,
    looked_at,
    processes,
    shared_maps,
    trackers,
)

_LIBRARIES: Final = ("ipykernel", "IPython", "zmq", "tornado", "jupyter_client", "isolation_kernel")
# Modules whose threads are of no harm when they are lost, and start anew: pyzmq's comes with the first large message.
_RENEWED: Final = ("zmq.utils.garbage", "tqdm._monitor")
# Names of native threads that may be lost: libzmq's are the kernel's, jemalloc (in pyarrow) starts its own again.
_NATIVE: Final = ("ZMQbg", "jemalloc_bg_thd")
_SHOWN: Final = 8


def refusals(own: Own, ours: Iterable[int] = ()) -> list[str]:
    """Reasons, for people; none when nothing of the user's would be lost. `ours`: descriptors that checkpoints need."""
    found = [*_threads(own), *_subshells(own), *_native_threads(), *_processes(own), *_tasks(own)]
    found += [*_open_files(own, set(ours)), *_maps(own)]
    if any(signal.getitimer(which)[0] for which in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)):
        found.append("a timer (signal.setitimer, signal.alarm)")
    if _debugs(own.app.kernel):
        found.append("the debugger, which has been used")
    if getattr(own.app.kernel, "eventloop", None) is not None:
        found.append("the event loop of a graphical toolkit (%gui)")
    more = len(found) - _SHOWN
    return found if more <= 0 else [*found[:_SHOWN], f"and {more} more"]


def _debugs(kernel: Any) -> bool:
    """Whether debugpy was started, which never ends. It is not by being asked: JupyterLab wants to know its state of
    each notebook that is opened, and so makes the debugger that stands behind ours (lazy_imports.py)."""
    debugger = getattr(kernel, "debugger", None)
    known = {} if debugger is None else vars(debugger)
    made = known.get("_debugger", None)
    return bool((known if made is None else vars(made)).get("debugpy_initialized"))


def _threads(own: Own) -> Iterator[str]:
    main = threading.main_thread()
    for thread in threading.enumerate():
        kind = type(thread)
        known = thread is main or thread in own.threads or is_subshell(thread) or thread in own.helpers()
        if not known and kind.__module__ not in _RENEWED:
            yield f"thread {thread.name!r}" + (f" ({kind.__module__})" if kind.__module__ != "threading" else "")


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
            named = sorted(set(names) - {command_of("self")})  # one that has no name has the process's
            yield f"{len(names)} threads of a library, not Python's ({', '.join(named) or 'of OpenMP or Arrow, say'})"


def _unknown_threads() -> list[str]:
    python = {os.getpid(), *(thread.native_id for thread in threading.enumerate())}  # a fork's first may not know its own
    found = []
    for name in os.listdir("/proc/self/task"):
        try:
            command = command_of(f"self/task/{name}")
        except OSError:
            continue
        if int(name) not in python and not command.startswith(_NATIVE):
            found.append(command)
    return found


def _processes(own: Own) -> Iterator[str]:
    for pid in processes():
        if pid not in own.processes and pid not in (os.getpid(), *trackers()[0]):
            try:
                with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                    words = file.read().replace("\0", " ").strip()
            except OSError:
                continue
            yield f"process {pid} ({words[:60]})"


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
        if fd in ours or fd in trackers()[1]:
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
    for path in shared_maps():
        if path not in own.shared_maps and not path.startswith(SEMAPHORE):
            yield f"memory shared with a file: {path}"


def _described(fd: int) -> str:
    with looked_at(fd) as end:
        ours, theirs = addresses(end)
        return f"{theirs or ours or '(unnamed)'} (descriptor {fd})"
