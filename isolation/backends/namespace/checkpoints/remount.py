"""A new layer for the files of a live sandbox: mounts are exchanged under a guest that runs on, and is hostile.

A process of the supervisor's own does it, with the rights of the user namespace that owns the sandbox's mounts, in two
places:

    its own copy of the sandbox's mount namespace    in which the store may be uncovered, for the guest is not in it: here
                                                     the new overlays are made, and taken out as detached trees
    the sandbox's mount namespace                    here each is put where its directory is, upon the mount that has been
                                                     there from the beginning, and instead of the one of the last time

The chain of lower layers ends with what the sandbox was made with. All layers lie in its one store, so that its limits hold
for all of them together.

The guest can rename whatever a mount point lies in, and plant a link there. So no path of its making is given to a call that
mounts: each is walked by descriptors, without a symlink, and mounts are named by descriptors from then on. One that was put
there before is known by its descriptor only, and nothing else is ever unmounted. Nor is anything imported here, since the
files are the guest's.

Who stays with the old files is in a mount that has gone. What was mounted beneath it, and may hide something, would go
first, unless it were locked to it: so the trees are taken out by a process of a lesser user namespace, whose copy of the
mounts the kernel locks (mount_namespaces(7)).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import inherited, steps
from isolation.backends.namespace.rootfs.layer_tree import ORIGIN, Change
from isolation.backends.namespace.rootfs.mounts import (
    HIDDEN,
    KEPT,
    LAYERS,
    PRIVATE,
    STORE,
    DevPts,
    FreshOperation,
    Overlay,
    Private,
    Proc,
    Rebind,
    overlay_options,
    store_of,
)
from isolation.linux import rmtree, syscalls
from isolation.plain import os, socket

_NS_GET_USERNS = 0xB701  # ioctl_ns(2)
_ROOM = f"{KEPT[1:]}/room"
_DIRECTORIES = 6  # of a mount in a layer, at most
_BENCH = store_of(2)  # free, in a sandbox that is no fork of a template: where mounts are made
_FLAGS = syscalls.MS_NODEV | syscalls.MS_NOSUID
_PAGE = 4096  # the options of a mount must fit in
_TREE = syscalls.OPEN_TREE_CLONE | os.O_CLOEXEC
_NODE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

# What it says to the supervisor, one message each.
BEGINS = b"b"  # from here on the sandbox's own mounts change
STANDS = b"s"  # they did; with the descriptors of what is there now
REFUSED = b"x"  # with errno and text, as elsewhere; nothing has changed but descriptors, if there are any with it
DONE = b"d"


class Place(NamedTuple):
    """A directory that the guest writes to and that lies in no other such one; and what is mounted beneath it, in order."""

    outer: Private | Overlay
    beneath: tuple[Private | Overlay | Rebind, ...]


class MountPair(NamedTuple):
    """For a place, descriptors of two mounts' roots: of what was there from the beginning, and of what lies upon it."""

    ground: int
    top: int


class Request(NamedTuple):
    """What is to be done, in which mount namespace, and what is held of each place there; nothing before the first time."""

    mounts: int
    change: Change
    held: tuple[MountPair, ...]


def usable() -> bool:
    """Whether a tmpfs keeps user extended attributes (Linux 6.6): without them an overlay cannot tell that a directory was
    replaced, and refuses to."""
    fd = os.memfd_create("isolation-attributes", os.MFD_CLOEXEC)  # of a tmpfs, too
    try:
        os.setxattr(fd, "user.isolation", b"")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def places(fresh: Sequence[FreshOperation]) -> tuple[Place, ...]:
    """Where layers are put. Raises OSError for a tree in which they cannot."""
    found: list[Place] = []
    for operation in fresh:  # in an order in which each comes before what lies beneath it
        index = next((i for i, place in enumerate(found) if operation.target.startswith(place.outer.target + "/")), None)
        if isinstance(operation, (Private, Overlay, Rebind)) and index is not None:
            found[index] = found[index]._replace(beneath=(*found[index].beneath, operation))
        elif isinstance(operation, (Private, Overlay)):
            found.append(Place(operation, ()))
        elif isinstance(operation, (Proc, DevPts)) and index is not None:
            raise OSError(errno.ENOTSUP, f"{operation.target} is mounted beneath {found[index].outer.target}")
    return tuple(found)


def lowers_of(operation: Private | Overlay, beneath: Sequence[int]) -> list[str]:
    """The lower layers of a new overlay, the uppermost first, as seen from the store."""
    found = [f"{KEPT[1:]}/{layer}/{operation.layer}/upper" for layer in beneath if layer != ORIGIN]
    if isinstance(operation, Private):
        return [*found, f"{PRIVATE[1:]}/{operation.number}"]
    return [*found, f"{LAYERS[1:]}/{operation.layer}/upper", *operation.lowers]


def live(plan: Plan, wish: Request, control_socket: socket.socket) -> NoReturn:
    """Be that process."""
    try:
        descriptors = [fd for held in wish.held for fd in (held.ground, held.top)]
        inherited.close_all_but({0, 1, 2, control_socket.fileno(), wish.mounts, *descriptors})
        sys.meta_path.clear()
        store = _enter(plan, wish.mounts)
        with contextlib.suppress(OSError):
            for layer in wish.change.failed:
                rmtree.remove(store, f"{KEPT[1:]}/{layer}")
            if wish.change.new is not None and wish.change.keeps is None:
                rmtree.remove(store, _ROOM)
        if wish.change.new is not None:
            _renew(plan, wish, wish.change.new, control_socket)
        for layer in wish.change.removes:
            rmtree.remove(store, f"{KEPT[1:]}/{layer}")
        _take_room(plan, store)
        control_socket.send(DONE)
    except OSError as error:
        refuse(control_socket, error, [])
    finally:
        os._exit(0)


def _take_room(plan: Plan, store: int) -> None:
    """For the directories of another layer: a guest that has filled its store can go back nevertheless."""
    with contextlib.suppress(OSError):  # it is taken already; or there is none
        os.mkdir(_ROOM, dir_fd=store)
        for number in range(_DIRECTORIES * (1 + len(plan.fresh))):
            os.mkdir(f"{_ROOM}/{number}", dir_fd=store)


def refuse(control_socket: socket.socket, error: OSError, held: Sequence[MountPair]) -> None:
    """Say why it was not done."""
    text = REFUSED + f"{error.errno or 0} {error.strerror or error}".encode("utf-8", "replace")[:4000]
    _send(control_socket, text, held)


def _send(control_socket: socket.socket, message: bytes, held: Sequence[MountPair]) -> None:
    socket.send_fds(control_socket, [message], [fd for item in held for fd in (item.ground, item.top)])


def _enter(plan: Plan, mounts: int) -> int:
    """Into a copy of the sandbox's mount namespace, as the root of who owns it. Returns a descriptor of the store, which is
    the working directory."""
    become_owner(plan, mounts)
    syscalls.setns(mounts, syscalls.CLONE_NEWNS)
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.umount2(HIDDEN, syscalls.MNT_DETACH)
    os.umask(0)
    os.chdir(STORE)
    return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def become_owner(plan: Plan, mounts: int) -> None:
    """The root of the user namespace that owns a mount namespace. Raises OSError."""
    owner = fcntl.ioctl(mounts, _NS_GET_USERNS)
    if os.fstat(owner).st_ino != os.stat("/proc/self/ns/user").st_ino:
        syscalls.setns(owner, syscalls.CLONE_NEWUSER)
    steps.leave_host_ids(plan)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of ids has cleared it


def _renew(plan: Plan, wish: Request, new: int, control_socket: socket.socket) -> None:
    """Make the new layer, and put it in its place. Raises OSError when nothing has changed."""
    there = places(plan.fresh)
    if wish.change.keeps is not None:
        _look_for_mounts(there)
    for path in (KEPT[1:], f"{KEPT[1:]}/{new}"):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755)
    trees = _take_out([_assemble(place, wish.change.beneath, new) for place in there])
    syscalls.setns(wish.mounts, syscalls.CLONE_NEWNS)
    exchange = _Exchange(wish.held or [MountPair(mount_at(place.outer.target), -1) for place in there], trees)
    if not wish.held:
        exchange.freezes = [
            mount_at(item.target) for place in there for item in place.beneath if not isinstance(item, Rebind)
        ]
    control_socket.send(BEGINS)
    try:
        try:
            exchange.run()
        except OSError as error:
            refuse(control_socket, error, exchange.undo())
            os._exit(0)
        _send(control_socket, STANDS, exchange.finish())
    except OSError:
        os._exit(1)  # without a word: neither the old files nor the new ones


def _look_for_mounts(there: Sequence[Place]) -> None:
    """What is not where it was mounted would be there again in the new layer, and the files so be others than they are."""
    for place in there:
        for operation in (place.outer, *place.beneath):
            os.close(mount_at(operation.target))


def mount_at(target: str) -> int:
    """The root of what is mounted at this path, which is walked without a symlink. Raises OSError."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = _walk(root, target)
    except OSError as error:
        raise OSError(error.errno, f"what was mounted at {target} is not there any more ({error.strerror})") from error
    finally:
        os.close(root)
    if not syscalls.statx_attributes(fd) & syscalls.STATX_ATTR_MOUNT_ROOT:
        os.close(fd)
        raise OSError(errno.EINVAL, f"what was mounted at {target} is not there any more")
    return fd


def _walk(top: int, path: str, *, make: bool = False, file: bool = False) -> int:
    """A descriptor of `path` beneath the directory `top`; with `make`, directories that are missing are made, and the file
    that it leads to, if it is to be one. Raises OSError, for a symlink, too."""
    fd = os.dup(top)
    names = [name for name in path.split("/") if name]
    try:
        for position, name in enumerate(names):
            last = position == len(names) - 1
            if make:
                with contextlib.suppress(FileExistsError):
                    if last and file:
                        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=fd))
                    else:
                        os.mkdir(name, 0o755, dir_fd=fd)
            below = os.open(name, _NODE | (0 if last else os.O_DIRECTORY), dir_fd=fd)
            os.close(fd)
            fd = below
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _assemble(place: Place, beneath: Sequence[int], new: int) -> str:
    """Mount the overlay, and in it what is mounted beneath it; returns where. Raises OSError."""
    point = f"{KEPT[1:]}/{new}/{place.outer.layer}.tree"
    os.mkdir(point, 0o755)
    _mount_overlay(place.outer, beneath, new, point)
    root = os.open(point, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for operation in place.beneath:
            _attach(operation, root, place.outer.target, beneath, new)
    finally:
        os.close(root)
    return point


def _take_out(points: Sequence[str]) -> list[int]:
    """Detached trees of what is mounted there, in which all mounts but the uppermost are locked. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid, pidfd = syscalls.clone(0)
    if pid == 0:
        try:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
            trees = [syscalls.open_tree(point, _TREE | syscalls.AT_RECURSIVE) for point in points]
            socket.send_fds(theirs, [b"t"], trees)
        except OSError as error:
            theirs.send(f"x{error.errno or 0} {error.strerror}".encode("utf-8", "replace")[:4000])
        finally:
            os._exit(0)
    theirs.close()
    said, trees, _flags, _ = socket.recv_fds(ours, 8192, len(points))
    ours.close()
    os.waitpid(pid, 0)
    os.close(pidfd)
    if len(trees) != len(points):
        number, _, what = said[1:].decode("utf-8", "replace").partition(" ")
        raise OSError(int(number or errno.ECHILD), what or "the new mounts could not be taken out")
    return trees


def _attach(operation: Private | Overlay | Rebind, root: int, outer: str, beneath: Sequence[int], new: int) -> None:
    if isinstance(operation, Rebind):
        tree = syscalls.open_tree(operation.base, _TREE | syscalls.AT_RECURSIVE)
        file = not operation.directory
    else:
        _mount_overlay(operation, beneath, new, _BENCH)
        tree, file = syscalls.open_tree(_BENCH, _TREE), False
        syscalls.umount2(_BENCH, syscalls.MNT_DETACH)
    try:
        with _named(operation.target):
            target = _walk(root, operation.target[len(outer) :], make=True, file=file)
            syscalls.move_mount_onto(tree, target)
            os.close(target)
    finally:
        os.close(tree)


@contextlib.contextmanager
def _named(target: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"there is no place any more to mount {target} ({os.strerror(error.errno or 0)})"
        raise OSError(error.errno, what) from error


def _mount_overlay(operation: Private | Overlay, beneath: Sequence[int], new: int, point: str) -> None:
    """Its upper is in the new layer. Raises OSError."""
    top = f"{KEPT[1:]}/{new}/{operation.layer}"
    for path in (top, f"{top}/work", f"{top}/upper"):
        os.mkdir(path, 0o755)
    lowers = lowers_of(operation, beneath)
    status = os.lstat(lowers[0])  # the merged root shows the upper's own
    os.chown(f"{top}/upper", status.st_uid, status.st_gid)
    os.chmod(f"{top}/upper", stat.S_IMODE(status.st_mode))
    os.utime(f"{top}/upper", ns=(status.st_atime_ns, status.st_mtime_ns))
    options = overlay_options(lowers, top)
    if len(options) >= _PAGE:
        raise OSError(errno.E2BIG, "too many layers for one mount")
    syscalls.mount("overlay", point, "overlay", _FLAGS, options)


class _Exchange:
    """Puts each tree in its place, or none. All mounts are named by descriptors."""

    def __init__(self, held: Sequence[MountPair], trees: Sequence[int]) -> None:
        self._held = list(held)
        self._trees = list(trees)
        # To put back what was there: it is gone then, and a copy is of the same file system.
        self._copies = [-1 if item.top < 0 else _copy(item.top) for item in held]
        self.freezes: Sequence[int] = ()  # other mounts that belong to the old ones
        self._placed: set[int] = set()
        self._gone: set[int] = set()  # places from which the old mount was taken

    def run(self) -> None:
        """Raises OSError, and then `undo` is next."""
        for index, (held, tree) in enumerate(zip(self._held, self._trees, strict=True)):
            if held.top < 0 or not self._slip_in(tree, held.top):
                if held.top >= 0:  # for a moment, the guest sees what lies below
                    _freeze(held.top, recursive=True)
                    _unmount(held.top)
                    self._gone.add(index)
                syscalls.move_mount_onto(tree, held.ground)
            self._placed.add(index)

    def _slip_in(self, tree: int, top: int) -> bool:
        """Beneath the old one, which is taken away later: so there is no moment without. Not before Linux 6.5."""
        try:
            syscalls.move_mount_onto(tree, top, beneath=True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def undo(self) -> list[MountPair]:
        """All is as it was. Returns what is held then. Raises OSError when it cannot be."""
        for index, (held, tree, copy) in enumerate(zip(self._held, self._trees, self._copies, strict=True)):
            if index in self._placed:
                if held.top >= 0 and index not in self._gone:
                    _unmount(held.top)  # which lies upon it
                _unmount(tree)
            if copy >= 0 and index in self._placed | self._gone:
                syscalls.move_mount_onto(copy, held.ground)
                self._held[index] = held._replace(top=copy)
        return [] if any(held.top < 0 for held in self._held) else self._held

    def finish(self) -> list[MountPair]:
        """The old mounts are frozen, as far as nobody writes to them, and go. Returns what is held now."""
        for index, held in enumerate(self._held):
            if held.top < 0:
                _freeze(held.ground)
            elif index not in self._gone:
                _freeze(held.top, recursive=True)
                _unmount(held.top)
        for mount in self.freezes:
            _freeze(mount)
        return [MountPair(held.ground, tree) for held, tree in zip(self._held, self._trees, strict=True)]


def _copy(mount: int) -> int:
    return syscalls.open_tree("", _TREE | syscalls.AT_RECURSIVE | syscalls.AT_EMPTY_PATH, mount)


def _freeze(mount: int, *, recursive: bool = False) -> None:
    """What still goes to the old files shall not write there. A mount in which a file is open for writing stays as it is:
    that nobody has is for the caller of all this to see to."""
    with contextlib.suppress(OSError):
        syscalls.mount_setattr(mount, syscalls.MOUNT_ATTR_RDONLY, recursive=recursive)


def _unmount(mount: int) -> None:
    """A mount, by its root, with all beneath it. Nothing must lie upon it, or that would go instead (LOOKUP_MOUNTPOINT)."""
    os.fchdir(mount)
    syscalls.umount2(".", syscalls.MNT_DETACH)
