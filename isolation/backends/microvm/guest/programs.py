"""Starting programs inside of a virtual machine, as the guest's user and with nothing of the agent's."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import struct
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from isolation.backends.microvm.guest import linux

FIRST_PASSED = 3  # number of the first descriptor beyond the standard streams


@dataclass(frozen=True)
class User:
    """Who the guest's programs are."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class NotStarted(Exception):
    """`errno`, what the kernel said, and whether it was the working directory."""

    def __init__(self, errno: int, what: str, *, cwd: bool) -> None:
        super().__init__(errno, what, cwd)
        self.errno = errno
        self.what = what
        self.cwd = cwd


_STAGES = ("it could not be prepared", "working directory", "execution")
_ERROR = struct.Struct("=iB")


def start(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    user: User,
    stdio: Sequence[int],
    *,
    given: Sequence[int] = (),
    terminal: bool = False,
    cgroup: str = "",
) -> int:
    """Fork and execute; returns the process number. `given` become descriptors 3, 4, …. Raises NotStarted."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _become(argv, env, cwd, user, [*stdio, *given], terminal, cgroup, writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        data = pipe.read()
    if not data:
        return pid
    os.waitpid(pid, 0)
    errno, stage = _ERROR.unpack(data)
    raise NotStarted(errno, os.strerror(errno), cwd=_STAGES[stage] == "working directory")


def _become(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    user: User,
    fds: Sequence[int],
    terminal: bool,
    cgroup: str,
    writer: int,
) -> NoReturn:
    stage = 0
    try:
        os.setsid()
        if cgroup:
            with open(f"{cgroup}/cgroup.procs", "w", encoding="ascii") as file:
                file.write("0")
        high = [os.dup(fd) if fd >= 64 else _above(fd) for fd in fds]
        for number, fd in enumerate(high):
            os.dup2(fd, number, inheritable=True)
        if terminal:
            _take_terminal()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("0")
        linux.become(user.uid, user.gid, user.groups)
        for number in range(1, signal.NSIG):
            if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.umask(0o022)
        stage = 1
        os.chdir(cwd)
        stage = 2
        _execute(argv, env)
    except OSError as error:
        os.write(writer, _ERROR.pack(error.errno or 0, stage))
    finally:
        os._exit(127)


def _above(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)


def _take_terminal() -> None:
    for fd in (0, 1, 2):
        if os.isatty(fd):
            fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
            return


def _execute(argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """execvpe(3) along the PATH of the new environment; a permission error on the way is told, if nothing else is found."""
    program = argv[0]
    if "/" in program:
        os.execve(program, list(argv), dict(env))
    denied: OSError | None = None
    for directory in env.get("PATH", os.defpath).split(os.pathsep):
        try:
            os.execve(os.path.join(directory, program), list(argv), dict(env))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            denied = error
    raise denied or FileNotFoundError(2, "No such file or directory")
