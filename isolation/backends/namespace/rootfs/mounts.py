"""The steps that build a sandbox's root file tree. Each is data: it can be printed, compared, and executed.

They come in two kinds. The *base* is what never changes: read-only views of the host. It is built once for a template,
in /new while the host's tree stands at /old, and every fork starts with a copy of the finished mount namespace. The
*fresh* part is what a guest writes to; it is made anew in each sandbox, whose root is then already `/`. Everything
written lands in the *store*, a tmpfs of the sandbox's own: in layers/N (the uppers of overlays) or private/N. It is
written down as a script of system calls (syscall_script.py), which every fork then runs.

A fork of a fork starts with a copy of the mount namespace of the template above it, and makes its fresh part on top: what
was an empty directory there is an overlay over what the template has put into it, and an overlay has the template's upper
as its first lower layer. The stack of layers stays flat, since the kernel stacks overlays themselves two deep at most.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

from isolation.linux import syscalls
from isolation.linux.syscall_script import SyscallScript
from isolation.plain import os

OLD_ROOT = "/old"
NEW_ROOT = "/new"
HIDDEN = "/.isolation"  # covered before anything of the guest's runs
EMPTY = HIDDEN + "/empty"
BASE = HIDDEN + "/base"
LOWER = HIDDEN + "/lower"
ADOPTED = HIDDEN + "/adopted"
STORE = HIDDEN + "/store"
PROC = HIDDEN + "/proc"
DEEPEST = 6  # levels of templates and forks below the host, and so stores in one mount namespace
LAYERS = "/layers"
PRIVATE = "/private"
KEPT = "/kept"  # layers of sandboxes whose files were kept once: remount.py

# `userxattr` is what lets a user namespace keep whiteouts and opaque marks; the others say what follows from it anyway
# and keep the kernel log quiet (kernel: Documentation/filesystems/overlayfs.rst). `volatile` skips pointless syncs.
_OVERLAY = "userxattr,index=off,metacopy=off,xino=off"
_COPY_AT_MOST = 1 << 30


def store_of(level: int) -> str:
    """Where the store of a sandbox is mounted that is `level` forks away from the host."""
    return STORE if level == 1 else f"{STORE}{level}"


def upper_of(store: str, layer: str) -> str:
    """Where a store has an overlay's own layer."""
    return f"{store}{LAYERS}/{layer}/upper"


def adopted(number: int) -> str:
    """Where the layer is, for an overlay that has one, of what the guest could not write otherwise (adoption.py)."""
    return f"{ADOPTED}/{number}"


@dataclass
class Ground:
    """What fresh operations are written onto.

    level   1 for a fork of the host's memory; 2 for a fork of that; …
    made    directories that the steps before have seen to
    """

    level: int = 1
    made: set[str] = field(default_factory=set)

    @property
    def store(self) -> str:
        """The store of what is being made."""
        return store_of(self.level)

    def stores_above(self) -> list[str]:
        """Those of the templates above it, the nearest first."""
        return [store_of(level) for level in range(self.level - 1, 0, -1)]

    def upper(self, layer: str) -> str:
        """Where an overlay's own layer is."""
        return upper_of(self.store, layer)


class Operation:
    """One step. `target` is the absolute path inside that it makes."""

    target: str

    def describe(self) -> str:
        """One line for `isolation run --explain`."""
        raise NotImplementedError


class BaseOperation(Operation):
    """A step of the base."""

    def execute(self) -> None:
        """Do it. Raises OSError."""
        raise NotImplementedError


class FreshOperation(Operation):
    """A step of the fresh part."""

    def write(self, script: SyscallScript, ground: Ground) -> None:
        """Write it down."""
        raise NotImplementedError


@dataclass(frozen=True)
class Directory(BaseOperation):
    """Base: an empty directory of the root itself, read-only once the root is sealed."""

    target: str
    mode: int = 0o755

    def execute(self) -> None:
        make_directory(NEW_ROOT + self.target, self.mode)

    def describe(self) -> str:
        return f"dir      {self.target}"


@dataclass(frozen=True)
class Symlink(BaseOperation):
    """Base: a symbolic link, as it stands on the host."""

    target: str
    to: str

    def execute(self) -> None:
        make_directory(os.path.dirname(NEW_ROOT + self.target))
        os.symlink(self.to, NEW_ROOT + self.target)

    def describe(self) -> str:
        return f"symlink  {self.target} -> {self.to}"


@dataclass(frozen=True)
class TextFile(BaseOperation):
    """Base: a small file with content of our own."""

    target: str
    text: str

    def execute(self) -> None:
        make_directory(os.path.dirname(NEW_ROOT + self.target))
        with open(NEW_ROOT + self.target, "w", encoding="utf-8") as file:
            file.write(self.text)

    def describe(self) -> str:
        return f"file     {self.target} ({len(self.text)} bytes)"


@dataclass(frozen=True)
class ReadOnlyView(BaseOperation):
    """Base: a host directory, read-only. `lower` is where it stands now, `source` where it is on the host.

    An overlay without an upper, not a bind: that also cuts what a read-only bind lets through. A unix socket or FIFO of
    the lower tree is another, dead inode here.
    """

    target: str
    source: str
    lower: str

    def execute(self) -> None:
        make_directory(NEW_ROOT + self.target)
        data = overlay_view(NEW_ROOT + EMPTY, _escape(self.lower))
        syscalls.mount("overlay", NEW_ROOT + self.target, "overlay", syscalls.MS_NODEV | syscalls.MS_NOSUID, data)

    def describe(self) -> str:
        return f"view     {_from(self.target, self.source)} (read-only)"


@dataclass(frozen=True)
class Bind(BaseOperation):
    """Base: a host file or directory itself; read-only unless `writable`, where the guest's writes reach the host.

    With `by_view`, a place for a view of its directory, a file is that of the view: not the host's inode, whose locks and
    leases (fcntl(2), F_SETLEASE) hold up the host's programs.
    """

    target: str
    source: str
    lower: str
    directory: bool
    writable: bool = False
    device: bool = False
    by_view: str | None = None

    def execute(self) -> None:
        path = NEW_ROOT + self.target
        make_mount_point(path, directory=self.directory)
        flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE | os.O_CLOEXEC
        fd = syscalls.open_tree(self._of_view() or self.lower, flags)
        attributes = syscalls.MOUNT_ATTR_NOSUID | (0 if self.writable else syscalls.MOUNT_ATTR_RDONLY)
        if not self.device:  # which a read-only mount keeps nobody from writing to; but its times are the host's
            attributes |= syscalls.MOUNT_ATTR_NODEV
        syscalls.mount_setattr(fd, attributes, recursive=True)
        syscalls.move_mount(fd, path)
        os.close(fd)

    def _of_view(self) -> str | None:
        """Where the view has it; None where there is none, or mounts below the directory forbid one (view.py, _split)."""
        if self.by_view is None:
            return None
        directory, name = os.path.split(self.lower)
        try:
            ReadOnlyView(self.by_view, "", directory).execute()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None
        return os.path.join(NEW_ROOT + self.by_view, name)

    def describe(self) -> str:
        kind = "device" if self.device else "writable: reaches the host" if self.writable else "read-only"
        return f"bind     {_from(self.target, self.source)} ({kind})"


@dataclass(frozen=True)
class Lower(BaseOperation):
    """Base: the lower layer of an overlay that each sandbox makes; out of the guest's sight."""

    target: str
    lower: str

    def execute(self) -> None:
        make_directory(NEW_ROOT + self.target)
        fd = syscalls.open_tree(self.lower, syscalls.OPEN_TREE_CLONE | os.O_CLOEXEC)
        syscalls.mount_setattr(fd, syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV)
        syscalls.move_mount(fd, NEW_ROOT + self.target)
        os.close(fd)

    def describe(self) -> str:
        return f"lower    {self.target}"


@dataclass(frozen=True)
class Private(FreshOperation):
    """Fresh: an empty, writable directory in the store."""

    target: str
    number: int
    mode: int = 0o755

    @property
    def layer(self) -> str:
        """The name of what it is in the layers above the first."""
        return f"private{self.number}"

    def beneath(self, ground: Ground) -> list[str]:
        """Where what the templates above have put into it is, the uppermost first. The first of them has no overlay."""
        if ground.level == 1:
            return []
        *stores, first = ground.stores_above()
        return [*(upper_of(store, self.layer) for store in stores), f"{first}{PRIVATE}/{self.number}"]

    def write(self, script: SyscallScript, ground: Ground) -> None:
        if ground.level > 1:
            write_overlay(script, self, ground, self.layer, self.beneath(ground))
            return
        source = f"{ground.store}{PRIVATE}/{self.number}"
        script.call("mkdirat", syscalls.AT_FDCWD, source, self.mode, about=self.describe())
        write_directory(script, self.target, ground.made)
        write_mount(script, self, source, self.target, "", syscalls.MS_BIND)
        _cover(self.target, ground.made)

    def describe(self) -> str:
        return f"private  {self.target} (empty, writable, discarded)"


@dataclass(frozen=True)
class Overlay(FreshOperation):
    """Fresh: a host directory, copy-on-write."""

    target: str
    source: str
    number: int
    foreign_mode: int | None = None  # of its root, where the owner has no id inside; else as it is on the host
    adopts: bool = False  # there is a layer of such owners' files above its lower one (adoption.py)

    @property
    def lower(self) -> str:
        """Where its `Lower` is."""
        return f"{LOWER}/{self.number}"

    @property
    def lowers(self) -> list[str]:
        """What is there before anybody writes, the uppermost first."""
        return [adopted(self.number), self.lower] if self.adopts else [self.lower]

    @property
    def layer(self) -> str:
        """The name of what it is in each layer."""
        return str(self.number)

    def beneath(self, ground: Ground) -> list[str]:
        """Its lower layers, the uppermost first."""
        return [*(upper_of(store, self.layer) for store in ground.stores_above()), *self.lowers]

    def write(self, script: SyscallScript, ground: Ground) -> None:
        foreign_mode = self.foreign_mode if ground.level == 1 else None  # what is above has one that may be shown
        write_overlay(script, self, ground, self.layer, self.beneath(ground), foreign_mode)

    def mode_for_guest(self) -> int | None:
        """Where the base stands, and one id only is mapped, which is 0 while the sandbox is made: the mode for a lower
        directory of anybody else's; None where it is of that one. Raises OSError.

        The guest must not be its owner, who could write what it could not write on the host: it becomes read-only where
        others could not write.
        """
        status = os.stat(self.lowers[0])
        if (status.st_uid, status.st_gid) == (0, 0):
            return None
        mode = stat.S_IMODE(status.st_mode)
        return mode if mode & 0o002 else mode & 0o555

    def describe(self) -> str:
        return f"overlay  {_from(self.target, self.source)} (copy-on-write)"


@dataclass(frozen=True)
class Rebind(FreshOperation):
    """Fresh: a part of the base that lies beneath something fresh, bound there."""

    target: str
    base: str
    directory: bool
    shows: Operation

    def write(self, script: SyscallScript, ground: Ground) -> None:
        if self.directory:
            write_directory(script, self.target, ground.made)
        else:
            write_directory(script, os.path.dirname(self.target), ground.made)
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC  # where it is missing
            file = script.call("openat", syscalls.AT_FDCWD, self.target, flags, 0o644, accept_any=True)
            script.call("close", file, accept_any=True)
        write_mount(script, self, self.base, self.target, "", syscalls.MS_BIND | syscalls.MS_REC)

    def describe(self) -> str:
        return self.shows.describe()


@dataclass(frozen=True)
class CopiedFile(FreshOperation):
    """Fresh: a small host file, copied: where there is no directory to be shown copy-on-write."""

    target: str
    base: str
    mode: int = 0o644

    def write(self, script: SyscallScript, ground: Ground) -> None:
        if ground.level > 1:
            return  # it is in a layer below
        here, about = syscalls.AT_FDCWD, self.describe()
        write_directory(script, os.path.dirname(self.target), ground.made)
        source = script.call("openat", here, self.base, os.O_RDONLY | os.O_CLOEXEC, 0, about=about)
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC
        copy = script.call("openat", here, self.target, flags, 0o600, about=about)
        script.call("sendfile", copy, source, 0, _COPY_AT_MOST, about=about)
        script.call("fchmod", copy, self.mode, about=about)
        script.call("close", source)
        script.call("close", copy)

    def describe(self) -> str:
        return f"copy     {self.target}"


@dataclass(frozen=True)
class FreshSymlink(FreshOperation):
    """Fresh: a symbolic link inside something fresh."""

    target: str
    to: str

    def write(self, script: SyscallScript, ground: Ground) -> None:
        if ground.level > 1:
            return  # as above
        write_directory(script, os.path.dirname(self.target), ground.made)
        script.call("symlinkat", self.to, syscalls.AT_FDCWD, self.target, about=self.describe())

    def describe(self) -> str:
        return f"symlink  {self.target} -> {self.to}"


@dataclass(frozen=True)
class Proc(FreshOperation):
    """Fresh: a /proc of the new PID namespace, without what tells of the host or its keys. `memory`: a file of the base that
    is /proc/meminfo."""

    masked: tuple[str, ...]
    directories: frozenset[str] = frozenset()  # those that are, in this kernel; the others are files, or missing
    memory: str | None = None
    target: str = "/proc"

    def write(self, script: SyscallScript, ground: Ground) -> None:
        flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
        write_mount(script, self, "proc", self.target, "proc", flags)
        for name in self.masked:
            # Only what is of its kind can cover it. To try both would cost more than all mounts together, for the kernel
            # waits for an expedited RCU grace period after each that does not fit (namespace_unlock).
            path = f"{self.target}/{name}"
            cover = EMPTY if name in self.directories else "/dev/null"
            script.call("mount", cover, path, "", syscalls.MS_BIND, 0, accept=(errno.ENOENT,), about=self.describe())
        if self.memory is not None:
            write_mount(script, self, self.memory, f"{self.target}/meminfo", "", syscalls.MS_BIND)

    def describe(self) -> str:
        return f"proc     {self.target} (masked: {', '.join(self.masked) or 'nothing'})"


@dataclass(frozen=True)
class DevPts(FreshOperation):
    """Fresh: a devpts instance of the sandbox's own: no terminal of the host is in it. All instances have 4096 together."""

    target: str = "/dev/pts"

    def write(self, script: SyscallScript, ground: Ground) -> None:
        flags = syscalls.MS_NOSUID | syscalls.MS_NOEXEC
        write_mount(script, self, "devpts", self.target, "devpts", flags, "newinstance,ptmxmode=0666,mode=620,max=256")

    def describe(self) -> str:
        return f"devpts   {self.target} (new instance)"


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


def write_mount(
    script: SyscallScript, operation: Operation, source: str, target: str, fstype: str, flags: int, data: str = ""
) -> None:
    """mount(2), as a step."""
    script.call("mount", source, target, fstype, flags, data or 0, about=operation.describe())


def write_overlay(
    script: SyscallScript,
    operation: Operation,
    ground: Ground,
    layer: str,
    lowers: Sequence[str],
    foreign_mode: int | None = None,
) -> None:
    """An overlay over `lowers`, the first of which is the uppermost, with its upper in the store. `foreign_mode`: see
    Overlay."""
    about = operation.describe()
    write_directory(script, operation.target, ground.made)
    upper = ground.upper(layer)
    top = os.path.dirname(upper)
    for path in (top, top + "/work", upper):
        script.call("mkdirat", syscalls.AT_FDCWD, path, 0o755, about=about)
    _write_status(script, lowers[0], upper, foreign_mode, about)
    data = overlay_options(lowers, top)
    flags = syscalls.MS_NODEV | syscalls.MS_NOSUID
    write_mount(script, operation, "overlay", operation.target, "overlay", flags, data)
    _cover(operation.target, ground.made)


def overlay_view(empty: str, lower: str) -> str:
    """What mount(2) is told of an overlay that nobody writes to; one with a single layer would be refused."""
    return f"lowerdir={empty}:{lower},{_OVERLAY}"


def overlay_options(lowers: Sequence[str], top: str) -> str:
    """What mount(2) is told of an overlay over `lowers`, the first of which is the uppermost; its upper is in `top`."""
    return f"lowerdir={':'.join(lowers)},upperdir={top}/upper,workdir={top}/work,{_OVERLAY},volatile"


def _write_status(script: SyscallScript, lower: str, upper: str, foreign_mode: int | None, about: str) -> None:
    """The merged root directory shows the upper's own mode, times and owner, which must be the lower's."""
    here = syscalls.AT_FDCWD
    status = script.memory(bytes(256))
    script.call("newfstatat", here, lower, status, 0, about=about)
    mode, uid, gid, times = (status.at(offset) for offset in syscalls.STAT_OFFSETS)
    if foreign_mode is None:
        script.call("fchownat", here, upper, uid.value(), gid.value(), 0, about=about)
        script.call("fchmodat", here, upper, mode.value(), about=about)
    else:
        script.call("fchmodat", here, upper, foreign_mode, about=about)
    script.call("utimensat", here, upper, times, 0, about=about)


def write_directory(script: SyscallScript, path: str, made: set[str]) -> None:
    """mkdir -p, as steps. Most exist, and one that cannot be made is missed by the step that needs it."""
    if path not in made and path != "/":
        write_directory(script, os.path.dirname(path), made)
        script.call("mkdirat", syscalls.AT_FDCWD, path, 0o755, accept_any=True)
        made.add(path)


def _cover(target: str, made: set[str]) -> None:
    """Something is mounted there: what was made beneath it is not to be seen any more."""
    made -= {path for path in made if path.startswith(target + "/")}


def _from(target: str, source: str) -> str:
    return target if source == target else f"{target} <- {source}"


def _escape(path: str) -> str:
    """A path as overlayfs reads it in its option string: backslash, colon and comma escaped."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
