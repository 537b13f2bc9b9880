"""Runs in a launcher: answers what a kernel asks for (status, changes, export), and watches the clock of its cells.

All of it is a hostile guest's word: requests are small JSON objects, checked here, and an answer that is not read in time
costs the kernel its wire.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from isolation.errors import GuestError, IsolationError, WireError
from isolation.hookspecs import CHANGES, FILE_CHECKPOINTS
from isolation.result import Change
from isolation.spec import SandboxSpec, is_path
from isolation.units import format_size
from isolation.wire import Message
from isolation_kernel.container.kernel import KernelBox
from isolation_kernel.export import Copy, Partial, Room
from isolation_kernel.options import Options

RUNTIME: Final = "/tmp/.isolation-kernel"  # the kernel's own files, inside
_ANSWER: Final = 2.0  # s
_CHANGES_AT_MOST: Final = 500
_HEADER: Final = ("msg_id", "msg_type", "session", "username", "version")
_HEADER_AT_MOST: Final = 200  # characters
_ASKED: Final = ("status", "changes", "export", "checkpoint", "keep", "rollback", "restore", "forget", "refresh")
_LOOK_AT_WALK: Final = 0.02  # s
LATER: Final = object()  # returned by a method whose answer is sent when it is done
CHECKPOINTS_AT_MOST: Final = 4  # each is the memory of a kernel, or of a machine
_NAME_AT_MOST: Final = 100
# What programs keep for themselves: compiled modules, fonts, completions; semaphores of joblib.
_CACHES: Final = re.compile(r"/(__pycache__|\.cache|\.ipynb_checkpoints|\.config/matplotlib)(/|$)|^/dev/shm/sem\.")
_GRACE: Final = 5.0  # s, between the interrupt of a cell whose time is up and the end of its kernel

T = TypeVar("T")


@dataclass
class _Kept:
    """A checkpoint: the kernel's number for its memory, the sandbox's for its files."""

    slot: int
    files: int


def checkpoint_name(message: Message, kept: Collection[str]) -> str:
    """The name that is asked for, where there are those already. Raises GuestError."""
    name = message.get("name")
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _NAME_AT_MOST:
        raise GuestError("a checkpoint wants a name: %isolation checkpoint NAME")
    if name not in kept and len(kept) >= CHECKPOINTS_AT_MOST:
        raise GuestError(
            f"there are {CHECKPOINTS_AT_MOST} checkpoints, which is all that one kernel may have; use one of their "
            f"names again: {', '.join(kept)}"
        )
    return name


def checkpoint_of(message: Message, kept: Mapping[str, T]) -> T:
    """The one that is asked for. Raises GuestError."""
    name = str(message.get("name"))[:_NAME_AT_MOST]
    found = kept.get(name)
    if found is None:
        raise GuestError(f"there is no checkpoint {name!r}; there is: {', '.join(kept) or 'none'}")
    return found


def exported(target: str, size: int) -> dict[str, Any]:
    """The answer."""
    return {"target": target, "size": format_size(size)}


class _Walk:
    """A thread that looks for changes. `answer`: None until it has found them."""

    def __init__(self, find: Callable[[], list[Any]]) -> None:
        import threading  # late: a warm kernel starts in less time than this may take

        self.answer: Message | None = None
        self._find = find
        threading.Thread(target=self._run, name="changes", daemon=True).start()

    def _run(self) -> None:
        try:
            self.answer = {"answer": self._find()}
        except Exception as error:  # of a sandbox that has ended, too
            self.answer = {"error": str(error)}


class Services:
    """Answers one kernel.

    warm    it has said that it waits for its order
    ready   it has said that it can be interrupted
    reason  why it had to be ended, for people
    cell    the header of the request that it works on
    """

    def __init__(self, box: KernelBox, options: Options, spec: SandboxSpec) -> None:
        self.warm = self.ready = False
        self.reason = ""
        self.cell: dict[str, str] = {}
        self._box = box
        self._options = options
        self._spec = spec
        self._began = time.monotonic()
        self._deadline: float | None = None
        self._interrupted = False
        self._kept: dict[str, _Kept] = {}
        self._wished: tuple[str, int] | None = None
        self._refreshed = False
        self.room = Room()
        self._copy: tuple[Copy, str] | None = None
        self._walk: _Walk | None = None
        self.listen()

    def listen(self) -> None:
        """To the box's wire, which may be another than before."""
        self._box.wire.sock.settimeout(_ANSWER)

    def read(self) -> bool:
        """Read and answer what has come; False when nothing will any more."""
        wire = self._box.wire
        self._refreshed = False
        try:
            alive = wire.fill()
            while (message := wire.next_message()) is not None:
                answer = self._answer(message)
                if answer is not None:
                    wire.send(answer)
        except WireError:
            wire.sock.shutdown(socket.SHUT_RDWR)  # or who asks waits for an answer
            return False
        return alive

    def _answer(self, message: Message) -> Message | None:
        op = message.get("op")
        if op == "ready":
            self.ready = True
        elif op == "warm":
            self.warm = True
        elif op == "cell":
            self._cell(message.get("parent"))
        elif op in _ASKED:
            try:
                found: Any = getattr(self, f"_{op}")(message)
            except (IsolationError, OSError) as error:
                return {"error": str(error)}
            return None if found is LATER else {"answer": found}
        return None

    def _cell(self, parent: Any) -> None:
        """One begins, for the request with the header `parent`; or (None) ends."""
        seconds = self._options.cell_seconds
        self._interrupted = False
        self.cell = {}
        if isinstance(parent, dict):
            values = ((name, parent.get(name)) for name in _HEADER)
            self.cell = {name: value[:_HEADER_AT_MOST] for name, value in values if isinstance(value, str)}
        self._deadline = time.monotonic() + seconds if parent is not None and seconds is not None else None

    def patience(self) -> float | None:
        """Seconds until `go_on` is to be called; None (or -1, as epoll has it) when there is no hurry."""
        if self._copy is not None:
            return 0
        if self._walk is not None:
            return _LOOK_AT_WALK
        return -1 if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def go_on(self) -> None:
        """A slice of what is exported, so that all else goes on, too; and a look at the clock."""
        if self._copy is not None:
            copy, target = self._copy
            try:
                size = copy.go_on()
                answer: Message = {} if size is None else {"answer": exported(target, size)}
            except (IsolationError, OSError) as error:
                answer = {"error": f"{os.path.basename(target)} was not exported: {error}"}
            if answer:
                self._copy = None
                try:
                    self._box.wire.send(answer)
                except WireError:
                    self._box.wire.sock.shutdown(socket.SHUT_RDWR)
        if self._walk is not None and (found := self._walk.answer) is not None:
            self._walk = None
            try:
                self._box.wire.send(found)
            except WireError:
                self._box.wire.sock.shutdown(socket.SHUT_RDWR)
        self._look_at_the_clock()

    def close(self) -> None:
        """Break off what is not done."""
        if self._copy is not None:
            self._copy[0].close()
            self._copy = None

    def _look_at_the_clock(self) -> None:
        """Interrupt a cell whose time is up; end the kernel where that does not help."""
        if self._deadline is None or time.monotonic() < self._deadline:
            return
        if not self._interrupted:
            self._interrupted = True
            self._deadline += _GRACE
            self._box.signal(signal.SIGINT)
        else:
            self._deadline = None
            self.reason = f"a cell took longer than {self._options.cell_timeout}, and an interrupt did not end it"
            self._box.signal(signal.SIGKILL)

    def _status(self, _message: Message) -> dict[str, Any]:
        spec, options = self._spec, self._options
        return {
            "backend": self._box.sandbox.backend.name,
            "limits": spec.limits.describe(),
            "cell_timeout": options.cell_timeout,
            "network": options.network,
            "notebook": options.notebook if spec.workdir in {mount.target for mount in spec.mounts} else "not shown",
            "workdir": spec.workdir,
            "mounts": [str(mount) for mount in spec.mounts],
            "export": options.export,
            "checkpoints": self._names(),
            "wall": time.monotonic() - self._began,
        }

    def _changes(self, _message: Message) -> object:
        """It is answered when all has been looked at: the guest decides how much that is."""
        if CHANGES not in self._box.sandbox.backend.features():
            raise GuestError(f"the {self._box.sandbox.backend.name} backend does not tell what was changed")
        if self._walk is not None:
            raise GuestError("one look at what was changed at a time")
        self._walk = _Walk(self._find_changes)
        return LATER

    def _find_changes(self) -> list[Any]:
        everything = [change for change in self._all_changes() if not change.path.startswith(RUNTIME)]
        found = [change for change in everything if not _CACHES.search(change.path)]
        said = [[change.kind, change.type, change.path[:4096], change.size] for change in found[:_CHANGES_AT_MOST]]
        return [said, len(found), len(everything) - len(found)]

    def _all_changes(self) -> list[Change]:
        return self._box.sandbox.changes()

    # Checkpoints of a container. The kernel keeps its memory itself, in a slot, and asks at the right moments for its files.

    def _checkpoint(self, message: Message) -> object:
        name = checkpoint_name(message, self._kept)
        if FILE_CHECKPOINTS not in self._box.sandbox.backend.features():
            raise GuestError(
                "checkpoints of a container need Linux 6.6 or later; a kernel in a virtual machine has them anywhere "
                "(isolation kernel install --backend microvm)"
            )
        taken = {kept.slot for kept in self._kept.values()}
        before = self._kept.get(name)
        slot = next(number for number in range(CHECKPOINTS_AT_MOST + 1) if number not in taken)
        self._wished = (name, slot)
        return {"slot": slot, "replaced": before.slot if before is not None else None}

    def _keep(self, message: Message) -> None:
        if self._wished is None or self._wished[0] != message.get("name"):
            raise GuestError("no checkpoint was asked for")
        name, slot = self._wished
        self._wished = None
        files = self._box.sandbox.keep_files()
        before = self._kept.pop(name, None)
        self._kept[name] = _Kept(slot, files)
        if before is not None:
            with contextlib.suppress(GuestError):  # more than can be removed in time: the rest goes with the next
                self._box.sandbox.forget_files(before.files)

    def _names(self) -> list[str]:
        return list(self._kept)

    def _forget(self, message: Message) -> dict[str, Any]:
        kept = checkpoint_of(message, self._kept)
        self._kept = {name: other for name, other in self._kept.items() if other is not kept}
        with contextlib.suppress(GuestError):  # more than can be removed in time: the rest goes with the next
            self._box.sandbox.forget_files(kept.files)
        return {"slot": kept.slot}

    def _rollback(self, message: Message) -> object:
        return {"slot": checkpoint_of(message, self._kept).slot}

    def _restore(self, message: Message) -> None:
        self._box.sandbox.restore_files(checkpoint_of(message, self._kept).files)

    def _refresh(self, _message: Message) -> bool:
        """Before a cell: what has changed on the host is to be seen in it. False where that is never so."""
        if self._refreshed:
            raise GuestError("one look at the host's files at a time")  # or a flood of them would hold up everything else
        self._refreshed = True
        self._box.sandbox.refresh_files()
        return True

    def _export(self, message: Message) -> object:
        """It is answered when all has been copied."""
        path, target = self._export_paths(message)
        if self._copy is not None:
            raise GuestError("one export at a time")
        source = self._box.sandbox.machine.open(path, "rb")
        try:
            self._copy = Copy(source, Partial(target, self.room)), target
        except BaseException:
            source.close()
            raise
        return LATER

    def _export_paths(self, message: Message) -> tuple[str, str]:
        """What to copy, and to which place on the host. Raises GuestError."""
        directory = self._options.export
        path = message.get("path")
        if directory is None:
            raise GuestError("this kernel exports nothing: it was installed without --export DIR")
        if not isinstance(path, str) or not path.startswith("/") or not is_path(path):
            raise GuestError("export wants the path of a file in the sandbox")
        name = os.path.basename(path)
        if not name or name in (".", "..") or not name.isprintable():
            raise GuestError(f"{name!r} is no name for a file")
        target = os.path.join(directory, name)
        if os.path.isdir(target):
            raise GuestError(f"{name!r} is a directory in {directory}")
        return path, target
