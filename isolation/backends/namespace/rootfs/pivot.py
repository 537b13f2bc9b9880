"""From the host's file tree to the sandbox's.

The base: a tmpfs becomes the root, with the host's tree at /old; the base operations build /new; then /new, sealed
read-only, becomes the root, and the host's tree is detached. The sources of all operations were resolved on the host, so
no symlink is followed here.

The fresh part: the store is mounted, the fresh operations run, and what only they needed is covered. The store lives on
beneath what was made of it, and in one directory descriptor that only PID 1 and the host hold.
"""

from __future__ import annotations

from collections.abc import Sequence

from isolation.backends.namespace.rootfs.mounts import (
    ADOPTED,
    BASE,
    DEEPEST,
    EMPTY,
    HIDDEN,
    LAYERS,
    LOWER,
    NEW_ROOT,
    OLD_ROOT,
    PRIVATE,
    PROC,
    BaseOperation,
    FreshOperation,
    Ground,
    store_of,
)
from isolation.linux import syscalls
from isolation.linux.syscall_script import Result, SyscallScript
from isolation.plain import os

_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV


def build_base(operations: Sequence[BaseOperation], mount_point: str) -> None:
    """In a new mount namespace that is a copy of the host's: change into the new root. Raises OSError."""
    # Mount events must not travel to the host; a new user namespace has made everything slave already, and private
    # keeps the detaching below from travelling anywhere either (bubblewrap).
    syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("isolation", mount_point, "tmpfs", _FLAGS, "mode=0755")
    os.chdir(mount_point)
    os.mkdir("." + OLD_ROOT)
    syscalls.pivot_root(".", "." + OLD_ROOT)
    os.chdir("/")
    os.mkdir(NEW_ROOT, 0o755)
    syscalls.mount(NEW_ROOT, NEW_ROOT, "", syscalls.MS_BIND)
    for directory in (HIDDEN, EMPTY, BASE, LOWER, ADOPTED, *map(store_of, range(1, DEEPEST + 1))):
        os.mkdir(NEW_ROOT + directory, 0o755)
    _execute(operations)
    # A /proc of a new PID namespace may be mounted only where another is wholly visible in the same mount namespace
    # (kernel: mount_too_revealing), so the host's stays until then, and is covered with the rest of HIDDEN.
    os.mkdir(NEW_ROOT + PROC, 0o755)
    syscalls.mount(OLD_ROOT + "/proc", NEW_ROOT + PROC, "", syscalls.MS_BIND | syscalls.MS_REC)
    syscalls.mount("", NEW_ROOT, "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY | _FLAGS)
    syscalls.umount2(OLD_ROOT, syscalls.MNT_DETACH)
    os.chdir(NEW_ROOT)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/")
    # CVE-2024-21626: a working directory outside of the root is the whole host.
    if not os.getcwd().startswith("/"):
        raise OSError("the working directory is outside of the sandbox's root")


def write_fresh(
    script: SyscallScript, operations: Sequence[FreshOperation], store_size: int | None, level: int = 1
) -> Result:
    """What a sandbox writes to, to be made in a mount namespace with the base as its root, or (level 2 and more) that of a
    template. The result is a descriptor of its store."""
    here = syscalls.AT_FDCWD
    ground = Ground(level)
    size = f",size={store_size},nr_inodes={max(4096, store_size // 2048)}" if store_size else ""
    script.call("mount", "isolation", ground.store, "tmpfs", _FLAGS, f"mode=0755{size}", about="the store")
    script.call("mkdirat", here, ground.store + LAYERS, 0o755)
    script.call("mkdirat", here, ground.store + PRIVATE, 0o755)
    store = script.call("openat", here, ground.store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, 0)
    for operation in operations:
        operation.write(script, ground)
    return store


def write_open_mounts(script: SyscallScript) -> Result:
    """Keep the mount namespace as it is now, for forks of what is being made, and go on in a copy. The result is a
    descriptor of it. The /proc in it that allows for others is one of this PID namespace from here on, not the host's."""
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    script.call("mount", "proc", PROC, "proc", flags, 0, about="a /proc for forks")
    mounts = script.call("openat", syscalls.AT_FDCWD, "/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC, 0)
    script.call("unshare", syscalls.CLONE_NEWNS, about="a mount namespace")
    return mounts


def write_cover(script: SyscallScript) -> None:
    """Put what only the construction needs out of the guest's sight. Covered, not detached: the guest's own user namespace
    can do neither, and detaching waits for the whole machine (synchronize_rcu)."""
    script.call("mount", EMPTY, HIDDEN, "", syscalls.MS_BIND, 0)


def _execute(operations: Sequence[BaseOperation]) -> None:
    for operation in operations:
        try:
            operation.execute()
        except OSError as error:
            raise OSError(error.errno, f"{operation.describe()}: {error.strerror}") from error
