"""Which parts of the host a sandbox shows: system directories, the Python environment, and what was asked for.

Everything else (home directories, /run, /tmp, /var, sockets, other users' files) is simply not in the tree.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from isolation.backends.namespace.rootfs import adoption
from isolation.backends.namespace.rootfs.idmap import Source
from isolation.backends.namespace.rootfs.mounts import (
    BASE,
    OLD_ROOT,
    BaseOperation,
    Bind,
    CopiedFile,
    Directory,
    FreshOperation,
    FreshSymlink,
    Lower,
    Operation,
    Overlay,
    Private,
    ReadOnlyView,
    Rebind,
    Symlink,
)
from isolation.backends.showing import SYSTEM
from isolation.errors import SpecError
from isolation.linux.mountinfo import MountTable
from isolation.paths import is_within
from isolation.plain import os

# File systems that are windows into the kernel or mount on access; never part of a view.
_VIRTUAL = frozenset(
    "autofs binfmt_misc bpf cgroup cgroup2 configfs debugfs devpts devtmpfs efivarfs fusectl hugetlbfs mqueue nsfs "
    "proc pstore rpc_pipefs securityfs selinuxfs sysfs tracefs".split()
)
_COPY_AT_MOST = 1 << 20
_IMPORTED = ("lib", "lib64")  # of an installation
_PARTS = ("bin", "include", "lib", "lib64", "libexec", "pyvenv.cfg", "share")  # all there is, of one closed to others
_MANY_LINKS = 40  # as the kernel: path_resolution(7)


class View:
    """Collects operations. `staged` is set for real root, whose sources are prepared by the supervisor (idmap.py). `own`:
    whose files can be written to inside; what is of others, and is to be, is adopted then (adoption.py).

    notes    what people are to hear before anything runs
    """

    def __init__(self, table: MountTable, stage: str | None = None, own: adoption.Own | None = None) -> None:
        self.notes: list[str] = []
        self._table = table
        self._stage = stage
        self._own = own
        self._adopts: dict[int, adoption.Adopt] = {}
        self._operations: dict[str, Operation] = {}
        self._numbers = count()
        self._lowers: dict[int, str] = {}
        self._seeds: dict[str, list[adoption.Copied]] = {}
        self.staged: list[Source] = []

    def operations(self) -> tuple[list[BaseOperation], list[FreshOperation]]:
        """(base, fresh), each in an order in which every directory exists before what lies in it."""
        base: list[BaseOperation] = []
        fresh: list[FreshOperation] = []
        for target in sorted(self._operations, key=_by_depth):
            operation = self._operations[target]
            if isinstance(operation, Symlink) and self._covering(os.path.dirname(target)) is not None:
                continue  # met before the directory was shown that has it
            parent = self._fresh_parent(target)
            if isinstance(operation, Private) and target in self._seeds:
                mode = operation.mode
                operation = Overlay(target, target, operation.number)
                base.append(adoption.Seed(operation.lower, mode, tuple(self._seeds[target])))
            elif isinstance(operation, Overlay):
                base.append(Lower(operation.lower, self._lowers[operation.number]))
                if operation.adopts:
                    base.append(self._adopts[operation.number])
            if isinstance(operation, FreshOperation):
                if isinstance(operation, CopiedFile):
                    if parent is None:
                        by_view = self._base_place() if self._stage is None else None
                        base.append(Bind(target, "", operation.base, directory=False, by_view=by_view))
                        continue
                    place = self._base_place()
                    base.append(Bind(place, "", operation.base, directory=False))
                    operation = replace(operation, base=place)
                if parent is None:
                    base.append(Directory(target))
                fresh.append(operation)
            elif parent is None and isinstance(operation, BaseOperation):
                base.append(operation)
            elif isinstance(operation, (ReadOnlyView, Bind)):
                place = self._base_place()
                base.append(replace(operation, target=place))
                directory = operation.directory if isinstance(operation, Bind) else True
                fresh.append(Rebind(target, place, directory, operation))
            elif isinstance(operation, Symlink):
                fresh.append(FreshSymlink(target, operation.to))
            elif isinstance(operation, Directory):
                fresh.append(Private(target, next(self._numbers), operation.mode))
        return base, fresh

    def _base_place(self) -> str:
        """Another one, out of the guest's sight."""
        return f"{BASE}/{next(self._numbers)}"

    def _fresh_parent(self, target: str) -> Operation | None:
        for parent in _parents(os.path.dirname(target)):
            operation = self._operations.get(parent)
            if operation is not None and isinstance(operation, FreshOperation):
                return operation
        return None

    def has(self, target: str) -> bool:
        """Whether something is made at exactly this place."""
        return target in self._operations

    def add(self, operation: Operation) -> None:
        """Put `operation` at its target, instead of what was there."""
        self._operations[operation.target] = operation

    def private(self, target: str, mode: int = 0o755) -> None:
        """An empty, writable directory, unless something is already shown there."""
        if target not in self._operations and self._covering(target) is None:
            self.add(Private(target, next(self._numbers), mode))

    def system(self) -> None:
        """The host's system directories. Their owners stay unmapped, so only what everyone may read is readable."""
        for name in SYSTEM:
            path = "/" + name
            if os.path.islink(path):
                self.add(Symlink(path, os.readlink(path)))
            elif os.path.isdir(path):
                self._overlay(path, path, owned=False, writable=False)

    def show(self, path: str, target: str | None = None, *, writable: bool, owned: bool | None = None) -> None:
        """A directory (copy-on-write if `writable`) or file (read-only) of the user's; symlinks on the way to it, too. One
        that is a system directory, or holds such, is not the user's own, unless `owned` says so."""
        real = self.follow(path) if target is None else os.path.realpath(path)
        if owned is None:
            owned = not any(is_within(system, [real]) for system in _system())
        self._overlay(real, target or real, owned=owned, writable=writable, explicit=target is not None)

    def environment(self, path: str) -> None:
        """What Python imports from, read-only. To root, all files are shown by their modes for others, but those that are
        imported: an installation holds keys and passwords, too (etc, pip.conf), and one in /usr is the system's."""
        real = self.follow(path)
        if self._stage is None:
            self._overlay(real, real, owned=True, writable=False)
        elif is_within(real, _system()):
            self._overlay(real, real, owned=False, writable=False)
        elif _is_installation(real):
            self._installation(real)
        else:
            self._overlay(real, real, owned=True, writable=False)

    def _installation(self, real: str) -> None:
        if _is_open(real):
            self._overlay(real, real, owned=False, writable=False)
        elif not self.shows(real):
            self.add(Directory(real))
        covered = self.shows(real) and not isinstance(self._operations.get(real), Directory)
        for name in _PARTS:
            part = os.path.join(real, name)
            if os.path.islink(part):
                if not covered:
                    self.add(Symlink(part, os.readlink(part)))
            elif os.path.isdir(part):
                if not covered or name in _IMPORTED or not _is_open(part):
                    self._overlay(part, part, owned=True, writable=False)
            elif os.path.isfile(part) and not _is_open(part):
                self.add(Bind(part, part, self._lower(part, owned=True), directory=False))
            elif os.path.isfile(part) and not covered:
                self.bind(part, part)

    def bind(self, source: str, target: str, *, writable: bool = False, device: bool = False) -> None:
        """The host's own file or directory."""
        real = os.path.realpath(source)
        by_view = not writable and not device and os.path.isfile(real)
        lower = self._lower(real, owned=writable and not device, by_view=by_view)  # the kernel's cannot be id-mapped
        place = self._base_place() if by_view and self._stage is None else None
        self.add(Bind(target, real, lower, os.path.isdir(real), writable, device, place))

    def copy(self, source: str, target: str) -> None:
        """A copy of a file, where the directory that it is in can be written to; else the file, read-only."""
        real = os.path.realpath(source)
        self.add(CopiedFile(target, self._lower(real, owned=True), os.stat(real).st_mode & 0o777))

    def seed(self, source: str, target: str) -> bool:
        """Have a copy of a directory in an empty, writable one, from the beginning; False: it would lie in none."""
        parent = next((self._operations[path] for path in _parents(target) if path in self._operations), None)
        if not isinstance(parent, Private) or parent.target == target:
            return False
        real = os.path.realpath(source)
        path = os.path.relpath(target, parent.target)
        copied = adoption.Copied(path, self._lower(real, owned=True), adoption.entries_of(real))
        self._seeds.setdefault(parent.target, []).append(copied)
        return True

    def shows(self, path: str) -> bool:
        """Whether `path` (without symlinks) is part of the view."""
        return path in self._operations or self._covering(path) is not None

    def follow(self, path: str) -> str:
        """Resolve `path` step by step, adding each symlink that is met outside of what is already shown."""
        done, todo = "/", [part for part in path.split("/") if part]
        links = 0
        while todo:
            step = os.path.join(done, todo.pop(0))
            if step.endswith("/.."):
                done = os.path.dirname(done)
            elif os.path.islink(step):
                links += 1
                if links > _MANY_LINKS:
                    raise SpecError(f"too many symbolic links in {path!r}")
                to = os.readlink(step)
                if not self.shows(step):
                    self.add(Symlink(step, to))
                todo[:0] = [part for part in to.split("/") if part and part != "."]
                done = "/" if to.startswith("/") else done
            else:
                done = step
        return done

    def _overlay(self, real: str, target: str, *, owned: bool, writable: bool, explicit: bool = False) -> None:
        if not os.path.isdir(real):
            if os.path.exists(real) and not self.shows(target):
                self.bind(real, target)
            return
        present = self._operations.get(target)
        if isinstance(present, Overlay) and present.source == real and not writable:
            return  # met again within something that is shown read-only, and is split because of it
        covering = self._covering(target)
        if not explicit and covering is not None and self._is_as_good(covering, owned=owned, writable=writable):
            return
        beneath = [path for path in self._table.beneath(real) if not self._is_virtual(path)]
        locked = self._table.beneath(real)
        if self._stage is None and locked:
            self._split(real, target, owned=owned, writable=writable)
            return
        lower = self._lower(real, owned=owned)
        if writable:
            number = next(self._numbers)
            self._lowers[number] = lower
            self.add(Overlay(target, real, number, adopts=self._adopt(real, number, lower)))
        else:
            self.add(ReadOnlyView(target, real, lower))
        for path in beneath:
            below = os.path.join(target, os.path.relpath(path, real))
            self._overlay(path, below, owned=owned, writable=writable, explicit=True)

    def _adopt(self, real: str, number: int, lower: str) -> bool:
        if self._own is None:
            return False
        found = adoption.survey(real, self._own)
        if found.left:
            self.notes.append(found.note(real))
        if found.entries:
            self._adopts[number] = adoption.Adopt(number, real, lower, found.entries)
        return bool(found.entries)

    def _split(self, real: str, target: str, *, owned: bool, writable: bool) -> None:
        """A directory with mounts beneath cannot be a lower layer in a user namespace (EINVAL: the kernel would have
        to clone it without its locked submounts), so its entries are shown one by one."""
        if owned and writable:
            self.add(Private(target, next(self._numbers)))
        else:
            self.add(Directory(target))
        try:
            entries = sorted(os.scandir(real), key=lambda entry: entry.name)
        except PermissionError:
            return
        for entry in entries:
            inside = os.path.join(target, entry.name)
            if entry.is_symlink():
                self.add(Symlink(inside, os.readlink(entry.path)))
            elif entry.is_dir():
                if os.access(entry.path, os.R_OK | os.X_OK) and not self._is_virtual(entry.path):
                    self._overlay(entry.path, inside, owned=owned, writable=writable, explicit=True)
            elif entry.is_file() and os.access(entry.path, os.R_OK):
                if owned and writable and entry.stat().st_size <= _COPY_AT_MOST:
                    mode = entry.stat().st_mode & 0o777
                    self.add(CopiedFile(inside, self._lower(entry.path, owned=owned), mode))
                else:
                    self.bind(entry.path, inside)

    def _is_virtual(self, path: str) -> bool:
        mount = self._table.containing(path)
        return mount is not None and mount.path == path and mount.fstype in _VIRTUAL

    def _covering(self, target: str) -> Operation | None:
        """The overlay that already shows `target` as it is on the host."""
        for parent in _parents(target):
            operation = self._operations.get(parent)
            if operation is not None:
                same = isinstance(operation, (Overlay, ReadOnlyView)) and operation.source == operation.target
                return operation if same else None
        return None

    def _is_as_good(self, covering: Operation, *, owned: bool, writable: bool) -> bool:
        """Whether what covers a path already shows it as it should be."""
        assert isinstance(covering, (Overlay, ReadOnlyView))
        if writable and not isinstance(covering, Overlay):
            return False
        return self._stage is None or not owned or Source(covering.source, owned=True) in self.staged

    def _lower(self, real: str, *, owned: bool, by_view: bool = False) -> str:
        if self._stage is None:
            return OLD_ROOT + real
        source = Source(real, owned, by_view)
        if source not in self.staged:
            self.staged.append(source)
        return f"{OLD_ROOT}{self._stage}/{self.staged.index(source)}"


def _system() -> list[str]:
    """The system directories, where they really are."""
    return [os.path.realpath("/" + name) for name in SYSTEM if os.path.isdir("/" + name)]


def _is_installation(path: str) -> bool:
    """The root of a Python installation, or of a virtual environment (PEP 405)."""
    if os.path.isfile(os.path.join(path, "pyvenv.cfg")):
        return True
    return bool(glob.glob(os.path.join(glob.escape(path), "lib", "python3.*", "os.py")))


def _is_open(path: str) -> bool:
    """Whether everybody may read it, and enter it if it is a directory."""
    wanted = 0o005 if os.path.isdir(path) else 0o004
    return os.stat(path).st_mode & wanted == wanted


def _by_depth(target: str) -> tuple[bool, int, str]:
    return target == "/proc", target.count("/"), target  # /proc is masked with what lies in /dev


def _parents(path: str) -> Iterator[str]:
    """`path` itself, then every directory above it but the root."""
    while path != "/":
        yield path
        path = os.path.dirname(path)
