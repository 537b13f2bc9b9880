"""What a process gives up, for good and for all its children, before it runs anything of the guest's.

Order matters: capabilities last need CAP_SETPCAP, no_new_privs is what lets an ordinary process restrict itself,
and the system call filter comes last since it refuses some of the calls before it.
"""

from __future__ import annotations

import errno
import struct

from isolation.linux import seccomp, syscalls
from isolation.linux.syscall_script import SixthArgument, SyscallScript
from isolation.plain import os

# landlock(7): the rights by which a file or directory is changed, and the ABI that brought them.
_FS_WRITE_FILE = 1 << 1
_FS_REMOVE_AND_MAKE = 0x1FF0
_FS_REFER = 1 << 13  # ABI 2; denied unless handled and allowed
_FS_TRUNCATE = 1 << 14  # ABI 3
_SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0  # ABI 6
_SCOPE_SIGNAL = 1 << 1
LANDLOCK_LEAST_ABI = 2  # ABI 1 has no way to allow a rename between directories

_CAP_SETFCAP = 31
_CAPABILITY_VERSION_3 = 0x20080522
_RULE_PATH_BENEATH = 1
# SECBIT_NOROOT and SECBIT_NO_SETUID_FIXUP, each with its lock, and KEEP_CAPS locked at "no": uid 0 means nothing.
_SECUREBITS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5
_CAPABILITIES_AT_MOST = 64


def write_drop_capabilities(script: SyscallScript, *, keep_setfcap: bool) -> None:
    """Every set empty, the bounding set first; root inside is then an ordinary user (capabilities(7)).

    One may stay, and survive execve(2): whoever has uid 0 and wants to nest must hold CAP_SETFCAP to map that uid into a
    namespace below (user_namespaces(7), since Linux 5.12). Over files of its own tree, which are all nosuid, it is of no
    other use.
    """
    script.call("prctl", syscalls.PR_SET_SECUREBITS, _SECUREBITS, 0, 0, 0, about="securebits")
    for capability in range(_CAPABILITIES_AT_MOST):
        if not (keep_setfcap and capability == _CAP_SETFCAP):
            # EINVAL: past the last that this kernel knows.
            script.call("prctl", syscalls.PR_CAPBSET_DROP, capability, 0, 0, 0, accept=(errno.EINVAL,), about="bounding set")
    script.call("prctl", syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, about="ambient set")
    kept = 1 << _CAP_SETFCAP if keep_setfcap else 0
    header = script.memory(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    script.call("capset", header, script.memory(struct.pack("=6I", kept, kept, kept, 0, 0, 0)), about="capabilities")
    if keep_setfcap:
        raise_one = syscalls.PR_CAP_AMBIENT_RAISE
        script.call("prctl", syscalls.PR_CAP_AMBIENT, raise_one, _CAP_SETFCAP, 0, 0, about="ambient set")


def write_no_new_privileges(script: SyscallScript) -> None:
    """setuid programs and file capabilities have no effect from here on."""
    script.call("prctl", syscalls.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, about="no_new_privs")


def write_restrict_to_root(script: SyscallScript, abi: int) -> None:
    """Landlock: files may be changed beneath the new root only.

    What is reachable without a path from it, by a magic link such as /proc/self/exe (CVE-2019-5736) or
    /proc/self/fd/0, is the host's, and stays as it is. From ABI 6 on, abstract unix sockets of the
    host are closed too, which matters with the host's network.
    """
    handled = _FS_WRITE_FILE | _FS_REMOVE_AND_MAKE | _FS_REFER
    if abi >= 3:
        handled |= _FS_TRUNCATE
    scoped = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if abi >= 6 else 0
    attributes = script.memory(struct.pack("=3Q", handled, 0, scoped))
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8  # older kernels know less of it
    ruleset = script.call("landlock_create_ruleset", attributes, size, 0, about="landlock")
    # Its sixth argument and its result are a struct landlock_path_beneath_attr: allowed_access and parent_fd.
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    root = script.call("openat", syscalls.AT_FDCWD, "/", flags, 0, 0, handled, about="landlock")
    script.call("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, SixthArgument(root.step), 0, about="landlock")
    script.call("landlock_restrict_self", ruleset, 0, about="landlock")
    script.call("close", root)
    script.call("close", ruleset)


def write_filter_system_calls(script: SyscallScript, program: bytes) -> None:
    """seccomp, from the compiled profile; the last step."""
    seccomp.write_install(script, program)
