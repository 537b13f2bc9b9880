"""Runs in the user's process: from a spec to a plan. All that can be decided is decided here, before anything is forked."""

from __future__ import annotations

import resource
import stat
from collections.abc import Iterable
from typing import Final

from isolation.backends.namespace.plan import ALL_DEFENCES, NAMESPACES, Plan
from isolation.backends.namespace.rootfs import adoption, view
from isolation.backends.namespace.rootfs.mounts import (
    HIDDEN,
    DevPts,
    Directory,
    Operation,
    Overlay,
    Proc,
    ReadOnlyView,
    Rebind,
    Symlink,
    TextFile,
)
from isolation.backends.showing import environment_for
from isolation.errors import FeatureMissing, SpecError
from isolation.linux import privileges, seccomp, syscalls
from isolation.linux.cgroup import Hierarchy
from isolation.linux.mountinfo import MountTable
from isolation.linux.userns import Identity
from isolation.plain import os
from isolation.spec import Limits, SandboxSpec

_DEVICES = ("full", "null", "random", "tty", "urandom", "zero")
# What the OCI runtime specification masks (config-linux, default of runc and crun), and what tells of keys.
MASKED = (
    "acpi", "asound", "kcore", "key-users", "keys", "latency_stats", "sched_debug", "scsi", "sysrq-trigger",
    "timer_list",
)  # fmt: skip
_MEMORY = f"{HIDDEN}/meminfo"
_COPY_AT_MOST = 64 << 20  # of a file that is copied into every sandbox
_STORE_MOUNT_POINTS = ("/tmp", "/var/tmp", "/mnt", "/")


def make_plan(spec: SandboxSpec, *, python: Iterable[str] = (), defences: frozenset[str] = ALL_DEFENCES) -> Plan:
    """Resolve `spec` on this machine; `python` are paths of the Python environment to show.

    Raises SpecError for what cannot be found, FeatureMissing for what cannot be enforced here.
    """
    if spec.image is not None:
        raise FeatureMissing("the namespace backend does not run OCI images yet; leave image=None for the host's tree")
    if spec.network.mode not in ("none", "host"):
        raise FeatureMissing(
            f"the namespace backend has no network mode {spec.network.mode!r}; it has 'none' (own loopback) and 'host'"
        )
    identity = Identity.of_caller()
    mount_point = next(path for path in _STORE_MOUNT_POINTS if os.path.isdir(path))
    own = adoption.Own(identity.uid, None if identity.ranged else identity.gid) if "view" in defences else None
    shown = view.View(MountTable.read(), mount_point if identity.ranged else None, own)
    if "view" in defences:
        _fill(shown, spec, python)
    else:
        _fill_everything(shown)
    env = environment_for(spec, shown.shows)
    _writable_places(shown, env)
    _copies(shown, spec)
    _kernel_places(shown, spec, defences)
    if spec.network.mode == "host":
        _name_resolution(shown)
    if not shown.shows(os.path.realpath(spec.workdir)) and spec.workdir != "/":
        if not shown.has(spec.workdir):
            raise SpecError(
                f"workdir {spec.workdir!r} is not part of the sandbox's file tree; mount it "
                f"(Mount.overlay({spec.workdir!r}), or --mount {spec.workdir})"
            )
    own_network = spec.network.mode == "none" and "network" in defences
    flags = sum(NAMESPACES.values()) & ~(0 if own_network else syscalls.CLONE_NEWNET)
    cgroup, rlimits, watch = _enforcement(spec.limits, _COUNTED if "counters" in defences else ())
    base, fresh = shown.operations()
    return Plan(
        base=tuple(base),
        fresh=tuple(fresh),
        staged=tuple(shown.staged),
        mount_point=mount_point,
        identity=identity,
        clone_flags=flags,
        own_network=own_network,
        limits=spec.limits,
        rlimits=rlimits,
        watch_memory=watch,
        cgroup=cgroup,
        landlock=0 if spec.nesting or "landlock" not in defences else _usable_landlock(),
        filter=seccomp.compiled_filter(spec.nesting),
        nesting=spec.nesting,
        workdir=spec.workdir,
        env=env,
        inherit_env=spec.inherit_env,
        defences=defences,
        notes=tuple(shown.notes),
        shared=_shared(spec, [*base, *fresh]),
    )


def _shared(spec: SandboxSpec, operations: Iterable[Operation]) -> tuple[str, ...]:
    """What shows a part of the host that was asked for; the system and the Python environment stay as they are."""
    asked = {path for mount in spec.mounts for path in (mount.target, os.path.realpath(mount.target))}
    found = []
    for operation in operations:
        kind = operation.shows if isinstance(operation, Rebind) else operation
        above = any(f"{path}/".startswith(f"{operation.target}/") for path in asked)
        beneath = any(operation.target.startswith(f"{path}/") for path in asked)
        if isinstance(kind, (Overlay, ReadOnlyView)) and (above or beneath):
            found.append(operation.target)
    return tuple(found)


def _fill(shown: view.View, spec: SandboxSpec, python: Iterable[str]) -> None:
    shown.system()
    for mount in spec.mounts:
        if not os.path.exists(mount.source):
            raise SpecError(f"mount source {mount.source!r} does not exist on the host")
        if mount.target == mount.source and mount.mode == "overlay" and os.path.isdir(mount.source):
            shown.show(mount.source, writable=True)
        elif mount.mode in ("overlay", "copy") and _is_small_file(mount.source):
            shown.copy(mount.source, mount.target)
        elif mount.mode == "copy" and os.path.isdir(mount.source):
            continue  # when it is known what it lies in
        elif mount.mode == "rw" or not os.path.isdir(mount.source):
            device = stat.S_ISCHR(os.stat(mount.source).st_mode)
            shown.bind(mount.source, mount.target, writable=mount.mode == "rw", device=device)
        else:
            shown.show(mount.source, mount.target, writable=mount.mode == "overlay")
    for path in python:
        shown.environment(path)


def _copies(shown: view.View, spec: SandboxSpec) -> None:
    for mount in spec.mounts:
        if mount.mode == "copy" and os.path.isdir(mount.source) and not shown.seed(mount.source, mount.target):
            shown.show(mount.source, mount.target, writable=True)


def _is_small_file(path: str) -> bool:
    status = os.stat(path)
    return stat.S_ISREG(status.st_mode) and status.st_size <= _COPY_AT_MOST


def _fill_everything(shown: view.View) -> None:
    for name in sorted(os.listdir("/")):
        if name not in ("proc", "dev", "sys"):
            shown.show("/" + name, writable=True, owned=True)


def _writable_places(shown: view.View, env: dict[str, str]) -> None:
    """Empty directories where programs expect to write; the home directory has its name, and nothing of its content."""
    shown.private("/tmp", 0o1777)
    shown.private("/var/tmp", 0o1777)
    shown.private("/run", 0o755)
    for name in ("HOME", "TMPDIR", "TEMP", "TMP"):
        path = os.path.normpath(env.get(name, "/"))
        if path.startswith("/") and os.path.realpath(path).strip("/"):
            place = shown.follow(path) if os.path.islink(path) else path
            shown.private(place, 0o700 if name == "HOME" else 0o1777)
    if not shown.shows("/var/run"):
        shown.add(Symlink("/var/run", "/run"))


def _kernel_places(shown: view.View, spec: SandboxSpec, defences: frozenset[str]) -> None:
    masked = MASKED if not spec.nesting and "proc-masks" in defences else ()
    memory = spec.limits.memory if "proc-masks" in defences and not spec.nesting else None
    if memory is not None:
        shown.add(TextFile(_MEMORY, _meminfo(memory)))
    directories = frozenset(name for name in masked if os.path.isdir(f"/proc/{name}"))
    shown.add(Proc(masked, directories, None if memory is None else _MEMORY))
    shown.add(Directory("/dev"))
    shown.add(DevPts())
    shown.private("/dev/shm", 0o1777)
    for name in _DEVICES:
        shown.bind(f"/dev/{name}", f"/dev/{name}", device=True)
    for name, to in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"),
                     ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")):  # fmt: skip
        shown.add(Symlink(f"/dev/{name}", to))
    if os.path.isdir("/sys/devices/system/cpu"):
        shown.bind("/sys/devices/system/cpu", "/sys/devices/system/cpu")  # how many processors: OpenBLAS, glibc, …
    for name in ("power_supply", "thermal", "hwmon"):
        shown.add(Directory(f"/sys/class/{name}"))  # empty: who asks for batteries, say, fails where there is no such place


def _meminfo(limit: int) -> str:
    """What programs size themselves by (proc_meminfo(5)). What is free is not followed."""
    total = min(limit, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) >> 10
    values = {"MemTotal": total, "MemFree": total, "MemAvailable": total}
    values |= dict.fromkeys("Buffers Cached Active Inactive SwapTotal SwapFree Shmem Slab SReclaimable".split(), 0)
    return "".join(f"{name + ':':<16}{value:>8} kB\n" for name, value in values.items())


def _name_resolution(shown: view.View) -> None:
    """/etc/resolv.conf is often a link into /run, which is not shown."""
    real = os.path.realpath("/etc/resolv.conf")
    if not shown.shows(real) and os.path.isfile(real):
        with open(real, encoding="utf-8", errors="replace") as file:
            shown.add(TextFile(real, file.read()))


# What the kernel counts for all processes of a user together, in all of its namespaces (ucounts, kernel/ucount.c): a sandbox
# gets a part, and cannot take it all from the host's programs.
_COUNTED: Final = (
    (resource.RLIMIT_NOFILE, 1 << 16),  # as many descriptors may be in flight, by unix sockets
    (resource.RLIMIT_SIGPENDING, 4096),  # timers are counted, too
    (resource.RLIMIT_MEMLOCK, 4 << 20),
)


def _enforcement(
    limits: Limits, counted: tuple[tuple[int, int], ...]
) -> tuple[Hierarchy | None, tuple[tuple[int, int], ...], bool]:
    """By what each limit is held: (cgroups, rlimits, the supervisor watches memory). Raises FeatureMissing."""
    # Where `core_pattern` is a pipe, the host's handler gets each dump, as the host's root, whatever the limit; but for the
    # one value that the kernel takes for a handler's own (core(5), fs/coredump.c).
    rlimits = [(resource.RLIMIT_CORE, 1), *counted]
    if limits.pids is not None:
        # Counted per user namespace since Linux 5.14, and so for this sandbox alone. Cheaper than a cgroup, and as strict.
        rlimits.append((resource.RLIMIT_NPROC, limits.pids))
    memory = None if limits.watched else limits.memory
    wanted = {name for name, value in (("memory", memory), ("cpu", limits.cpus)) if value is not None}
    hierarchy = Hierarchy.find() if wanted else None
    if hierarchy is not None and not all(hierarchy.can(name) for name in wanted):
        hierarchy = None
    if hierarchy is not None or not wanted:
        return hierarchy, tuple(rlimits), hierarchy is None and limits.memory is not None
    if "cpu" in wanted:
        raise FeatureMissing(
            "a cpus limit needs a cgroup with the cpu controller that this user may write; run under "
            "'systemd-run --user --scope -p Delegate=yes', or leave the limit out"
        )
    return None, tuple(rlimits), limits.memory is not None


def _usable_landlock() -> int:
    abi = syscalls.landlock_abi()
    return abi if abi >= privileges.LANDLOCK_LEAST_ABI else 0
