"""Templates of the microVM backend: a saved machine, and forks of it, the next one restored while this one runs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import signal
import struct
from pathlib import Path
from typing import Any

from isolation.backends.microvm import boot, machine
from isolation.backends.microvm.guest import warm_payload
from isolation.backends.microvm.plan import Plan, now, seed
from isolation.backends.microvm.vm.link import Link, clean, text_of
from isolation.backends.microvm.vm.snapshot import Key, Snapshot
from isolation.backends.microvm.vm.vm import State, Vm
from isolation.errors import FeatureMissing, LaunchError, SandboxClosed, SpecError, WireError
from isolation.plain import json, select, socket, threading, time
from isolation.result import Change, Ended, Usage, Verdict
from isolation.template import Branch, Fork, Template
from isolation.wire import Message, Wire

_PAYLOAD = 1  # the agent's number for it
_STREAMS = (1, 2, 3)  # its wire, stdout and stderr
_JSON_AT_MOST = 4 << 20
_DATA_AT_MOST = 32 << 20
_PATIENCE = 2  # s, with a guest that does not read
_CONFIG_PATIENCE = 60  # s, with a machine that does not take the configuration
_CHANGES_WAIT = 30.0  # s
_STACKS_WAIT = 3.0  # s, for the stacks of a process that is about to be ended
_STACKS_AT_MOST = 256 << 10
_SCRATCH_AT_MOST = 16 << 20
_OUTPUT_AT_MOST = 64 << 10


class _Streams:
    """The host's ends of a payload's wire, stdout and stderr."""

    def __init__(self) -> None:
        ours, self._theirs = Wire.pair()
        self._theirs.setblocking(False)
        # A guest that does not read must not keep the host waiting.
        self.patience(ours, _PATIENCE)
        self.sock = ours
        self.stdout, self._stdout = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.stderr, self._stderr = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._connected = False

    def connect(self, link: Link, message: Message, *, mark: bytes = b"") -> None:
        """Say `message`, with which the agent begins to use them, and hand over the other ends."""
        self._connected = True
        fd = self._theirs.detach()
        ends = [(_STREAMS[0], fd, fd), (_STREAMS[1], -1, self._stdout), (_STREAMS[2], -1, self._stderr)]
        self._stdout = self._stderr = -1
        link.say(message, ends, outputs=_STREAMS, mark=mark)

    @staticmethod
    def patience(sock: socket.socket, seconds: int) -> None:
        """How long a message may wait to be sent."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", seconds, 0))

    def close(self) -> None:
        """The host's ends, and the others if nobody has got them."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self._theirs.close()
        for fd in {self.stdout, self.stderr, self._stdout, self._stderr} - {-1}:
            os.close(fd)
        self.stdout = self.stderr = self._stdout = self._stderr = -1


class MicrovmTemplate(Template):
    """A payload that has warmed up, in a machine that is asleep."""

    def __init__(self, plan: Plan, key: Key, state: State, *, ahead: int = 1) -> None:
        self._plan = plan
        self._key = key
        self._state = state
        self._ahead = ahead
        self._spares: collections.deque[MicrovmFork] = collections.deque()
        self._living: list[MicrovmFork] = []  # every machine that is not known to be gone
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def make(cls, plan: Plan, payload: str, config: Any, *, path: list[str], ahead: int = 1) -> MicrovmTemplate:
        """Start `payload` in a new machine, and save it when it is warm. Raises LaunchError with what it wrote."""
        vm = machine.prepare(plan, keep=True)
        streams: _Streams | None = None
        try:
            streams = _Streams()
            argv = warm_payload.argv(plan.python, path, payload)
            streams.connect(vm.link, {"op": "template", "id": _PAYLOAD, "argv": argv, "streams": list(_STREAMS)})
            vm.link.watch()
            streams.patience(streams.sock, _CONFIG_PATIENCE)
            Wire(streams.sock).send({"config": config})
            _until_warm(vm, streams)
            state = vm.save()
        except (SandboxClosed, WireError) as error:
            raise LaunchError(f"the template could not be made: {vm.link.over or error}{vm.last_words()}") from error
        finally:
            vm.close()
            if streams is not None:
                streams.close()
        return cls(plan, template_key(plan, payload, config), state, ahead=ahead)

    @classmethod
    def load(cls, plan: Plan, payload: str, config: Any, directory: str) -> MicrovmTemplate:
        """A template that was saved. Raises LaunchError, with the reason, when anything differs."""
        key = template_key(plan, payload, config)
        drives = boot.drives(plan)[: plan.hardware.layers] + plan.slots(plan.hardware)
        return cls(plan, key, Snapshot.load(directory, key=key, drives=drives).state)

    def fork(self, job: Any = None, *, reseed: bool = True, account: bool = False) -> Fork:
        if account:
            raise FeatureMissing("the microvm backend does not tell what a fork left behind")
        with self._lock:
            fork = self._spares.popleft() if self._spares else None
        if fork is None or fork.ended:
            if fork is not None:
                fork.close()
            fork = self._prepare()
        try:
            fork.begin(job, reseed=reseed)
        except LaunchError:
            fork.close()
            fork = self._prepare()  # one that was made ahead may have died of something that has passed
            try:
                fork.begin(job, reseed=reseed)
            except BaseException:
                fork.close()
                raise
        except BaseException:
            fork.close()
            raise
        while len(self._spares) < self._ahead:
            try:
                spare = self._prepare()
            except (LaunchError, SandboxClosed):
                break  # who asks for it will be told
            with self._lock:
                self._spares.append(spare)
        return fork

    @property
    def held(self) -> int:
        """The pages of its memory: a sealed memfd."""
        return os.fstat(self._state.memory).st_blocks * 512

    @property
    def memory(self) -> int:
        return os.fstat(self._state.memory).st_size

    def branch(self, job: Any = None) -> MicrovmBranch:
        parts = dict(self._key.parts)
        parts["payload"] += " " + json.dumps(job, sort_keys=True)
        vm = self._restore(keep=True)
        try:
            branch = MicrovmBranch(vm, self._state.mark, self._plan, Key(tuple(parts.items())), self._ahead)
        except BaseException:
            vm.close()
            raise
        try:
            branch.begin(job, reseed=True)
        except BaseException:
            branch.close()
            raise
        with self._lock:
            self._living.append(branch)
        return branch

    def advance(self, job: Any = None) -> Branch:
        """A machine that sleeps does not go on; a fork of it does, in its place."""
        branch = self.branch(job)
        branch.replaces = self
        return branch

    def save(self, directory: str | os.PathLike[str]) -> None:
        Snapshot(self._state, self._key).save(Path(directory))

    def close(self) -> None:
        if os.getpid() != self._owner:
            return  # a fork of the process whose template it is
        with self._lock:
            if self._closed:
                return
            self._closed = True
            spares, self._spares = list(self._spares), collections.deque()
            living, self._living = self._living, []
        for fork in spares:
            fork.close()
        for fork in living:
            fork.vm.kill()
        for fork in living:
            fork.vm.close()
        self._state.close()

    def _prepare(self) -> MicrovmFork:
        vm = self._restore(keep=False)
        try:
            fork = MicrovmFork(vm, self._state.mark)
            with self._lock:
                self._living = [other for other in self._living if not other.gone]
                if not self._closed:
                    self._living.append(fork)
                    return fork
            fork.close()
            raise SandboxClosed("the template is closed")
        except BaseException:
            vm.close()
            raise

    def _restore(self, *, keep: bool) -> Vm:
        """With a descriptor of the memory of its own: another thread may close the template meanwhile."""
        with self._lock:
            if self._closed:
                raise SandboxClosed("the template is closed")
            state = dataclasses.replace(self._state, memory=os.dup(self._state.memory))
        try:
            return Vm.restore(state, keep=keep)
        finally:
            state.close()


def template_key(plan: Plan, payload: str, config: Any) -> Key:
    """What a template depends on."""
    base = boot.key_of(plan)
    parts = dict(base.parts)
    parts["trees"] = " ".join(tree.key for tree in plan.trees)
    parts["payload"] = payload + " " + json.dumps([config, plan.order], sort_keys=True)
    return Key(tuple(parts.items()))


def _until_warm(vm: Vm, streams: _Streams) -> None:
    output = bytearray()
    poller = select.poll()
    for fd in (vm.link.fileno(), streams.stdout, streams.stderr):
        poller.register(fd, select.POLLIN)
    while True:
        ready = [fd for fd, _events in poller.poll()]
        for fd in (streams.stdout, streams.stderr):
            if fd in ready and not _collect(fd, output):
                poller.unregister(fd)
        if vm.link.fileno() not in ready:
            continue
        message = vm.link.receive(5.0)
        if message is None:
            raise LaunchError(f"the machine ended while the template warmed up ({vm.link.over}){vm.last_words()}")
        if message["event"] == "warm":
            return
        if message["event"] == "failed":
            raise LaunchError(f"the template could not be started: {clean(message.get('what'), 2000)}")
        if message["event"] == "exit":
            for fd in (streams.stdout, streams.stderr):
                _collect(fd, output)
            verdict = machine.verdict_of_exit(message)
            words = text_of(output, lines=30)
            raise LaunchError(f"the template {verdict} before it was warm{': ' if words else ''}{words}")


def _collect(fd: int, kept: bytearray) -> bool:
    try:
        data = os.read(fd, 1 << 16)
    except BlockingIOError:
        return True
    kept += data
    del kept[:-_OUTPUT_AT_MOST]
    return bool(data)


class MicrovmFork(Fork):
    """A machine restored from a template's memory. All that it says, its agent says; only that it ended is QEMU's word."""

    def __init__(self, vm: Vm, mark: bytes) -> None:
        self.vm = vm
        self.streams = _Streams()
        self.stdout, self.stderr = self.streams.stdout, self.streams.stderr
        self._mark = mark
        self._wire = Wire(self.streams.sock, max_json=_JSON_AT_MOST, max_data=_DATA_AT_MOST)
        self._begun = time.monotonic()
        self._verdict: Verdict | None = None
        self._exit: Message | None = None
        self._stacks: bytes | None = None
        self._closed = False

    @property
    def ended(self) -> bool:
        """It died before it was used."""
        return self.vm.link.over is not None

    @property
    def gone(self) -> bool:
        """Closed, and nothing of it is left."""
        return self._closed and self.vm.link.over is not None

    def begin(self, job: Any, *, reseed: bool) -> None:
        """Renew it, and hand over the job; this is when its time starts. Raises LaunchError."""
        self.vm.wait_until_running()
        self._begun = time.monotonic()
        try:
            message = {"op": "renew", "id": _PAYLOAD, "seed": seed() if reseed else None, "time": now(), "job": job}
            self.streams.connect(self.vm.link, message, mark=self._mark)
            self.vm.link.watch()
        except SandboxClosed as error:
            raise LaunchError(f"the sandbox could not be made: {self.vm.link.over}{self.vm.last_words()}") from error

    def send(self, message: Message, data: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        if fds:
            raise SpecError("a virtual machine cannot be given open descriptors")
        self._wire.send(message, data)

    def receive(self, timeout: float | None = None) -> Message | None:
        return self._wire.receive(timeout)

    def filenos(self) -> tuple[int, ...]:
        return (self._wire.fileno(),)

    def take_stream(self) -> int:
        self._wire.sock.setblocking(False)
        return self._wire.fileno()

    def changes(self) -> list[Change]:
        found: dict[tuple[str, str, str], Change] = {}
        self.vm.link.say({"op": "changes"})
        while (message := self._await("changes", _CHANGES_WAIT)) is not None:
            more = machine.add_changes(message, found)
            if not message.get("more"):
                return sorted(found.values())
            if not more:
                break
        raise SandboxClosed("the machine does not tell what was changed in it")

    def wait(self, timeout: float | None = None) -> Verdict | None:
        if self._verdict is None:
            found = self._await("exit", timeout)
            if found is None and self.vm.link.over is None:
                return None
            self._exit = found
            self._verdict = machine.verdict_of_exit(found) if found else machine.verdict_of_end(self.vm, closed=self._closed)
        return self._verdict

    def end(self, verdict: Verdict) -> None:
        if self._closed:
            return
        if self._verdict is None and verdict.ended in (Ended.TIMED_OUT, Ended.OUT_OF_MEMORY):
            self._ask_for_stacks(at_once=True)
        self._verdict = self._verdict or verdict
        # Of the machine, only the payload: what it had written can be asked for until `close`.
        with contextlib.suppress(SandboxClosed):
            self.vm.link.say({"op": "signal", "id": _PAYLOAD, "signal": signal.SIGKILL, "group": True})

    def usage(self) -> Usage:
        self.wait()
        return machine.usage_of(time.monotonic() - self._begun, self._exit)

    def stacks(self) -> str:
        if self._stacks is None:
            self._ask_for_stacks(at_once=False)
        dumps = [
            dump for dump in (self._stacks or b"")[-_STACKS_AT_MOST:].split(warm_payload.STACKS_MARK) if dump.strip(b"\0 \n")
        ]
        return dumps[-1].decode("utf-8", "replace") if dumps else ""

    def scratch_index(self, inode: int) -> int | None:
        return inode  # the memory of every fork has the same files

    def scratch(self, index: int) -> bytes:
        answer = self._ask({"op": "deleted", "inode": index, "most": _SCRATCH_AT_MOST}, "deleted")
        return _data(answer)[:_SCRATCH_AT_MOST]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.vm.kill()
        self.vm.link.close_news()
        self.streams.close()

    def _ask_for_stacks(self, *, at_once: bool) -> None:
        answer = self._ask({"op": "stacks", "now": at_once}, "stacks")
        self._stacks = _data(answer)

    def _ask(self, message: Message, event: str) -> Message | None:
        try:
            self.vm.link.say(message)
        except SandboxClosed:
            return None
        return self._await(event, _STACKS_WAIT)

    def _await(self, event: str, timeout: float | None) -> Message | None:
        """The agent's next message of this kind; an exit that comes before it is kept."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if event == "exit" and self._exit is not None:
            return self._exit
        while True:
            try:
                message = self.vm.link.receive(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                return None
            if message is None or (message["event"] == event and (event != "exit" or message.get("id") == _PAYLOAD)):
                return message
            if message["event"] == "exit" and message.get("id") == _PAYLOAD:
                self._exit = message
                if event == "warm":
                    return None  # it never will be
            if deadline is not None and time.monotonic() >= deadline:
                return None  # it speaks of other things all the time


class MicrovmBranch(MicrovmFork, Branch):
    """A machine whose memory is kept when its payload asks for forks."""

    def __init__(self, vm: Vm, mark: bytes, plan: Plan, key: Key, ahead: int) -> None:
        super().__init__(vm, mark)
        self.replaces: MicrovmTemplate | None = None
        self._plan = plan
        self._key = key
        self._ahead = ahead
        self._made: MicrovmTemplate | None = None

    def filenos(self) -> tuple[int, ...]:
        return (*super().filenos(), self.vm.link.fileno())

    def template(self, timeout: float | None = None) -> Template | None:
        if self._made is None:
            if self._await("warm", timeout) is None:
                if self._exit is not None or self.vm.link.over is not None:
                    raise LaunchError(f"the template {self.wait(0.0)} before it asked for forks")
                return None
            try:
                state = self.vm.save()
            except SandboxClosed as error:
                raise LaunchError(f"the template could not be saved: {error}{self.vm.last_words()}") from error
            finally:
                self.vm.close()
            self._made = MicrovmTemplate(self._plan, self._key, state, ahead=self._ahead)
            if self.replaces is not None:
                self.replaces.close()
        return self._made

    def close(self) -> None:
        if not self._closed:
            super().close()
            self.vm.close()
            if self._made is not None:
                self._made.close()


def _data(message: Message | None) -> bytes:
    return bytes(message.get("data", b"")) if message is not None else b""
