"""`%isolation …`: what a notebook can ask about its sandbox."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from IPython.core.error import UsageError

from isolation.errors import WireError
from isolation_kernel.inside import arrivals, usage
from isolation_kernel.inside.checkpoint import request
from isolation_kernel.inside.host_channel import Host, Refused

if TYPE_CHECKING:
    from isolation_kernel.inside.checkpoint.checkpoint import Undo

_ARRIVE: Final = 60.0  # s of an emulated machine, for frontends that are connected to its host
_USAGE = """\
%isolation                 what this sandbox is, and what it uses
%isolation changes         which files were added, changed or deleted in it
%isolation export PATH     copy a file out, into the directory that the kernel was installed with (--export)
%isolation checkpoint NAME keep everything as it is now: variables and files; in a virtual machine threads and processes, too
%isolation rollback NAME   go back to that
%isolation forget NAME     forget it: there is room for four"""


class Magic:
    """The line magic of one kernel."""

    def __init__(self, host: Host, undo: Undo) -> None:
        self._host = host
        self._undo = undo
        self._shell: Any = None

    def register(self, shell: Any) -> None:
        """Offer it in `shell`."""
        self._shell = shell
        shell.register_magic_function(self.isolation, "line", "isolation")
        shell.register_magic_function(self.connect_info, "line", "connect_info")
        shell.register_magic_function(self._pip_of(shell.find_line_magic("pip")), "line", "pip")

    def _pip_of(self, plain: Callable[[str], object]) -> Callable[[str], None]:
        @functools.wraps(plain)
        def pip(line: str) -> None:
            plain(line)
            with contextlib.suppress(Refused, WireError, TimeoutError):
                if line.split()[:1] == ["install"] and self._host.ask("status")["network"] == "none":
                    print("isolation: this kernel has no network; 'isolation kernel install --network …' gives one")

        return pip

    def connect_info(self, _line: str) -> None:
        """Say how another client connects: not by the file that the kernel itself knows, which is the sandbox's."""
        print(
            "This kernel's channels are its host's, and so is the connection file of it. There, not in the sandbox:\n\n"
            "    $ jupyter console --existing        # the newest kernel; or the name of a file in 'jupyter --runtime-dir'"
        )

    def isolation(self, line: str) -> None:
        """Ask about this kernel's sandbox: `%isolation [status | changes | export PATH | …]`."""
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UsageError(str(error)) from None
        name, arguments = (words[0], words[1:]) if words else ("status", [])
        command = {
            "status": self._status, "changes": self._changes, "export": self._export,
            "checkpoint": self._checkpoint, "rollback": self._roll_back, "forget": self._forget,
        }.get(name)  # fmt: skip
        if command is None:
            raise UsageError(f"there is no '%isolation {name}'; there is:\n{_USAGE}")
        try:
            command(arguments)
        except Refused as error:
            raise UsageError(str(error)) from None
        except (WireError, TimeoutError) as error:
            raise UsageError(f"the host does not answer: {error}") from None

    def _status(self, arguments: list[str]) -> None:
        _none(arguments)
        said = self._host.ask("status")
        network = {"none": "own loopback only", "host": "the host's: NOT isolated"}.get(said["network"], said["network"])
        rows = [
            ("backend", said["backend"]),
            ("limits", said["limits"] + (f", cell {said['cell_timeout']}" if said["cell_timeout"] else "")),
            ("in use", f"memory {usage.size(usage.memory_used())}, {usage.processes()} processes, up {said['wall']:.0f}s"),
            ("network", network),
            ("notebook", f"{said['workdir']} ({said['notebook']})"),
            *(("mount", mount) for mount in said["mounts"]),
            ("kept", ", ".join(said["checkpoints"]) or "no checkpoint"),
            ("export", said["export"] or "nothing (installed without --export)"),
        ]
        print("\n".join(f"{name:9} {text}" for name, text in rows))

    def _changes(self, arguments: list[str]) -> None:
        _none(arguments)
        found, count, cached = self._host.ask("changes")
        for kind, what, path, size in found:
            of = f" ({usage.size(size)})" if size is not None else ""
            print(f"{kind:8} {path}{'/' if what == 'directory' else ''}{of}")
        if count > len(found):
            print(f"… and {count - len(found)} more")
        if not found:
            print("nothing was changed")
        if cached:
            print(f"({cached} in caches)")

    def _export(self, arguments: list[str]) -> None:
        if len(arguments) != 1:
            raise UsageError("%isolation export PATH")
        said = self._host.ask("export", path=os.path.abspath(os.path.expanduser(arguments[0])))
        print(f"exported to {said['target']} ({said['size']})")

    def _checkpoint(self, arguments: list[str]) -> None:
        name = _one(arguments, "%isolation checkpoint NAME")
        # In a machine it is answered twice: to the one that goes on, and after a rollback.
        with arrivals.of_running(self._shell.kernel.parent) as arrived:
            said = self._host.ask("checkpoint", name=name)
            if "connected" in said:
                arrived.wait(said["connected"], _ARRIVE)
        if "slot" in said:
            self._undo.wish(name, said)
        elif "rolled_back" in said:
            request.become(self._shell.kernel, said["request"], said["idents"])
            request.wait_again(self._shell.kernel, request.from_text(said["waiting"]))
            print(f"back at checkpoint {name}")
        else:
            print(f"checkpoint {name} in {said['seconds']} s")

    def _forget(self, arguments: list[str]) -> None:
        said = self._host.ask("forget", name=_one(arguments, "%isolation forget NAME"))
        if "slot" in said:
            self._undo.forget(said["slot"])

    def _roll_back(self, arguments: list[str]) -> None:
        name = _one(arguments, "%isolation rollback NAME")
        kernel = self._shell.kernel
        asked, idents = request.current(kernel)
        waiting = [] if self._undo.holds else request.waiting(kernel)  # a machine does not come back here with them
        try:
            said = self._host.ask("rollback", name=name, request=asked, idents=idents, waiting=request.as_text(waiting))
        except BaseException:
            request.wait_again(kernel, waiting)
            raise
        self._undo.roll_back(name, said["slot"])


def _one(arguments: list[str], usage: str) -> str:
    if len(arguments) != 1:
        raise UsageError(usage)
    return arguments[0]


def _none(arguments: list[str]) -> None:
    if arguments:
        raise UsageError(f"too many words:\n{_USAGE}")
