"""The steps that build a sandbox's root file tree. Each is data: it can be printed, compared, and executed.

They come in two kinds. The *base* is what never changes: read-only views of the host. It is built once for a template,
in /new while the host's tree stands at /old, and every fork starts with a copy of the finished mount namespace. The
*fresh* part is what a guest writes to; it is made anew in each sandbox, whose root is then already `/`. Everything
written lands in the *store*, a tmpfs of the sandbox's own: in layers/N (the uppers of overlays) or private/N.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from isolation.backends.namespace import syscalls

OLD = "/old"
NEW = "/new"
HIDDEN = "/.isolation"  # covered before anything of the guest's runs
EMPTY = HIDDEN + "/empty"
BASE = HIDDEN + "/base"
LOWER = HIDDEN + "/lower"
STORE = HIDDEN + "/store"
PROC = HIDDEN + "/proc"
LAYERS = "/layers"
PRIVATE = "/private"

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
    """Base: an empty directory of the root itself, read-only once the root is sealed."""

    target: str
    mode: int = 0o755

    def execute(self) -> None:
        make_directory(NEW + self.target, self.mode)

    def describe(self) -> str:
        return f"dir      {self.target}"


@dataclass(frozen=True)
class Symlink(Operation):
    """Base: a symbolic link, as it stands on the host."""

    target: str
    to: str

    def execute(self) -> None:
        make_directory(os.path.dirname(NEW + self.target))
        os.symlink(self.to, NEW + self.target)

    def describe(self) -> str:
        return f"symlink  {self.target} -> {self.to}"


@dataclass(frozen=True)
class TextFile(Operation):
    """Base: a small file with content of our own."""

    target: str
    text: str

    def execute(self) -> None:
        make_directory(os.path.dirname(NEW + self.target))
        with open(NEW + self.target, "w", encoding="utf-8") as file:
            file.write(self.text)

    def describe(self) -> str:
        return f"file     {self.target} ({len(self.text)} bytes)"


@dataclass(frozen=True)
class View(Operation):
    """Base: a host directory, read-only. `lower` is where it stands now, `source` where it is on the host.

    An overlay without an upper, not a bind: that also cuts what a read-only bind lets through. A unix socket or FIFO of
    the lower tree is another, dead inode here.
    """

    target: str
    source: str
    lower: str

    def execute(self) -> None:
        make_directory(NEW + self.target)
        data = f"lowerdir={NEW}{EMPTY}:{_escape(self.lower)},{_OVERLAY}"
        syscalls.mount("overlay", NEW + self.target, "overlay", syscalls.MS_NODEV | syscalls.MS_NOSUID, data)

    def describe(self) -> str:
        return f"view     {_from(self.target, self.source)} (read-only)"


@dataclass(frozen=True)
class Bind(Operation):
    """Base: a host file or directory itself; read-only unless `writable`, where the guest's writes reach the host."""

    target: str
    source: str
    lower: str
    directory: bool
    writable: bool = False
    device: bool = False

    def execute(self) -> None:
        path = NEW + self.target
        make_mount_point(path, directory=self.directory)
        fd = syscalls.open_tree(self.lower, syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE | os.O_CLOEXEC)
        attributes = syscalls.MOUNT_ATTR_NOSUID
        if not self.device:
            attributes |= syscalls.MOUNT_ATTR_NODEV | (0 if self.writable else syscalls.MOUNT_ATTR_RDONLY)
        syscalls.mount_setattr(fd, attributes, recursive=True)
        syscalls.move_mount(fd, path)
        os.close(fd)

    def describe(self) -> str:
        kind = "device" if self.device else "writable: reaches the host" if self.writable else "read-only"
        return f"bind     {_from(self.target, self.source)} ({kind})"


@dataclass(frozen=True)
class Lower(Operation):
    """Base: the lower layer of an overlay that each sandbox makes; out of the guest's sight."""

    target: str
    lower: str

    def execute(self) -> None:
        make_directory(NEW + self.target)
        syscalls.mount(self.lower, NEW + self.target, "", syscalls.MS_BIND)

    def describe(self) -> str:
        return f"lower    {self.target}"


@dataclass(frozen=True)
class Private(Operation):
    """Fresh: an empty, writable directory in the store."""

    target: str
    number: int
    mode: int = 0o755

    def execute(self) -> None:
        source = f"{STORE}{PRIVATE}/{self.number}"
        os.mkdir(source)
        os.chmod(source, self.mode)
        make_directory(self.target)
        syscalls.mount(source, self.target, "", syscalls.MS_BIND)

    def describe(self) -> str:
        return f"private  {self.target} (empty, writable, discarded)"


@dataclass(frozen=True)
class Overlay(Operation):
    """Fresh: a host directory, copy-on-write."""

    target: str
    source: str
    number: int

    @property
    def lower(self) -> str:
        """Where its `Lower` is."""
        return f"{LOWER}/{self.number}"

    def execute(self) -> None:
        make_directory(self.target)
        layer = f"{STORE}{LAYERS}/{self.number}"
        os.mkdir(layer)
        os.mkdir(layer + "/work")
        os.mkdir(layer + "/upper")
        self._copy_owner(layer + "/upper")
        data = f"lowerdir={self.lower},upperdir={layer}/upper,workdir={layer}/work,{_OVERLAY},volatile"
        syscalls.mount("overlay", self.target, "overlay", syscalls.MS_NODEV | syscalls.MS_NOSUID, data)

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
        return f"overlay  {_from(self.target, self.source)} (copy-on-write)"


@dataclass(frozen=True)
class Rebind(Operation):
    """Fresh: a part of the base that lies beneath something fresh, bound there."""

    target: str
    base: str
    directory: bool
    shows: Operation

    def execute(self) -> None:
        make_mount_point(self.target, directory=self.directory)
        syscalls.mount(self.base, self.target, "", syscalls.MS_BIND | syscalls.MS_REC)

    def describe(self) -> str:
        return self.shows.describe()


@dataclass(frozen=True)
class CopiedFile(Operation):
    """Fresh: a small host file, copied; for directories that must be shown entry by entry."""

    target: str
    base: str

    def execute(self) -> None:
        with open(self.base, "rb") as source, open(self.target, "wb") as copy:
            copy.write(source.read())
            os.fchmod(copy.fileno(), stat.S_IMODE(os.fstat(source.fileno()).st_mode) & 0o777)

    def describe(self) -> str:
        return f"copy     {self.target}"


@dataclass(frozen=True)
class FreshSymlink(Operation):
    """Fresh: a symbolic link inside something fresh."""

    target: str
    to: str

    def execute(self) -> None:
        make_directory(os.path.dirname(self.target))
        os.symlink(self.to, self.target)

    def describe(self) -> str:
        return f"symlink  {self.target} -> {self.to}"


@dataclass(frozen=True)
class Proc(Operation):
    """Fresh: a /proc of the new PID namespace, without what tells of the host or its keys."""

    masked: tuple[str, ...]
    target: str = "/proc"

    def execute(self) -> None:
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
        syscalls.mount("proc", self.target, "proc", flags)
        for name in self.masked:
            path = f"{self.target}/{name}"
            if os.path.isdir(path):
                syscalls.mount(EMPTY, path, "", syscalls.MS_BIND)
            elif os.path.exists(path):
                syscalls.mount("/dev/null", path, "", syscalls.MS_BIND)

    def describe(self) -> str:
        return f"proc     {self.target} (masked: {', '.join(self.masked) or 'nothing'})"


@dataclass(frozen=True)
class DevPts(Operation):
    """Fresh: a devpts instance of the sandbox's own: no terminal of the host is in it."""

    target: str = "/dev/pts"

    def execute(self) -> None:
        flags = syscalls.MS_NOSUID | syscalls.MS_NOEXEC
        syscalls.mount("devpts", self.target, "devpts", flags, "newinstance,ptmxmode=0666,mode=620")

    def describe(self) -> str:
        return f"devpts   {self.target} (new instance)"


FRESH = (Private, Overlay, Rebind, CopiedFile, FreshSymlink, Proc, DevPts)


def make_directory(path: str, mode: int = 0o755) -> None:
    """mkdir -p, without the stat calls of `os.makedirs` where the directory exists."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        pass
    except OSError:
        if os.path.isdir(path):  # on a read-only mount
            return
        make_directory(os.path.dirname(path))
        os.mkdir(path, mode)


def make_mount_point(path: str, *, directory: bool) -> None:
    """A directory or an empty file to mount something on."""
    if directory:
        make_directory(path)
    elif not os.path.lexists(path):
        make_directory(os.path.dirname(path))
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))


def _from(target: str, source: str) -> str:
    return target if source == target else f"{target} <- {source}"


def _escape(path: str) -> str:
    """A path as overlayfs reads it in its option string: backslash, colon and comma escaped."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
