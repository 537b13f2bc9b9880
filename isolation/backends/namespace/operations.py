"""The steps that build a sandbox's root file tree. Each is data: it can be printed, compared, and executed.

They run in PID 1 of the new sandbox, as root of its user namespace, after the first pivot_root (tree.py): `/` is the
*store*, a tmpfs of the sandbox's own; the host's tree stands at /old; the new root grows in /new. Everything that the
guest writes lands in the store: in /layers/N (the uppers of overlays) or /private/N (plain directories).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from isolation.backends.namespace import syscalls

OLD = "/old"
NEW = "/new"
LAYERS = "/layers"
PRIVATE = "/private"
EMPTY = "/empty"

# `userxattr` is what lets a user namespace keep whiteouts and opaque marks; the others say what follows from it anyway
# and keep the kernel log quiet (kernel: Documentation/filesystems/overlayfs.rst). `volatile` skips pointless syncs.
_OVERLAY = "userxattr,index=off,metacopy=off,xino=off"


class Operation:
    """One step. `target` is the absolute path inside that it makes."""

    target: str

    def execute(self) -> None:
        """Do it. Raises OSError."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for `isolation run --explain`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Directory(Operation):
    """An empty directory of the root itself: read-only once the root is sealed."""

    target: str
    mode: int = 0o755

    def execute(self) -> None:
        make_directory(NEW + self.target, self.mode)

    def describe(self) -> str:
        return f"dir      {self.target}"


@dataclass(frozen=True)
class Symlink(Operation):
    """A symbolic link, as it stands on the host."""

    target: str
    to: str

    def execute(self) -> None:
        make_directory(os.path.dirname(NEW + self.target))
        os.symlink(self.to, NEW + self.target)

    def describe(self) -> str:
        return f"symlink  {self.target} -> {self.to}"


@dataclass(frozen=True)
class TextFile(Operation):
    """A small file with content of our own."""

    target: str
    text: str

    def execute(self) -> None:
        make_directory(os.path.dirname(NEW + self.target))
        with open(NEW + self.target, "w", encoding="utf-8") as file:
            file.write(self.text)

    def describe(self) -> str:
        return f"file     {self.target} ({len(self.text)} bytes)"


@dataclass(frozen=True)
class Private(Operation):
    """An empty, writable directory in the store."""

    target: str
    number: int
    mode: int = 0o755

    def execute(self) -> None:
        source = f"{PRIVATE}/{self.number}"
        os.mkdir(source)
        os.chmod(source, self.mode)
        make_directory(NEW + self.target)
        syscalls.mount(source, NEW + self.target, "", syscalls.MS_BIND)

    def describe(self) -> str:
        return f"private  {self.target} (empty, writable, discarded)"


@dataclass(frozen=True)
class Overlay(Operation):
    """A host directory, copy-on-write. `lower` is where it stands for PID 1, `source` where it is on the host.

    An overlay also cuts what a read-only bind lets through: a unix socket or FIFO of the lower tree is another,
    dead inode here.
    """

    target: str
    source: str
    lower: str
    number: int
    writable: bool = True

    def execute(self) -> None:
        make_directory(NEW + self.target)
        lower = _escape(self.lower)
        if not self.writable:
            syscalls.mount("overlay", NEW + self.target, "overlay", 0, f"lowerdir={EMPTY}:{lower},{_OVERLAY}")
            return
        layer = f"{LAYERS}/{self.number}"
        os.mkdir(layer)
        os.mkdir(layer + "/work")
        os.mkdir(layer + "/upper")
        self._copy_owner(layer + "/upper")
        data = f"lowerdir={lower},upperdir={layer}/upper,workdir={layer}/work,{_OVERLAY},volatile"
        syscalls.mount("overlay", NEW + self.target, "overlay", syscalls.MS_NODEV | syscalls.MS_NOSUID, data)

    def _copy_owner(self, upper: str) -> None:
        """The merged root directory shows the upper's own mode and times, which must be the lower's."""
        status = os.stat(self.lower)
        os.chmod(upper, stat.S_IMODE(status.st_mode))
        os.utime(upper, ns=(status.st_atime_ns, status.st_mtime_ns))
        try:
            os.chown(upper, status.st_uid, status.st_gid)
        except OSError:
            # An owner that the user namespace does not map. The guest must not own, and so be able to write,
            # what it could not write on the host: the directory becomes read-only where others could not write.
            if not status.st_mode & 0o002:
                os.chmod(upper, stat.S_IMODE(status.st_mode) & 0o555)

    def describe(self) -> str:
        where = self.target if self.source == self.target else f"{self.target} <- {self.source}"
        return f"overlay  {where} ({'copy-on-write' if self.writable else 'read-only'})"


@dataclass(frozen=True)
class Bind(Operation):
    """A host file or directory itself; read-only unless `writable`, where the guest's writes reach the host."""

    target: str
    source: str
    lower: str
    directory: bool
    writable: bool = False
    device: bool = False

    def execute(self) -> None:
        path = NEW + self.target
        if self.directory:
            make_directory(path)
        else:
            make_directory(os.path.dirname(path))
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        fd = syscalls.open_tree(self.lower, syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE | os.O_CLOEXEC)
        attributes = syscalls.MOUNT_ATTR_NOSUID
        if not self.device:
            attributes |= syscalls.MOUNT_ATTR_NODEV | (0 if self.writable else syscalls.MOUNT_ATTR_RDONLY)
        syscalls.mount_setattr(fd, attributes, recursive=True)
        syscalls.move_mount(fd, path)
        os.close(fd)

    def describe(self) -> str:
        where = self.target if self.source == self.target else f"{self.target} <- {self.source}"
        kind = "device" if self.device else "writable: reaches the host" if self.writable else "read-only"
        return f"bind     {where} ({kind})"


@dataclass(frozen=True)
class CopiedFile(Operation):
    """A small host file, copied: for directories that must be shown entry by entry."""

    target: str
    lower: str

    def execute(self) -> None:
        path = NEW + self.target
        make_directory(os.path.dirname(path))
        with open(self.lower, "rb") as source, open(path, "wb") as copy:
            copy.write(source.read())
            os.fchmod(copy.fileno(), stat.S_IMODE(os.fstat(source.fileno()).st_mode) & 0o777)

    def describe(self) -> str:
        return f"copy     {self.target}"


@dataclass(frozen=True)
class Proc(Operation):
    """A fresh /proc of the new PID namespace, without what tells of the host or its keys."""

    masked: tuple[str, ...]
    target: str = "/proc"

    def execute(self) -> None:
        make_directory(NEW + self.target)
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
        syscalls.mount("proc", NEW + self.target, "proc", flags)
        for name in self.masked:
            path = f"{NEW}{self.target}/{name}"
            if os.path.isdir(path):
                syscalls.mount(EMPTY, path, "", syscalls.MS_BIND)
            elif os.path.exists(path):
                syscalls.mount(f"{NEW}/dev/null", path, "", syscalls.MS_BIND)

    def describe(self) -> str:
        return f"proc     {self.target} (masked: {', '.join(self.masked) or 'nothing'})"


@dataclass(frozen=True)
class DevPts(Operation):
    """A devpts instance of the sandbox's own: no terminal of the host is in it."""

    target: str = "/dev/pts"

    def execute(self) -> None:
        make_directory(NEW + self.target)
        flags = syscalls.MS_NOSUID | syscalls.MS_NOEXEC
        syscalls.mount("devpts", NEW + self.target, "devpts", flags, "newinstance,ptmxmode=0666,mode=620")

    def describe(self) -> str:
        return f"devpts   {self.target} (new instance)"


def make_directory(path: str, mode: int = 0o755) -> None:
    """mkdir -p, without the stat calls of `os.makedirs` where the directory exists."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        pass
    except FileNotFoundError:
        make_directory(os.path.dirname(path))
        os.mkdir(path, mode)


def _escape(path: str) -> str:
    """A path as overlayfs reads it in its option string: backslash, colon and comma escaped."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
