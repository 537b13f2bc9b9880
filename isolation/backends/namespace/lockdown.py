"""What a process gives up, for good and for all its children, before it runs anything of the guest's.

Order matters: capabilities last need CAP_SETPCAP, no_new_privs is what lets an ordinary process restrict itself, and
the system call filter comes last since it refuses some of the calls before it.
"""

from __future__ import annotations

import os

from isolation.backends.namespace import seccomp, syscalls

# landlock(7): the rights by which a file or directory is changed, and the ABI that brought them.
_FS_WRITE_FILE = 1 << 1
_FS_REMOVE_AND_MAKE = 0x1FF0
_FS_REFER = 1 << 13  # ABI 2; denied unless handled and allowed
_FS_TRUNCATE = 1 << 14  # ABI 3
_SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0  # ABI 6
_SCOPE_SIGNAL = 1 << 1
LANDLOCK_LEAST_ABI = 2  # ABI 1 has no way to allow a rename between directories

_CAP_SETFCAP = 31
# SECBIT_NOROOT and SECBIT_NO_SETUID_FIXUP, each with its lock, and KEEP_CAPS locked at "no": uid 0 means nothing.
_SECUREBITS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5



def drop_capabilities(*, keep_setfcap: bool) -> None:
    """Every set empty, the bounding set first; root inside is then an ordinary user (capabilities(7)).

    One may stay, and survive execve(2): whoever has uid 0 and wants to nest must hold CAP_SETFCAP to map that uid into a
    namespace below (user_namespaces(7), since Linux 5.12). Over files of its own tree, which are all nosuid, it is of no
    other use.
    """
    syscalls.prctl(syscalls.PR_SET_SECUREBITS, _SECUREBITS)
    capability = 0
    while True:
        try:
            if not (keep_setfcap and capability == _CAP_SETFCAP):
                syscalls.prctl(syscalls.PR_CAPBSET_DROP, capability)
        except OSError:
            break  # EINVAL: one past the last that this kernel knows
        capability += 1
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    kept = 1 << _CAP_SETFCAP if keep_setfcap else 0
    syscalls.capset(kept, kept, kept)
    if keep_setfcap:
        syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, _CAP_SETFCAP)


def no_new_privileges() -> None:
    """setuid programs and file capabilities have no effect from here on."""
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def restrict_to_root(abi: int) -> None:
    """Landlock: files may be changed beneath the new root only.

    What is reachable without a path from it, by a magic link such as /proc/self/exe (CVE-2019-5736) or
    /proc/self/fd/0, is the host's, and stays as it is. From ABI 6 on, abstract unix sockets of the
    host are closed too, which matters with the host's network.
    """
    handled = _FS_WRITE_FILE | _FS_REMOVE_AND_MAKE | _FS_REFER
    if abi >= 3:
        handled |= _FS_TRUNCATE
    scoped = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if abi >= 6 else 0
    ruleset = syscalls.landlock_create_ruleset(handled, scoped, size=24 if abi >= 6 else 16 if abi >= 4 else 8)
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.landlock_add_path(ruleset, root, handled)
        syscalls.landlock_restrict_self(ruleset)
    finally:
        os.close(root)
        os.close(ruleset)


def filter_system_calls(program: bytes) -> None:
    """seccomp, from the compiled profile; the last step."""
    seccomp.install(program)
