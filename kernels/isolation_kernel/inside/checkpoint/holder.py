"""Processes that keep checkpoints, and the one that stands for the kernel when its first process is gone.

The host waits for the process that it has started. When another takes over after a rollback, the first becomes a supervisor
by execve(2): the same process, without threads, with next to no memory. It adopts the kernels to come
(PR_SET_CHILD_SUBREAPER), and ends as the last of them does.

A holder hears of one thing only: that it is to make a kernel. With that comes a pipe, which ends when the kernel before has.
Holders are known by their names, for a kernel that has come back does not know of those that were made since.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from isolation_kernel.inside.checkpoint import supervisor
from isolation_kernel.inside.checkpoint.own import GIVEN, Own
from isolation_kernel.inside.checkpoint.process import HOLDER_NAME, descriptors, fork, holders, processes, trackers

SLOTS: Final = 5  # one more than a kernel may have checkpoints, for the one that takes another's place
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_ANSWER: Final = 20.0  # s, for a fork
_ENDED: Final = "the process that kept it has ended; take another"
_REQUEST: Final = 1 << 17


class Gone(Exception):
    """A checkpoint's process is no more, or can make no kernel."""


@dataclass
class Wake:
    """What a kernel hears that has come back: a message; and a pipe that tells of the end of the one before, and of the
    requests that waited there."""

    message: dict[str, Any]
    life: int
    state: Any = None  # state.State, as it was


class Lineage:
    """What all kernels and holders that descend from one kernel share. Made before the first fork."""

    def __init__(self) -> None:
        self.first = True  # this is the process that the host has started
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(SLOTS)]
        self._ours = [ours for ours, _theirs in pairs]
        self._theirs = [theirs for _ours, theirs in pairs]
        for end in (*self._ours, *self._theirs):
            end.setblocking(True)  # whatever a user's socket.setdefaulttimeout() says
        self._pids, self._its_pids = os.pipe2(os.O_CLOEXEC)

    def fds(self) -> set[int]:
        """What of it is open."""
        return {end.fileno() for end in (*self._ours, *self._theirs)} | {self._pids, self._its_pids}

    def hold(self, slot: int, own: Own) -> Wake | None:
        """Leave a copy of this process behind. Returns None; and in each kernel that comes back to it, what woke that one.
        Raises OSError."""
        self.forget(slot)
        loops = own.loops()  # now: threads of subshells are forgotten by a fork
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        named, its_named = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                pid = fork()
            except OSError:
                os.close(named)
                os.close(its_named)
                raise
            os.close(its_named if pid else named)
            if pid:
                os.read(named, 1)  # until it has the name that it is found by (or has ended)
                os.close(named)
                return None
            own.lost = loops
            wake = self._be_holder(slot, own, its_named)
            self.first = False
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as ipykernel has it between cells
            return wake
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _be_holder(self, slot: int, own: Own, named: int) -> Wake:
        """Until it is killed; returns in each copy of it that is to be a kernel. `named` hears when it has its name."""
        try:
            _prctl(_PR_SET_NAME, f"{HOLDER_NAME}{slot}".encode())
            os.write(named, b"n")
            os.close(named)
            _let_go(own, self.fds())
            wake = self._wait(self._theirs[slot])
            _prctl(_PR_SET_NAME, b"python")
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)  # sys.stderr is for channels that are not this process's
            os._exit(1)
        return wake

    def _wait(self, end: socket.socket) -> Wake:
        while True:
            data, given, _flags, _address = socket.recv_fds(end, _REQUEST, 1)
            try:
                # By way of a child that ends, so that the supervisor adopts it.
                if (pid := fork()) == 0:
                    _fork_and_leave(end)
                    end.send(json.dumps({"pid": os.getpid()}).encode())
                    return Wake(json.loads(data), given[0])
                os.waitpid(pid, 0)
            except OSError as error:
                _complain(end, error)
            for fd in given:
                os.close(fd)

    def forget(self, slot: int) -> None:
        """End the holder in a slot, if there is one."""
        for pid in holders(slot):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # one that a kernel before this one has left
                os.waitpid(pid, 0)
        for end in (self._ours[slot], self._theirs[slot]):
            while select.select([end], [], [], 0)[0]:
                end.recv(_REQUEST)  # what it has not read, or nobody from it

    def wake(self, slot: int, message: dict[str, Any]) -> Successor:
        """Have the holder in a slot make a kernel, which waits for the end of this one. Raises Gone."""
        holder = _pidfd(next(holders(slot), -1))
        if holder < 0:
            raise Gone(_ENDED)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        end = self._ours[slot]
        life, its_life = os.pipe2(os.O_CLOEXEC)
        try:
            socket.send_fds(end, [json.dumps(message).encode()], [life])
            # One that is killed is there for some moments yet.
            heard = select.select([end.fileno(), holder], [], [], _ANSWER)[0]
            if end.fileno() not in heard:
                raise Gone(_ENDED if heard else "it does not answer")
            answer = json.loads(end.recv(_REQUEST))
            if "error" in answer:
                raise Gone(answer["error"])
        except (OSError, Gone) as error:
            os.close(its_life)
            raise Gone(str(error)) from None
        finally:
            os.close(life)
            os.close(holder)
        return Successor(self, answer["pid"], its_life)


def _pidfd(pid: int) -> int:
    """-1 for a process that is no more."""
    try:
        return os.pidfd_open(pid) if pid > 0 else -1
    except ProcessLookupError:
        return -1


@dataclass
class Successor:
    """A kernel that waits for this one's end."""

    _lineage: Lineage
    _pid: int
    _life: int

    def stop(self) -> None:
        """It is not wanted after all."""
        os.close(self._life)

    def take_over(self, streams: Sequence[Any], waiting: list[list[bytes]]) -> None:
        """End this process, or become the supervisor. Does not return."""
        lineage = self._lineage
        with open(self._life, "wb", closefd=False) as life:
            pickle.dump(waiting, life)
        if not lineage.first:
            os.write(lineage._its_pids, self._pid.to_bytes(8, "little"))
            os._exit(0)
        _restore(streams)
        for number in supervisor.SIGNALS:
            ctypes.CDLL(None).signal(number, 1)  # SIG_IGN, which stays through execve(2); from a subshell, too
        os.set_inheritable(lineage._pids, True)
        os.execv(sys.executable, [sys.executable, "-I", "-S", supervisor.__file__, str(lineage._pids), str(self._pid)])


def become_kernel(wake: Wake, own: Own) -> list[list[bytes]]:
    """In one that comes back: wait for the end of the one before, and end what was started since the checkpoint. Returns the
    requests that waited there. Ends this process when it is not wanted after all."""
    with open(wake.life, "rb") as life:
        data = life.read()
    if not data:
        os._exit(0)
    deadline = time.monotonic() + _ANSWER
    while strays := [pid for pid in processes() if pid not in (*own.processes, os.getpid(), *trackers()[0])]:
        for pid in strays:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass  # gone by itself
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    found: list[list[bytes]] = pickle.loads(data)
    return found


def _fork_and_leave(end: socket.socket) -> None:
    """Returns in a child only."""
    try:
        if fork():
            os._exit(0)
    except OSError as error:
        _complain(end, error)
        os._exit(1)


def _complain(end: socket.socket, error: OSError) -> None:
    end.send(json.dumps({"error": error.strerror}).encode())


def _let_go(own: Own, kept: set[int]) -> None:
    """Close what the kernel has open for itself: frontends must see its end when it ends. What is certainly not used again
    and has no object that would close its number a second time."""
    _restore(own.streams())
    for loop in own.lost:
        selector = getattr(getattr(loop, "_selector", None), "_selector", None)
        if selector is not None:
            selector.close()
    for end in own.loop_ends():
        end.close()
    captured = {os.readlink(f"/proc/self/fd/{stream._fid}") for stream in own.streams()}
    for fd, link in descriptors():
        if fd in kept or fd in GIVEN:
            continue
        try:
            if (link.startswith("socket:") and own.is_own_socket(fd)) or fd in own.anonymous or link in captured:
                os.close(fd)
        except OSError:
            continue


def _restore(streams: Sequence[Any]) -> None:
    """stdout and stderr are again what they were before ipykernel took them."""
    for stream in streams:
        os.dup2(stream._original_stdstream_copy, stream._original_stdstream_fd)


def _prctl(option: int, value: int | bytes) -> None:
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    ctypes.CDLL(None).prctl(option, argument, 0, 0, 0)
