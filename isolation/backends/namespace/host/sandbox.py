"""One sandbox of the namespace backend, seen from the host."""

from __future__ import annotations

import contextlib
import errno
import signal
import stat
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from isolation.backends.namespace.checkpoints import remount, session
from isolation.backends.namespace.host import supervisor_pool
from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.rootfs import changes, layer_tree
from isolation.backends.namespace.supervisor.handle import SupervisorHandle
from isolation.backends.refusal import not_started
from isolation.errors import FeatureMissing, GuestError, LaunchError, SandboxClosed, WireError
from isolation.hookspecs import Machine
from isolation.plain import os, socket, threading, time
from isolation.result import Change, Ended, Usage, Verdict
from isolation.wire import Message, Wire, wait_readable

_NOTES_AT_ONCE = 1000
_LOOK_AGAIN = 0.1  # s
_FILES_TIMEOUT = session.PATIENCE + 30
_DONE = {"keep": "kept", "restore": "restored", "forget": "forgotten", "refresh": "looked at anew"}

_HINTS = {
    errno.ENOSPC: "the kernel's limit on namespaces is reached; raise sysctl user.max_user_namespaces (and its like)",
    errno.EPERM: "the kernel refused; 'isolation doctor' says which setting forbids it",
    errno.EAGAIN: "too many processes for this user (ulimit -u)",
    errno.ENOMEM: "the machine is out of memory",
}


def failure(message: Message | None) -> str:
    """A sentence for an event that says that something could not be made."""
    if message is None:
        return "the sandbox went away while it was being made"
    what = str(message.get("what"))
    hint = _HINTS.get(message.get("errno") or 0)
    return f"{what} ({hint})" if hint else what


class NamespaceMachine(Machine):
    """Talks to the sandbox's PID 1. Calls from several threads take turns."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.workdir = plan.workdir
        self._lock = threading.RLock()
        self._numbers = 0
        self._store = -1
        self._exits: dict[int, Message] = {}
        self._oom = False
        self._started: dict[int, float] = {}
        self._last: Message | None = None  # the supervisor's last word
        self._closed = False
        self._owner = os.getpid()
        self._files_lock = threading.Lock()
        self._chain: tuple[int, ...] = (layer_tree.ORIGIN,)  # what the files lie in, the live layer first
        self._supervisor: SupervisorHandle = supervisor_pool.supervisor_for(plan)
        # The time of a wall-clock limit begins with the clone, so that none is made ahead.
        self._number, self._control = self._supervisor.new_init(ahead=plan.limits.wall is None)
        try:
            self._supervisor.scratch()
            message = self._event("ready")
            (self._store,) = self._control.take_fds(1)
        except BaseException:
            self.close()
            raise
        assert message is not None

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
        with self._lock:
            self._numbers += 1
            number = self._numbers
            given = [fd for fd in stdio if fd is not None]
            tty = [fd is None for fd in stdio] if len(given) < 3 else None
            request = {"op": "spawn", "id": number, "argv": list(argv), "env": dict(env), "cwd": cwd}
            request |= {"tty": tty, "window": window, "passed": len(pass_fds), "fds": len(given) + len(pass_fds)}
            self._send(request, [*given, *pass_fds])
            message = self._event("spawned", "unspawned")
            if message["event"] == "unspawned":
                raise not_started(
                    argv[0], cwd, message["errno"], message["what"], failure(message), missing_cwd=message["cwd"]
                )
            self._started[number] = time.monotonic()
            return number, self._control.take_fds(1)[0] if tty else None

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
                fd = self._control.fileno()
            # Not with the lock: another thread may want to end it, or may read the news that this one waits for.
            left = _LOOK_AGAIN if deadline is None else min(_LOOK_AGAIN, deadline - time.monotonic())
            if left <= 0:
                return None
            if fd >= 0:
                wait_readable(fd, left)

    def _take_notes(self) -> bool:
        """Of all messages that there are, within reason; False when there will be none."""
        for _ in range(_NOTES_AT_ONCE):
            try:
                message = self._control.receive(0) if self._control.fileno() >= 0 else None
            except TimeoutError:
                return True
            except WireError:
                message = None
            if message is None:
                return False
            self._note(message)
        return True

    def fileno(self) -> int:
        return self._control.fileno()

    def signal(self, number: int, signum: int, *, group: bool) -> None:
        with self._lock:
            self._send({"op": "signal", "id": number, "signal": int(signum), "group": group})

    def open(self, path: str, mode: str) -> BinaryIO:
        flags = os.O_RDONLY if mode == "rb" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with self._lock:
            self._send({"op": "open", "path": path, "flags": flags})
            message = self._event("opened")
            if "errno" in message:
                raise GuestError(f"{path}: {message['what']} (inside the sandbox)")
            (fd,) = self._control.take_fds(1)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise GuestError(f"{path} is not a regular file inside the sandbox")
        os.set_blocking(fd, True)
        return os.fdopen(fd, mode)  # type: ignore[return-value]

    def changes(self) -> list[Change]:
        if self._store < 0:
            raise SandboxClosed("the sandbox is closed, and what it wrote is gone")
        return changes.of_store(self._store, self.plan.fresh, chain=self._chain)

    def keep_files(self) -> int:
        kept: int = self._ask_for_files("keep", None)["kept"]
        return kept

    def restore_files(self, kept: int) -> None:
        self._ask_for_files("restore", kept)

    def forget_files(self, kept: int) -> None:
        self._ask_for_files("forget", kept)

    def refresh_files(self) -> None:
        self._ask_for_files("refresh", None)

    def _ask_for_files(self, do: str, kept: int | None) -> Message:
        if do != "refresh" and not remount.usable():
            raise FeatureMissing("files can be kept where a tmpfs has user extended attributes: Linux 6.6 or later")
        with self._files_lock:  # not self._lock: who waits for a command need not wait for this
            if self._closed:
                raise SandboxClosed("the sandbox is closed")
            try:
                answer = self._supervisor.files(self._number, do, kept, _FILES_TIMEOUT)
            except LaunchError:
                answer = None
            except TimeoutError:
                raise GuestError(f"the files could not be {_DONE[do]}: no answer") from None
            if answer is None:
                raise SandboxClosed(f"the sandbox has ended: {self._verdict_of_end()}")
            if "errno" in answer:
                raise GuestError(f"the files could not be {_DONE[do]}: {answer['what']}")
            self._chain = tuple(answer["chain"])
            return answer

    def close(self) -> None:
        if self._closed or os.getpid() != self._owner:
            return  # closed already, or a fork of the process whose sandbox it is
        self._closed = True
        self._control.close()
        self._supervisor.done_with(self._number)
        if self._store >= 0:
            os.close(self._store)
            self._store = -1

    def lend(self) -> tuple[Any, list[int]]:
        return {"workdir": self.workdir}, [self._control.fileno()]

    def _send(self, message: Message, given: Sequence[int] = ()) -> None:
        if self._control.fileno() < 0:
            raise SandboxClosed("the sandbox is closed")
        try:
            self._control.send(message, fds=given)
        except WireError as error:
            raise SandboxClosed(f"the sandbox has ended: {self._verdict_of_end()}") from error

    def _event(self, *kinds: str) -> Message:
        """The next event of one of these kinds; exits that come before it are kept."""
        while True:
            try:
                message = self._control.receive()
            except WireError:
                message = None
            if message is None:
                last = self._last_word()
                if kinds == ("ready",):
                    raise LaunchError(f"the sandbox could not be made: {failure(last)}")
                raise SandboxClosed(f"the sandbox has ended: {self._verdict_of_end()}")
            if message["event"] in kinds:
                return message
            if message["event"] == "failed":
                raise LaunchError(f"the sandbox could not be made: {failure(message)}")
            self._note(message)

    def _note(self, message: Message) -> None:
        if message["event"] == "exit":
            self._exits[message["id"]] = message
        elif message["event"] == "oom":
            self._oom = True

    def _last_word(self, timeout: float = 5.0) -> Message | None:
        if self._last is None and self._supervisor.pidfd >= 0:
            with contextlib.suppress(TimeoutError):
                self._last = self._supervisor.last_word(self._number, timeout)
        return self._last

    def _verdict_of_end(self) -> Verdict:
        """Why the whole sandbox is gone."""
        last = self._last_word()
        return verdict_of_end(last, oom=self._oom)

    def _usage(self, number: int, message: Message | None) -> Usage:
        wall = time.monotonic() - self._started.get(number, time.monotonic())
        last = self._last if message is None else None
        return usage_of(wall, message or last)


class BorrowedMachine(NamespaceMachine):
    """A machine lent by the host: its wire, without the supervisor and the store behind it."""

    def __init__(self, token: dict[str, str], fd: int) -> None:
        self.workdir = token["workdir"]
        self._lock = threading.RLock()
        self._numbers = 0
        self._exits = {}
        self._oom = False
        self._started = {}
        self._last = None
        self._store = -1
        self._control = Wire(socket.socket(fileno=fd), accept_fds=True)

    def changes(self) -> list[Change]:
        raise FeatureMissing("the changes of a sandbox are seen from the host only, not from inside a test's sandbox")

    def _ask_for_files(self, do: str, kept: int | None) -> Message:
        raise FeatureMissing("the files of a sandbox are kept by the host only, not from inside a test's sandbox")

    def close(self) -> None:
        self._control.close()

    def _last_word(self, timeout: float = 5.0) -> Message | None:
        return None


def verdict_of_exit(message: Message) -> Verdict:
    """From the word of who waited for a process: PID 1 for a command, the supervisor for a payload."""
    status = message["status"]
    if message.get("oom") or (os.WIFSIGNALED(status) and message.get("accounts", {}).get("oom_kills")):
        return Verdict(Ended.OUT_OF_MEMORY)
    if message.get("deadlocked"):
        return Verdict(Ended.DEADLOCKED)
    if os.WIFSIGNALED(status):
        return Verdict(Ended.SIGNALLED, os.WTERMSIG(status))
    return Verdict(Ended.EXITED, os.WEXITSTATUS(status))


def verdict_of_end(last: Message | None, *, oom: bool) -> Verdict:
    """From the supervisor's word on PID 1, for a sandbox that ended as a whole."""
    if oom or (last and (last.get("oom") or last.get("accounts", {}).get("oom_kills"))):
        return Verdict(Ended.OUT_OF_MEMORY)
    if last and last.get("timed_out"):
        return Verdict(Ended.TIMED_OUT)
    if last and os.WIFSIGNALED(last.get("status", 0)):
        return Verdict(Ended.KILLED, signal.SIGKILL)
    return Verdict(Ended.LOST)


def usage_of(wall: float, message: Message | None) -> Usage:
    """From an event's rusage and, where there was a cgroup, its accounts."""
    if message is None:
        return Usage(wall)
    user, system, peak = message["usage"]
    accounts = message.get("accounts", {})
    return Usage(
        wall,
        cpu_user=accounts.get("cpu_user", user),
        cpu_system=accounts.get("cpu_system", system),
        memory_peak=int(accounts.get("memory_peak", peak)),
    )
