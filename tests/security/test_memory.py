"""The memory limit where no cgroup holds it: the supervisor watches, and a guest cannot blind it."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isolation import Ended, Limits, SandboxSpec
from isolation.backends.namespace.host.sandbox import NamespaceMachine
from isolation.backends.namespace.host.template import NamespaceTemplate
from isolation.backends.namespace.plan import ALL_DEFENCES, Plan
from isolation.backends.namespace.planner import make_plan
from isolation.backends.namespace.process import memory_watch
from isolation.backends.showing import python_environment
from isolation.guest import Guest
from isolation.sandbox import Sandbox

pytestmark = pytest.mark.usefixtures("nothing_left")

# The first thread's end makes the kernel's shortest answer zero, and the longer one takes descriptors.
BLINDING = """
import contextlib, ctypes, os, resource, signal, threading, time
def blind():
    with contextlib.suppress(OSError):
        resource.prlimit(1, resource.RLIMIT_NOFILE, (6, 6))
    with contextlib.suppress(OSError):
        os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))
def hold():
    held = bytearray(400 << 20)
    for place in range(0, len(held), 4096): held[place] = 1
    print("held", flush=True)
    signal.pause()
blind()
threading.Thread(target=hold).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def watched(megabytes: int, without: str = "") -> Plan:
    """As for an ordinary user without a cgroup of their own."""
    spec = SandboxSpec(limits=Limits(memory=f"{megabytes}M"))
    plan = make_plan(spec, python=python_environment(), defences=ALL_DEFENCES - set(without.split()))
    return dataclasses.replace(plan, cgroup=None, watch_memory=True)


@pytest.mark.parametrize("without", ["", "seccomp"])
def test_who_watches_is_not_within_reach(without: str) -> None:
    with Sandbox.borrowed(NamespaceMachine(watched(150, without))) as box:
        done = box.run([sys.executable, "-c", BLINDING], timeout=600)
        assert done.verdict.ended is Ended.OUT_OF_MEMORY
        assert b"held" not in done.stdout


def test_a_stopped_init_does_not_stop_the_watch() -> None:
    """The supervisor looks, whatever PID 1 does meanwhile."""
    hold = "input(); held = b'x' * (400 << 20); input()"
    with Sandbox.borrowed(NamespaceMachine(watched(150))) as box:
        with box.popen([sys.executable, "-c", hold], stdin=subprocess.PIPE) as process:
            (init,) = _inits_of_this_test()
            os.kill(init, signal.SIGSTOP)  # from outside, which it cannot ignore
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            verdict = process.wait(60)
            assert verdict is not None
            assert verdict.ended is Ended.OUT_OF_MEMORY


def _inits_of_this_test() -> set[int]:
    """PID 1s below this process."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                status = dict(
                    line.split(":\t", 1) for line in Path(f"/proc/{name}/status").read_text().splitlines() if ":\t" in line
                )
            except OSError:
                continue
            if (
                status["Name"] == "isolation-init"
                and status["NSpid"].split()[1:] == ["1"]
                and os.getpid() in _above(int(name))
            ):
                found.add(int(name))
    return found


def _above(pid: int) -> set[int]:
    found = set()
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.add(pid)
    return found


@pytest.mark.parametrize(
    ("error", "said"),
    [(errno.EMFILE, "over"), (errno.EACCES, "over"), (errno.ENOENT, "low"), (errno.ESRCH, "low")],
)
def test_what_cannot_be_looked_at_is_over_the_limit(error: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But a process that has ended meanwhile holds nothing."""

    def fail(self: memory_watch.Watch, name: str) -> bytes:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(memory_watch.Watch, "_read", fail)
    watch = memory_watch.Watch(
        1 << 30,
        None,
        os.open("/proc", os.O_RDONLY | os.O_DIRECTORY),
        os.open("/dev/shm", os.O_RDONLY | os.O_DIRECTORY),
        kills=True,
    )
    try:
        assert watch.look() == said
    finally:
        watch.close()


def test_far_from_the_limit_it_looks_seldom() -> None:
    """And never so that the limit could be reached unseen, by processors that do nothing but clear pages."""
    directory = os.open("/dev/shm", os.O_RDONLY | os.O_DIRECTORY)
    far = memory_watch.Watch(1 << 50, None, os.dup(directory), directory, kills=True)
    try:
        assert far.look() == "low"
        assert 100 < far.interval <= 250
        assert far.look() == "unknown"
    finally:
        far.close()


def test_what_programs_size_themselves_by() -> None:
    spec = SandboxSpec(limits=Limits(memory="200M"))
    with Sandbox(spec) as box:
        done = box.run(["cat", "/proc/meminfo"], timeout=600)
        lines = dict(line.split(":") for line in done.stdout.decode().splitlines())
        assert lines["MemTotal"].split() == [str(200 << 10), "kB"]
        assert int(lines["MemAvailable"].split()[0]) <= 200 << 10
        assert box.run(["sh", "-c", "echo x > /proc/meminfo"], timeout=600).returncode != 0
    with Sandbox(SandboxSpec()) as box:
        whole = box.run(["head", "-1", "/proc/meminfo"], timeout=600).stdout.decode()
        assert whole == Path("/proc/meminfo").read_text().partition("\n")[0] + "\n"


def test_a_fork_and_a_fork_of_a_fork_see_it_too() -> None:
    def total() -> int:
        with open("/proc/meminfo", encoding="ascii") as file:
            return int(file.readline().split()[1])

    def payload(guest: Guest) -> None:
        for _level in guest.forks():
            guest.send({"total": total()})
            for _job in guest.forks():
                guest.send({"total": total()})

    with NamespaceTemplate(
        make_plan(SandboxSpec(limits=Limits(memory="300M")), python=python_environment()), payload
    ) as root:
        with root.branch() as branch:
            template = branch.template(600)
            assert template is not None
            with template.fork() as fork:
                seen = [branch.receive(600), fork.receive(600)]
    assert seen == [{"total": 300 << 10}] * 2
