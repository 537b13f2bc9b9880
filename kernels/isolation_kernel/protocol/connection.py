"""The five channels of a kernel, and the connection file that tells where a frontend expects them."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from isolation.errors import LaunchError

# In the order of their numbers, wherever there are five of something.
CHANNELS: Final = ("shell", "iopub", "stdin", "control", "hb")
BACKLOG: Final = 128
_PREFIX: Final = "isk-"  # of private directories
_PATH_AT_MOST: Final = 107  # bytes, of a unix socket's (unix(7))
_FILE_AT_MOST: Final = 1 << 16
_SECRETS: Final = ("key", "signature_scheme", "curve_publickey", "curve_secretkey", "kernel_name", "jupyter_session")


class Connection(NamedTuple):
    """What a connection file says. (Nothing here is imported that takes long: a warm kernel starts faster than that.)

    transport  "tcp", or "ipc": then `ip` is the beginning of a path, and a port its end
    told       what the kernel has to know of it: keys and names
    raw        the file itself
    """

    transport: str
    ip: str
    ports: tuple[int, ...]
    told: Mapping[str, Any]
    raw: Mapping[str, Any]

    @classmethod
    def read(cls, path: str) -> Connection:
        """Raises LaunchError, saying what is wrong with the file."""
        try:
            with open(path, "rb") as file:
                data = json.loads(file.read(_FILE_AT_MOST))
        except (OSError, ValueError) as error:
            raise LaunchError(f"the connection file {path!r} cannot be read: {error}") from error
        return cls.of(data)

    @classmethod
    def of(cls, data: Any) -> Connection:
        """From the file's content. Raises LaunchError."""
        try:
            ports = tuple(int(data[f"{channel}_port"]) for channel in CHANNELS)
            transport, ip = str(data["transport"]), str(data["ip"])
            told = {name: data[name] for name in _SECRETS if isinstance(data.get(name), str)}
        except (KeyError, TypeError, ValueError) as error:
            raise LaunchError(f"the connection file lacks something, or holds nonsense: {error!r}") from error
        if transport not in ("tcp", "ipc"):
            raise LaunchError(f"the connection file asks for transport {transport!r}; there is 'tcp' and 'ipc'")
        return cls(transport, ip, ports, told, data)

    @property
    def encrypted(self) -> bool:
        """CurveZMQ: the kernel needs its keys before it begins to listen."""
        return "curve_secretkey" in self.told

    def listen_tcp(self) -> list[socket.socket]:
        """The five ports, open. Raises LaunchError; the frontend then tries others."""
        listeners: list[socket.socket] = []
        try:
            for port in self.ports:
                listener = socket.socket(socket.AF_INET6 if ":" in self.ip else socket.AF_INET)
                listeners.append(listener)
                # A restarted kernel gets the ports of the one before, some of whose connections still linger.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((self.ip, port))
                listener.listen(BACKLOG)
                listener.setblocking(False)
        except OSError as error:
            for listener in listeners:
                listener.close()
            raise LaunchError(f"cannot listen on {self.ip}:{port}: {error.strerror}") from error
        return listeners

    def endpoint(self, channel: int) -> str:
        """As libzmq writes it."""
        port = self.ports[channel]
        if self.transport == "ipc":
            return f"ipc://{self.ip}-{port}"
        return f"tcp://[{self.ip}]:{port}" if ":" in self.ip else f"tcp://{self.ip}:{port}"

    def paths(self) -> list[str]:
        """Where the five unix sockets are expected."""
        return [f"{self.ip}-{port}" for port in self.ports]


class Doors:
    """Listening unix sockets that a kernel accepts its frontends on, and the ways to them from outside."""

    def __init__(self, paths: Sequence[str] | None = None, count: int = len(CHANNELS)) -> None:
        """At `paths`, where what a kernel before it has left is replaced; else without a name. Raises LaunchError."""
        self.listeners: list[socket.socket] = []
        self.ways: list[int] = []  # O_PATH descriptors of the sockets' inodes; each can be connected to
        directory = None if paths is not None else private_directory()
        try:
            for number in range(count):
                path = f"{directory}/{number}" if paths is None else paths[number]
                self._open(path)
                if paths is None:
                    os.unlink(path)
        except BaseException:
            self.close()
            raise
        finally:
            if directory is not None:
                os.rmdir(directory)

    def _open(self, path: str) -> None:
        if len(os.fsencode(path)) > _PATH_AT_MOST:
            raise LaunchError(f"the path of a unix socket is too long ({_PATH_AT_MOST} bytes at most): {path}")
        try:
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
        except FileNotFoundError:
            pass
        listener = socket.socket(socket.AF_UNIX)
        self.listeners.append(listener)
        try:
            listener.bind(path)
            os.chmod(path, 0o600)
            listener.listen(BACKLOG)
            # libzmq takes it as it is, and would wait in accept(2).
            listener.setblocking(False)
            self.ways.append(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
        except OSError as error:
            raise LaunchError(f"cannot listen on the unix socket {path}: {error.strerror}") from error

    def connect(self, channel: int) -> socket.socket:
        """A connection to the kernel's channel. Raises OSError: BlockingIOError when too many wait already."""
        end = socket.socket(socket.AF_UNIX)
        try:
            end.setblocking(False)
            end.connect(f"/proc/self/fd/{self.ways[channel]}")
        except BaseException:
            end.close()
            raise
        return end

    def given_away(self) -> None:
        """The kernel has the listening ends: from now on it alone keeps them open."""
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()

    def close(self) -> None:
        self.given_away()
        for way in self.ways:
            os.close(way)
        self.ways.clear()


def runtime_root() -> str:
    """A directory of this user's alone, whose path is short; shorter than Jupyter's own runtime directory, in which the
    name of a unix socket would often be too long."""
    run = f"/run/user/{os.geteuid()}"
    return run if os.path.isdir(run) and os.access(run, os.W_OK) else "/tmp"


def private_directory() -> str:
    """A new directory, mode 0700, which nobody can have foreseen."""
    path = f"{runtime_root()}/{_PREFIX}{os.getpid()}-{os.urandom(8).hex()}"
    os.mkdir(path, 0o700)
    return path


def sweep() -> None:
    """Remove directories of processes that were killed. Nothing listens in those any more."""
    root = runtime_root()
    for name in os.listdir(root):
        pid = name[len(_PREFIX) :].partition("-")[0]
        if name.startswith(_PREFIX) and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            path = f"{root}/{name}"
            try:
                if os.lstat(path).st_uid == os.geteuid() and not any(_listens(entry.path) for entry in os.scandir(path)):
                    for entry in os.scandir(path):
                        os.unlink(entry.path)
                    os.rmdir(path)
            except OSError:
                continue  # somebody else sweeps, too


def _listens(path: str) -> bool:
    """The process may be one of another container, that has the same /tmp."""
    with socket.socket(socket.AF_UNIX) as end:
        end.setblocking(False)
        try:
            end.connect(path)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def printable(text: str, most: int = 2000) -> str:
    """A guest's text, for a terminal or a log: control characters become visible ones."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text[:most])
