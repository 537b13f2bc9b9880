"""Machines as users hold them, and how they end. Real ones."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import alive, machines

from isolation import PIPE, Ended, LaunchError, Limits, Mount, Sandbox, SandboxClosed, SandboxSpec
from isolation.backends.microvm import boot
from isolation.backends.microvm.machine import MicrovmMachine
from isolation.backends.microvm.vm import memory, qemu
from isolation.backends.microvm.vm import vm as vms
from isolation.backends.microvm.vm.vm import State

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("microvm_ready", "nothing_left")]


def spec(**fields: object) -> SandboxSpec:
    return SandboxSpec(backend="microvm", **fields)  # type: ignore[arg-type]


@pytest.fixture
def box() -> Iterator[Sandbox]:
    with Sandbox(spec()) as made:
        yield made


def qemu_of() -> int:
    (pid,) = machines(os.getpid())
    return pid


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def link_of(box: Sandbox):  # type: ignore[no-untyped-def]
    assert isinstance(box.machine, MicrovmMachine)
    return box.machine.vm.link


def state_of(box: Sandbox) -> State:
    assert isinstance(box.machine, MicrovmMachine)
    return boot.state(box.machine.plan)


def test_a_killed_qemu(box: Sandbox) -> None:
    process = box.popen(["sleep", "1000"], stdout=PIPE)
    os.kill(qemu_of(), signal.SIGKILL)
    verdict = process.wait(60)
    assert verdict is not None
    assert verdict.ended is Ended.LOST
    assert str(verdict).isprintable()
    assert process.stdout is not None
    assert process.stdout.read() == b""
    with pytest.raises(SandboxClosed, match="has ended: lost"):
        box.run(["true"])
    with pytest.raises(SandboxClosed):
        box.copy_out("/etc/hostname", os.devnull + ".x")
    process.close()


def test_a_machine_that_is_frozen(box: Sandbox) -> None:
    """The host asks, and gives it up; a time-out of a command works all the same."""
    link = link_of(box)
    link._ping_after, link._lost_after = 0.2, 1.0
    link.watch()
    process = box.popen(["sleep", "1000"])
    pid = qemu_of()
    os.kill(pid, signal.SIGSTOP)
    verdict = process.wait(60)
    assert verdict is not None
    assert verdict.ended is Ended.LOST
    assert "has not answered for 1 s" in verdict.detail
    until(lambda: not alive({pid}))
    process.close()


def test_a_time_out_in_a_machine_that_is_frozen(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    from isolation import sandbox

    monkeypatch.setattr(sandbox, "_FORCE_AFTER", 0.5)
    process = box.popen(["sleep", "1000"], stdout=PIPE)
    os.kill(qemu_of(), signal.SIGSTOP)
    assert process.communicate(timeout=0.5).verdict.ended is Ended.TIMED_OUT


def test_a_panic(box: Sandbox) -> None:
    """Any program that is the guest's could find a way; here the agent is asked to end, which is PID 1."""
    process = box.popen(["sleep", "1000"])
    link_of(box).say({"op": "spawn"})  # a message that it does not survive
    verdict = process.wait(60)
    assert verdict is not None
    assert verdict.ended is Ended.LOST
    assert "isolation-agent: KeyError" in verdict.detail
    process.close()


def test_the_wall_clock_of_the_machine() -> None:
    with Sandbox(spec(limits=Limits(wall=10))) as box:
        assert box.run(["sleep", "1000"]).verdict.ended is Ended.TIMED_OUT


def test_all_memory_of_the_machine(box: Sandbox) -> None:
    """Without a limit the machine's size is the limit."""
    hoard = "b = []\nwhile True: b.append(b'x' * (1 << 24))"
    verdict = box.run([sys.executable, "-c", hoard], timeout=600).verdict
    assert verdict.ended is Ended.OUT_OF_MEMORY, verdict
    assert box.run(["true"], timeout=600).returncode == 0


def test_a_fork_bomb_without_a_limit(box: Sandbox) -> None:
    """It has its own kernel to overwhelm; the time-out ends it."""
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert box.run([sys.executable, "-c", bomb], timeout=3).verdict.ended is Ended.TIMED_OUT


def test_a_full_disk() -> None:
    fill = "import sys\ntry:\n    f = open('/tmp/x', 'wb', 0)\n    while True: f.write(bytes(1 << 20))\nexcept OSError as error: print(error.errno)"
    with Sandbox(spec(limits=Limits(disk="20M"))) as box:
        assert box.run([sys.executable, "-c", fill], timeout=600).stdout == b"28\n"
        assert box.run(["rm", "/tmp/x"]).returncode == 0
        assert box.run(["sh", "-c", "echo x > /tmp/y"]).returncode == 0


def test_streams_whose_readers_go_away(box: Sandbox) -> None:
    """On either side; the machine lives on."""
    assert box.run(["true"], input=b"x" * (1 << 20)).returncode == 0
    assert box.run(["sh", "-c", "exec <&-; sleep 0.2"], input=b"x" * (1 << 20)).returncode == 0
    process = box.popen(["sh", "-c", "yes; echo $? >&2"], stdout=PIPE, stderr=PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(100)
    process.stdout.close()
    assert process.stderr.read() != b"0\n"
    assert process.wait(60) is not None
    process.close()
    assert box.run(["echo", "still here"]).stdout == b"still here\n"


def test_output_that_nobody_reads_keeps_nobody_else(box: Sandbox) -> None:
    stuck = box.popen(["yes"], stdout=PIPE)
    assert box.run(["echo", "hello"]).stdout == b"hello\n"
    assert box.run(["sh", "-c", "head -c 1000000 /dev/zero"]).stdout == bytes(1_000_000)
    assert len(link_of(box)._mux.stream(2).arrived) <= 256 << 10
    stuck.kill()
    stuck.close()


def test_one_thread_waits_and_another_kills(box: Sandbox) -> None:
    process = box.popen(["sleep", "1000"])
    found: list[object] = []
    waiter = threading.Thread(target=lambda: found.append(process.wait()), daemon=True)
    waiter.start()
    time.sleep(0.3)
    killer = threading.Thread(target=process.kill, daemon=True)
    killer.start()
    killer.join(60)
    waiter.join(60)
    assert found
    process.close()


def test_a_close_while_others_wait(box: Sandbox) -> None:
    process = box.popen(["sleep", "1000"])
    found: list[object] = []
    waiter = threading.Thread(target=lambda: found.append(process.wait()), daemon=True)
    waiter.start()
    time.sleep(0.2)
    box.close()
    waiter.join(60)
    assert found
    process.close()


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def nothing_grows(action: Callable[[], None]) -> None:
    """Supervisors are made for later, so only the second half counts."""
    before = 0
    for number in range(4):
        if number == 2:
            before = fds()
        action()
    assert fds() <= before


def test_a_qemu_that_dies_at_once(monkeypatch: pytest.MonkeyPatch, box: Sandbox) -> None:
    """As its machine is made: no descriptor of the saved machine may be closed for it, as it is everybody's."""
    command = qemu.command

    def broken(*words: object, **more: object) -> list[str]:
        argv = command(*words, **more)  # type: ignore[arg-type]
        return [argv[0], "-nonsense", *argv[1:]]

    def launch() -> None:
        with pytest.raises(LaunchError, match="nonsense"):
            _ = Sandbox(spec()).machine

    with monkeypatch.context() as patch:
        patch.setattr(qemu, "command", broken)
        nothing_grows(launch)
    with Sandbox(spec()) as other:
        assert other.run(["true"]).returncode == 0


def test_a_machine_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, box: Sandbox) -> None:
    """Nothing is left of it: no process, no descriptor."""

    def no_link(*_words: object, **_more: object) -> None:
        raise RuntimeError("can't start new thread")

    def launch() -> None:
        with pytest.raises(RuntimeError, match="thread"):
            _ = Sandbox(spec()).machine

    monkeypatch.setattr(vms, "Link", no_link)
    nothing_grows(launch)
    assert len(machines(os.getpid())) == 1


def test_saving_a_machine_that_has_died(box: Sandbox) -> None:
    state = state_of(box)

    def try_it() -> None:
        vm = vms.Vm.restore(state, keep=True)
        vm.wait_until_running()
        vm.kill()
        vm.link.join(60)
        with pytest.raises(LaunchError):
            vm.save()
        vm.close()

    nothing_grows(try_it)
    assert os.fstat(state.memory).st_size == state.hardware.memory


def test_a_state_that_is_none(box: Sandbox) -> None:
    """QEMU refuses it, and says why."""

    good = state_of(box)
    for devices in (b"", b"garbage" * 1000, good.devices[:1000]):
        bad = dataclasses.replace(good, devices=devices)

        def restore(bad: State = bad) -> None:
            vm = vms.Vm.restore(bad)
            try:
                vm.wait_until_running()
            finally:
                vm.close()

        with pytest.raises(LaunchError, match="could not be restored"):
            restore()


# The host process itself.

HOST = """
import os, sys, time, threading
from isolation import Mount, Sandbox, SandboxSpec, Limits
from isolation.backends.microvm import boot
from isolation.backends.microvm.vm import vm
point = sys.argv[1]

def say():
    print(os.getpid(), flush=True)
    time.sleep(1000)

def before(owner, name):
    real = getattr(owner, name)
    def wrapped(*words, **more):
        if threading.current_thread() is threading.main_thread():
            say()
        return real(*words, **more)
    setattr(owner, name, wrapped)

spec = SandboxSpec(backend="microvm", mounts=[Mount.overlay(os.getcwd())], workdir=os.getcwd())
sys.path.insert(0, os.getcwd())
if point == "restore":
    before(vm.Vm, "wait_until_running")
if point == "booting":
    before(vm.Vm, "expect")
    boot.state = lambda wanted: boot.boot(wanted)
if point == "saving":
    before(vm.Vm, "_migrate")
with Sandbox(spec) as box:
    if point == "running":
        process = box.popen(["sleep", "1000"])
        say()
    with box.template("warm:main") as template:
        with template.fork(1) as fork:
            fork.receive(60)
            say()
"""

WARM = """
import os, random, socket, threading, time, uuid
def main(guest):
    for job in guest.forks():
        guest.send({"job": job})
        time.sleep(1000)
"""


def below(pid: int) -> set[int]:
    """All processes that came from it."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found and child not in found}:
        found |= more
    return found - {pid}


def own_mounts(project: Path) -> set[str]:
    """What else is mounted on a person's machine is not looked at."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if "isolation" in line or str(project) in line}


def own_shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "isolation" in name or "qemu" in name}


@pytest.mark.parametrize("point", ["booting", "restore", "running", "saving", "forks"])
def test_a_killed_host(project: Path, point: str) -> None:
    """No process, no mount and no file is left, wherever it was."""
    (project / "warm.py").write_text(WARM)
    shm = own_shared_memory()
    mounts = own_mounts(project)
    host = subprocess.Popen([sys.executable, "-c", HOST, point], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=project)
    assert host.stdout is not None
    assert host.stderr is not None
    line = host.stdout.readline()
    assert line, host.stderr.read()
    until(lambda: machines(host.pid))
    family = below(host.pid)
    assert len(family) >= 2
    host.kill()
    host.wait(60)
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in family))
    until(lambda: own_mounts(project) <= mounts)  # another file's test may have some for a moment
    until(lambda: own_shared_memory() <= shm)
    assert {path.name for path in project.iterdir()} <= {"data.txt", "warm.py", "__pycache__"}
    host.stdout.close()
    host.stderr.close()


def test_a_fork_of_the_host_disturbs_nothing(project: Path) -> None:
    """os.fork, and a child that leaves through all the `with` blocks; and one of multiprocessing."""
    import multiprocessing

    (project / "warm.py").write_text(WARM)
    with Sandbox(SandboxSpec(backend="microvm", mounts=[Mount.overlay(project)], workdir=str(project))) as box:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(project))
            with box.template("warm:main") as template:
                assert box.run(["true"]).returncode == 0
                pid = os.fork()
                if pid == 0:
                    try:
                        template.close()
                        box.close()
                    finally:
                        os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0
                child = multiprocessing.get_context("fork").Process(target=box.close)
                child.start()
                child.join(60)
                assert child.exitcode == 0
                assert box.run(["echo", "alive"]).stdout == b"alive\n"
                with template.fork(2) as fork:
                    assert fork.receive(60) == {"job": 2}


def test_interrupted_while_it_is_made() -> None:
    """Ctrl-C at any moment: what had begun is gone."""
    source = textwrap.dedent(
        """
        import os, signal, sys, threading, time
        from isolation import Sandbox, SandboxSpec
        from isolation.backends.microvm.vm import vm
        spec = SandboxSpec(backend="microvm")
        with Sandbox(spec) as box:
            box.run(["true"])
        fds = len(os.listdir("/proc/self/fd"))
        for delay in (0.0, 0.01, 0.03, 0.06, 0.1, 0.2):
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                with Sandbox(spec) as box:
                    time.sleep(5)
            except KeyboardInterrupt:
                pass
            timer.join()
        with Sandbox(spec) as box:
            assert box.run(["true"]).returncode == 0
            assert len(os.listdir("/proc/self/task")) <= 3
        import gc
        gc.collect()
        print("fds", len(os.listdir("/proc/self/fd")) - fds)
        """
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fds"), done


def test_memory_of_machines_has_a_name_that_no_fork_of_the_host_keeps() -> None:
    fd = memory.empty(1 << 20)
    assert "isolation-host" in os.readlink(f"/proc/self/fd/{fd}")
    os.close(fd)
