"""From the host's file tree to the sandbox's: two pivots with the plan's operations between them.

1. A tmpfs, the *store*, becomes the root, with the host's tree at /old. The sources of all operations were resolved
   on the host, so no symlink is followed here.
2. The operations build /new.
3. /new, sealed read-only, becomes the root; the store and the host's tree are detached. The store lives on beneath the
   overlays, and in one directory descriptor that only PID 1 and the host hold.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from isolation.backends.namespace import syscalls
from isolation.backends.namespace.operations import EMPTY, LAYERS, NEW, OLD, PRIVATE, Operation


def build(operations: Sequence[Operation], store_size: int | None, mount_point: str) -> int:
    """Change into the new root. Returns a descriptor of the store. Raises OSError, naming the operation."""
    # Mount events must not travel to the host; a new user namespace has made everything slave already, and private
    # keeps the detaching below from travelling anywhere either (bubblewrap).
    syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    size = f",size={store_size},nr_inodes={max(4096, store_size // 2048)}" if store_size else ""
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("isolation", mount_point, "tmpfs", flags, f"mode=0755{size}")
    os.chdir(mount_point)
    os.mkdir("." + OLD)
    syscalls.pivot_root(".", "." + OLD)
    os.chdir("/")
    for directory in (NEW, LAYERS, PRIVATE, EMPTY):
        os.mkdir(directory, 0o755)
    store = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    syscalls.mount(NEW, NEW, "", syscalls.MS_BIND)
    for operation in operations:
        try:
            operation.execute()
        except OSError as error:
            raise OSError(error.errno, f"{operation.describe()}: {error.strerror}") from error
    syscalls.mount("", NEW, "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY | flags)
    syscalls.umount2(OLD, syscalls.MNT_DETACH)
    os.chdir(NEW)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/")
    # CVE-2024-21626: a working directory outside of the root is the whole host.
    if not os.getcwd().startswith("/"):
        raise OSError("the working directory is outside of the sandbox's root")
    return store
