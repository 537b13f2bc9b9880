"""An eye of a supervisor's on its forks: does any thread of one still have something that could wake it?

A fork has one thread of its template's, and so waits for ever for a lock that another of them held, for a pool's answer, a
timer. The kernel tells what each thread waits in (proc_pid_syscall(5)): where all threads of all processes of a sandbox are
in a futex(2) wait, and none moves, nobody is left who could end that. To sleep, read or wait for a child is no such wait.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import NamedTuple

from isolation.linux import syscalls
from isolation.plain import os, time

_INTERVAL = 1.0  # s between two looks
_LOOKS = 10  # so many in a row must find the same
_LOOKS_AT_LOOPS = 60  # where waits have a time-out: what asks again and again may count how often
_FUTEX = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAITS = (0, 6, 9, 11, 13)  # FUTEX_WAIT, LOCK_PI, WAIT_BITSET, WAIT_REQUEUE_PI, LOCK_PI2 (linux/futex.h)
_FUTEX_COMMAND = 0x7F  # without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME
_SEEN_AT_WORK = 4  # looks that one at which it is counts against
_ALARMS = (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF)  # of setitimer(2), which nothing in /proc tells of
_BUSY = 0.05  # of a processor; a loop around a wait of 10 ms takes less


class _Wait(NamedTuple):
    """A thread in a futex wait. `switches`: how often it has given the processor away; `ticks`: of it, used."""

    pid: str
    thread: str
    timed: bool
    switches: int
    ticks: int


class DeadlockWatch:
    """Of one sandbox. `loops`: waits that end by themselves count, too, where for a minute all that follows is the same wait
    again (as of gRPC, which looks for signals meanwhile). For a single long one there may be a good reason."""

    def __init__(self, *, loops: bool) -> None:
        self._loops = loops
        self._next = 0.0
        self._seen: dict[tuple[str, str], _Wait] = {}
        self._same = 0

    def patience(self) -> float:
        """Milliseconds until the next look."""
        return max(0.0, self._next - time.monotonic()) * 1000 + 1

    def look(self, roots: tuple[int, ...]) -> bool:
        """Whether it is deadlocked, as far as is known by now. `roots`: numbers of its first processes, in /proc."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _INTERVAL
        found = self._waits(roots)
        if found is not None and self._is_as_before(found):
            self._same += 1
        else:  # what goes round is seen at work now and then
            self._same = max(0, self._same - _SEEN_AT_WORK) if self._loops else 0
        self._seen = found or {}
        looks = _LOOKS_AT_LOOPS if any(wait.timed for wait in self._seen.values()) else _LOOKS
        return self._same >= looks and not any(map(_has_timer, {wait.pid for wait in self._seen.values()}))

    def _waits(self, roots: tuple[int, ...]) -> dict[tuple[str, str], _Wait] | None:
        """All threads, by process and thread; None when one does something else, or cannot be looked at."""
        try:
            if _wait_of(str(roots[-1]), str(roots[-1])) is None:
                return None  # this one is asked first: it costs next to nothing, and says no at nearly every look
            threads = [(pid, thread) for pid in _below(roots) for thread in os.listdir(f"/proc/{pid}/task")]
            waits = {name: _wait_of(*name) for name in threads}
        except (OSError, ValueError, IndexError):
            return None
        return {name: wait for name, wait in waits.items() if wait is not None} if all(waits.values()) else None

    def _is_as_before(self, found: dict[tuple[str, str], _Wait]) -> bool:
        if found.keys() != self._seen.keys():
            return False
        ticks = sum(found[name].ticks - self._seen[name].ticks for name in found)
        if not any(wait.timed for wait in found.values()):
            return found == self._seen
        goes_round = any(found[name].switches > self._seen[name].switches for name, wait in found.items() if wait.timed)
        return self._loops and goes_round and ticks <= _BUSY * _INTERVAL * os.sysconf("SC_CLK_TCK")


def _wait_of(pid: str, thread: str) -> _Wait | None:
    """None for a thread that is not in a futex wait. Raises OSError, ValueError."""
    words = _read(f"/proc/{pid}/task/{thread}/syscall").split()
    if len(words) < 8 or int(words[0]) != _FUTEX[syscalls.MACHINE]:
        return None
    operation, timeout = int(words[2], 16), int(words[4], 16)
    if operation & _FUTEX_COMMAND not in _FUTEX_WAITS:
        return None
    fields = _read(f"/proc/{pid}/task/{thread}/stat").rpartition(")")[2].split()
    status = _read(f"/proc/{pid}/task/{thread}/status")
    switches = next(int(line.split()[1]) for line in status.split("\n") if line.startswith("voluntary_ctxt_switches:"))
    return _Wait(pid, thread, timeout != 0, switches, int(fields[11]) + int(fields[12]))


def _has_timer(pid: str) -> bool:
    """Whether a signal may come that a handler waits for, which could release what is waited for; or that cannot be told."""
    try:
        if _read(f"/proc/{pid}/timers"):
            return True
    except FileNotFoundError:
        pass  # a kernel without CONFIG_CHECKPOINT_RESTORE
    except OSError:
        return True
    caught = next(line.split()[1] for line in _read(f"/proc/{pid}/status").split("\n") if line.startswith("SigCgt:"))
    return any(int(caught, 16) >> (number - 1) & 1 for number in _ALARMS)


def _below(roots: tuple[int, ...]) -> Iterator[str]:
    """The last of the roots, and all descendants of any that have not ended: with a PID namespace's first process among the
    roots, nobody gets away from it."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                state, parent = _read(f"/proc/{name}/stat").rpartition(")")[2].split()[:2]
            except OSError:
                continue  # it has just ended
            if state not in "ZX":
                parents[name] = parent
    found = {str(root) for root in roots}
    grown = True
    while grown:
        more = {name for name, parent in parents.items() if parent in found} - found
        grown = bool(more)
        found |= more
    return iter(found - {str(root) for root in roots[:-1]})


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        return file.read()
