"""What is asked for: a sandbox's spec. Immutable, checked when made; equal specs make equal sandboxes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, get_args

from isolation.errors import SpecError
from isolation.plain import os
from isolation.units import format_size, parse_count, parse_seconds, parse_size

MountMode = Literal["ro", "rw", "overlay", "copy"]
NetworkMode = Literal["none", "nat", "allow", "host"]

_ENV_NAME = re.compile(r"[^=\0]+")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")


def is_host_name(text: str) -> bool:
    """Whether this is a name as the DNS has them (RFC 1123, with the underscore of RFC 2782), or an IPv4 address.

    The one grammar for names, those of a guest too: what fits holds no NUL, at which a C function would end it, no space, no
    control character, and nothing that IDNA would turn into other characters.
    """
    return _HOST_NAME.fullmatch(text) is not None


def is_path(text: str) -> bool:
    """Whether a system call could take it: it has no NUL, can be encoded, and is no longer than PATH_MAX."""
    try:
        return "\0" not in text and len(os.fsencode(text)) < 4096
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True)
class Mount:
    """A part of the host's file tree shown inside.

    `source` is a path on the host (relative ones are taken from the current directory), `target` an
    absolute path inside (default: the same path). Modes: "ro"; "rw", where the guest's writes reach the
    host; "overlay", writable inside and discarded; "copy", as that, of something small: the guest can remove
    it, too, or rename it, which it cannot where something is mounted.
    """

    source: str
    target: str = ""
    mode: MountMode = "ro"

    def __init__(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str] = "",
        mode: MountMode = "ro",
        *,
        writable: bool = False,
    ) -> None:
        absolute = os.path.abspath(os.fspath(source))
        inside = os.fspath(target) or absolute
        if "\0" in absolute + inside:
            raise SpecError(f"a mount path cannot hold a NUL character: {source!r}")
        if not inside.startswith("/"):
            raise SpecError(f"mount target {inside!r} must be an absolute path inside the sandbox")
        if mode not in get_args(MountMode):
            raise SpecError(f"mount mode {mode!r} is not one of {', '.join(get_args(MountMode))}")
        object.__setattr__(self, "source", absolute)
        object.__setattr__(self, "target", os.path.normpath(inside).replace("//", "/"))
        object.__setattr__(self, "mode", "rw" if writable else mode)
        if self.target == "/":
            raise SpecError("nothing can be mounted over the sandbox's root '/'; name a directory below it")

    @classmethod
    def overlay(cls, source: str | os.PathLike[str], target: str | os.PathLike[str] = "") -> Mount:
        """A writable view of `source` whose changes are discarded with the sandbox."""
        return cls(source, target, "overlay")

    @classmethod
    def parse(cls, text: str) -> Mount:
        r"""`SRC[:DST][:ro|rw|overlay|copy]`, as on the command line; a colon in a path is written `\:`."""
        parts = [part.replace("\\:", ":") for part in re.split(r"(?<!\\):", text)]
        mode: MountMode = "ro"
        if len(parts) > 1 and parts[-1] in get_args(MountMode):
            mode = parts.pop()  # type: ignore[assignment]
        if not parts[0] or len(parts) > 2 or (len(parts) == 2 and not parts[1]):
            raise SpecError(f"mount {text!r} is not SRC:DST[:ro|rw|overlay|copy] (write a colon in a path as '\\:')")
        return cls(parts[0], parts[1] if len(parts) == 2 else "", mode)

    def __str__(self) -> str:
        return f"{self.source}:{self.target}:{self.mode}"


@dataclass(frozen=True)
class Network:
    """What the guest reaches: nothing but its own loopback, some hosts, any host, or the host's own stack."""

    mode: NetworkMode = "none"
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in get_args(NetworkMode):
            raise SpecError(f"network {self.mode!r} is not one of {', '.join(get_args(NetworkMode))}")
        if bool(self.hosts) != (self.mode == "allow"):
            raise SpecError("network 'allow' needs host names (e.g. 'allow:pypi.org'), and only it takes them")
        for host in self.hosts:
            if not is_host_name(host.removeprefix("*.")):
                raise SpecError(f"network: {host!r} is not a host name")

    @classmethod
    def none(cls) -> Network:
        """An empty network namespace: own `lo`, up, and nothing else."""
        return cls("none")

    @classmethod
    def nat(cls) -> Network:
        """Outgoing connections through the host, none incoming."""
        return cls("nat")

    @classmethod
    def allow(cls, hosts: Iterable[str]) -> Network:
        """HTTP(S) to the named hosts only."""
        return cls("allow", tuple(hosts))

    @classmethod
    def host(cls) -> Network:
        """The host's own network, local services included: no network isolation at all."""
        return cls("host")

    @classmethod
    def parse(cls, text: str | Network) -> Network:
        """`none`, `nat`, `host` or `allow:NAME,NAME`."""
        if isinstance(text, Network):
            return text
        if not isinstance(text, str):
            raise SpecError(f"network must be a name such as 'none' or 'host', not {text!r}")
        mode, _, hosts = text.partition(":")
        return cls(mode, tuple(host for host in hosts.split(",") if host))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.mode}:{','.join(self.hosts)}" if self.hosts else self.mode


PIDS: Final = 4096  # of a command or a kernel, where nobody has said how many: a fork bomb is bounded, a build is not


@dataclass(frozen=True)
class Limits:
    """Bounds of the whole sandbox, all its processes together; None is "no limit of its own".

    memory and disk in bytes ("512M"), cpus in cores (0.5 is half of one), wall in seconds ("2s"). `watched`: the memory
    limit is held by a watch, and no cgroup is made for it. For a limit that nobody has asked for: with version 2, a cgroup
    of one's own can take moving all processes of the session that one is a part of (cgroups(7), "no internal processes").
    """

    memory: int | None = None
    pids: int | None = None
    cpus: float | None = None
    disk: int | None = None
    wall: float | None = None
    watched: bool = False

    def __init__(
        self,
        memory: str | int | None = None,
        pids: str | int | None = None,
        cpus: str | float | None = None,
        disk: str | int | None = None,
        wall: str | float | None = None,
        *,
        watched: bool = False,
    ) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("memory", None if memory is None else parse_size(memory, "memory limit"))
        put("pids", None if pids is None else parse_count(pids, "pids limit"))
        put("cpus", None if cpus is None else _parse_cpus(cpus))
        put("disk", None if disk is None else parse_size(disk, "disk limit"))
        put("wall", None if wall is None else parse_seconds(wall, "wall-clock limit"))
        put("watched", watched)
        if self.memory is not None and self.memory < 1 << 20:
            raise SpecError(f"memory limit {memory!r} is less than 1M: no program runs in that (a unit missing?)")
        if self.disk is not None and self.disk < 1 << 16:
            raise SpecError(f"disk limit {disk!r} is less than 64K: no sandbox starts in that (a unit missing?)")

    def describe(self) -> str:
        """For people: "memory 512M, pids 128", or "no limits"."""
        said = []
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is not None and limit.name != "watched":
                size = limit.name in ("memory", "disk")
                text = format_size(value) if size else f"{value:g}{'s' if limit.name == 'wall' else ''}"
                said.append(f"{limit.name} {text}")
        return ", ".join(said) or "no limits"


def _parse_cpus(value: str | float) -> float:
    try:
        cpus = float(value)
    except (TypeError, ValueError):
        cpus = 0.0
    if isinstance(value, bool) or not 0.01 <= cpus <= 4096:
        raise SpecError(f"cpus limit must be a number of cores from 0.01 up, such as 0.5 or 2, not {value!r}")
    return cpus


@dataclass(frozen=True)
class SandboxSpec:
    """Everything that decides what a sandbox is.

    backend      a backend's name, or "auto": the first that works here and has the features asked for
    image        None: the host's own system directories and Python environment, without anybody's
                 files; or an OCI reference (for backends with the feature "image")
    mounts       what else of the host is to be seen
    workdir      where commands start, inside
    env          variables set inside, besides the allowlist of harmless ones (PATH, LANG, TERM, …)
    inherit_env  pass the caller's whole environment, secrets included: only for trusted code
    network      see Network
    limits       see Limits
    nesting      may make sandboxes itself (opens user namespaces inside: more kernel for an attacker)
    """

    backend: str = "auto"
    image: str | None = None
    mounts: tuple[Mount, ...] = ()
    workdir: str = "/"
    env: tuple[tuple[str, str], ...] = ()
    inherit_env: bool = False
    network: Network = field(default_factory=Network)
    limits: Limits = field(default_factory=Limits)
    nesting: bool = False

    def __init__(
        self,
        backend: str = "auto",
        image: str | None = None,
        mounts: Iterable[Mount] = (),
        workdir: str | os.PathLike[str] = "/",
        env: Mapping[str, str] | Iterable[tuple[str, str]] = (),
        inherit_env: bool = False,
        network: Network | str = "none",
        limits: Limits | None = None,
        nesting: bool = False,
    ) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("backend", backend)
        put("image", image)
        put("mounts", tuple(mounts))
        put("workdir", os.fspath(workdir))
        put("env", _env_pairs(env))
        put("inherit_env", bool(inherit_env))
        put("network", Network.parse(network))
        put("limits", limits if limits is not None else Limits())
        put("nesting", bool(nesting))
        if not isinstance(backend, str) or not backend:
            raise SpecError(f"backend must be a name such as 'auto' or 'namespace', not {backend!r}")
        if not self.workdir.startswith("/") or "\0" in self.workdir:
            raise SpecError(f"workdir {self.workdir!r} must be an absolute path inside the sandbox")
        if not isinstance(self.limits, Limits):
            raise SpecError(f"limits must be a Limits(…), not {limits!r}")
        targets: set[str] = set()
        for mount in self.mounts:
            if not isinstance(mount, Mount):
                raise SpecError(f"mounts must be a list of Mount(…), and holds {mount!r}")
            if mount.target in targets:
                raise SpecError(f"two mounts want the same place inside: {mount.target}")
            targets.add(mount.target)

    def replace(self, **changes: Any) -> SandboxSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)


def _env_pairs(env: Mapping[str, str] | Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    pairs = tuple(sorted(dict(env).items()))
    for name, value in pairs:
        if not isinstance(name, str) or not isinstance(value, str):
            raise SpecError(f"env must map names to strings; {name!r} is {value!r}")
        if not _ENV_NAME.fullmatch(name) or "\0" in value:
            raise SpecError(f"env: {name!r} cannot be the name of a variable, or its value holds a NUL")
    return pairs
