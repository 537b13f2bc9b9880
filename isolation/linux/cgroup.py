"""Limits and accounts of a whole sandbox, through cgroup v2 (a delegated subtree) or cgroup v1 (cgroups(7)).

A cgroup is named after the supervisor that made it, so that whoever comes later can tell, and clear away, what the death of
both host and supervisor left behind.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass

from isolation.plain import os, time

_NAME = re.compile(r"isolation-(\d+)-(\d+)")
_CONTROLLERS = ("memory", "cpu", "cpuacct")
_PERIOD = 100_000  # µs; the kernel's default accounting period


@dataclass(frozen=True)
class Hierarchy:
    """Where this process may make cgroups: for each usable controller its directory."""

    version: int
    parents: dict[str, str]

    @classmethod
    def find(cls, proc_cgroup: str = "/proc/self/cgroup", mountinfo: str = "/proc/self/mountinfo") -> Hierarchy:
        """Look, and change nothing. An empty `parents` means: no cgroups for this user here."""
        mounts = _mounts(mountinfo)
        with open(proc_cgroup, encoding="utf-8") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
        first: dict[str, str] = {}
        for number, names, path in lines:
            for name in [""] if number == "0" else names.split(","):
                if name in mounts and (name in _CONTROLLERS or name == ""):
                    directory = mounts[name] + ("" if path == "/" else path)
                    if os.access(directory, os.W_OK):
                        first[name] = directory
        unified = first.pop("", None)
        if first:
            return cls(1, first)
        if unified is None:
            return cls(2, {})
        available = _read(unified + "/cgroup.controllers").split()
        return cls(2, {name: unified for name in _CONTROLLERS if name in available})

    def can(self, controller: str) -> bool:
        return controller in self.parents

    def subtree(self) -> Hierarchy:
        """A cgroup of this process's own, to make others in. Needs the rights of whoever may write the hierarchy;
        what is made in it later needs only this process's user id. Raises OSError."""
        if self.version == 2:
            _delegate(self.parents)
        name = f"isolation-{os.getpid()}-{_start_time(os.getpid())}"
        parents = {controller: f"{parent}/{name}" for controller, parent in self.parents.items()}
        for path in set(parents.values()):
            os.mkdir(path, 0o755)
        if self.version == 2:
            _delegate(parents)
        return Hierarchy(self.version, parents)

    def create(self, number: int, *, memory: int | None, cpus: float | None) -> Cgroup:
        """A cgroup for one sandbox, limited to `memory` bytes and to `cpus` processors. Raises OSError."""
        group = Cgroup(self.version, {controller: f"{parent}/{number}" for controller, parent in self.parents.items()})
        try:
            for path in set(group.paths.values()):
                os.mkdir(path, 0o755)
            group.apply(memory=memory, cpus=cpus)
        except OSError:
            group.remove()
            raise
        return group

    def remove(self) -> None:
        """Remove a subtree, whose sandboxes are gone; those of a supervisor that was killed are still in it."""
        for path in set(self.parents.values()):
            with contextlib.suppress(OSError):
                for entry in os.scandir(path):
                    if entry.is_dir(follow_symlinks=False):
                        Cgroup(self.version, {"": entry.path}).remove()
        Cgroup(self.version, self.parents).remove()

    def sweep(self) -> None:
        """Remove the cgroups of supervisors that are no more."""
        for parent in set(self.parents.values()):
            with contextlib.suppress(OSError):
                for name in os.listdir(parent):
                    match = _NAME.fullmatch(name)
                    if match and _start_time(int(match[1])) != match[2]:
                        _remove_tree(f"{parent}/{name}")


class Cgroup:
    """One sandbox's."""

    def __init__(self, version: int, paths: dict[str, str]) -> None:
        self.version = version
        self.paths = paths

    def apply(self, *, memory: int | None, cpus: float | None) -> None:
        if memory is not None:
            if self.version == 2:
                self._write("memory", "memory.max", memory)
                self._write("memory", "memory.swap.max", 0, optional=True)
                self._write("memory", "memory.oom.group", 1, optional=True)
            else:
                self._write("memory", "memory.limit_in_bytes", memory)
                self._write("memory", "memory.memsw.limit_in_bytes", memory, optional=True)
                # What waits in TCP's buffers is counted apart there (cgroup-v1/memory.rst, 2.7.2).
                self._write("memory", "memory.kmem.tcp.limit_in_bytes", memory, optional=True)
        if cpus is not None:
            quota = max(1000, int(cpus * _PERIOD))
            if self.version == 2:
                self._write("cpu", "cpu.max", f"{quota} {_PERIOD}")
            else:
                self._write("cpu", "cpu.cfs_period_us", _PERIOD)
                self._write("cpu", "cpu.cfs_quota_us", quota)

    def add(self, pid: int) -> None:
        """Move a process in; its children follow."""
        for path in set(self.paths.values()):
            _write_file(f"{path}/cgroup.procs", str(pid))

    def open_memory_files(self) -> tuple[int, int] | None:
        """Descriptors of the files that tell memory in use and out-of-memory kills; None without the controller."""
        if "memory" not in self.paths:
            return None
        path = self.paths["memory"]
        names = (
            ("memory.current", "memory.events")
            if self.version == 2
            else (
                "memory.usage_in_bytes",
                "memory.oom_control",
            )
        )
        use, events = (os.open(f"{path}/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in names)
        return use, events

    def accounts(self) -> dict[str, float]:
        """What was used so far: cpu_user and cpu_system (seconds), memory_peak (bytes), oom_kills; what is known of it."""
        found: dict[str, float] = {}
        if "memory" in self.paths:
            path = self.paths["memory"]
            peak = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
            with contextlib.suppress(OSError, ValueError):
                found["memory_peak"] = int(_read(f"{path}/{peak}"))
            events = "memory.events" if self.version == 2 else "memory.oom_control"
            with contextlib.suppress(OSError):
                found["oom_kills"] = oom_kills(_read(f"{path}/{events}"))
        with contextlib.suppress(OSError, ValueError, KeyError):
            if self.version == 2:
                stat = _pairs(_read(self.paths["cpu"] + "/cpu.stat"))
                found["cpu_user"], found["cpu_system"] = stat["user_usec"] / 1e6, stat["system_usec"] / 1e6
            else:
                stat = _pairs(_read(self.paths["cpuacct"] + "/cpuacct.stat"))
                ticks = os.sysconf("SC_CLK_TCK")
                found["cpu_user"], found["cpu_system"] = stat["user"] / ticks, stat["system"] / ticks
        return found

    def remove(self) -> None:
        """Remove it. Its processes must have ended; the kernel may need a moment to notice that they have."""
        for path in set(self.paths.values()):
            for attempt in range(50):
                try:
                    os.rmdir(path)
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.001 * (attempt + 1))
                else:
                    break

    def _write(self, controller: str, file: str, value: object, *, optional: bool = False) -> None:
        path = f"{self.paths[controller]}/{file}"
        if optional and not os.path.exists(path):
            return
        _write_file(path, str(value))


def _remove_tree(path: str) -> None:
    with contextlib.suppress(OSError):
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                os.rmdir(entry.path)
        os.rmdir(path)


def oom_kills(events: str) -> int:
    """The counter in memory.events (v2) or memory.oom_control (v1, since Linux 4.13)."""
    return _pairs(events).get("oom_kill", 0)


def _delegate(parents: dict[str, str]) -> None:
    """v2: children get a controller only when their parent passes it on, and a cgroup with processes of its own may
    not ("no internal processes", cgroups(7)): then this process moves to a leaf of its own first."""
    (directory,) = set(parents.values())
    missing = set(parents) - set(_read(directory + "/cgroup.subtree_control").split()) - {"cpuacct"}
    if not missing:
        return
    wanted = " ".join(f"+{name}" for name in sorted(missing))
    try:
        _write_file(directory + "/cgroup.subtree_control", wanted)
    except OSError:
        leaf = directory + "/isolation-host"
        os.makedirs(leaf, exist_ok=True)
        for pid in _read(directory + "/cgroup.procs").split():
            _write_file(leaf + "/cgroup.procs", pid)
        _write_file(directory + "/cgroup.subtree_control", wanted)


def _mounts(mountinfo: str) -> dict[str, str]:
    """Mount points by v1 controller; the v2 hierarchy has the name ""."""
    found: dict[str, str] = {}
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.rstrip("\n").partition(" - ")
            fstype, _, options = after.split(" ", 2)
            root, path = before.split(" ")[3:5]
            if root != "/":
                continue  # a part of the hierarchy, bound here: paths from /proc/self/cgroup do not fit it
            if fstype == "cgroup2":
                found[""] = path
            elif fstype == "cgroup":
                found.update(dict.fromkeys(set(options.split(",")) & set(_CONTROLLERS), path))
    return found


def _start_time(pid: int) -> str:
    """Field 22 of /proc/PID/stat: tells a process from a later one of the same number; "" when there is none."""
    try:
        return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _pairs(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split(" ", 1) for line in text.splitlines() if " " in line)}


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def _write_file(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
