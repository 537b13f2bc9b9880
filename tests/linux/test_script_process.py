"""Scripts that run in a process of their own, which shares this one's memory and nothing else that it does not ask for."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isolation.backends.namespace.process.pause import Sleeper
from isolation.linux import syscalls
from isolation.linux.nsenter import NsEnter
from isolation.linux.script_process import ChildStack, ScriptProcess
from isolation.linux.syscall_script import SyscallScript

_SHARED = syscalls.CLONE_VM | syscalls.CLONE_FILES | signal.SIGCHLD


def run(script_process: ScriptProcess, flags: int = _SHARED) -> int:
    """Its exit status."""
    script_process.begin()
    pid, pidfd = syscalls.clone_function(script_process.function, script_process.stack, flags, script_process.argument)
    os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_results_are_seen_here_and_the_rest_is_not() -> None:
    script = SyscallScript()
    opened = script.call("openat", syscalls.AT_FDCWD, "/proc/self", os.O_RDONLY, 0)
    script.call("chdir", "/")
    script.call("umask", 0o123)
    script.finish()
    script_process = ScriptProcess(script)
    before, mask = os.getcwd(), os.umask(0o22)
    os.umask(mask)
    for _ in range(3):
        assert run(script_process) == 0
        script_process.check()
        fd = script.result(opened)
        assert os.path.isdir(f"/proc/self/fd/{fd}")  # the table of descriptors was shared
        os.close(fd)
    assert os.getcwd() == before
    assert os.umask(mask) == mask


def test_a_step_that_fails_is_named() -> None:
    script = SyscallScript()
    script.call("close", 0x7FFFFFFF, about="the third rail")
    script.call("chdir", "/nowhere/at/all")
    script.finish()
    script_process = ScriptProcess(script)
    assert run(script_process) == 1
    with pytest.raises(OSError, match="the third rail") as caught:
        script_process.check()
    assert caught.value.errno == errno.EBADF


def test_a_script_can_start_another_and_wait_for_it() -> None:
    inner = SyscallScript()
    opened = inner.call("openat", syscalls.AT_FDCWD, "/dev/null", os.O_RDONLY, 0)
    inner.finish()
    inner_apart = ScriptProcess(inner)
    outer = SyscallScript()
    flags = syscalls.CLONE_VM | syscalls.CLONE_FILES | syscalls.CLONE_VFORK | signal.SIGCHLD
    outer.spawn(flags, inner_apart.begin(), 0, about="the inner one")
    outer.call("wait4", -1, 0, 0, 0)
    outer.finish()
    script_process = ScriptProcess(outer)
    for _ in range(3):
        inner_apart.begin()
        assert run(script_process) == 0
        script_process.check()
        inner_apart.check()
        os.close(inner.result(opened))


def test_a_sleeper_can_be_started_by_a_script() -> None:
    sleeper = Sleeper()
    script = SyscallScript()
    pidfd = script.memory(b"\xff" * 8)
    flags = syscalls.CLONE_VM | syscalls.CLONE_FILES | syscalls.CLONE_PARENT | syscalls.CLONE_PIDFD | signal.SIGCHLD
    script.spawn(flags, sleeper.stack.begin(), pidfd)
    script.finish()
    assert run(ScriptProcess(script)) == 0
    fd = script.read(pidfd)
    signal.pidfd_send_signal(fd, 0)  # it is there, and ours
    signal.pidfd_send_signal(fd, signal.SIGKILL)
    result = os.waitid(os.P_PIDFD, fd, os.WEXITED)
    assert result is not None
    assert result.si_status == signal.SIGKILL
    os.close(fd)


def test_the_stack_is_written_anew_each_time() -> None:
    stack = ChildStack(0x1111, 0x2222)
    import ctypes

    for _ in range(2):
        top = stack.begin()
        assert top % 16 == 0
        assert list((ctypes.c_uint64 * 2).from_address(top)) == [0x2222, 0x1111]
        ctypes.memset(top, 0, 16)


ENTERS = """
import os, sys, threading, time
from isolation.linux import syscalls
from isolation.linux.nsenter import NsEnter
if "thread" in sys.argv:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
here = {name: os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in ("uts", "ipc")}
kept = [object() for _ in range(1000)]
entrance = NsEnter(tuple(here)) if os.geteuid() == 0 else NsEnter(())
for number in range(3):
    reader, writer = os.pipe()
    if entrance.fork(list(here.values()) if os.geteuid() == 0 else []):
        values = sum(1 for each in kept if each is not None)
        os.write(writer, f"{number} {values} {threading.active_count()}".encode())
        os._exit(0)
    os.close(writer)
    print(os.read(reader, 100).decode(), threading.active_count(), flush=True)
    os.close(reader)
os._exit(0)
"""


@pytest.mark.parametrize("threads", ["", "thread"])
def test_a_process_forks_from_within_a_call(threads: str) -> None:
    """In a process of its own, since it enters namespaces; with other threads, by another way."""
    command = [sys.executable, "-c", ENTERS, *filter(None, [threads])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    here = 2 if threads else 1
    assert done.stdout.splitlines() == [f"{number} 1000 1 {here}" for number in range(3)], done.stderr


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights over a namespace, to be refused another")
def test_an_entrance_that_is_refused_forks_nothing() -> None:
    entrance = NsEnter(("net",))
    before = children()
    wrong = os.open("/proc/self/ns/uts", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="net namespace"):
            entrance.fork([wrong])
    finally:
        os.close(wrong)
    assert children() == before
