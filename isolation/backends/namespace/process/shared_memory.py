"""What becomes of memory that a fork would share: areas of MAP_SHARED, which fork(2) does not copy.

Such an area is a file, or a nameless object of the kernel's, and a write to it is one to the object: to the project's file
on the host, to what a lock of all processes is made of, to a database's index. One that is mapped for reading can be made
writable by mprotect(2), if its descriptor could write. So each fork gets, at the same place and with the same content:

    a file that the sandbox's tree has too → the tree's own
    an unlinked file that has a descriptor → what that descriptor has become (inherited.py)
    any other object, to `_COPY_AT_MOST`   → a copy, which the fork and the processes that it starts share
    a larger one                           → private memory (copy-on-write), which the fork alone writes
    memory of a device, rings of a kernel  → nothing: who touches that gets SIGSEGV

The template looks once, when it begins to wait, as it does nothing else then; without such areas (the common case) that is
one read of /proc/self/maps. The forks act on what it has found.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from isolation.backends.namespace.process import inherited as fds
from isolation.linux import syscalls
from isolation.plain import os

_COPY_AT_MOST = 64 << 20  # for every fork; what is more costs each of them too long
_AT_ONCE = 16 << 20
_DELETED = " (deleted)"
_NAMED = "/dev/shm/"
_SHARED = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ ...s ", re.MULTILINE)
# A line of /proc/PID/maps, which smaps has, too (proc_pid_maps(5)).
_AREA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (...)(.) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+) *(.*)")
# VmFlags (proc_pid_smaps(5)): pages that are a device's; not there in a child.
_DEVICE_FLAGS = frozenset(("io", "pf"))
_NOT_IN_CHILDREN = "dc"
_ODD_BYTES = bytes(number & 1 for number in range(256))  # only the lowest bit of each means something, see mincore(2)


class Area(NamedTuple):
    """A part of this process's memory: `offset` bytes into the object."""

    start: int
    end: int
    protection: int
    offset: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start


@dataclass
class Object:
    """What areas are of.

    path      where it may be opened again; "" for one without a name
    inherited the number of a descriptor that every fork has replaced by its own copy of the object; -1 for none
    source    a descriptor to read it from, to be closed; -1 for none: it is read from memory
    whole     its pages may be swapped out: none is known to be empty
    """

    name: str
    inode: int
    areas: list[Area] = field(default_factory=list)
    path: str = ""
    inherited: int = -1
    source: int = -1
    device: bool = False
    whole: bool = False

    @property
    def size(self) -> int:
        """As far as it is mapped."""
        return max(area.offset + area.size for area in self.areas)

    @property
    def writable(self) -> bool:
        """Whether anything writes to it now."""
        return any(area.protection & mmap.PROT_WRITE for area in self.areas)


def look(inherited: Sequence[fds.Inherited]) -> list[Object]:
    """In a template, when it begins to wait: what its forks must not share. `inherited` are its descriptors. Makes large
    nameless objects private at once: a copy for each fork would take too long."""
    if not _SHARED.search(_read("/proc/self/maps")):
        return []
    kept = []
    for item in _objects():
        if not item.device:
            _find_source(item, inherited)
            if item.source < 0 and item.inherited < 0 and sum(area.size for area in item.areas) > _COPY_AT_MOST:
                for area in item.areas:
                    _make_private(item, area)
                continue
        kept.append(item)
    return kept


def sources(objects: Iterable[Object]) -> list[int]:
    """Descriptors that are needed until `adopt` is done."""
    return [item.source for item in objects if item.source >= 0]


def forget(objects: Iterable[Object]) -> None:
    """In a template that waits no longer."""
    for fd in sources(objects):
        os.close(fd)


def adopt(objects: Iterable[Object], inherited: Sequence[fds.Inherited]) -> None:
    """In a fork, when its descriptors are its own, and before anything of the guest's runs. Raises OSError."""
    for item in objects:
        try:
            _replace(item, inherited)
        except OSError as error:
            raise OSError(error.errno, f"a copy of the shared memory {item.name}: {error.strerror}") from error


# What there is.


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def _objects() -> list[Object]:
    try:
        text = _read("/proc/self/smaps")
    except OSError:  # a kernel without CONFIG_PROC_PAGE_MONITOR
        text = _read("/proc/self/maps")
    found: dict[tuple[str, str, str], Object] = {}
    item: Object | None = None
    # Of the characters that str.splitlines() takes for the end of a line, the kernel escapes one in names of files.
    for line in os.fsdecode(text).split("\n"):
        if match := _AREA.fullmatch(line):
            start, end, rights, kind, offset, device, inode, name = match.groups()
            item = None
            if kind == "s":
                item = found.setdefault((device, inode, name), Object(name, int(inode)))
                item.device |= not _is_memory(name)
                item.areas.append(Area(int(start, 16), int(end, 16), _protection(rights), int(offset, 16)))
        elif item is not None and line.startswith("Swap:") and line.split()[1] != "0":
            item.whole = True
        elif item is not None and line.startswith("VmFlags:"):
            flags = set(line.split()[1:])
            item.device |= not flags.isdisjoint(_DEVICE_FLAGS)
            if _NOT_IN_CHILDREN in flags:
                item.areas.pop()
    return [item for item in found.values() if item.areas]


def _is_memory(name: str) -> bool:
    """Not of a device, a ring ("anon_inode:[io_uring]", "[aio]"), a socket, or a buffer of one ("/dmabuf:")."""
    if name.startswith(("/dev/zero", _NAMED, "/dev/hugepages/")):
        return True
    return name.startswith("/") and not name.startswith(("/dev/", "/dmabuf:", "/[", "/sys/", "/proc/"))


def _protection(rights: str) -> int:
    every = {"r": mmap.PROT_READ, "w": mmap.PROT_WRITE, "x": mmap.PROT_EXEC}
    return sum(every.get(right, 0) for right in rights)


def _find_source(item: Object, inherited: Sequence[fds.Inherited]) -> None:
    """Where its content is to be had, without reading pages that nobody has written: to read one makes it."""
    if item.name.endswith(_DELETED):
        for known in inherited:
            if known.scratch and _is_mapped_of(item, known.fd):
                item.inherited, item.source = known.fd, _open_again(f"/proc/self/fd/{known.fd}")
                return
        return
    item.path = item.name if os.path.lexists(item.name) else item.name.replace("\\012", "\n")
    item.source = _open_again(item.path)


def _open_again(path: str, flags: int = os.O_RDONLY) -> int:
    """With a position of its own; -1 for what is no file, or not to be had."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return -1


def _is_mapped_of(item: Object, fd: int) -> bool:
    """By name: device numbers of some file systems are others in /proc than in stat(2)."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == item.name and os.fstat(fd).st_ino == item.inode
    except OSError:
        return False


# What it becomes.


def _replace(item: Object, inherited: Sequence[fds.Inherited]) -> None:
    if item.device:
        for area in item.areas:
            _put_nothing(area)
        return
    if item.inherited >= 0:
        _fill_inherited(item)
        _map(item, item.inherited, syscalls.MAP_SHARED)
        return
    fd = _open_own(item, inherited)
    if fd >= 0:
        _map(item, fd, syscalls.MAP_SHARED)
    elif item.source >= 0 and _stored(item.source) > _COPY_AT_MOST:
        _map(item, item.source, syscalls.MAP_PRIVATE)
        return
    else:
        fd = _new_file(item)
        os.ftruncate(fd, item.size)
        if item.source >= 0:
            fds.copy_file(item.source, fd)
        else:
            for area in item.areas:
                for start, end in _resident(item, area):
                    _write(fd, start, end - start, area.offset + start - area.start)
        _map(item, fd, syscalls.MAP_SHARED)
    os.close(fd)


def _new_file(item: Object) -> int:
    """Of shared memory that has a name (shm_overview(7)), under that name: it can be attached, and removed, as before."""
    if item.path.startswith(_NAMED):
        try:
            return os.open(item.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            pass  # the sandbox has something else there, or no such directory
    return os.memfd_create("isolation-shared", os.MFD_CLOEXEC)


def _open_own(item: Object, inherited: Sequence[fds.Inherited]) -> int:
    """The file at its place in this sandbox's tree; -1 where there is none, or to open it would copy too much up."""
    if not item.path:
        return -1
    flags = os.O_RDONLY
    if item.writable:
        copied_up = any(known.path == item.path and known.flags & os.O_ACCMODE == os.O_RDWR for known in inherited)
        if not copied_up and item.source >= 0 and _stored(item.source) > _COPY_AT_MOST:
            return -1
        flags = os.O_RDWR
    return _open_again(item.path, flags)


def _fill_inherited(item: Object) -> None:
    """What inherited.py has not copied, as it is too long; a page beyond the end could not be touched."""
    if item.source >= 0 and os.fstat(item.inherited).st_size < min(item.size, os.fstat(item.source).st_size):
        fds.copy_file(item.source, item.inherited)


def _map(item: Object, fd: int, flags: int) -> None:
    for area in item.areas:
        syscalls.mmap(area.start, area.size, area.protection, flags | syscalls.MAP_FIXED, fd, area.offset)


def _put_nothing(area: Area) -> None:
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE | syscalls.MAP_FIXED
    syscalls.mmap(area.start, area.size, 0, flags, -1, 0)


def _make_private(item: Object, area: Area) -> None:
    """Copy-on-write from here on, at the same place. What has been written is copied once."""
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE
    made = syscalls.mmap(0, area.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    for start, end in _resident(item, area):
        ctypes.memmove(made + start - area.start, start, end - start)
    syscalls.mprotect(made, area.size, area.protection)
    syscalls.mremap_onto(made, area.size, area.start)


def _resident(item: Object, area: Area) -> list[tuple[int, int]]:
    """The parts of an area that have pages, readable from here on."""
    if not area.protection & mmap.PROT_READ:
        syscalls.mprotect(area.start, area.size, area.protection | mmap.PROT_READ)
    if item.whole:
        return [(area.start, area.end)]
    found = []
    for start in range(area.start, area.end, _AT_ONCE):
        pages = syscalls.mincore(start, min(_AT_ONCE, area.end - start)).translate(_ODD_BYTES)
        for run in re.finditer(b"\1+", pages):
            found.append((start + run.start() * mmap.PAGESIZE, start + run.end() * mmap.PAGESIZE))
    return found


def _write(fd: int, start: int, size: int, offset: int) -> None:
    """Memory into a file."""
    while size > 0:
        count = os.pwrite(fd, (ctypes.c_char * min(size, _AT_ONCE)).from_address(start), offset)
        start, size, offset = start + count, size - count, offset + count


def _stored(fd: int) -> int:
    """Bytes that a file really has."""
    return os.fstat(fd).st_blocks * 512
