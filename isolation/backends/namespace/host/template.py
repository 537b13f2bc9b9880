"""Templates of the namespace backend: a supervisor with warm memory, and forks made ahead of need."""

from __future__ import annotations

import collections
import fcntl
import itertools
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

from isolation.backends.namespace.host import sandbox
from isolation.backends.namespace.host.sandbox import NamespaceMachine
from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.supervisor import start
from isolation.backends.namespace.supervisor.handle import SupervisorHandle
from isolation.backends.namespace.supervisor.supervisor import STACKS_MARK
from isolation.errors import FeatureMissing, LaunchError, WireError
from isolation.guest import Guest
from isolation.hookspecs import Machine
from isolation.plain import os, socket, time
from isolation.result import Account, Change, Ended, Usage, Verdict
from isolation.template import Branch, Fork, Template
from isolation.wire import Message, Wire, wait_readable

_STACKS_AT_MOST = 256 << 10
_SCRATCH_AT_MOST = 16 << 20
_JSON_AT_MOST = 4 << 20
_DATA_AT_MOST = 32 << 20
_PATIENCE = 2  # s, with a guest that does not read
_STACKS_WAIT = 0.25  # s, for the stacks of a process that is about to be ended


class NamespaceTemplate(Template):
    """Warm memory of the process that made it, as it was then."""

    def __init__(self, plan: Plan, payload: Callable[[Guest], object], *, ahead: int = 1) -> None:
        self._begin(plan, start.start(plan, payload), ahead, itertools.count(1))

    def _begin(self, plan: Plan, process: SupervisorHandle, ahead: int, numbers: Iterator[int]) -> None:
        self._plan = plan
        self._ahead = ahead
        self._numbers = numbers  # of forks and theirs: they name cgroups
        self._supervisor = process
        self._spares: collections.deque[NamespaceFork] = collections.deque()
        self._branches: list[NamespaceBranch] = []
        self._account = False
        self._deadlock = ""
        self._done: list[int] = []
        try:
            self._scratch = self._supervisor.scratch()
        except BaseException:
            self._supervisor.close()
            raise

    def fork(self, job: Any = None, *, reseed: bool = True, account: bool = False) -> Fork:
        if not reseed:
            raise FeatureMissing("the namespace backend cannot give two forks the same random numbers of the kernel's")
        if account is not self._account:
            self._account = account
            while self._spares:
                self._spares.pop().close()
        fork = self._spares.popleft() if self._spares else self._prepare()
        fork.begin(job)
        # While this one runs, the supervisor makes the next: on a second core it costs the host nothing but the request.
        while len(self._spares) < self._ahead:
            self._spares.append(self._prepare())
        self._supervisor.forget(self._done)
        self._done.clear()
        return fork

    def branch(self, job: Any = None) -> Branch:
        branch = NamespaceBranch(
            self._plan, self._supervisor, next(self._numbers), self._scratch, self._done,
            ahead=self._ahead, numbers=self._numbers, deadlock=self._deadlock,
        )  # fmt: skip
        try:
            branch.begin(job)
        except BaseException:
            branch.close()
            raise
        self._branches = [other for other in self._branches if not other.closed]
        self._branches.append(branch)
        return branch

    def watch_for_deadlock(self, *, loops: bool = False) -> None:
        self._deadlock = "loops" if loops else "locks"
        self.forget_forks()

    def close(self) -> None:
        self.forget_forks()
        self._supervisor.close()

    def forget_forks(self) -> None:
        """Close those made ahead, and the templates made of this one."""
        for fork in (*self._spares, *self._branches):
            fork.close()
        self._spares.clear()
        self._branches.clear()

    def _prepare(self) -> NamespaceFork:
        return NamespaceFork(
            self._plan, self._supervisor, next(self._numbers), self._scratch, self._done, account=self._account,
            deadlock=self._deadlock,
        )  # fmt: skip


class BranchTemplate(NamespaceTemplate):
    """What a branch has become: a sealed process that its supervisor can have copied."""

    def __init__(self, plan: Plan, branch: NamespaceBranch, process: NestedForkServerHandle, scratch: int) -> None:
        self._branch = branch
        process.know(scratch)
        self._begin(plan, process, branch.ahead, branch.numbers)
        self._deadlock = branch.deadlock

    def advance(self, job: Any = None) -> Branch:
        self.forget_forks()
        self._supervisor.request({"op": "advance"})
        self._branch.begin(job)
        return self._branch

    def become(self, scratch: int) -> None:
        """It waits again."""
        self._scratch = scratch


class NestedForkServerHandle(SupervisorHandle):
    """The supervisor of a branch: PID 1 of the branch's own sandbox, and so ended with it."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(-1, -1, wire)
        self.branch: NamespaceBranch | None = None

    def know(self, scratch: int) -> None:
        """How many private files a fork wants, since it has said so."""
        self._scratch = scratch

    def close(self) -> None:
        self.wire.close()
        if self.branch is not None:
            self.branch.close()


class SealedForkServerHandle(SupervisorHandle):
    """The supervisor inside of a sandbox: ends with it."""

    def __init__(self, machine: Machine, wire: Wire) -> None:
        super().__init__(-1, -1, wire)
        self._machine = machine

    def close(self) -> None:
        self.wire.close()
        self._machine.close()


class SealedTemplate(NamespaceTemplate):
    """A template whose warm-up code is not trusted: it runs in a sandbox, and its forks are sandboxes within (sealed.py)."""

    def __init__(self, machine: NamespaceMachine, payload: str, config: Any, path: list[str], writable: list[str]) -> None:
        ours, theirs = Wire.pair()
        wire = Wire(ours)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            command = [sys.executable, "-I", "-m", "isolation.backends.namespace.supervisor.sealed"]
            machine.start(command, env={}, cwd=machine.workdir, stdio=[theirs.fileno(), null, 2])
        except BaseException:
            wire.close()
            machine.close()
            raise
        finally:
            theirs.close()
            os.close(null)
        order = {"payload": payload, "config": config, "path": path, "writable": writable, "workdir": machine.workdir}
        wire.send(order)
        self._begin(machine.plan, SealedForkServerHandle(machine, wire), 1, itertools.count(1))


class NamespaceFork(Fork):
    """One fresh sandbox. What its payload says comes over its own wire; how it ended, from the supervisor, which is
    believed."""

    def __init__(
        self, plan: Plan, supervisor_handle: SupervisorHandle, number: int, scratch: int, done: list[int], *,
        account: bool = False, deadlock: str = "",
    ) -> None:  # fmt: skip
        self._supervisor = supervisor_handle
        self._number = number
        self._done = done
        self._begun = time.monotonic()
        self._exit: Message | None = None
        self._verdict: Verdict | None = None
        self._failure: Message | None = None
        self._closed = False
        wire, theirs = Wire.pair()
        # A guest that does not read must not keep the host waiting.
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _PATIENCE, 0))
        self._wire = Wire(wire, max_json=_JSON_AT_MOST, max_data=_DATA_AT_MOST)
        self.stdout, stdout = os.pipe2(os.O_CLOEXEC)
        self.stderr, stderr = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.stdout, False)
        os.set_blocking(self.stderr, False)
        stdin = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._crash = os.memfd_create("isolation-stacks")
        fcntl.fcntl(self._crash, fcntl.F_SETFL, os.O_APPEND)  # two write to it
        self._scratch = [os.memfd_create("isolation-scratch") for _ in range(scratch)]
        more = self._more()
        given = [*more, theirs.fileno(), stdin, stdout, stderr, self._crash, *self._scratch]
        order: Message = {"op": "fork", "id": number, "payload": True, "template": bool(more), "fds": len(given)}
        order["account"], order["deadlock"] = account, deadlock
        try:
            self._supervisor.request(order, given)
        finally:
            theirs.close()
            for fd in more:
                os.close(fd)
            for fd in (stdin, stdout, stderr):
                os.close(fd)

    def _more(self) -> list[int]:
        """Descriptors for the supervisor above it, which this call hands over."""
        return []

    def begin(self, job: Any) -> None:
        """Hand over the job; this is when its time starts."""
        self._begun = time.monotonic()
        try:
            self._wire.send({"job": job})
        except WireError as error:
            raise LaunchError(f"the sandbox could not be made: {self._why()}") from error

    def send(self, message: Message, data: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        self._wire.send(message, data, fds)

    def receive(self, timeout: float | None = None) -> Message | None:
        message = self._wire.receive(timeout)
        if message is None:
            self.wait(5.0)
            self._raise_failure()
        return message

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise LaunchError(f"the sandbox could not be made: {sandbox.failure(self._failure)}")

    def filenos(self) -> tuple[int, ...]:
        return (self._wire.fileno(),)

    def wait(self, timeout: float | None = None) -> Verdict | None:
        if self._verdict is None:
            try:
                self._exit = self._supervisor.last_word(self._number, timeout)
            except TimeoutError:
                return None
            if self._exit is not None and self._exit["event"] == "unforked":
                self._failure, self._exit = self._exit, None
            self._verdict = sandbox.verdict_of_exit(self._exit) if self._exit else Verdict(Ended.LOST)
        return self._verdict

    def end(self, verdict: Verdict) -> None:
        if self._closed:
            return
        if self._verdict is None and verdict.ended in (Ended.TIMED_OUT, Ended.OUT_OF_MEMORY):
            self._ask_for_stacks()
        self._verdict = self._verdict or verdict
        self._kill()
        wait_readable(self._wire.fileno(), 1.0)

    def usage(self) -> Usage:
        self.wait()
        return sandbox.usage_of(time.monotonic() - self._begun, self._exit)

    def account(self) -> Account:
        self.wait()
        told = (self._exit or {}).get("account", {})
        changes = tuple(Change(*change) for change in told.get("changes", ()))
        return Account(changes, tuple(told.get("processes", ())))

    def stacks(self) -> str:
        size = os.fstat(self._crash).st_size
        text = os.pread(self._crash, _STACKS_AT_MOST, max(0, size - _STACKS_AT_MOST))
        dumps = [dump for dump in text.split(STACKS_MARK) if dump.strip(b"\0 \n")]
        return dumps[-1].decode("utf-8", "replace") if dumps else ""

    def scratch_index(self, inode: int) -> int | None:
        for index, fd in enumerate(self._scratch):
            if os.fstat(fd).st_ino == inode:
                return index
        return None

    def scratch(self, index: int) -> bytes:
        return os.pread(self._scratch[index], _SCRATCH_AT_MOST, 0)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._exit is None:
            self._kill()
            self._done.append(self._number)
        self._wire.close()
        for fd in (self.stdout, self.stderr, self._crash, *self._scratch):
            os.close(fd)

    def _why(self) -> str:
        self.wait(5.0)
        return sandbox.failure(self._failure)

    def _ask_for_stacks(self) -> None:
        before = len(self.stacks())
        try:
            self._supervisor.request({"op": "dump", "id": self._number})
        except LaunchError:
            return
        deadline = time.monotonic() + _STACKS_WAIT
        last = before
        while time.monotonic() < deadline:
            time.sleep(0.01)
            now = len(self.stacks())
            if now != before and now == last:
                return  # written, and no longer growing
            last = now

    def _kill(self) -> None:
        try:
            self._supervisor.request({"op": "kill", "id": self._number})
        except LaunchError:
            pass  # gone, and its sandboxes with it


class NamespaceBranch(NamespaceFork, Branch):
    """A fork whose payload is about to be forked itself."""

    def __init__(
        self, plan: Plan, supervisor_handle: SupervisorHandle, number: int, scratch: int, done: list[int], *,
        ahead: int, numbers: Iterator[int], deadlock: str = "",
    ) -> None:  # fmt: skip
        self.ahead = ahead
        self.deadlock = deadlock
        self.numbers = numbers
        self._plan = plan
        self._template: BranchTemplate | None = None
        super().__init__(plan, supervisor_handle, number, scratch, done, deadlock=deadlock)

    def _more(self) -> list[int]:
        ours, theirs = Wire.pair()
        self._own_supervisor = NestedForkServerHandle(Wire(ours))
        return [theirs.detach()]

    def filenos(self) -> tuple[int, ...]:
        return (*super().filenos(), self._own_supervisor.wire.fileno())

    def template(self, timeout: float | None = None) -> Template | None:
        try:
            scratch = self._own_supervisor.ready(timeout)
        except LaunchError:
            self.wait(5.0)
            self._raise_failure()  # which says more
            raise
        if scratch is None:
            return None
        if self._template is None:
            self._template = BranchTemplate(self._plan, self, self._own_supervisor, scratch)
            self._own_supervisor.branch = self
        else:
            self._template.become(scratch)
        return self._template

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        if not self._closed:
            super().close()
            if self._template is not None:
                self._template.forget_forks()
            self._own_supervisor.wire.close()
