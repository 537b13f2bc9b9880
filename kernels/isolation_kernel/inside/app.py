"""ipykernel's application, but for where its sockets come from; and another one in the same process, after a rollback."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import signal
import threading
import types
from typing import Any, ClassVar, Final

import zmq
from ipykernel.heartbeat import Heartbeat
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from traitlets import Type, default

from isolation_kernel.inside.arrivals import Arrivals
from isolation_kernel.protocol.connection import CHANNELS

_SHELL, _IOPUB = (CHANNELS.index(name) + 1 for name in ("shell", "iopub"))  # ports
_PATIENCE: Final = 15.0  # s, for frontends that connect again: libzmq tries after 0.1 to 0.2, if its process runs


class Kernel(IPythonKernel):
    """IPython's, with something to do at the beginning and the end of each cell, and an eye on who waits."""

    at_cell_begin: Any = None
    at_cell_end: Any = None
    in_cell = False
    context: Any = None  # of all cells: context variables that they set are there in the next

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.waiting: dict[int, Any] = {}  # requests that have come, and are not begun
        self._interrupted = threading.Event()  # while a cell's request was on its way to do_execute
        self.subshells: list[str] = []  # that there were in the kernel before, and are to be again

    def start(self) -> None:
        """As the base class's; it hears of requests as soon as they come."""
        if self.subshells:
            self.shell_channel_thread.manager.set_on_recv_callback(self.shell_main)
            self.shell_channel_thread.io_loop.add_callback(self._make_subshells)
        super().start()  # type: ignore[no-untyped-call]
        if getattr(self, "shell_channel_thread", None) is None:
            return  # before ipykernel 7
        self.context = context = self.context or contextvars.copy_context()

        async def begin(message: Any) -> None:
            await asyncio.create_task(self.shell_main(None, message), context=context)

        def received(message: Any) -> Any:
            self.waiting[id(message)] = message
            return begin(message)

        self.shell_channel_thread.manager.get_shell_channel_to_subshell_pair(None).on_recv(self.io_loop, received)

    def _make_subshells(self) -> None:
        """By the names that frontends know them by. ipykernel takes new ones, from the module `uuid`."""
        from ipykernel import subshell_manager

        module: Any = subshell_manager
        uuid, names = module.uuid, iter(self.subshells)
        module.uuid = types.SimpleNamespace(uuid4=lambda: next(names))
        try:
            for _ in self.subshells:
                self.shell_channel_thread.manager._create_subshell()
        finally:
            module.uuid = uuid

    async def dispatch_shell(self, msg: Any, *arguments: Any, **more: Any) -> None:
        """A request's turn has come."""
        self.waiting.pop(id(msg), None)
        await super().dispatch_shell(msg, *arguments, **more)

    def pre_handler_hook(self) -> None:
        """As the base class's. But a cell is not interrupted on its way to `do_execute`: ipykernel would never answer it."""
        parent: dict[str, Any] = self.get_parent("shell")  # type: ignore[no-untyped-call]
        if parent.get("header", {}).get("msg_type") != "execute_request":
            super().pre_handler_hook()  # type: ignore[no-untyped-call]
            return
        self._interrupted.clear()
        self.saved_sigint_handler = signal.signal(signal.SIGINT, lambda *_details: self._interrupted.set())

    async def do_execute(self, *arguments: Any, **more: Any) -> Any:
        """A cell. From here on an interrupt ends it, until it has ended; it is answered in any case."""
        main = threading.current_thread() is threading.main_thread()
        self.in_cell = True
        try:
            try:
                if main:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    if self._interrupted.is_set():
                        raise KeyboardInterrupt
                if self.at_cell_begin is not None:
                    self.at_cell_begin()
                reply = await super().do_execute(*arguments, **more)  # type: ignore[no-untyped-call]
            finally:
                _ignore_interrupts(main)
        except KeyboardInterrupt:  # before the cell's first line, or after its last
            _ignore_interrupts(main)
            reply = {
                "status": "error", "ename": "KeyboardInterrupt", "evalue": "", "traceback": [], "payload": [],
                "execution_count": self.execution_count - 1, "user_expressions": {},
            }  # fmt: skip
        self.in_cell = False
        return reply if self.at_cell_end is None else await self.at_cell_end(reply)


def _ignore_interrupts(main: bool) -> None:
    """Until the next cell (Kernel.post_handler_hook). `signal.signal` itself raises what has come before."""
    while main:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return
        except KeyboardInterrupt:
            continue


class KernelApp(IPKernelApp):
    """Takes over listening sockets. Their numbers stand where an ordinary kernel has the descriptors of its own."""

    given: dict[int, int]  # by a channel's port: the descriptor of its listening socket
    blocking_class = Type(
        klass=object
    )  # jupyter_client has its name there, which is looked up at the start: lazy_imports.py

    @default("blocking_class")
    def _blocking_class(self) -> Any:
        return importlib.import_module("jupyter_client").BlockingKernelClient

    def _try_bind_socket(self, s: Any, port: int) -> int:
        take_over(s, self.given[port], f"{self.ip}-{port}")
        if port == _SHELL:
            # ipykernel's debugger sends requests to its own shell, which it finds by its last endpoint.
            with contextlib.suppress(zmq.ZMQError):  # on a full disk it is the only thing that is missing
                s.bind(f"ipc://{self.ip}-inner")
        return port

    def init_heartbeat(self) -> None:
        """As the base class's, with the given socket."""
        address = (self.transport, self.ip, self.hb_port)
        found = ((name, getattr(self, name, None)) for name in ("curve_publickey", "curve_secretkey"))
        keys = {name: key for name, key in found if key is not None}  # ipykernel before 7.3 has none
        self.heartbeat = _Heartbeat(zmq.Context(), address, **keys)  # type: ignore[no-untyped-call]
        self.heartbeat.given = self.given[self.hb_port]
        self.heartbeat.start()


class RenewedApp(KernelApp):
    """In a kernel that has come back: the shell, and what its user has made of it, is there already.

    It waits for the frontends of the kernel before, of whom so many were `expected` (by channel).
    """

    expected: ClassVar[list[int]]
    streams: ClassVar[dict[str, Any]]  # stdout and stderr of the application before

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._arrivals = Arrivals()

    def _try_bind_socket(self, s: Any, port: int) -> int:
        if CHANNELS[port - 1] in ("shell", "iopub", "stdin"):
            self._arrivals.watch(port - 1, s)
        return port if port == _IOPUB else super()._try_bind_socket(s, port)

    def init_iopub(self, context: Any) -> None:
        """It takes no connection before it is seen who subscribes."""
        super().init_iopub(context)  # type: ignore[no-untyped-call]
        thread = self.iopub_thread
        self._arrivals.watch_iopub(thread)
        thread.io_loop.add_callback(super()._try_bind_socket, thread.socket, _IOPUB)

    def init_io(self) -> None:
        """Streams for the new channels; in the objects that were there before, which loggers, say, have kept."""
        self.outstream_class = f"{__name__}.stream_again"
        super().init_io()  # type: ignore[no-untyped-call]

    def init_kernel(self) -> None:
        """Not before the frontends are there."""
        self._arrivals.wait(self.expected, _PATIENCE)
        self._arrivals.close()
        super().init_kernel()  # type: ignore[no-untyped-call]

    def _nothing(self) -> None:
        """Was done when the kernel started, or its user may have changed it since."""

    init_pdb = init_path = init_gui_pylab = init_extensions = init_code = patch_io = _nothing
    configure_tornado_logger = _nothing


class _Heartbeat(Heartbeat):
    given: int

    def _try_bind_socket(self) -> None:
        take_over(self.socket, self.given, f"{self.ip}-{self.port}")


def stream_again(session: Any, iopub: Any, name: str, **how: Any) -> Any:
    """What `ipykernel.iostream.OutStream` makes, in the place of the one that was there."""
    stream = RenewedApp.streams[name]
    hooks = getattr(stream, "_hooks", [])
    stream.__init__(session, iopub, name, **how)
    for hook in hooks:
        stream.register_hook(hook)
    return stream


def take_over(s: Any, fd: int, path: str) -> None:
    """Let a socket accept its connections on a listening descriptor. The path is a name only: nothing is made there."""
    s.use_fd = fd
    s.bind(f"ipc://{path}")
    s.use_fd = -1
