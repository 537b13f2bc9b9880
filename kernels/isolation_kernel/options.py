"""What a kernelspec asks for: the words of its command line, and the sandbox that they mean."""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args

from isolation.errors import SpecError
from isolation.spec import PIDS, Limits, Mount, Network, SandboxSpec
from isolation.units import parse_seconds, unless_none

Notebook = Literal["overlay", "ro", "rw", "none"]

PROXY_PORT: Final = 3128  # inside, where every port is free
PACKAGES: Final = "/tmp/.isolation-kernel/packages"  # where pip installs to, inside
# The frontend's, beside the allowlist that the core has; neither tells a secret.
_ENVIRONMENT: Final = ("JPY_SESSION_NAME", "MPLBACKEND")
# Of the cgroup that a container is: of version 2, and of version 1, as it sees them itself (cgroup_namespaces(7)).
_CONTAINER_MEMORY: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Options:
    """Each is `--name VALUE` in a kernelspec's argv, and `name` in a provisioner's configuration.

    notebook      the directory that the kernel starts in: "overlay" (writable, discarded), "ro", "rw", or "none"; a home
                  directory is shown by an explicit mount only
    mount, env    as `isolation run` has them
    memory, pids  None: what fits this machine; "none": no limit. A virtual machine has its own bounds, unless some are said
    timeout       wall-clock limit of the whole kernel
    cell_timeout  of one cell: it is interrupted, and the kernel ended if that does not help
    export        the one directory on the host that `%isolation export` may write to
    """

    backend: str = "auto"
    network: str = "none"
    memory: str | None = None
    pids: str | None = None
    cpus: str | None = None
    disk: str | None = None
    timeout: str | None = None
    cell_timeout: str | None = None
    mount: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    notebook: Notebook = "overlay"
    export: str | None = None

    def __post_init__(self) -> None:
        """Everything that can be wrong is said when a kernelspec is written, not when a kernel is started."""
        if self.notebook not in get_args(Notebook):
            raise SpecError(f"notebook {self.notebook!r} is not one of {', '.join(get_args(Notebook))}")
        if self.cell_timeout is not None:
            parse_seconds(self.cell_timeout, "cell time limit")
        if self.export is not None and not os.path.isabs(self.export):
            raise SpecError(f"the export directory {self.export!r} must be an absolute path")
        if self.in_machine and (Network.parse(self.network).mode == "host" or self.notebook == "rw"):
            raise SpecError(
                "a kernel in a virtual machine has --network none, allow:… or nat, and --notebook overlay, ro or none: what "
                "it writes reaches the host by %isolation export only"
            )
        self.spec(None, {})

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From names and values. Raises SpecError."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            plain = name.replace("-", "_")
            if plain not in known:
                raise SpecError(f"there is no kernel option {name!r}; there are: {', '.join(sorted(known))}")
            if plain in ("mount", "env"):
                values[plain] = (value,) if isinstance(value, str) else tuple(str(item) for item in value)
            elif value is not None:
                values[plain] = str(value)
        return cls(**values)

    def words(self) -> list[str]:
        """As a part of a command line; what is the default is left out."""
        said: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            for item in value if isinstance(value, tuple) else (value,):
                said += [f"--{field.name.replace('_', '-')}", item]
        return said

    @property
    def cell_seconds(self) -> float | None:
        return None if self.cell_timeout is None else parse_seconds(self.cell_timeout)

    def spec(self, cwd: str | None, environ: Mapping[str, str]) -> SandboxSpec:
        """The sandbox of a kernel that is started in `cwd` by a frontend with this environment."""
        mounts = [Mount.parse(text) for text in self.mount]
        workdir = "/"
        if cwd is not None and holds_home(cwd):
            workdir = cwd if _is_home(cwd) else "/"  # an empty one, inside
        elif cwd is not None and self.notebook != "none":
            workdir = cwd
            if cwd not in (mount.target for mount in mounts):
                mounts.append(Mount(cwd, mode=self.notebook))
        env = {name: environ[name] for name in _ENVIRONMENT if name in environ}
        env["JPY_PARENT_PID"] = "1"  # the kernel's parent is the sandbox's PID 1: nothing to watch
        env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # the debugger misses breakpoints in frozen modules, and says so always
        for text in self.env:
            name, given, value = text.partition("=")
            if given:
                env[name] = value
            elif name in environ:
                env[name] = environ[name]
        network = Network.parse(self.network)
        if network.mode == "allow":
            env |= proxy_environment(network.hosts)
        env.setdefault("PIP_TARGET", PACKAGES)  # the environment itself is read-only
        if network.mode == "none":
            env.setdefault("PIP_RETRIES", "0")  # nobody will answer later either
        return SandboxSpec(
            backend=self.backend,
            mounts=mounts,
            workdir=workdir,
            env=env,
            # Names that are reached by way of a proxy on the host: the sandbox itself has no network.
            network=Network.none() if network.mode == "allow" else network,
            limits=self._limits(),
        )

    def _limits(self) -> Limits:
        memory, pids = (None, None) if self.in_machine else (fitting_memory(), PIDS)
        return Limits(
            memory=unless_none(self.memory, memory),
            pids=unless_none(self.pids, pids),
            cpus=self.cpus,
            disk=self.disk,
            wall=self.timeout,
            watched=self.memory is None and memory is not None,
        )

    @property
    def machine_environment(self) -> dict[str, str]:
        """Of the machine that kernels are forked from. Where the proxy is, each kernel is told: with and without one, they
        are forked from the same."""
        proxy = proxy_environment(self.allowed_hosts) if self.allowed_hosts else {}
        env = dict(self.spec(None, {}).env)
        return {name: value for name, value in env.items() if proxy.get(name) != value and name != "PIP_RETRIES"}

    @property
    def in_machine(self) -> bool:
        """A kernel in a virtual machine (machine/), not one whose sockets can be handed to it."""
        return self.backend == "microvm"

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Network mode "allow": the names that may be connected to."""
        return Network.parse(self.network).hosts


def fitting_memory() -> int:
    """Four fifths of this machine's, or this container's, in bytes: a cell that takes too much ends its kernel, and not what
    else runs here."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _CONTAINER_MEMORY:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            total = min(total, int(Path(path).read_text(encoding="ascii")))
    return max(total * 4 // 5 >> 26 << 26, 1 << 26)


def holds_home(path: str) -> bool:
    """Whether it is a home directory of the user's, or above one: too much to be shown because a notebook lies in it."""
    real = os.path.join(os.path.realpath(path), "")
    return any(os.path.join(home, "").startswith(real) for home in _homes())


def _is_home(path: str) -> bool:
    return os.path.realpath(path) in _homes()


def _homes() -> set[str]:
    homes = {os.path.expanduser("~")}
    try:
        homes.add(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        pass  # a user without an entry, as containers have
    return {os.path.realpath(home) for home in homes}


def proxy_environment(hosts: Sequence[str]) -> dict[str, str]:
    """What makes programs ask the forwarder inside, which is the only way out."""
    env = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), f"http://127.0.0.1:{PROXY_PORT}")
    own = [name for name in ("localhost", "127.0.0.1", "::1") if name not in hosts]
    return env | {name: ",".join(own) for name in ("no_proxy", "NO_PROXY")}


@dataclass(frozen=True)
class CommandLine:
    """The words of a launcher: its own options, the connection file, and what is for ipykernel."""

    options: Options
    connection_file: str
    forwarded: tuple[str, ...]


def parse(words: Sequence[str]) -> CommandLine:
    """Raises SpecError. Not argparse, which takes as long to import as a warm kernel takes to start."""
    known = {f"--{field.name.replace('_', '-')}": field.name for field in fields(Options)}
    given: dict[str, Any] = {"mount": [], "env": []}
    connection_file = ""
    forwarded: list[str] = []
    rest = iter(words)
    for word in rest:
        name, _, value = word.partition("=")
        if name in known and not connection_file:
            value = value if "=" in word else _next(rest, word)
            if isinstance(given.get(known[name]), list):
                given[known[name]].append(value)
            else:
                given[known[name]] = value
        elif word == "-f":
            connection_file = _next(rest, word)
        else:
            forwarded.append(word)
    if not connection_file:
        raise SpecError("no connection file (… -f FILE): this is what a kernelspec runs; see 'isolation kernel --help'")
    return CommandLine(Options.of(given), connection_file, tuple(forwarded))


def _next(rest: Iterable[str], word: str) -> str:
    for value in rest:
        return value
    raise SpecError(f"{word} needs a value")
