"""PID 1 of a virtual machine: does what the host asks, over one virtio-serial port.

Stream 0 of the multiplexed port carries messages; the others, numbered by the host, are what the programs read and write.
It is single-threaded, and never waits for the guest's programs.
"""

from __future__ import annotations

import fcntl
import gc
import glob
import json
import os
import resource
import select
import signal
import struct
import sys
import termios
import time
from typing import Any

from isolation.backends.microvm.guest import linux, renew
from isolation.backends.microvm.guest.cgroup import Cgroup
from isolation.backends.microvm.guest.programs import NotStarted, User, start
from isolation.backends.microvm.guest.tree import HIDDEN, Tree
from isolation.backends.microvm.guest.warm_payload import WarmPayload
from isolation.mux import Mux
from isolation.wire import Decoder, Message, encode

PORT = "isolation"  # the name that the host gives the port
CONTROL = 0
_ORDER = struct.Struct(">I")  # the length of what follows the mark: the first message, in JSON


def main() -> None:
    """Serve until the machine is switched off."""
    try:
        os.close(0)
        null = os.open("/dev/null", os.O_RDWR)
        if null != 0:
            os.dup2(null, 0)
        Agent(_find_port()).serve()
    except BaseException as error:
        print(f"isolation-agent: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        linux.restart()


def _find_port() -> int:
    for path in glob.glob("/sys/class/virtio-ports/*/name"):
        with open(path, encoding="ascii") as file:
            if file.read().strip() == PORT:
                return os.open(f"/dev/{path.split('/')[-2]}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    raise FileNotFoundError("no virtio-serial port of the host's")


class Agent:
    """The machine's side of the conversation."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._wakeup, signals = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_about: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # which Python handles, and so would reach PID 1
        signal.set_wakeup_fd(signals, warn_on_full_buffer=False)
        self._tree = Tree()
        self._user = User(0, 0)
        self._env: dict[str, str] = {}
        self._workdir = "/"
        self._commands: dict[int, int] = {}  # by process number: the host's number for it
        self._exits: list[tuple[Message, dict[int, int]]] = []  # with how much of which streams is to be taken before
        self._outputs: dict[int, list[int]] = {}  # by the host's number: its streams
        self._terminals: dict[int, int] = {}  # by the host's number: a descriptor of its terminal
        self._template: WarmPayload | None = None
        self._cgroup = Cgroup()
        self._frozen = False
        self._mark = b""  # of the snapshot that is to be made
        self._connect()

    def _connect(self) -> None:
        self._mux = Mux(self._port, patient=True)
        self._decoder = Decoder()
        self._mux.open(CONTROL, deliver=self._hear)

    def _hear(self, data: bytes) -> None:
        """At once, and not after the step: what follows may be for a stream that a message begins."""
        self._decoder.feed(data)
        while (message := self._decoder.next_message()) is not None:
            self._handle(message)

    def serve(self) -> None:
        """The loop."""
        self._tree.kernel_places()
        self._cgroup.prepare(f"{HIDDEN}/cgroup")
        linux.interface_up(b"lo")
        _write("/proc/self/oom_score_adj", "-1000")
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 1 << 20))
        os.setpriority(os.PRIO_PROCESS, 0, -10)
        self._say({"event": "booted", "python": sys.version.split()[0]})
        gc.collect()
        gc.freeze()
        while True:
            extra = [self._wakeup]
            if self._template is not None and self._template.control >= 0:
                extra.append(self._template.control)
            ready = self._mux.step(None, extra)
            if self._wakeup in ready:
                os.read(self._wakeup, 4096)
                self._reap()
            if self._mark:
                self._fall_silent()
            if self._template is not None and self._template.control in ready:
                self._template_speaks(self._template)
            self._say_exits()

    def _say(self, message: Message, data: bytes = b"") -> None:
        self._mux.write(CONTROL, encode(message, data))

    def _handle(self, message: Message) -> None:
        op = message["op"]
        handler = getattr(self, f"_op_{op}", None)
        if handler is None:
            self._say({"event": "failed", "what": f"the agent does not know {op!r}"})
            return
        try:
            handler(message)
        except OSError as error:
            self._say({"event": "failed", "op": op, "errno": error.errno, "what": error.strerror or str(error)})

    def _op_setup(self, message: Message) -> None:
        """What the spec asks for. Said once, before anything else of the guest's."""
        user = message["user"]
        self._user = User(user["uid"], user["gid"], tuple(user["groups"]))
        self._env = message["env"]
        self._workdir = message["workdir"]
        if message["disk"] is not None:
            self._tree.limit(message["disk"])
        self._tree.build(message["tree"], user["uid"], user["gid"])
        self._renew(message)
        if message["nat"]:
            self._connect_outwards()
        for name, value in message["sysctl"].items():
            _write(f"/proc/sys/{name}", value)
        self._cgroup.limit(message["limits"])
        self._tree.seal()
        self._say({"event": "ready", "workdir": os.path.isdir(self._workdir)})

    def _connect_outwards(self) -> None:
        """QEMU's user networking has these addresses wherever it runs (QEMU: docs/system/devices/net)."""
        linux.interface_up(b"eth0")
        linux.interface_address(b"eth0", "10.0.2.15", "255.255.255.0")
        linux.default_route("10.0.2.2")
        self._tree.own_file("/etc/resolv.conf", "nameserver 10.0.2.3\n")

    def _op_ping(self, message: Message) -> None:
        self._say({"event": "pong"})

    def _op_spawn(self, message: Message) -> None:
        number, streams, tty = message["id"], message["streams"], message["tty"]
        self._mux.expect(max(streams, default=0))
        ours: list[tuple[int, int, int]] = []  # stream, source, sink
        theirs: list[int] = []
        terminal = -1
        try:
            if any(tty):
                master, terminal = os.openpty()
                os.set_blocking(master, False)
                if message["window"]:
                    _set_window(master, message["window"])
                ours.append((message["terminal"], master, master))
            for position in range(3):
                if tty[position]:
                    theirs.append(os.dup(terminal))
                    continue
                reader, writer = os.pipe2(os.O_CLOEXEC)
                mine, other = (writer, reader) if position == 0 else (reader, writer)
                os.set_blocking(mine, False)
                theirs.append(other)
                ours.append((streams[position], -1, mine) if position == 0 else (streams[position], mine, -1))
            pid = start(
                message["argv"], self._env | message["env"], message["cwd"], self._user, theirs,
                terminal=any(tty), cgroup=self._cgroup.guest,
            )  # fmt: skip
        except (NotStarted, OSError) as error:
            for _number, source, sink in ours:
                for fd in {source, sink} - {-1}:
                    os.close(fd)
            what = error.what if isinstance(error, NotStarted) else error.strerror
            cwd = isinstance(error, NotStarted) and error.cwd
            self._say({"event": "unspawned", "id": number, "errno": error.errno, "what": what, "cwd": cwd})
        else:
            self._commands[pid] = number
            self._outputs[number] = [stream for stream, source, _sink in ours if source >= 0]
            for stream, source, sink in ours:
                self._mux.open(stream, source=source, sink=sink)
            if terminal >= 0:
                self._terminals[number] = os.dup(ours[0][1])
            self._say({"event": "spawned", "id": number})
        finally:
            for fd in theirs:
                os.close(fd)
            if terminal >= 0:
                os.close(terminal)

    def _op_resize(self, message: Message) -> None:
        if message["id"] in self._terminals:
            _set_window(self._terminals[message["id"]], message["window"])

    def _op_signal(self, message: Message) -> None:
        for pid, number in self._commands.items():
            if number == message["id"]:
                try:
                    os.killpg(pid, message["signal"]) if message["group"] else os.kill(pid, message["signal"])
                except ProcessLookupError:
                    pass

    def _op_open(self, message: Message) -> None:
        """A file as the guest's user sees it: its permissions, and symlinks wherever they lead within the machine."""
        path, reading, stream = message["path"], message["mode"] == "rb", message["stream"]
        self._mux.expect(stream)
        flags = os.O_RDONLY if reading else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            fd = self._as_user(lambda: os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o644))
        except OSError as error:
            self._say({"event": "opened", "stream": stream, "errno": error.errno, "what": error.strerror})
            return
        status = os.fstat(fd)
        if not os.path.isfile(f"/proc/self/fd/{fd}"):
            os.close(fd)
            self._say({"event": "opened", "stream": stream, "errno": 0, "what": "not a regular file"})
            return
        self._say({"event": "opened", "stream": stream, "size": status.st_size})
        if reading:
            self._mux.open(stream, source=fd)
        else:
            self._mux.open(stream, sink=fd, ended=lambda: self._say({"event": "written", "stream": stream}))

    def _as_user(self, action: Any) -> Any:
        """With the file permissions of the guest's user (setfsuid would do, and Python has none)."""
        os.setegid(self._user.gid)
        os.seteuid(self._user.uid)
        try:
            return action()
        finally:
            os.seteuid(0)
            os.setegid(0)

    def _op_changes(self, message: Message) -> None:
        found = self._tree.changes()
        for begin in range(0, len(found) or 1, 1000):
            part = [[c.path, c.kind, c.type, c.size] for c in found[begin : begin + 1000]]
            self._say({"event": "changes", "changes": part, "more": begin + 1000 < len(found)})

    def _op_template(self, message: Message) -> None:
        """Start the payload that is to be forked while it is warm."""
        streams = message["streams"]
        self._mux.expect(max(streams))
        self._template = WarmPayload(message, self._env, self._user, self._workdir, self._cgroup.guest)
        self._commands[self._template.pid] = message["id"]
        self._outputs[message["id"]] = streams
        wire, stdout, stderr = self._template.take_streams()
        self._mux.open(streams[0], source=wire, sink=wire)
        self._mux.open(streams[1], source=stdout)
        self._mux.open(streams[2], source=stderr)
        self._say({"event": "spawned", "id": message["id"]})

    def _template_speaks(self, template: WarmPayload) -> None:
        if template.said_warm():
            self._say({"event": "warm"})

    def _op_snapshot(self, message: Message) -> None:
        self._mark = bytes.fromhex(message["mark"])

    def _fall_silent(self) -> None:
        """Fall silent, and wait until a host speaks the mark: the memory of this moment is what every fork begins with."""
        # A payload alone waits to be woken; whatever else it has started would run on before the random numbers are new.
        self._frozen = self._cgroup.busy()
        if self._frozen:
            self._cgroup.freeze(frozen=True)
        if self._template is not None:
            self._template.keep_deleted_files()
        self._mux.drain()  # what was written while it warmed up is not to be told by every fork
        self._say({"event": "quiet"})
        _wait_until_written(self._mux)
        gc.collect()
        gc.freeze()
        _wait_for_mark(self._port, self._mark)
        order = _read_exactly(self._port, _ORDER.unpack(_read_exactly(self._port, _ORDER.size))[0])
        self._mark = b""
        self._decoder = Decoder()
        self._mux.restart()
        self._handle(json.loads(order))

    def _op_renew(self, message: Message) -> None:
        """The first words to a fork, and its job; nothing else in the machine has run on yet."""
        self._renew(message)
        if self._template is not None:
            self._template.wake(message["seed"], message["job"])
        if self._frozen:
            self._cgroup.freeze(frozen=False)

    def _renew(self, message: Message) -> None:
        seed = bytes.fromhex(message["seed"]) if message["seed"] else None
        renew.machine(seed, (message["time"][0], message["time"][1]), self._tree)

    def _op_stacks(self, message: Message) -> None:
        """What faulthandler wrote; with `now`, ask for it first."""
        if self._template is None:
            self._say({"event": "stacks"})
            return
        if message["now"]:
            self._template.ask_for_stacks()
        self._say({"event": "stacks"}, self._template.stacks())

    def _op_deleted(self, message: Message) -> None:
        """An unlinked file that the template had open, by its inode number."""
        data = self._template.deleted_file(message["inode"], message["most"]) if self._template is not None else None
        self._say({"event": "deleted", "known": data is not None}, data or b"")

    def _reap(self) -> None:
        """Collect everything that has ended; orphans too, which nobody asks for."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            number = self._commands.pop(pid, None)
            if number is None:
                continue
            fd = self._terminals.pop(number, None)
            if fd is not None:
                os.close(fd)
            event: dict[str, Any] = {"event": "exit", "id": number, "status": status}
            event["oom"] = os.WIFSIGNALED(status) and self._cgroup.killed_for_memory()
            peak = self._cgroup.memory_peak() or usage.ru_maxrss * 1024
            event["usage"] = [usage.ru_utime, usage.ru_stime, peak]
            self._exits.append((event, self._mux.marks(self._outputs.pop(number, ()))))

    def _say_exits(self) -> None:
        """What a program had written comes before the word of its end; what its children write later does not matter."""
        waiting = []
        for event, marks in self._exits:
            if self._mux.reached(marks):
                self._say(event)
            else:
                waiting.append((event, marks))
        self._exits = waiting


def _wait_until_written(mux: Mux) -> None:
    """Not one byte may be read from here on: the next ones may be the mark."""
    poller = select.poll()
    poller.register(mux.fd, select.POLLOUT)
    mux.flush()
    while not mux.idle:
        poller.poll(20)
        mux.flush()


def _wait_for_mark(port: int, mark: bytes) -> None:
    """Whatever was under way from the host that was is dropped. One read at a time, no more than the mark: what follows
    it is the new host's."""
    poller = select.poll()
    poller.register(port, select.POLLIN)
    seen = b""
    while seen != mark:
        try:
            byte = os.read(port, 1 if seen else len(mark))
        except BlockingIOError:
            poller.poll()
            continue
        if not byte:
            time.sleep(0.001)  # the host is not there yet
            continue
        seen = (seen + byte)[-len(mark) :]


def _read_exactly(port: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            data += os.read(port, size - len(data))
        except BlockingIOError:
            time.sleep(0.0005)
    return data


def _set_window(terminal: int, window: list[int]) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *window, 0, 0))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
