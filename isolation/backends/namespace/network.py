"""The sandbox's own loopback interface."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def loopback_up() -> None:
    """Bring `lo` up in the current network namespace, by ioctl (netdevice(7)): 0.2 ms where netlink takes 4."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH22x", b"lo", 0)
        (flags,) = struct.unpack("16xH22x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def open_low_ports(proc: str = "/proc") -> None:
    """Let the guest, which has no capabilities, bind ports below 1024 of its own network (ip(7))."""
    try:
        fd = os.open(f"{proc}/sys/net/ipv4/ip_unprivileged_port_start", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return  # a convenience for suites that are run as root; older kernels lack it
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)
