"""System calls that Python lacks, each as a function of the same name; unit tests replace them by a recorder.

All calls go through `ctypes.PyDLL`, which keeps the GIL: between fork(2) and PyOS_AfterFork_Child() the GIL's own
lock may be in any state, so a call that lets go of it could hang. Errors are OSError with the call's arguments
that matter; nothing here decides anything.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from typing import Any, Final

from isolation.plain import os

# Flags, from the kernel's uapi headers; alphabetical within a call.
AT_EMPTY_PATH = 0x1000
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
CLONE_FILES = 0x00000400
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
CLONE_NEWTIME = 0x00000080
CLONE_NEWUSER = 0x10000000
CLONE_NEWUTS = 0x04000000
CLONE_PARENT = 0x00008000
CLONE_PIDFD = 0x00001000
CLONE_VFORK = 0x00004000
CLONE_VM = 0x00000100
KEYCTL_JOIN_SESSION_KEYRING = 1
MAP_ANONYMOUS = 0x20
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
MAP_PRIVATE = 0x02
MAP_SHARED = 0x01
MNT_DETACH = 2
MOUNT_ATTR_IDMAP = 0x00100000
MOUNT_ATTR_NODEV = 0x00000004
MOUNT_ATTR_NOSUID = 0x00000002
MOUNT_ATTR_RDONLY = 0x00000001
MOVE_MOUNT_BENEATH = 0x00000200
MOVE_MOUNT_F_EMPTY_PATH = 0x00000004
MOVE_MOUNT_T_EMPTY_PATH = 0x00000040
MREMAP_FIXED = 2
MREMAP_MAYMOVE = 1
MS_BIND = 4096
MS_NODEV = 4
MS_NOEXEC = 8
MS_NOSUID = 2
MS_PRIVATE = 1 << 18
MS_RDONLY = 1
MS_REC = 16384
MS_REMOUNT = 32
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
OPEN_TREE_CLONE = 1
PR_CAPBSET_DROP = 24
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
PR_CAP_AMBIENT_RAISE = 2
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_NO_NEW_PRIVS = 38
PR_SET_PDEATHSIG = 1
PR_SET_SECUREBITS = 28
STATX_ATTR_MOUNT_ROOT = 0x00002000

# Numbers that differ between architectures; those of 2019 and later (424 up) are the same everywhere.
MACHINE: Final = os.uname().machine  # the module `platform` takes long to import
_NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {"capset": 126, "clone": 56, "keyctl": 250, "pivot_root": 155, "signalfd4": 289, "statx": 332},
    "aarch64": {"capset": 91, "clone": 220, "keyctl": 219, "pivot_root": 41, "signalfd4": 74, "statx": 291},
}
_NR = _NUMBERS.get(MACHINE, {})
# struct stat: where mode, uid, gid and the two times are that utimensat(2) takes (<asm/stat.h>, <asm-generic/stat.h>).
STAT_OFFSETS = (24, 28, 32, 72) if MACHINE == "x86_64" else (16, 24, 28, 72)
_FSCONFIG_CMD_RECONFIGURE = 7
_FSPICK_CLOEXEC, _FSPICK_EMPTY_PATH = 1, 8
_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSCONFIG = 431
_NR_FSPICK = 433
_NR_CLOSE_RANGE = 436
_NR_MOUNT_SETATTR = 442
_NR_LANDLOCK_CREATE_RULESET = 444
_NR_LANDLOCK_ADD_RULE = 445
_NR_LANDLOCK_RESTRICT_SELF = 446

_libc = ctypes.PyDLL(None, use_errno=True)
_python = ctypes.pythonapi
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_size_t
_MAP_FAILED = ctypes.c_size_t(-1).value
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def supported_machine() -> bool:
    """Whether the syscall numbers of this processor are known here."""
    return bool(_NR)


def _fail(call: str, *about: object) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}({', '.join(str(item) for item in about)}): {os.strerror(number)}")


def _syscall(number: int, *arguments: Any) -> int:
    widened = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    return int(_libc.syscall(ctypes.c_long(number), *widened))


def mount(source: str, target: str, fstype: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    encoded = os.fsencode(data) if data else None
    if _libc.mount(os.fsencode(source), os.fsencode(target), os.fsencode(fstype), flags, encoded):
        raise _fail("mount", fstype or "bind", source, target, data)


def umount2(target: str, flags: int) -> None:
    """umount2(2)."""
    if _libc.umount2(os.fsencode(target), flags):
        raise _fail("umount2", target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    if _syscall(_NR["pivot_root"], ctypes.c_char_p(os.fsencode(new_root)), ctypes.c_char_p(os.fsencode(put_old))):
        raise _fail("pivot_root", new_root, put_old)


def unshare(flags: int) -> None:
    """unshare(2)."""
    if _libc.unshare(ctypes.c_int(flags)):
        raise _fail("unshare", hex(flags))


def setns(fd: int, flags: int) -> None:
    """setns(2)."""
    if _libc.setns(ctypes.c_int(fd), ctypes.c_int(flags)):
        raise _fail("setns", hex(flags))


def clone(flags: int) -> tuple[int, int]:
    """clone(2) as fork(2) does it, with `flags` and SIGCHLD: (pid, pidfd) in the parent, (0, -1) in the child.

    glibc's and CPython's fork handlers do not run, so the caller must be single-threaded.
    """
    pidfd = ctypes.c_int(-1)
    pid = _syscall(_NR["clone"], flags | CLONE_PIDFD | 17, 0, ctypes.byref(pidfd), 0, 0)
    if pid < 0:
        raise _fail("clone", hex(flags))
    return pid, pidfd.value


def clone_function(function: int, stack: int, flags: int, argument: int) -> tuple[int, int]:
    """clone(3): run the machine code at `function` on `stack` in a new process; (pid, pidfd)."""
    pidfd = ctypes.c_int(-1)
    pid = _libc.clone(
        ctypes.c_void_p(function), ctypes.c_void_p(stack), ctypes.c_int(flags | CLONE_PIDFD), ctypes.c_void_p(argument),
        ctypes.byref(pidfd), None, None,
    )  # fmt: skip
    if pid < 0:
        raise _fail("clone", hex(flags))
    return int(pid), pidfd.value


def fork_before() -> None:
    """PyOS_BeforeFork(): the interpreter's locks are taken, at-fork hooks run."""
    _python.PyOS_BeforeFork()


def fork() -> int:
    """glibc's fork(3), with its own handlers (malloc, stdio) and without Python's: see fork.py. -1 is an OSError."""
    pid = int(_libc.fork())
    if pid < 0:
        raise _fail("fork")
    return pid


def fork_after_child() -> None:
    """PyOS_AfterFork_Child(): from here on the child is an ordinary Python process."""
    _python.PyOS_AfterFork_Child()


def fork_after_parent() -> None:
    """PyOS_AfterFork_Parent(): the counterpart of `fork_before`."""
    _python.PyOS_AfterFork_Parent()


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2) with integer arguments."""
    result = int(_libc.prctl(option, arg2, arg3, arg4, arg5))
    if result < 0:
        raise _fail("prctl", option, arg2)
    return result


def set_name(name: str) -> None:
    """prctl(PR_SET_NAME): what ps(1) and top(1) show; 15 bytes at most."""
    buffer = ctypes.create_string_buffer(os.fsencode(name)[:15])
    _libc.prctl(PR_SET_NAME, ctypes.addressof(buffer), 0, 0, 0)


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """capset(2), version 3, of the calling thread."""
    header = _CapHeader(0x20080522, 0)
    masks = [effective, permitted, inheritable]
    words = (ctypes.c_uint32 * 6)(*(mask & 0xFFFFFFFF for mask in masks), *(mask >> 32 for mask in masks))
    if _syscall(_NR["capset"], ctypes.byref(header), ctypes.byref(words)):
        raise _fail("capset")


def open_tree(path: str, flags: int, dirfd: int = AT_FDCWD) -> int:
    """open_tree(2)."""
    fd = _syscall(_NR_OPEN_TREE, dirfd, ctypes.c_char_p(os.fsencode(path)), flags)
    if fd < 0:
        raise _fail("open_tree", path)
    return fd


def move_mount(from_fd: int, to_path: str) -> None:
    """move_mount(2) of the detached tree `from_fd` onto `to_path`."""
    empty, target = ctypes.c_char_p(b""), ctypes.c_char_p(os.fsencode(to_path))
    if _syscall(_NR_MOVE_MOUNT, from_fd, empty, AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH):
        raise _fail("move_mount", to_path)


def move_mount_onto(from_fd: int, to_fd: int, *, beneath: bool = False) -> None:
    """move_mount(2) of the detached tree `from_fd` onto the directory or file `to_fd`; with `beneath` (Linux 6.5), between
    the mount whose root that is and what it lies on."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH | (MOVE_MOUNT_BENEATH if beneath else 0)
    if _syscall(_NR_MOVE_MOUNT, from_fd, ctypes.c_char_p(b""), to_fd, ctypes.c_char_p(b""), flags):
        raise _fail("move_mount", from_fd, to_fd)


def reconfigure(root_fd: int) -> None:
    """fspick(2) and fsconfig(2): the file system whose mount has this root, with all as it is."""
    empty = ctypes.c_char_p(b"")
    context = _syscall(_NR_FSPICK, root_fd, empty, _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH)
    if context < 0:
        raise _fail("fspick", root_fd)
    try:
        if _syscall(_NR_FSCONFIG, context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0):
            raise _fail("fsconfig", root_fd)
    finally:
        os.close(context)


def statx_attributes(fd: int) -> int:
    """statx(2): stx_attributes of what `fd` is."""
    result = ctypes.create_string_buffer(256)
    if _syscall(_NR["statx"], fd, ctypes.c_char_p(b""), AT_EMPTY_PATH, 0, ctypes.byref(result)):
        raise _fail("statx", fd)
    return int.from_bytes(result.raw[8:16], sys.byteorder)


class _MountAttr(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


def mount_setattr(fd: int, attr_set: int, userns_fd: int = 0, *, attr_clr: int = 0, recursive: bool = False) -> None:
    """mount_setattr(2) of the mount that `fd` is."""
    attr = _MountAttr(attr_set, attr_clr, 0, userns_fd)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    size = ctypes.sizeof(attr)
    if _syscall(_NR_MOUNT_SETATTR, fd, ctypes.c_char_p(b""), flags, ctypes.byref(attr), size):
        raise _fail("mount_setattr", hex(attr_set))


def close_range(first: int, last: int) -> None:
    """close_range(2)."""
    if _syscall(_NR_CLOSE_RANGE, first, last, 0):
        raise _fail("close_range", first, last)


def signalfd(signals: int) -> int:
    """signalfd4(2), close-on-exec, for the signals in the bit mask `signals` (bit n-1 is signal n)."""
    mask = ctypes.c_uint64(signals)
    fd = _syscall(_NR["signalfd4"], -1, ctypes.byref(mask), 8, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise _fail("signalfd4")
    return fd


def tee(source: int, target: int, size: int) -> int:
    """tee(2), with SPLICE_F_NONBLOCK: how many bytes that wait in one pipe wait in the other, too."""
    count = int(_libc.tee(ctypes.c_int(source), ctypes.c_int(target), ctypes.c_size_t(size), ctypes.c_uint(2)))
    if count < 0:
        raise _fail("tee", source, target)
    return count


def epoll_create(flags: int) -> int:
    """epoll_create1(2)."""
    fd = int(_libc.epoll_create1(ctypes.c_int(flags)))
    if fd < 0:
        raise _fail("epoll_create1")
    return fd


def epoll_add(epoll: int, fd: int, events: int, data: int) -> None:
    """epoll_ctl(EPOLL_CTL_ADD)."""
    event = struct.pack("=IQ" if MACHINE == "x86_64" else "@IQ", events, data)  # packed there only
    if _libc.epoll_ctl(ctypes.c_int(epoll), 1, ctypes.c_int(fd), ctypes.create_string_buffer(event, len(event))):
        raise _fail("epoll_ctl", epoll, fd)


def timerfd_create(clock: int, flags: int) -> int:
    """timerfd_create(2)."""
    fd = int(_libc.timerfd_create(ctypes.c_int(clock), ctypes.c_int(flags)))
    if fd < 0:
        raise _fail("timerfd_create", clock)
    return fd


def timerfd_settime(fd: int, value: tuple[int, int], interval: tuple[int, int]) -> None:
    """timerfd_settime(2), relative; both in seconds and nanoseconds."""
    times = (ctypes.c_long * 4)(*interval, *value)
    if _libc.timerfd_settime(ctypes.c_int(fd), 0, ctypes.byref(times), None):
        raise _fail("timerfd_settime", fd)


class _LandlockRuleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _LandlockPathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 where it has none (landlock(7))."""
    return max(0, _syscall(_NR_LANDLOCK_CREATE_RULESET, 0, 0, 1))


def landlock_create_ruleset(handled_fs: int, scoped: int, *, size: int) -> int:
    """landlock_create_ruleset(2), with the attribute cut to `size` bytes, which is how older kernels know it."""
    attr = _LandlockRuleset(handled_fs, 0, scoped)
    fd = _syscall(_NR_LANDLOCK_CREATE_RULESET, ctypes.byref(attr), size, 0)
    if fd < 0:
        raise _fail("landlock_create_ruleset", hex(handled_fs))
    return fd


def landlock_restrict_self(ruleset: int) -> None:
    """landlock_restrict_self(2)."""
    if _syscall(_NR_LANDLOCK_RESTRICT_SELF, ruleset, 0):
        raise _fail("landlock_restrict_self")


def mprotect(address: int, size: int, protection: int) -> None:
    """mprotect(2) of whole pages."""
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(protection)):
        raise _fail("mprotect", hex(protection))


def mmap(address: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    """mmap(2): where it is."""
    made = int(_libc.mmap(*map(ctypes.c_void_p, (address, size)), protection, flags, fd, ctypes.c_long(offset)))
    if made == _MAP_FAILED:
        raise _fail("mmap", hex(address), size)
    return made


def mremap_onto(address: int, size: int, place: int) -> None:
    """mremap(2), in place of what is at `place`: there is no moment at which nothing is."""
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    if int(_libc.mremap(*map(ctypes.c_void_p, (address, size, size)), flags, ctypes.c_void_p(place))) == _MAP_FAILED:
        raise _fail("mremap", hex(place), size)


def mincore(address: int, size: int) -> bytes:
    """mincore(2): a byte for each page, whose lowest bit tells whether it is in memory."""
    pages = ctypes.create_string_buffer(-(-size // os.sysconf("SC_PAGE_SIZE")))
    if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages):
        raise _fail("mincore", hex(address), size)
    return pages.raw


def clear_memory(start: int, end: int) -> None:
    """Overwrite the calling process's own bytes from `start` to `end` with zeroes."""
    ctypes.memset(start, 0, end - start)


def clearenv() -> None:
    """clearenv(3): the C library forgets the environment that it started with."""
    _libc.clearenv()


def malloc_trim() -> None:
    """malloc_trim(3): give unused memory back to the kernel. Only glibc has it."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
