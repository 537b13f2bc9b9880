"""The guest's file tree, from the layers that the machine was started with to what the spec asks for.

What the guest may write lies in one tmpfs, and so counts against one limit: the upper directory of each copy-on-write
mount, and private directories such as /tmp. All else is read-only.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from isolation.backends.microvm.guest import linux
from isolation.linux import overlay_upper
from isolation.result import Change

HIDDEN = "/.isolation"  # the agent's own; mode 0700
_RW = f"{HIDDEN}/rw"
_DEV = f"{HIDDEN}/dev"
_NOBODYS = 65533
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}


class Tree:
    """Built once per machine, before anything of the guest's runs."""

    def __init__(self) -> None:
        self._uppers: list[tuple[str, str, str]] = []  # (where it is written, what it shows, what was there before)
        self._own_files: dict[str, int] = {}  # by path: descriptors, for renewal
        self._users_places: list[str] = []  # where the guest's user may make directories
        self._own: frozenset[str] = frozenset()  # what was made on the guest's behalf, and is no change of its

    def kernel_places(self) -> None:
        """/dev with harmless devices only, /proc/sys and /sys as far as programs read them."""
        os.makedirs(_DEV, exist_ok=True)
        os.chown(HIDDEN, _NOBODYS, _NOBODYS)  # the guest's programs may be root's, if without capabilities
        linux.mount("/dev", _DEV, flags=linux.MS_MOVE)
        linux.mount("dev", "/dev", "tmpfs", linux.MS_NOSUID | linux.MS_NOEXEC, "mode=755,size=64k")
        for name, (major, minor) in _DEVICES.items():
            os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
            os.chmod(f"/dev/{name}", 0o666)
        for name, to in _LINKS.items():
            os.symlink(to, f"/dev/{name}")
        os.mkdir("/dev/pts")
        linux.mount("devpts", "/dev/pts", "devpts", linux.MS_NOSUID | linux.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")
        os.mkdir("/dev/shm")
        self._private("/dev/shm", 0o1777, 0, 0)
        os.makedirs(f"{HIDDEN}/cgroup", exist_ok=True)
        linux.mount("cgroup2", f"{HIDDEN}/cgroup", "cgroup2", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        os.makedirs(f"{HIDDEN}/sys", exist_ok=True)
        linux.mount("/sys", f"{HIDDEN}/sys", flags=linux.MS_MOVE)
        cpus = "/sys/devices/system/cpu"
        os.makedirs(cpus, exist_ok=True)
        linux.mount(f"{HIDDEN}{cpus}", cpus, flags=linux.MS_BIND)
        linux.mount("", cpus, flags=linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY)

    def limit(self, size: int) -> None:
        """How many bytes may be written in all, beside what is there."""
        status = os.statvfs(HIDDEN)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        linux.mount("", HIDDEN, flags=linux.MS_REMOUNT | linux.MS_NOSUID, data=f"size={used + size}")

    def build(self, order: dict[str, Any], uid: int, gid: int) -> None:
        """Private directories first, then what lies in them. Raises OSError.

        private  [path, mode]: empty, writable directories
        kept     paths of the layers that a private directory would cover
        links    [path, to]: symbolic links
        mounts   {device, target, mode, directory}
        home     which of the private directories belongs to the guest's user
        """
        kept = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in order["kept"]]
        for path, mode in order["private"]:
            home = path == order["home"]
            self._private(path, mode, uid if home else 0, gid if home else 0)
            if home or mode & stat.S_IWOTH:
                self._users_places.append(path)
        for path, to in order["links"]:
            if not os.path.lexists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.symlink(to, path)
        for path, fd in kept:
            source = f"/proc/self/fd/{fd}"
            _make_place(path, directory=os.path.isdir(source))
            if not os.path.samestat(os.stat(path), os.stat(source)):
                linux.mount(source, path, flags=linux.MS_BIND)
            os.close(fd)
        for number, entry in enumerate(order["mounts"]):
            self._make_way(os.path.dirname(entry["target"]), uid, gid)
            self._show(number, entry["device"], entry["target"], entry["mode"], directory=entry["directory"])

    def own_file(self, path: str, text: str) -> None:
        """A file of this machine's own in place of `path`, if that exists."""
        if path not in self._own_files:
            own = f"{HIDDEN}/own{path.replace('/', '.')}"
            self._own_files[path] = os.open(own, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o444)
            os.fchmod(self._own_files[path], 0o444)
            if os.path.exists(path):
                linux.mount(own, path, flags=linux.MS_BIND)
        os.pwrite(self._own_files[path], text.encode("ascii"), 0)

    def seal(self) -> None:
        """From here on only what was made writable is.

        Nothing is mounted over a part of /proc: a new one can be mounted in a sandbox within only where this one is wholly
        visible (kernel: mount_too_revealing).
        """
        linux.mount("", "/", flags=linux.MS_REMOUNT | linux.MS_RDONLY)
        self._own = frozenset(change.path for change in self.changes())

    def changes(self) -> list[Change]:
        """What the guest wrote, sorted by path; bounded."""
        found: list[Change] = []
        store = os.open("/", os.O_PATH | os.O_DIRECTORY)
        try:
            for top, target, source in self._uppers:
                most = overlay_upper.AT_MOST - len(found)
                found += [Change(*entry) for entry in overlay_upper.walk(store, top.lstrip("/"), target, source, most=most)]
        finally:
            os.close(store)
        return sorted(change for change in found if change.path not in self._own)

    def _show(self, number: int, device: str, target: str, mode: str, *, directory: bool) -> None:
        layer = f"{HIDDEN}/mount{number}"
        os.mkdir(layer, 0o755)
        linux.mount(f"{_DEV}/{device}", layer, "squashfs", linux.MS_RDONLY | linux.MS_NODEV | linux.MS_NOSUID)
        if not directory:
            _make_place(target, directory=False)
            linux.mount(f"{layer}/file", target, flags=linux.MS_BIND)
            return
        _make_place(target, directory=True)
        lower = f"{layer}/tree"
        if mode == "ro":
            linux.mount(lower, target, flags=linux.MS_BIND)
            return
        work, top = f"{_RW}/mount{number}/work", f"{_RW}/mount{number}/upper"
        os.makedirs(work)
        os.mkdir(top)
        status = os.stat(lower)
        os.chown(top, status.st_uid, status.st_gid)
        os.chmod(top, stat.S_IMODE(status.st_mode))
        options = f"lowerdir={lower},upperdir={top},workdir={work}"
        linux.mount("overlay", target, "overlay", linux.MS_NODEV | linux.MS_NOSUID, options)
        self._uppers.append((top, target, lower))

    def _make_way(self, path: str, uid: int, gid: int) -> None:
        """Directories on the way to a mount: where the guest's user could have made them, they are the user's."""
        new = []
        while not os.path.lexists(path):
            new.append(path)
            path = os.path.dirname(path)
        users = any(path == place or path.startswith(f"{place}/") for place in self._users_places)
        for each in reversed(new):
            os.mkdir(each)
            if users:
                os.chown(each, uid, gid)

    def _private(self, path: str, mode: int, uid: int, gid: int) -> None:
        own = f"{_RW}/private{path.replace('/', '.')}"
        os.mkdir(own)
        os.chown(own, uid, gid)
        os.chmod(own, mode)
        _make_place(path, directory=True)
        linux.mount(own, path, flags=linux.MS_BIND)
        self._uppers.append((own, path, ""))


def _make_place(path: str, *, directory: bool) -> None:
    if os.path.lexists(path):
        return
    os.makedirs(path if directory else os.path.dirname(path), exist_ok=True)
    if not directory:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o444))
