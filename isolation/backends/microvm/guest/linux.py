"""The system calls that Python has no function for, as the agent of a virtual machine needs them. x86_64 and aarch64."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Sequence

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_MOVE = 8192
MS_PRIVATE = 1 << 18

_PR_CAPBSET_DROP = 24
_PR_SET_SECUREBITS = 28
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAP_SETFCAP = 31
# As the namespace backend: uid 0 means nothing, for good (capabilities(7)).
_SECUREBITS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5
_CAPABILITY_VERSION_3 = 0x20080522

_RNDADDENTROPY = 0x40085203  # random(4)
_RNDRESEEDCRNG = 0x5207
_SIOCGIFFLAGS = 0x8913  # netdevice(7)
_SIOCSIFFLAGS = 0x8914
_SIOCSIFADDR = 0x8916
_SIOCSIFNETMASK = 0x891C
_SIOCADDRT = 0x890B
_IFF_UP = 1
_RTF_UP_GATEWAY = 3

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError."""
    arguments = [os.fsencode(text) if text else None for text in (source, target, fstype)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(data) if data else None)
    _check(result, f"mount {target}")


def umount(target: str) -> None:
    """umount2(2), lazily. Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), 2), f"umount {target}")


def become(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Become an ordinary user, or a root that means nothing: all capabilities but one are given up, for good.

    CAP_SETFCAP stays for who is root: without it uid 0 could not be mapped into a user namespace below
    (user_namespaces(7)), and sandboxes could not be made inside of this machine. Raises OSError.
    """
    _check(_libc.prctl(_PR_SET_SECUREBITS, _SECUREBITS, 0, 0, 0), "securebits")
    capability = 0
    while (uid == 0 and capability == _CAP_SETFCAP) or _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1  # until EINVAL: one past the last that this kernel knows
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)  # takes no capability away: SECBIT_NO_SETUID_FIXUP
    kept = 1 << _CAP_SETFCAP if uid == 0 else 0
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = struct.pack("=6I", kept, kept, kept, 0, 0, 0)
    _check(_libc.capset(header, data), "capset")
    if kept:
        _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_SETFCAP, 0, 0), "ambient capability")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def restart() -> None:
    """Restart the machine at once (reboot(2)), which the host takes for its end."""
    _check(_libc.reboot(0x01234567), "reboot")


def add_entropy(seed: bytes) -> None:
    """Mix `seed` into the kernel's random pool, and make every generator start anew from it (random(4))."""
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("=ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(fd, _RNDRESEEDCRNG, 0)
    finally:
        os.close(fd)


def interface_up(name: bytes) -> None:
    """Bring a network interface up. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH22x", name, 0)
        (flags,) = struct.unpack("16xH22x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | _IFF_UP))


def interface_address(name: bytes, address: str, netmask: str) -> None:
    """Give an interface an IPv4 address (netdevice(7)). Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, netmask)):
            fcntl.ioctl(sock, request, struct.pack("16s16s8x", name, _sockaddr(value)))


def default_route(gateway: str) -> None:
    """Send everything else by `gateway` (struct rtentry of linux/route.h). Raises OSError."""
    nowhere = _sockaddr("0.0.0.0")
    entry = struct.pack("=8x16s16s16sH62x", nowhere, _sockaddr(gateway), nowhere, _RTF_UP_GATEWAY)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCADDRT, entry)


def _sockaddr(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
