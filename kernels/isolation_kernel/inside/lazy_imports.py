"""Importing what a kernel needs only sometimes when it is needed: debugpy when somebody debugs, Jupyter's client side, and
dateutil.

ipykernel imports them while it starts: its debugger to see whether there is one, the package `jupyter_client` on its way to
some of its modules, dateutil for one function. That is nearly half of a kernel's start, and a quarter of its memory. None is
changed: what stands in for a module knows what ipykernel asks for, and becomes the real one at the first look at anything
else. For a package it stands where imports look only while ipykernel is imported. Who imports the package afterwards, or a
module inside it, does what Python always does, in its order and with its locks; only that its code runs in the stand-in.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import datetime
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any, Final

from traitlets import Type

# What the import system asks of each module, without wanting anything of it.
_ASKED: Final = frozenset({"__cached__", "__file__", "__loader__", "__package__", "__path__", "__spec__"})


class _StandIn(ModuleType):
    """For a module whose code has not run yet; the module itself when it has."""

    def __getattr__(self, name: str) -> Any:
        if name in _ASKED:
            raise AttributeError(name)
        module = self._isolation_import()
        if type(module) is _StandIn:
            raise AttributeError(f"partially initialized module {self.__name__!r} has no attribute {name!r}")
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        submodule = isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}"
        if not (submodule or name.startswith("__")):
            self._isolation_import()  # or its code would overwrite that later
        ModuleType.__setattr__(self, name, value)  # it may be a plain one by now

    def __dir__(self) -> list[str]:
        return dir(self._isolation_import())

    def _isolation_import(self) -> ModuleType:
        _remove(self.__name__)
        return importlib.import_module(self.__name__)


class _Loader(SourceFileLoader):
    """Runs a module's code where there is a stand-in for it, in that; and then what is to be done afterwards."""

    def __init__(self, name: str, path: str, module: _StandIn | None, after: Callable[[Any], None] | None) -> None:
        super().__init__(name, path)
        self._module, self._after = module, after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if self._after is not None:
            self._after(module)
        if module is self._module:
            module.__class__ = ModuleType  # type: ignore[assignment]
        _Finder.awaited.pop(self.name, None)


class _Finder:
    """Where Python's import looks first, for the modules that something is known of."""

    awaited: Final[dict[str, tuple[_StandIn | None, Callable[[Any], None] | None]]] = {}

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        known = cls.awaited.get(name)
        if known is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(name, spec.loader.path, *known)
        return spec


_standing: Final[dict[str, _StandIn]] = {}  # those that are where imports look


def _await(name: str, module: _StandIn | None, after: Callable[[Any], None] | None = None) -> None:
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
    _Finder.awaited[name] = module, after


def _source(name: str) -> ModuleSpec | None:
    """Where the code of a module is that is not there yet; None if it is, or is in no ordinary file."""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    return spec if spec is not None and type(spec.loader) is SourceFileLoader else None


def _defer(name: str, **known: Any) -> _StandIn | None:
    """Put a stand-in where imports look; None when the module is there already, or cannot be found."""
    spec = _source(name)
    if spec is None:
        return None
    module = _StandIn(name)
    spec.loader = _Loader(name, str(spec.origin), module, None)
    _await(name, module)
    importlib.util.module_from_spec(spec)  # gives it what every module has
    module.__dict__.update(known)
    sys.modules[name] = _standing[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _remove(name: str) -> None:
    """From where imports look; once, so that it is never the module itself, which is there later."""
    module = _standing.pop(name, None)
    if module is not None and sys.modules.get(name) is module:
        del sys.modules[name]


def when_imported(name: str, change: Callable[[Any], None]) -> None:
    """Have `change(module)` done to a module, if there is one, before anybody sees it."""
    if _source(name) is not None:
        _await(name, None, change)
    elif importlib.util.find_spec(name) is not None:
        change(importlib.import_module(name))


@contextlib.contextmanager
def client_side() -> Iterator[None]:
    """Of `jupyter_client` itself, ipykernel wants two names while it starts: it is to be imported within this."""
    module = _defer("jupyter_client")
    if module is not None:
        _defer("platformdirs")  # jupyter_core's, where JUPYTER_PLATFORM_DIRS is set
        _import_without_dateutil("jupyter_client.jsonutil")
        connect = importlib.import_module("jupyter_client.connect")
        for name in ("find_connection_file", "write_connection_file"):
            module.__dict__[name] = getattr(connect, name)
    yield
    for name in ("jupyter_client", "platformdirs"):
        _remove(name)


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
