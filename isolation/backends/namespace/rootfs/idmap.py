"""Real root only: the sources of a sandbox's tree, opened while host root, and shifted to the mapped range.

The supervisor does this once, in a mount namespace of its own. What belongs to the user (project, Python environment,
mounts) becomes id-mapped mounts: owners 0 to 65535 on disk are 0 to 65535 inside (mount_setattr(2), MOUNT_ATTR_IDMAP).
System directories are not mapped, so that a file which only root may read is not readable.
"""

from __future__ import annotations

import contextlib
import signal
import stat
from collections.abc import Sequence
from typing import NamedTuple

from isolation.backends.namespace.rootfs.mounts import overlay_view
from isolation.linux import syscalls
from isolation.linux import userns as identity
from isolation.plain import os

_COPY_FILES = 200_000
_COPY_BYTES = 2 << 30


class Source(NamedTuple):
    """owned    it is the user's: id-mapped
    by_view  a file, not by its own inode, but by that of a view of its directory (mounts.py, Bind)
    """

    path: str
    owned: bool
    by_view: bool = False


def prepare(sources: Sequence[Source], mount_point: str, base: int) -> None:
    """Put each source at `mount_point`/0, /1, …; those that are owned are id-mapped to the range that begins with `base`.
    Raises OSError."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    userns = _mapped_user_namespace(base)
    trees: list[int | None] = []
    for path, owned, _by_view in sources:
        fd = syscalls.open_tree(path, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
        if owned:
            try:
                syscalls.mount_setattr(fd, syscalls.MOUNT_ATTR_IDMAP, userns)
            except OSError:
                os.close(fd)  # this file system cannot be id-mapped (overlay, FUSE, NFS, …): copied below
                trees.append(None)
                continue
        trees.append(fd)
    os.close(userns)
    copies = [(os.open(each.path, os.O_PATH), index) for index, each in enumerate(sources) if trees[index] is None]
    beside = [(os.open(os.path.dirname(each.path), os.O_PATH), index) for index, each in enumerate(sources) if each.by_view]
    syscalls.mount("isolation-stage", mount_point, "tmpfs", syscalls.MS_NOSUID, "mode=0711")
    for directory, index in beside:
        if (viewed := _of_view(directory, os.path.basename(sources[index].path), f"{mount_point}/view{index}")) >= 0:
            os.close(trees[index] or -1)
            trees[index] = viewed
        os.close(directory)
    for index, tree in enumerate(trees):
        target = f"{mount_point}/{index}"
        if tree is None:
            continue
        if stat.S_ISDIR(os.fstat(tree).st_mode):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC))
        syscalls.move_mount(tree, target)
        os.close(tree)
    for source, index in copies:
        _copy_shifted(f"/proc/self/fd/{source}", f"{mount_point}/{index}", sources[index][0], base)
        os.close(source)


def _of_view(directory: int, name: str, place: str) -> int:
    """A descriptor of the file in a view of its directory; -1 on a file system that cannot have one."""
    os.mkdir(place)
    os.mkdir(f"{place}/empty")
    try:
        syscalls.mount("overlay", place, "overlay", syscalls.MS_NODEV | syscalls.MS_NOSUID,
                       overlay_view(f"{place}/empty", f"/proc/self/fd/{directory}"))  # fmt: skip
        return syscalls.open_tree(f"{place}/{name}", syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
    except OSError:
        return -1


def _mapped_user_namespace(base: int) -> int:
    """A descriptor of a user namespace with the range's maps; a process must be in it while they are written."""
    pid, pidfd = syscalls.clone(syscalls.CLONE_NEWUSER)
    if pid == 0:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        while True:
            signal.pause()
    try:
        identity.map_range(pid, base)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pidfd)


def _copy_shifted(source: str, target: str, name: str, base: int) -> None:
    """A copy whose owners are in the range. Raises OSError when it is too large to be made for every supervisor."""
    import shutil  # late: with all that it can unpack it takes long

    files = size = 0
    if not os.path.isdir(source):
        shutil.copy2(source, target)
        os.chown(target, base, base)
        return
    for directory, _names, found in os.walk(source):
        files += len(found)
        with contextlib.suppress(OSError):
            size += sum(os.lstat(os.path.join(directory, file)).st_size for file in found)
        if files > _COPY_FILES or size > _COPY_BYTES:
            raise OSError(
                f"{name} lies on a file system that cannot be id-mapped, and is too large to copy "
                f"(over {_COPY_FILES} files or {_COPY_BYTES >> 30}G); run as an ordinary user instead"
            )
    shutil.copytree(source, target, symlinks=True, ignore=_irregular, ignore_dangling_symlinks=True)
    for directory, directories, found in os.walk(target):
        for path in [directory, *(os.path.join(directory, item) for item in directories + found)]:
            status = os.lstat(path)
            shift = base if status.st_uid < identity.RANGE_SIZE else 0
            os.lchown(path, status.st_uid + shift, status.st_gid + shift)
            if not stat.S_ISLNK(status.st_mode):
                os.chmod(path, stat.S_IMODE(status.st_mode))


def _irregular(directory: str, names: list[str]) -> list[str]:
    """Sockets, FIFOs and devices: nothing that can be copied."""
    kinds = (stat.S_ISREG, stat.S_ISDIR, stat.S_ISLNK)
    modes = ((name, os.lstat(os.path.join(directory, name)).st_mode) for name in names)
    return [name for name, mode in modes if not any(kind(mode) for kind in kinds)]
