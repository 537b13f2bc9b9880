"""From a clone to a sealed sandbox: the steps, in their order, and why it is that order."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket

from isolation.backends.namespace import identity, lockdown, network, syscalls, tree
from isolation.backends.namespace.plan import Plan


def ask_keeper(leash: socket.socket, request: bytes) -> None:
    """One byte there, one back: the keeper has mapped ids ("m", "i"), or put this process into its cgroup ("c")."""
    leash.send(request)
    if leash.recv(1) != request:
        os._exit(1)


def become_root_of_namespace(plan: Plan, leash: socket.socket) -> None:
    """In a clone with a new user namespace: have ids in it. Real root keeps its host's, until `leave_host_ids`."""
    who = plan.identity
    if who.ranged:
        ask_keeper(leash, b"m")  # only real root, outside, can map a range
    else:
        identity.map_own_ids(0, 0, who.uid, who.gid)  # devpts wants a mapped root (bubblewrap)


def leave_host_ids(plan: Plan) -> None:
    """In every process of a sandbox, before it makes a file: real root becomes the root of the mapped range."""
    if plan.identity.ranged:
        identity.become_mapped_root()


def build_base(plan: Plan) -> None:
    """In a new mount namespace: the part of the tree that never changes. Raises OSError."""
    leave_host_ids(plan)
    os.umask(0)
    tree.build_base(plan.base, plan.mount_point)


def enter_base(plan: Plan, base: int) -> None:
    """In a clone of a keeper that has a base: start from a copy of its mount namespace."""
    leave_host_ids(plan)
    syscalls.setns(base, syscalls.CLONE_NEWNS)
    syscalls.unshare(syscalls.CLONE_NEWNS)


def build_fresh(plan: Plan, umask: int) -> int:
    """What is this sandbox's alone: keyring, files, network, limits. Returns a descriptor of its store."""
    if "keyring" in plan.defences:
        _fresh_keyring()
    os.umask(0)
    store = tree.build_fresh(plan.fresh, plan.limits.disk)
    os.umask(umask)
    if plan.own_network:
        network.loopback_up()
        network.open_low_ports()
    for number, value in plan.rlimits:
        _set_rlimit(number, value)
    return store


def seal(plan: Plan, leash: socket.socket) -> None:
    """The end of all privileges, for this process and its children."""
    # The guest's own user namespace, below the one that owns the mounts: even with capabilities in its own, it has none
    # over them.
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    who = plan.identity
    if who.ranged:
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # else its maps belong to host root
        ask_keeper(leash, b"i")
    else:
        identity.map_own_ids(who.uid, who.gid, 0, 0)
    if "capabilities" in plan.defences:
        lockdown.drop_capabilities(keep_setfcap=plan.nesting and who.uid == 0)
    lockdown.no_new_privileges()
    if plan.landlock:
        lockdown.restrict_to_root(plan.landlock)
    if "seccomp" in plan.defences:
        lockdown.filter_system_calls(plan.filter)


def die_with_keeper() -> None:
    """The keeper is single-threaded, so its death is the death of the thread that made this process (prctl(2))."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)


def _fresh_keyring() -> None:
    """Keyrings are in no namespace (keyrings(7)): leave the host's session keyring. A kernel without keys has none to
    leave, and an outer sandbox may have refused the call along with all others on keys."""
    try:
        syscalls.join_session_keyring()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise


def _set_rlimit(number: int, value: int) -> None:
    _soft, hard = resource.getrlimit(number)
    lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(number, (lower, lower))
