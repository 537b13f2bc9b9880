"""Importing what a kernel needs only sometimes when it is needed: debugpy when somebody debugs, Jupyter's client side, and
dateutil.

ipykernel imports them while it starts: its debugger to see whether there is one, the package `jupyter_client` on its way to
some of its modules, dateutil for one function. That is nearly half of a kernel's start, and a quarter of its memory. None is
changed: what stands in for a module knows what ipykernel asks for, and becomes the real one at the first look at anything
else.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime
from types import ModuleType
from typing import Any, Final

from traitlets import Type

# What the import system asks of each module, without wanting anything of it.
_ASKED: Final = frozenset({"__cached__", "__file__", "__loader__", "__package__", "__path__", "__spec__"})


class _Deferred(ModuleType):
    """A module whose code has not run yet; a plain one when it has."""

    _isolation_lock: threading.RLock
    _isolation_state: str
    _isolation_after: Callable[[Any], None] | None

    def __getattr__(self, name: str) -> Any:
        if name in _ASKED or name.startswith("_isolation"):
            raise AttributeError(name)
        self._isolation_load()
        if type(self) is _Deferred:
            raise AttributeError(f"partially initialized module {self.__name__!r} has no attribute {name!r}")
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        submodule = isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}"
        if not (submodule or name.startswith(("__", "_isolation"))):
            self._isolation_load()  # or its code would overwrite that later
        ModuleType.__setattr__(self, name, value)  # it may be a plain one by now

    def __dir__(self) -> list[str]:
        self._isolation_load()
        return sorted(self.__dict__)

    def _isolation_load(self) -> None:
        with self._isolation_lock:
            if self._isolation_state != "deferred":
                return
            self._isolation_state = "running"
            spec = self.__spec__
            assert spec is not None
            assert spec.loader is not None
            try:
                spec.loader.exec_module(self)
            except BaseException:
                self._isolation_state = "deferred"
                raise
            if self._isolation_after is not None:
                self._isolation_after(self)
            self._isolation_state = "done"
            self.__class__ = ModuleType  # type: ignore[assignment]


def _defer(name: str, **known: Any) -> _Deferred | None:
    """Put a stand-in where imports look; None when the module is there already, or cannot be found."""
    if name in sys.modules:
        return None
    spec = importlib.util.find_spec(name)
    if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
        return None
    module = _Deferred(name)
    module.__spec__, module.__file__, module.__loader__ = spec, spec.origin, spec.loader
    module.__package__ = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    if spec.submodule_search_locations is not None:
        module.__path__ = list(spec.submodule_search_locations)
    module._isolation_lock, module._isolation_state, module._isolation_after = threading.RLock(), "deferred", None
    module.__dict__.update(known)
    sys.modules[name] = module
    return module


def when_imported(name: str, change: Callable[[Any], None]) -> None:
    """Have `change(module)` done to a module, if there is one, before anybody sees it."""
    module = _defer(name)
    if module is not None:
        module._isolation_after = change
    elif importlib.util.find_spec(name) is not None:
        change(importlib.import_module(name))


def client_side() -> None:
    """Of `jupyter_client` itself, ipykernel wants two names while it starts. Call this before that."""
    module = _defer("jupyter_client")
    if module is not None:
        _defer("platformdirs")  # jupyter_core's, where JUPYTER_PLATFORM_DIRS is set
        _import_without_dateutil("jupyter_client.jsonutil")
        connect = importlib.import_module("jupyter_client.connect")
        for name in ("find_connection_file", "write_connection_file"):
            module.__dict__[name] = getattr(connect, name)


def _import_without_dateutil(name: str) -> None:
    """A module that wants two names of it, for the times in messages' headers. Who asks for dateutil itself, gets it."""
    parser, tz = ModuleType("dateutil.parser"), ModuleType("dateutil.tz")
    parser.__dict__.update(isoparse=_read_time("isoparse"), parse=_read_time("parse"))  # by its version, one of them
    tz.__dict__["tzlocal"] = lambda: importlib.import_module("dateutil.tz").tzlocal()
    ours = {module.__name__: module for module in (ModuleType("dateutil"), parser, tz)}
    if ours.keys() & sys.modules.keys():
        return
    sys.modules.update(ours)
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # another version, that wants more: whoever imports it next, imports that, too
    finally:
        for module in ours:
            del sys.modules[module]


def _read_time(function: str) -> Callable[[str], datetime]:
    """As a function of dateutil.parser. From Python 3.11 on, Python can read all but a few forms of ISO 8601 itself."""

    def read(text: str) -> datetime:
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            found: datetime = getattr(importlib.import_module("dateutil.parser"), function)(text)
            return found

    return read


class _Debugger:
    """Stands for an `ipykernel.debugger.Debugger`, and makes it when it is needed."""

    def __init__(self, *arguments: Any) -> None:
        self.__dict__["_arguments"] = arguments
        self.__dict__["_wanted"] = Future()

    def _made(self) -> Any:
        if "_debugger" not in self.__dict__:
            self.__dict__["_debugger"] = importlib.import_module("ipykernel.debugger").Debugger(*self._arguments)
            self.__dict__["_wanted"].set_result(None)
        return self.__dict__["_debugger"]

    async def handle_stopped_event(self) -> None:
        """ipykernel waits for this from the start, in another thread; nothing stops before there is a debugger."""
        await asyncio.shield(asyncio.wrap_future(self.__dict__["_wanted"]))
        await self._made().handle_stopped_event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._made(), name, value)


def kernel_class() -> Any:
    """Our kernel's; with a debugger that is made when it is needed, where there is one and it is not imported yet."""
    from isolation_kernel.inside.app import Kernel

    if importlib.util.find_spec("debugpy") is None or _defer("ipykernel.debugger", _is_debugpy_available=True) is None:
        return Kernel

    class DeferringKernel(Kernel):
        debugger_class = Type(_Debugger)

    return DeferringKernel
