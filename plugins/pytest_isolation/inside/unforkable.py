"""What a fork of a process cannot carry: threads, child processes, sockets and the like, memory of a device.

On namespaces a fork is fork(2): one thread of one process, with files of its own tree, and a copy of shared memory. A
fixture that leaves anything else behind is not the same in a fork, nor is what a module started when it was imported. (Who
else has that memory is another process, which is counted as such.) Of what modules have made, forks have some things anew,
such as a pipe both of whose ends are this process's: the backend knows.
"""

from __future__ import annotations

import contextlib
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from isolation.plain import os, threading

_DEVICES = ("/dev/dri/", "/dev/nvidia", "/dev/kfd", "/dmabuf:", "anon_inode:", "socket:")
_KINDS = {
    "socket": "socket", "pipe": "pipe", "anon_inode": "event descriptor", "/dev/ptmx": "pseudoterminal",
    "/dev/pts/ptmx": "pseudoterminal",
}  # fmt: skip
_NAMES_AT_MOST = 5
_HARMLESS = ("jemalloc_bg_thd",)  # a thread of jemalloc (in pyarrow) that starts again by itself
Carries = Callable[[Collection[int]], Collection[int]]
initially = pytest.StashKey[tuple["Held", "Held"]]()  # what was held before conftest files were loaded, and after


@dataclass(frozen=True)
class Held:
    """What this process has of them, by what tells one from another. `threads`: names by thread id; `files`: paths of those
    that are open, which a fork has as far as it is shown where they are."""

    threads: Mapping[int, str]
    processes: frozenset[str]
    descriptors: frozenset[tuple[str, str]]
    mappings: frozenset[str]
    native: frozenset[int] = field(default_factory=frozenset)
    files: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def now(cls, before: Held | None = None, *, own: bool = False, carries: Carries | None = None) -> Held:
        """`own`: of processes, only those below this one; not all of its PID namespace, which is the host's. `carries` tells
        which descriptors a fork has nevertheless.

        Threads are all that the kernel knows of, Python's or a library's. Those that are new since `before` and not
        Python's are looked at after a fork that is for nothing else: some libraries (OpenBLAS) end theirs before a fork, and
        start them again when they are needed (pthread_atfork(3)); others (OpenMP, rayon) would wait for ever in a fork."""
        threads, native = _threads()
        if native - (set() if before is None else before.native):
            _fork_and_end()
            threads, native = _threads()
        descriptors = frozenset(_descriptors(carries))
        return cls(threads, _processes(own=own), descriptors, frozenset(_mappings()), native, frozenset(_files()))

    def since(self, before: Held) -> Held:
        """What is new since then."""
        return Held(
            {tid: name for tid, name in self.threads.items() if tid not in before.threads},
            self.processes - before.processes, self.descriptors - before.descriptors, self.mappings - before.mappings,
            self.native - before.native, self.files - before.files,
        )  # fmt: skip

    def describe(self) -> str:
        """In words; "" for nothing."""
        names = {
            "thread": [name for tid, name in self.threads.items() if tid not in self.native],
            "thread of a library": [name for tid, name in self.threads.items() if tid in self.native],
        }
        found = Counter({what: len(each) for what, each in names.items()})
        found["process"] = len(self.processes)
        found["mapping of a device"] = len(self.mappings)
        for kind, _what in self.descriptors:
            found[kind] += 1
        return ", ".join(
            _counted(what, number) + _named(names.get(what, ())) for what, number in found.items() if number
        )  # fmt: skip


def _counted(what: str, number: int) -> str:
    if number == 1:
        return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
    first, space, rest = what.partition(" of ")
    return f"{number} {first}{'es' if first.endswith('s') else 's'}{space}{rest}"


def _named(names: Iterable[str]) -> str:
    found = sorted({name for name in names if name})
    more = ["…"] if len(found) > _NAMES_AT_MOST else []
    return f" ({', '.join([*found[:_NAMES_AT_MOST], *more])})" if found else ""


def _threads() -> tuple[dict[int, str], frozenset[int]]:
    """Names by thread id of all but this process's first one; and which of them are not Python's."""
    unnamed = _command_of("self")  # a thread that has no name of its own has the process's
    # What a project has put in the place of a thread (eventlet does) may not have all that one has.
    python = {getattr(thread, "native_id", None): thread.name for thread in threading.enumerate()}
    found, native = {}, set()
    for name in os.listdir("/proc/self/task"):
        tid = int(name)
        if tid == os.getpid():
            continue
        if tid in python:
            found[tid] = python[tid]
            continue
        try:
            command = _command_of(f"self/task/{name}")
        except OSError:
            continue  # it has just ended
        if not command.startswith(_HARMLESS):
            found[tid] = "" if command == unnamed else command
            native.add(tid)
    return found, frozenset(native)


def _command_of(which: str) -> str:
    with open(f"/proc/{which}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def _fork_and_end() -> None:
    """For what handlers do before a fork."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: this process has threads
        pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _processes(*, own: bool) -> frozenset[str]:
    """All that run in this PID namespace: a server that became a daemon is nobody's child but PID 1's. On the host, where
    others run as well, those below this one (`own`)."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue  # it has just ended
            if state not in ("Z", "X"):
                parents[name] = parent
    if not own:
        return frozenset(parents)
    found = {str(os.getpid())}
    grown = True
    while grown:
        more = {name for name, parent in parents.items() if parent in found} - found
        grown = bool(more)
        found |= more
    return frozenset(found - {str(os.getpid()), _tracker()})


def _tracker() -> str:
    """multiprocessing's resource tracker, which nobody waits for."""
    module = sys.modules.get("multiprocessing.resource_tracker")
    return str(getattr(getattr(module, "_resource_tracker", None), "_pid", None))


def _descriptors(carries: Carries | None) -> list[tuple[str, str]]:
    """One that is a duplicate of another does not count: pytest's capture puts those aside that it replaces."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        kind = _KINDS.get(target.partition(":")[0])
        if kind is not None:  # event descriptors have no number of their own
            found[int(name)] = kind, f"{name} {target}" if target.startswith(("anon_inode", "/dev/")) else target
    carried = () if carries is None else carries(found)
    return [each for number, each in found.items() if number not in carried]


def _files() -> Iterator[str]:
    """But for the standard streams, and what was put aside of them."""
    streams = {(status.st_dev, status.st_ino) for status in map(_status, (0, 1, 2)) if status is not None}
    for name in os.listdir("/proc/self/fd"):
        status = _status(int(name))
        named = status is not None and stat.S_ISREG(status.st_mode) and status.st_nlink > 0
        if status is not None and named and (status.st_dev, status.st_ino) not in streams:
            with contextlib.suppress(OSError):
                yield os.readlink(f"/proc/self/fd/{name}")


def _status(fd: int) -> os.stat_result | None:
    try:
        return os.fstat(fd)
    except OSError:
        return None


def _mappings() -> list[str]:
    """Shared, and neither of a file nor of the kernel's own memory: a fork does not have them."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            area, rights, _offset, _device, _inode, *name = line.split(None, 5)
            if rights.endswith("s") and "".join(name).startswith(_DEVICES):
                found.append(area)
    return found
