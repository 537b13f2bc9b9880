"""What an enemy tries, as Python source that runs inside. Each prints BREACH and what it got, or nothing.

`{…}` is filled in with str.format_map, from what the host side of the test has set up.
"""

from __future__ import annotations

HOST_FILE = """
try:
    print("BREACH read", open({path!r}).read())
except OSError:
    pass
"""

HOST_DIRECTORY_BY_FD = """
import os
for fd in range(64):
    try:
        os.fchdir(fd)
        if os.path.isdir("../../../../../../../../sys/kernel"):
            print("BREACH a directory descriptor leads out:", fd)
    except OSError:
        pass
"""

TCP = """
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), 2)
    print("BREACH connected to the host's TCP port")
except OSError:
    pass
"""

UDP = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
try:
    s.sendto(b"leak", ("127.0.0.1", {udp}))
except OSError:
    pass
"""

ABSTRACT = """
import socket
s = socket.socket(socket.AF_UNIX)
try:
    s.connect("\\0" + {abstract!r})
    print("BREACH connected to an abstract socket")
except OSError:
    pass
"""

PATHNAME = """
import socket
s = socket.socket(socket.AF_UNIX)
try:
    s.connect({socket!r})
    print("BREACH connected to a unix socket of the host's")
except OSError:
    pass
"""

INHERITED_SOCKET = """
import os, socket
for fd in range(3, 256):
    try:
        s = socket.socket(fileno=os.dup(fd))
        if s.family == socket.AF_INET:
            s.connect(("127.0.0.1", {port}))
            print("BREACH an inherited socket reaches the host's network:", fd)
    except OSError:
        pass
"""

INHERITED_FILE = """
import os
for fd in range(3, 256):
    try:
        os.pwrite(fd, b"owned", 0)
    except OSError:
        pass
"""

HOST_PROCESSES = """
import os
seen = [int(name) for name in os.listdir("/proc") if name.isdigit()]
if {pid} in seen and {pid} > 50 or len(seen) > 20:
    print("BREACH host processes are visible", seen)
try:
    os.kill({pid}, 0)
    if {pid} > 50:
        print("BREACH a host process can be signalled")
except (ProcessLookupError, PermissionError):
    pass
"""

ENVIRONMENT = """
import glob
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        if {secret!r}.encode() in open(path, "rb").read():
            print("BREACH secret in", path)
    except OSError:
        pass
"""

MEMORY = """
import glob, os, re
for maps in glob.glob("/proc/[0-9]*/maps"):
    pid = maps.split("/")[2]
    if pid == str(os.getpid()):
        continue  # it has it in this source
    try:
        memory = open("/proc/" + pid + "/mem", "rb", 0)
        for line in open(maps):
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if match:
                start, end = int(match[1], 16), int(match[2], 16)
                memory.seek(start)
                if {secret!r}.encode() in memory.read(end - start):
                    print("BREACH secret in the memory of", pid)
    except OSError:
        pass
"""

INIT_IS_OPEN = """
import os
for name in ("exe", "root", "cwd"):
    try:
        print("BREACH /proc/1/" + name, os.readlink("/proc/1/" + name))
    except OSError:
        pass
try:
    print("BREACH fds of PID 1", os.listdir("/proc/1/fd"))
except OSError:
    pass
"""

KILL_INIT = """
import os, signal
for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP, signal.SIGUSR1, signal.SIGSEGV):
    try:
        os.kill(1, number)
    except OSError:
        pass
"""

REOPEN_STDIN = """
import os
try:
    fd = os.open("/proc/self/fd/0", os.O_WRONLY)
    os.write(fd, b"owned")
    print("BREACH a host file was opened for writing")
except OSError:
    pass
"""

CAPABILITIES = """
for line in open("/proc/self/status"):
    if line.startswith("Cap") and int(line.split()[1], 16):
        print("BREACH", line.strip())
"""

NO_NEW_PRIVILEGES = """
for line in open("/proc/self/status"):
    if line.startswith("NoNewPrivs") and line.split()[1] != "1":
        print("BREACH", line.strip())
"""

SYSTEM_CALLS = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    ctypes.set_errno(0)
    if libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]) >= 0:
        print("BREACH system call", name)
if os.uname().machine == "x86_64":
    call("unshare user", 272, 0x10000000)
    call("unshare mount", 272, 0x20000)
    call("keyctl join", 250, 1, 0, 0, 0, 0)
    call("bpf", 321, 0, 0, 0)
    call("io_uring_setup", 425, 1, ctypes.create_string_buffer(120))
    call("perf_event_open", 298, 0, 0, -1, -1, 0)
    call("userfaultfd", 323, 1)
    call("clone3", 435, 0, 0)
for family in (38, 40, 17, 29):
    try:
        socket.socket(family, socket.SOCK_SEQPACKET if family == 38 else socket.SOCK_DGRAM)
        print("BREACH socket family", family)
    except OSError:
        pass
"""

NAMESPACES = """
import os
host = {namespaces!r}
for name, inode in host.items():
    if os.readlink("/proc/self/ns/" + name) == inode:
        print("BREACH shares namespace", name)
"""

COUNTERS = """
import ctypes, mmap, resource
libc = ctypes.CDLL(None, use_errno=True)

def take(what, most):
    held = 0
    while held < most and what() >= 0:
        held += 1
    return held

watches = take(lambda: libc.inotify_init1(0o2000000), {inotify})
if watches > {inotify} // 2:
    print("BREACH inotify instances", watches)
timer = ctypes.c_void_p()
timers = take(lambda: libc.timer_create(1, None, ctypes.byref(timer)), 10000)
if timers > 5000:
    print("BREACH pending signals", timers)
memory = mmap.mmap(-1, 6 << 20)
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
if libc.mlock(address, ctypes.c_size_t(6 << 20)) == 0:
    print("BREACH locked memory")
if resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 1 << 16:
    print("BREACH descriptors in flight")
"""

SHARED = """
import ctypes, os, platform, resource
libc = ctypes.CDLL(None, use_errno=True)
context = ctypes.c_ulong()
number = dict(x86_64=206, aarch64=0)[platform.machine()]
if libc.syscall(number, 1000, ctypes.byref(context)) == 0:
    print("BREACH requests for asynchronous I/O, which are counted for the whole machine")
terminals = 0
try:
    while terminals < 300:
        os.openpty()
        terminals += 1
except OSError:
    pass
if terminals > 260:
    print("BREACH terminals", terminals)
if resource.getrlimit(resource.RLIMIT_CORE) not in ((1, 1), (0, 0)):
    print("BREACH a core dump starts the host's handler")
"""

HOST_ID = """
uid_map = open("/proc/self/uid_map").read().split()
if uid_map[1] == "0" and {host_uid} == 0 and int(uid_map[2]) > 1000000:
    print("BREACH host ids", uid_map)
"""

SHADOW = """
for path in ("/etc/shadow", "/etc/gshadow", "/etc/ssh/ssh_host_ed25519_key", "/root/.ssh/id_rsa", "/root/.bashrc"):
    try:
        print("BREACH", path, len(open(path).read()))
    except OSError:
        pass
"""

PROC = """
import os
for name in {masked!r}:
    path = "/proc/" + name
    try:
        found = os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1)
    except OSError:
        continue
    if found:
        print("BREACH", path)
"""

DEVICES = """
import os, stat
allowed = {{"null", "zero", "full", "random", "urandom", "tty", "ptmx"}}
for directory, names, files in os.walk("/dev"):
    for name in files:
        path = os.path.join(directory, name)
        mode = os.lstat(path).st_mode
        if (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)) and name not in allowed and not path.startswith("/dev/pts/"):
            print("BREACH device", path)
try:
    os.mknod("/tmp/disk", 0o600 | stat.S_IFBLK, os.makedev(254, 0))
    open("/tmp/disk", "rb").read(1)
    print("BREACH made a device")
except OSError:
    pass
"""

# Whoever may write to a device may set its times, and a read-only mount keeps nobody from writing.
DEVICE_TIMES = """
import os
for name in ("null", "zero", "full", "random", "urandom"):
    try:
        os.utime("/dev/" + name)
        print("BREACH the times of a device of the host's", name)
    except OSError:
        pass
"""

HIDDEN_TREE = """
import os
for path in ("/.isolation/lower", "/.isolation/proc", "/.isolation/store", "/.isolation/base"):
    if os.path.exists(path):
        print("BREACH", path)
for pid in os.listdir("/proc"):
    if pid.isdigit():
        try:
            if os.listdir("/proc/" + pid + "/root/old"):
                print("BREACH old root")
        except OSError:
            pass
"""

WRITE_HOST = """
import os
for path in ({path!r}, "/etc/passwd", "/usr/bin/true", {executable!r}):
    try:
        with open(path, "ab") as file:
            file.write(b"owned")
    except OSError:
        pass
"""

# A page that is shared with the supervisor is a way to change what that does.
SHARED_MEMORY = """
for line in open("/proc/self/maps"):
    start, rights = line.split()[:2]
    if rights[1] == "w" and rights[3] == "s":
        print("BREACH", line)
"""

# PID 1 has the guest's user id, and most calls that take a pid ask for no more.
POWER_OVER_INIT = """
import ctypes, os, resource, struct
libc = ctypes.CDLL(None, use_errno=True)
def attempt(what, function):
    try:
        function()
        print("BREACH", what)
    except OSError:
        pass
def call(number, *arguments):
    if os.uname().machine == "x86_64":
        words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
        if libc.syscall(ctypes.c_long(number), *words) != 0:
            raise OSError(ctypes.get_errno(), "refused")
    else:
        raise OSError(38, "not tried here")
attempt("limits", lambda: resource.prlimit(1, resource.RLIMIT_NOFILE, (8, 8)))
attempt("limits, a high half", lambda: call(302, 1 + (7 << 32), 7, struct.pack("QQ", 8, 8), 0))
attempt("affinity", lambda: os.sched_setaffinity(1, [0]))
attempt("scheduler", lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)))
attempt("parameters", lambda: os.sched_setparam(1, os.sched_param(0)))
attempt("attributes", lambda: call(314, 1, struct.pack("IIQiIQQQ", 48, 5, 0, 0, 0, 0, 0, 0), 0))
for which in (os.PRIO_PROCESS, os.PRIO_PGRP):
    attempt("priority", lambda: os.setpriority(which, 1, 10))
attempt("priority of all", lambda: os.setpriority(os.PRIO_USER, 0, 10))
attempt("i/o priority", lambda: call(251, 1, 1, 3 << 13))
attempt("i/o priority of all", lambda: call(251, 3, 0, 3 << 13))
attempt("memory", lambda: open("/proc/1/mem", "rb"))
attempt("out of memory score", lambda: open("/proc/1/oom_score_adj", "w").write("1000"))
attempt("trace", lambda: call(101, 0x4206, 1, 0, 0))
"""

# A child of the guest's own parent would be outside of the PID namespace, and nobody's to end.
SIBLING = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
number = 56 if os.uname().machine == "x86_64" else 220
made = libc.syscall(ctypes.c_long(number), ctypes.c_long(0x8000 | signal.SIGCHLD), *[ctypes.c_long(0)] * 4)
if made == 0:
    signal.pause()
    os._exit(0)
if made > 0:
    print("BREACH a sibling", made)
"""

# What was mapped shared before the fork; for reading only, too, as that can be changed.
SHARED_AREAS = """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
for area in {areas}:
    if libc.mprotect(ctypes.c_void_p(area), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE) == 0:
        ctypes.memmove(area, b"EVIL", 4)
"""
