"""One QEMU process in its own namespace sandbox: booted, restored from a snapshot, or saved as one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from isolation.backends.microvm.vm import memory, qemu
from isolation.backends.microvm.vm.link import Link, clean, text_of
from isolation.backends.microvm.vm.qemu import Boot, Descriptors, Hardware
from isolation.backends.microvm.vm.qmp import Qmp, QmpError
from isolation.errors import LaunchError, SandboxClosed
from isolation.plain import socket, threading, time
from isolation.sandbox import PIPE, Process, Sandbox
from isolation.spec import Limits, Mount, SandboxSpec
from isolation.wire import Message

_RESTORE_PATIENCE = 30.0  # s; a restore takes less than 0.1
_SAVE_PATIENCE = 60.0  # s; it takes some milliseconds
_QEMU_PROCESSES = 64
STATE_AT_MOST = 64 << 20  # bytes


@dataclass(frozen=True)
class State:
    """A saved machine: its hardware, its memory (a sealed memfd), the state of its devices, and its drives' descriptors.

    mark  what its agent waits for before it goes on
    """

    hardware: Hardware
    memory: int
    devices: bytes
    drives: tuple[int, ...]
    mark: bytes

    def close(self) -> None:
        """The drives' descriptors are not closed: they are shared with the state that this one grew from."""
        os.close(self.memory)


class Vm:
    """A machine that runs, or will in a moment."""

    def __init__(
        self, hardware: Hardware, drives: Sequence[int], ram: int, *, owns_ram: bool, shared: bool, boot: Boot | None
    ) -> None:
        """With `owns_ram`, the descriptor of the memory is this machine's, whatever comes of it."""
        self.hardware = hardware
        self.drives = tuple(drives)
        self.born = time.monotonic()
        self._ram = ram
        self._lock = threading.Lock()
        self._closed = False
        self._saving = False
        self._owns_ram = owns_ram
        self._owner = os.getpid()
        self._running = False
        self._unanswered = 0  # QMP commands of the restore, whose answers nobody has read
        descriptors = Descriptors()
        pairs: list[tuple[socket.socket, socket.socket]] = []
        box: Sandbox | None = None
        stderr = -1
        try:
            found = qemu.find()
            pairs += [socket.socketpair() for _ in range(3)]
            argv = qemu.command(
                found, hardware, descriptors, qmp=pairs[0][1].fileno(), agent=pairs[1][1].fileno(),
                console=pairs[2][1].fileno(), memory=ram, drives=drives, shared=shared, boot=boot,
            )  # fmt: skip
            self._box = box = Sandbox(_spec(hardware))
            self._process: Process = box.popen(argv, stderr=PIPE, pass_fds=descriptors.fds)
            assert self._process.stderr is not None
            stderr = os.dup(self._process.stderr.fileno())
            self._process.close()
            self.qmp = Qmp(pairs[0][0])
            self.link = Link(pairs[1][0], pairs[2][0], stderr, self._ended)
        except BaseException:
            for ours, _theirs in pairs:
                ours.close()
            if box is not None:
                box.close()
            for fd in (stderr, ram if owns_ram else -1):
                if fd >= 0:
                    os.close(fd)
            raise
        finally:
            for _ours, theirs in pairs:
                theirs.close()

    @classmethod
    def boot(cls, hardware: Hardware, drives: Sequence[int], boot: Boot, patience: float) -> Vm:
        """A machine that starts from nothing; returns when its agent has spoken.

        Raises LaunchError, after `patience` seconds.
        """
        vm = cls(hardware, drives, memory.empty(hardware.memory), owns_ram=True, shared=True, boot=boot)
        try:
            vm.expect("booted", timeout=patience)
        except BaseException:
            vm.close()
            raise
        return vm

    @classmethod
    def restore(cls, state: State, *, keep: bool = False, drives: Sequence[int] | None = None) -> Vm:
        """A fork of a saved machine; returns at once. With `keep` it has a copy of the memory, and can be saved again.

        `drives` may differ from the state's in what is in the slots.
        """
        ram = state.memory
        if keep:
            ram = memory.empty(state.hardware.memory)
            try:
                memory.copy(state.memory, ram)
            except BaseException:
                os.close(ram)
                raise
        vm = cls(state.hardware, state.drives if drives is None else drives, ram, owns_ram=keep, shared=keep, boot=None)
        vm._unanswered = 4
        ours, theirs = socket.socketpair()
        try:
            ours.settimeout(_RESTORE_PATIENCE)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(state.devices) + (64 << 10))
            vm.qmp.send("qmp_capabilities")
            vm.qmp.send("migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": True}]})
            vm.qmp.send("getfd", {"fdname": "state"}, fd=theirs.fileno())
            vm.qmp.send("migrate-incoming", {"uri": "fd:state"})
            ours.sendall(state.devices)
            ours.shutdown(socket.SHUT_WR)
        except (OSError, QmpError) as error:
            words = vm.last_words()
            vm.close()
            raise LaunchError(f"the machine could not be restored: {error}{words}") from error
        except BaseException:
            vm.close()
            raise
        finally:
            ours.close()
            theirs.close()
        return vm

    def wait_until_running(self) -> None:
        """A restored machine starts by itself. Raises LaunchError when it does not."""
        if self._running:
            return
        try:
            self.qmp.wait_for("RESUME", _RESTORE_PATIENCE)
        except QmpError as error:
            raise LaunchError(f"the machine could not be restored: {error}{self.last_words()}") from error
        self._running = True

    def expect(self, *events: str, timeout: float | None) -> Message:
        """The agent's next message, which must be one of these. Raises LaunchError with the machine's own words."""
        try:
            message = self.link.receive(timeout)
        except TimeoutError:
            raise LaunchError(f"the machine said nothing for {timeout:g} s{self.last_words()}") from None
        if message is None:
            raise LaunchError(f"the machine ended while it was being made ({self.link.over}){self.last_words()}")
        if message["event"] == "failed":
            raise LaunchError(f"the machine could not be prepared: {clean(message.get('what'), 2000)}")
        if message["event"] not in events:
            raise LaunchError(f"the machine's agent says {clean(message['event'], 50)!r} instead of {events[0]!r}")
        return message

    def save(self) -> State:
        """Keep this machine as it is, asleep; it is gone after that. Raises LaunchError."""
        mark = secrets.token_bytes(16)
        try:
            self.link.say({"op": "snapshot", "mark": mark.hex()})
        except SandboxClosed:
            raise LaunchError(f"the machine ended before it was saved ({self.link.over}){self.last_words()}") from None
        self.expect("quiet", timeout=_SAVE_PATIENCE)
        ram = -1
        try:
            with self._lock:
                if self._closed:
                    raise LaunchError(f"the machine ended as it was being saved{self.last_words()}")
                self._saving = True
                ram = os.dup(self._ram)
            self.link.stop()
            devices = self._migrate()
            self._saving = False
            self.close()  # sealing needs that nobody has it mapped
            memory.seal(ram)
        except BaseException:
            self._saving = False
            self.close()
            if ram >= 0:
                os.close(ram)
            raise
        finally:
            self.link.hang_up()
        return State(self.hardware, ram, devices, self.drives, mark)

    def _migrate(self) -> bytes:
        ours, theirs = socket.socketpair()
        deadline = time.monotonic() + _SAVE_PATIENCE
        try:
            if self._unanswered:
                for _command in range(self._unanswered):
                    self.qmp.answer(30.0)
            else:
                self.qmp.execute("qmp_capabilities")
            self.qmp.execute(
                "migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
            )
            self.qmp.execute("getfd", {"fdname": "out"}, fd=theirs.fileno())
            theirs.close()
            self.qmp.execute("migrate", {"uri": "fd:out"})
            devices = bytearray()
            ours.settimeout(_SAVE_PATIENCE)
            while data := ours.recv(1 << 16):
                devices += data
                if len(devices) > STATE_AT_MOST or time.monotonic() > deadline:
                    raise LaunchError("the state of the machine's devices is larger than any can be")
            while (status := self._migration()) in ("active", "setup", "device") and time.monotonic() < deadline:
                time.sleep(0.001)
            if status != "completed":
                raise LaunchError(f"the machine could not be saved: QEMU says {status!r}")
        except OSError as error:
            raise LaunchError(f"the machine could not be saved: {error}") from error
        finally:
            ours.close()
            theirs.close()
        return bytes(devices)

    def _migration(self) -> str:
        answer = self.qmp.execute("query-migrate")
        return clean(answer.get("status")) if isinstance(answer, dict) else "nothing"

    def last_words(self) -> str:
        """What QEMU or the guest's kernel complained about, to be put behind a message."""
        self.link.join(0.5)
        words = text_of(self.link.errors) or text_of(self.link.console)
        return f": {words}" if words else ""

    def kill(self) -> None:
        """End it, without waiting until it is gone."""
        try:
            self._process.send_signal(9)
        except SandboxClosed:
            pass

    def close(self) -> None:
        """End it; returns when it is gone."""
        self._clear()
        self.link.join(10.0)
        self.link.close_news()

    def _ended(self, _reason: str) -> None:
        """In the link's thread."""
        if not self._saving:
            self._clear()

    def _clear(self) -> None:
        if os.getpid() != self._owner:
            return  # a fork of the process whose machine it is
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._box.close()
        self.qmp.close()
        if self._owns_ram:
            os.close(self._ram)


def _spec(hardware: Hardware) -> SandboxSpec:
    """Of the sandbox around QEMU: nothing but system directories. All that a machine has, it gets as descriptors."""
    return SandboxSpec(
        backend="namespace",
        mounts=[Mount("/dev/kvm", writable=True)] if hardware.accel == "kvm" else [],
        limits=Limits(pids=_QEMU_PROCESSES),
        network="host" if hardware.nat else "none",
    )


__all__ = ["QmpError", "State", "Vm"]
