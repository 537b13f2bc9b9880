"""One sandbox of the microVM backend, seen from the host."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import tty as terminals
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, cast

from isolation.backends.microvm import boot
from isolation.backends.microvm.plan import Plan, now, seed
from isolation.backends.microvm.vm.link import Ends, clean
from isolation.backends.microvm.vm.vm import Vm
from isolation.backends.refusal import not_started
from isolation.errors import FeatureMissing, GuestError, LaunchError, SandboxClosed
from isolation.hookspecs import Machine
from isolation.plain import select, threading, time
from isolation.result import Change, Ended, Usage, Verdict
from isolation.wire import Message

_PREPARE_PATIENCE = 60.0  # s
_ANSWER_PATIENCE = 90.0  # s, for an agent that answers pings, and not this
_PIPE_BUF = 4096  # what POLLOUT promises of a pipe (pipe(7))
_NOTES_AT_ONCE = 1000
_LOOK_AGAIN = 0.1  # s; another thread may have read the news that this one waits for
_CHANGES_AT_MOST = 200_000
_HUGE = 1 << 62  # no size, and no time, is as large


class MicrovmMachine(Machine):
    """Talks to the machine's agent. Calls from several threads take turns."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.workdir = plan.workdir
        self._lock = threading.RLock()
        self._numbers = 0
        self._streams = 0
        self._exits: dict[int, Message] = {}
        self._started: dict[int, float] = {}
        self._windows: dict[int, int] = {}
        self._closed = False
        self._changes: list[Change] | None = None
        self.vm = prepare(plan)
        if plan.limits.wall is not None:
            self.vm.link.deadline = time.monotonic() + plan.limits.wall
        self.vm.link.watch()

    def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        stdio: Sequence[int | None],
        window: tuple[int, int] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> tuple[int, int | None]:
        if pass_fds:
            raise FeatureMissing("a command in a virtual machine cannot be given open descriptors")
        tty = [fd is None for fd in stdio]
        with self._lock:
            self._numbers += 1
            number = self._numbers
            streams = [self._new_stream() for _ in range(3)]
            terminal = self._new_stream()
            master: int | None = None
            ends: list[Ends] = []
            if any(tty):
                # A terminal here as well, in raw mode, so that what the caller does with the master works.
                master, slave = pty.openpty()
                terminals.setraw(slave)
                os.set_blocking(slave, False)
                ends.append((terminal, slave, slave))
            for position, fd in enumerate(stdio):
                if fd is not None:
                    own = os.dup(fd)
                    ends.append((streams[position], own, -1) if position == 0 else (streams[position], -1, own))
            order = {
                "op": "spawn", "id": number, "argv": list(argv), "env": dict(env), "cwd": cwd, "streams": streams,
                "terminal": terminal, "tty": tty, "window": window,
            }  # fmt: skip
            try:
                self._say(order, ends, outputs=(terminal, streams[1], streams[2]))
                message = self._event("spawned", "unspawned", number=number)
                if message["event"] == "unspawned":
                    raise self._not_started(argv[0], cwd, message)
            except BaseException:
                if master is not None:
                    os.close(master)
                raise
            self._started[number] = time.monotonic()
            return number, master

    def _new_stream(self) -> int:
        self._streams += 1
        return self._streams

    def _not_started(self, command: str, cwd: str, message: Message) -> LaunchError:
        number, what = message.get("errno"), clean(message.get("what"))
        return not_started(command, cwd, number, what, what, missing_cwd=bool(message.get("cwd")))

    def wait(self, number: int, timeout: float | None) -> tuple[Verdict, Usage] | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                alive = number in self._exits or self._take_notes()
                if number in self._exits:
                    message = self._exits[number]
                    return verdict_of_exit(message), self._usage(number, message)
                if not alive:
                    return self._verdict_of_end(), self._usage(number, None)
            # Not with the lock: another thread may want to end it.
            left = _LOOK_AGAIN if deadline is None else min(_LOOK_AGAIN, deadline - time.monotonic())
            if left <= 0:
                return None
            self.vm.link.wait(left)

    def _take_notes(self) -> bool:
        """Of all messages that there are, within reason; False when there will be none."""
        for _ in range(_NOTES_AT_ONCE):
            try:
                message = self.vm.link.receive(0)
            except TimeoutError:
                return True
            if message is None:
                return False
            self._note(message)
        return True

    def fileno(self) -> int:
        return self.vm.link.fileno()

    def signal(self, number: int, signum: int, *, group: bool) -> None:
        with self._lock, contextlib.suppress(SandboxClosed):  # ended already
            self._say({"op": "signal", "id": number, "signal": int(signum), "group": group})

    def resize(self, number: int, terminal: int, window: tuple[int, int]) -> None:
        with self._lock, contextlib.suppress(SandboxClosed):
            self._say({"op": "resize", "id": number, "window": list(window)})

    def open(self, path: str, mode: str) -> BinaryIO:
        with self._lock:
            stream = self._new_stream()
            ours, theirs = os.pipe2(os.O_CLOEXEC)
            if mode == "wb":
                ours, theirs = theirs, ours
            os.set_blocking(theirs, False)
            os.set_blocking(ours, False)
            ends = (stream, -1, theirs) if mode == "rb" else (stream, theirs, -1)
            try:
                self._say({"op": "open", "path": path, "mode": mode, "stream": stream}, [ends])
                message = self._event("opened", number=stream, key="stream")
                if "errno" in message:
                    raise GuestError(f"{path}: {clean(message.get('what'))} (inside the sandbox)")
            except BaseException:
                os.close(ours)
                raise
        size = message.get("size")
        if mode == "rb":
            return cast(BinaryIO, _Incoming(self, ours, path, size if isinstance(size, int) else 0))
        return cast(BinaryIO, _Outgoing(self, ours, path, stream))

    def changes(self) -> list[Change]:
        with self._lock:
            if self._changes is not None:
                return self._changes
            if self._closed:
                raise SandboxClosed("the sandbox is closed, and what it wrote is gone")
            found: dict[tuple[str, str, str], Change] = {}
            self._say({"op": "changes"})
            while True:
                message = self._event("changes")
                more = add_changes(message, found)
                if not message.get("more"):
                    return sorted(found.values())
                if not more:
                    raise self._not_answered("goes on about changes without end")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.vm.close()

    def _say(self, message: Message, ends: Sequence[Ends] = (), *, outputs: tuple[int, ...] = ()) -> None:
        try:
            self.vm.link.say(message, ends, outputs=outputs)
        except SandboxClosed:
            raise SandboxClosed(f"the sandbox has ended: {self._verdict_of_end()}") from None

    def _event(self, *kinds: str, number: int | None = None, key: str = "id") -> Message:
        """The next event of one of these kinds; exits that come before it are kept. An agent that does not speak it loses
        its machine."""
        deadline = time.monotonic() + _ANSWER_PATIENCE
        while True:
            try:
                message = self.vm.link.receive(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise self._not_answered("has not done what it was asked to") from None
            if message is None:
                raise SandboxClosed(f"the sandbox has ended: {self._verdict_of_end()}")
            if message["event"] in kinds and (number is None or message.get(key) == number):
                return message
            if message["event"] == "failed":
                raise LaunchError(f"the machine's agent failed: {clean(message.get('what'))}")
            self._note(message)
            if time.monotonic() >= deadline:
                raise self._not_answered("speaks of other things than it was asked for")

    def _not_answered(self, what: str) -> SandboxClosed:
        self.vm.link.give_up(f"its agent {what}")
        self.vm.link.join(_PREPARE_PATIENCE)
        return SandboxClosed(f"the sandbox has ended: {self._verdict_of_end()}")

    def _note(self, message: Message) -> None:
        """An exit, of what was started here: the numbers are the guest's word."""
        number = message.get("id")
        if message["event"] == "exit" and isinstance(number, int) and 0 < number <= self._numbers:
            self._exits.setdefault(number, {name: message.get(name) for name in ("status", "oom", "usage")})

    def _verdict_of_end(self) -> Verdict:
        """Why the whole machine is gone."""
        return verdict_of_end(self.vm, closed=self._closed)

    def _usage(self, number: int, message: Message | None) -> Usage:
        return usage_of(time.monotonic() - self._started.get(number, time.monotonic()), message)


def prepare(plan: Plan, *, keep: bool = False) -> Vm:
    """A machine of `plan`, as far as nothing of the guest's runs in it yet. With `keep` it can be saved.

    Raises LaunchError.
    """
    state = boot.state(plan)
    vm = Vm.restore(state, keep=keep, drives=[*state.drives[: state.hardware.layers], *plan.slots(state.hardware)])
    try:
        vm.wait_until_running()
        vm.link.say({"op": "setup", "seed": seed(), "time": now()} | plan.order, mark=state.mark)
        message = vm.expect("ready", timeout=_PREPARE_PATIENCE)
        if not message.get("workdir"):
            raise LaunchError(f"the working directory {plan.workdir!r} does not exist inside the sandbox")
    except BaseException:
        vm.close()
        raise
    return vm


class _Stream(io.RawIOBase):
    """`fd` does not block: an agent that gives or takes nothing must not keep the host."""

    def __init__(self, machine: MicrovmMachine, fd: int, path: str) -> None:
        super().__init__()
        self._machine = machine
        self._fd = fd
        self._path = path

    def _await(self, event: int) -> None:
        poller = select.poll()
        poller.register(self._fd, event)
        if not poller.poll(_ANSWER_PATIENCE * 1000):
            self._machine.vm.link.give_up("its agent does not go on with a file")
            raise GuestError(f"{self._path}: the sandbox did not go on for {_ANSWER_PATIENCE:g} s")

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
            super().close()


class _Incoming(_Stream):
    """A file of the guest's. An end before its size was reached is an error, not an end, if the machine has ended."""

    def __init__(self, machine: MicrovmMachine, fd: int, path: str, size: int) -> None:
        super().__init__(machine, fd, path)
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._await(select.POLLIN)
        count = os.readv(self._fd, [buffer])
        self._left -= count
        if count == 0 and self._left > 0 and self._machine.vm.link.over is not None:
            raise GuestError(f"{self._path}: the sandbox ended before all of it was read")
        return count


class _Outgoing(_Stream):
    def __init__(self, machine: MicrovmMachine, fd: int, path: str, stream: int) -> None:
        super().__init__(machine, fd, path)
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:  # all of it: shutil.copyfileobj, for one, does not look at what is returned
                self._await(select.POLLOUT)
                left = left[os.write(self._fd, left[:_PIPE_BUF]) :]
        except BrokenPipeError:
            raise GuestError(f"{self._path}: it could not be written (inside the sandbox)") from None
        return size

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        with self._machine._lock:
            self._machine._event("written", number=self._stream, key="stream")


def add_changes(message: Message, found: dict[tuple[str, str, str], Change]) -> bool:
    """Take those of one of the agent's messages; False when it should not go on."""
    rows = message.get("changes")
    for row in rows if isinstance(rows, list) else ():
        if (change := _change(row)) is not None:
            found[change.path, change.kind, change.type] = change
    return bool(rows) and len(found) <= _CHANGES_AT_MOST


def _change(row: object) -> Change | None:
    """One line of the agent's account, if it is one."""
    match row:
        case [
            str(path),
            ("added" | "changed" | "deleted") as kind,
            ("file" | "directory" | "symlink" | "other") as type_,
            size,
        ]:
            return Change(path, kind, type_, size if type(size) is int and 0 <= size < _HUGE else None)
    return None


def verdict_of_exit(message: Message) -> Verdict:
    """From the agent's word."""
    status = message.get("status")
    if message.get("oom"):
        return Verdict(Ended.OUT_OF_MEMORY)
    if not isinstance(status, int) or not 0 <= status <= 0xFFFF:
        return Verdict(Ended.LOST, detail="its agent does not say how")
    if os.WIFSIGNALED(status):
        return Verdict(Ended.SIGNALLED, os.WTERMSIG(status))
    return Verdict(Ended.EXITED, os.WEXITSTATUS(status))


def verdict_of_end(vm: Vm, *, closed: bool) -> Verdict:
    """For a machine that ended as a whole."""
    if vm.link.timed_out:
        return Verdict(Ended.TIMED_OUT)
    if closed:
        return Verdict(Ended.KILLED, signal.SIGKILL)
    words = vm.last_words()
    detail = f"{vm.link.over}{words}"
    if "Out of memory" in detail or "out of memory" in detail:
        return Verdict(Ended.OUT_OF_MEMORY, detail=detail)
    return Verdict(Ended.LOST, detail=detail)


def usage_of(wall: float, message: Message | None) -> Usage:
    """From an exit's account, as far as it is one."""
    match (message or {}).get("usage"):
        case [user, system, peak] if all(type(part) in (int, float) and 0 <= part < _HUGE for part in (user, system, peak)):
            return Usage(wall, float(user), float(system), int(peak))
    return Usage(wall)
