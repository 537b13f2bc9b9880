"""Seeing anew what has changed on the host, in a live sandbox: overlayfs remembers names that it has looked up, and those
that were not there, and does not ask the layers below again.

It forgets them, but for what is in use, when its superblock is reconfigured, be it with nothing that differs
(reconfigure_super() in the kernel's fs/super.c calls shrink_dcache_sb()). No mount is exchanged, so open files, working
directories and layers that are kept stay as they are, and any kernel can do it. A process of the supervisor's own does, with
the rights of the user namespace that owns the mounts; fspick(2) is for the superblock alone, so no attribute of a mount is
touched.

Copies of what others own (adoption.py) are brought up to date before.

The guest cannot mount anything. So whatever is mounted where one of these is looked for, without a symlink on the way, is
one of ours.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from isolation.backends.namespace.checkpoints import remount
from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import inherited
from isolation.backends.namespace.rootfs import adoption
from isolation.backends.namespace.rootfs.mounts import HIDDEN, Overlay, adopted
from isolation.linux import syscalls
from isolation.plain import os, socket


def live(plan: Plan, mounts: int, control_socket: socket.socket) -> NoReturn:
    """Be that process: for what the host shows of its own to the sandbox with this mount namespace."""
    try:
        inherited.close_all_but({0, 1, 2, control_socket.fileno(), mounts})
        sys.meta_path.clear()
        remount.become_owner(plan, mounts)
        syscalls.setns(mounts, syscalls.CLONE_NEWNS)
        adopting = [item for item in plan.fresh if isinstance(item, Overlay) and item.adopts]
        if adopting:
            with contextlib.suppress(OSError):  # the rest is seen nevertheless
                _adopt_again(adopting, ranged=plan.identity.ranged)
        for target in plan.shared:
            with contextlib.suppress(OSError):  # the guest has put it elsewhere; or see below
                root = remount.mount_at(target)
                syscalls.reconfigure(root)  # one without an upper refuses (EROFS), when it has forgotten
        control_socket.send(remount.DONE)
    except OSError as error:
        remount.refuse(control_socket, error, [])
    finally:
        os._exit(0)


def _adopt_again(overlays: Sequence[Overlay], *, ranged: bool) -> None:
    """In a copy of the mounts, where that layer may be uncovered, and written to."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.umount2(HIDDEN, syscalls.MNT_DETACH)
    syscalls.mount("", "/", "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_NOSUID | syscalls.MS_NODEV)
    own = adoption.Own(0, None if ranged else 0)  # in this namespace
    for overlay in overlays:
        # Our mount of the host's directory is read-only; what the user may write there, another one tells.
        tree = syscalls.open_tree(overlay.lower, syscalls.OPEN_TREE_CLONE | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # on the host it is read-only, too
            syscalls.mount_setattr(tree, 0, attr_clr=syscalls.MOUNT_ATTR_RDONLY)
        os.fchdir(tree)
        found = adoption.look(".", own)
        adoption.copy_again(".", adopted(overlay.number), found.entries)
        os.close(tree)
