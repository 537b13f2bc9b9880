"""The sandbox's own loopback interface."""

from __future__ import annotations

import errno
import struct

from isolation.linux import syscalls
from isolation.linux.syscall_script import SyscallScript
from isolation.plain import os, socket

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def write_loopback_up(script: SyscallScript) -> None:
    """Bring `lo` up in the current network namespace, by ioctl (netdevice(7)): 0.1 ms where netlink takes 4. It has no flags
    yet that could be lost."""
    request = script.memory(struct.pack("16sH22x", b"lo", _IFF_UP))
    sock = script.call("socket", socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0, about="the loopback interface")
    script.call("ioctl", sock, _SIOCSIFFLAGS, request, about="the loopback interface")
    script.call("close", sock)


def write_open_low_ports(script: SyscallScript) -> None:
    """Let the guest, which has no capabilities, bind ports below 1024 of its own network (ip(7)). A convenience for suites
    that are run as root; older kernels lack it."""
    path = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
    file = script.call("openat", syscalls.AT_FDCWD, path, os.O_WRONLY | os.O_CLOEXEC, 0, accept_any=True)
    script.call("write", file, "0", 1, accept=(errno.EBADF,), about=path)
    script.call("close", file, accept_any=True)
