"""From the start of the process to the kernel's loop."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from isolation_kernel.inside import usage
from isolation_kernel.inside.host_channel import FIRST_GIVEN, Host

if TYPE_CHECKING:
    from isolation_kernel.inside.checkpoint.checkpoint import Undo

_CHANNELS: Final = ("shell", "iopub", "stdin", "control", "hb")
_RUNTIME: Final = "/tmp/.isolation-kernel"
_PACKAGES: Final = f"{_RUNTIME}/packages"  # of `%pip install`: the environment itself is read-only
_INLINE: Final = "module://matplotlib_inline.backend_inline"
_HISTORY: Final = "--HistoryManager.hist_file=:memory:"  # it is this kernel's alone, and goes back with it
_STACK: Final = ("numpy", "pandas", "matplotlib.pyplot")


def main(argv: Sequence[str]) -> None:
    """Be a kernel until the frontend, or the host, wants no more."""
    given = [FIRST_GIVEN + number for number in range(len(_CHANNELS))]
    for fd in given:
        os.set_inheritable(fd, False)  # not for programs that a cell starts
    host = Host(FIRST_GIVEN + len(_CHANNELS))
    os.makedirs(_PACKAGES, mode=0o700, exist_ok=True)  # now: what was not there is not looked at again
    os.environ.setdefault("IPYTHONDIR", f"{_RUNTIME}/ipython")  # history is this kernel's alone
    # As `python -m ipykernel_launcher` has it. Here it is the sandbox's own directory; on the host it would not be safe.
    sys.path[:0] = ["", _PACKAGES]
    if "--standby" in argv:
        app, undo = _application(host, given, {"key": secrets.token_hex(), "signature_scheme": "hmac-sha256"}, argv[1:])
        _import_stack(app.shell)
        _settle()
        host.tell("warm")
        order = host.receive()
        if order is None:
            return
        _take_over(app, order)
    else:
        order = host.receive()
        if order is None:
            return
        app, undo = _application(host, given, order["connection"], order["arguments"])
        _settle()
    from isolation_kernel.inside import lazy_imports  # late, as everything that imports much

    lazy_imports.when_imported("psutil", lambda module: usage.show_limits(module, order["memory"], order["cpus"]))
    host.tell("ready")
    undo.run()


def _application(host: Host, given: Sequence[int], told: dict[str, Any], arguments: Sequence[str]) -> tuple[Any, Undo]:
    """An IPKernelApp up to where only its loop is missing, and who runs it."""
    from isolation_kernel.inside import lazy_imports

    with lazy_imports.client_side():
        from isolation_kernel.inside.app import KernelApp

        kernel_class = lazy_imports.kernel_class()
    history = [] if any(word.startswith("--HistoryManager.hist_file") for word in arguments) else [_HISTORY]
    given_arguments = ["-f", _write_connection_file(told), *history, *arguments]
    sys.argv = ["ipykernel_launcher", *given_arguments]
    KernelApp.given = {number + 1: fd for number, fd in enumerate(given)}
    app: Any = KernelApp.instance(kernel_class=kernel_class)
    app.initialize(given_arguments)
    from isolation_kernel.inside.checkpoint.checkpoint import Undo

    undo = Undo(app, host, given_arguments)
    _equip(app.shell, host, undo)
    return app, undo


def _import_stack(shell: Any) -> None:
    """Ahead of the first cell. The first plot takes longer than most imports, and the first completion longer than that: so
    there is one of each that nobody sees. (In an emulated machine that completion takes so long that another thread is
    likely to change the filters of warnings meanwhile, which Python does for all threads, and it fails.)"""
    os.environ.setdefault("MPLBACKEND", _INLINE)  # pyplot chooses when it is imported
    for name in _STACK:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    if "matplotlib.pyplot" in sys.modules:
        shell.run_cell(
            "import io, matplotlib.pyplot as p; p.plot([0, 1]); p.savefig(io.BytesIO()); p.close('all'); del io, p",
            silent=True, store_history=False,
        )  # fmt: skip
    else:
        shell.run_cell("pass", silent=True, store_history=False)
    from IPython.core.completer import provisionalcompleter

    with provisionalcompleter():
        list(shell.Completer.completions("zi", 2))


def _take_over(app: Any, order: dict[str, Any]) -> None:
    """Become who the order says: another key, another environment, other random numbers."""
    told = order["connection"]
    _write_connection_file(told)
    app.session.signature_scheme = told.get("signature_scheme", "hmac-sha256")
    app.session.key = told.get("key", "").encode()
    os.environ.update(order["env"])
    time.tzset()
    os.chdir(order["cwd"])
    if "JPY_SESSION_NAME" in os.environ:
        app.shell.user_ns["__session__"] = os.environ["JPY_SESSION_NAME"]
    import random

    random.seed()
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed()


def _equip(shell: Any, host: Host, undo: Undo) -> None:
    """With what an ordinary kernel does not have."""
    from isolation_kernel.inside.magic import Magic

    Magic(host, undo).register(shell)
    shell.events.register("pre_run_cell", lambda _info: host.tell("cell", parent=_header(shell.kernel)))
    shell.events.register("post_run_cell", lambda _result: host.tell("cell", parent=None))


def _header(kernel: Any) -> dict[str, str]:
    """Of the request that a cell came with."""
    header = kernel.get_parent("shell").get("header", {})
    return {name: str(header[name]) for name in ("msg_id", "msg_type", "session", "username", "version") if name in header}


def _settle() -> None:
    """What is there now, stays: with the collector merely enabled, it would look through all of it first (50 ms, with
    matplotlib)."""
    gc.freeze()
    gc.enable()


def _write_connection_file(told: dict[str, Any]) -> str:
    """For %connect_info, and for ipykernel, which reads its keys there."""
    ports = {f"{name}_port": number + 1 for number, name in enumerate(_CHANNELS)}
    path = f"{_RUNTIME}/connection.json"
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump({"transport": "ipc", "ip": f"{_RUNTIME}/k", **ports, **told}, file)
    return path
