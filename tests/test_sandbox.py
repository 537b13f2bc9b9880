"""Sandboxes as users hold them: real ones."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import leftovers

from isolation import (
    PIPE,
    Change,
    CommandNotFound,
    Ended,
    FeatureMissing,
    GuestError,
    LaunchError,
    Limits,
    Mount,
    Sandbox,
    SandboxClosed,
    SandboxSpec,
    SpecError,
    UnknownBackend,
)
from isolation.linux.cgroup import Hierarchy

pytestmark = pytest.mark.usefixtures("backend", "nothing_left")


def of(project: Path, **fields: object) -> SandboxSpec:
    return SandboxSpec(mounts=[Mount.overlay(project)], workdir=str(project), **fields)  # type: ignore[arg-type]


def test_run(project: Path) -> None:
    with Sandbox(of(project, env={"GREETING": "hello"})) as box:
        done = box.run(["sh", "-c", "cat; echo $GREETING; pwd; echo err >&2; exit 3"], input="in\n", env={"X": "1"})
        assert done.stdout.decode().split() == ["in", "hello", str(project)]
        assert (done.stderr, done.returncode, done.verdict.ended) == (b"err\n", 3, Ended.EXITED)
        assert done.usage.wall > 0
        assert box.run(["sh", "-c", "kill -SEGV $$"]).returncode == -signal.SIGSEGV


def test_python_is_the_callers(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin:/usr/bin:/bin")
    with Sandbox(of(project)) as box:
        done = box.run(["python", "-c", "import sys, pluggy; print(sys.prefix)"])
        assert done.stdout.decode().strip() == sys.prefix, done


def test_writes_are_discarded_and_told(project: Path) -> None:
    (project / "old").mkdir()
    (project / "old" / "gone.txt").write_text("x")
    with Sandbox(of(project)) as box:
        assert box.changes() == []
        script = "echo more >> data.txt; mkdir d; echo new > d/new.txt; rm old/gone.txt; ln -s x link; echo t > /tmp/t"
        assert box.run(["sh", "-c", script]).returncode == 0
        assert box.run(["cat", "data.txt"]).stdout == b"originalmore\n"
        assert box.changes() == sorted([
            Change("/tmp/t", "added", "file", 2),
            Change(f"{project}/d", "added", "directory"),
            Change(f"{project}/d/new.txt", "added", "file", 4),
            Change(f"{project}/data.txt", "changed", "file", 13),
            Change(f"{project}/link", "added", "symlink"),
            Change(f"{project}/old/gone.txt", "deleted", "other"),
        ])  # fmt: skip
    assert (project / "data.txt").read_text() == "original"
    assert sorted(os.listdir(project)) == ["data.txt", "old"]


def test_copies(project: Path, tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(b"\0\1" * 100_000)
    with Sandbox(of(project)) as box:
        box.copy_in(tmp_path / "in.bin", "/tmp/x")
        assert box.run(["wc", "-c", "/tmp/x"]).stdout.split()[0] == b"200000"
        assert box.copy_out("/tmp/x", tmp_path / "out.bin") == 200_000
        assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "in.bin").read_bytes()
        box.run(["sh", "-c", "mkfifo /tmp/fifo; ln -s /etc/passwd /tmp/link; ln -s /root /tmp/away"])
        for path in ("/tmp/fifo", "/tmp", "/nonexistent", "/dev/zero"):
            with pytest.raises(GuestError):
                box.copy_out(path, tmp_path / "bad")
        with pytest.raises(GuestError, match="limit"):
            box.copy_out("/tmp/x", tmp_path / "bad", limit="1K")
        with pytest.raises(SpecError):
            box.copy_out("relative", tmp_path / "bad")
        assert not (tmp_path / "bad").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"project", "in.bin", "out.bin"}


def test_copy_out_replaces_a_symlink_of_the_hosts(project: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("safe")
    (tmp_path / "out").symlink_to(victim)
    with Sandbox(of(project)) as box:
        box.copy_out(f"{project}/data.txt", tmp_path / "out")
    assert victim.read_text() == "safe"
    assert (tmp_path / "out").read_text() == "original"


def test_mounts(project: Path, tmp_path: Path, backend: str) -> None:
    for name in ("ro", "rw"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    spec = SandboxSpec(mounts=[Mount(tmp_path / "ro", "/data"), Mount(tmp_path / "rw", "/out", writable=True)])
    if backend == "microvm":
        with pytest.raises(FeatureMissing, match="reach the host"):
            Sandbox(spec).run(["true"])
        with Sandbox(SandboxSpec(mounts=[Mount(tmp_path / "ro", "/data"), Mount(tmp_path / "ro" / "f", "/file")])) as box:
            assert box.run(["cat", "/data/f", "/file"]).stdout == b"roro"
            assert box.run(["sh", "-c", "echo x > /data/f"]).returncode != 0
        return
    with Sandbox(spec) as box:
        assert box.run(["cat", "/data/f", "/out/f"]).stdout == b"rorw"
        assert box.run(["sh", "-c", "echo x > /data/f"]).returncode != 0
        assert box.run(["sh", "-c", "echo x > /out/g"]).returncode == 0
    assert (tmp_path / "rw" / "g").read_text() == "x\n"
    assert (tmp_path / "rw" / "g").stat().st_uid == os.getuid()


@pytest.mark.parametrize(
    "name", ["with space", "co:lon", "com,ma", "back\\slash", "ünï çödé ☃", "-dash", "nl\nnl", "'quote\""]
)
def test_any_directory_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    (path / "f").write_text("here")
    with Sandbox(of(path)) as box:
        assert box.run(["cat", "f"]).stdout == b"here"
        assert box.run(["sh", "-c", "echo x > g; rm f"]).returncode == 0
        assert {Path(change.path).name for change in box.changes()} == {"f", "g"}


def test_a_command_that_is_not_there(project: Path) -> None:
    with Sandbox(of(project)) as box:
        with pytest.raises(CommandNotFound):
            box.run(["no-such-command"])
        with pytest.raises(CommandNotFound):
            box.run(["/etc/passwd"])
        with pytest.raises(LaunchError, match="working directory"):
            box.run(["true"], cwd="/nowhere")
        for bad in ([], "true", ["a\0b"], [1]):
            with pytest.raises(SpecError):
                box.run(bad)  # type: ignore[arg-type]
        assert box.run(["true"]).returncode == 0


def test_bad_specs_leave_nothing(project: Path, backend: str) -> None:
    with pytest.raises(SpecError, match="does not exist"):
        Sandbox(SandboxSpec(mounts=[Mount("/no/such/dir")])).run(["true"])
    with pytest.raises(SpecError, match="workdir"):
        Sandbox(SandboxSpec(workdir="/no/such/dir")).run(["true"])
    with pytest.raises(UnknownBackend, match="namespace"):
        Sandbox(SandboxSpec(backend="nonsense"))
    with pytest.raises(FeatureMissing):
        Sandbox(SandboxSpec(backend=backend, network="nat" if backend == "namespace" else "host")).run(["true"])
    with pytest.raises(FeatureMissing):
        Sandbox(SandboxSpec(image="debian")).run(["true"])


def test_timeout(project: Path, backend: str) -> None:
    with Sandbox(of(project)) as box:
        done = box.run(
            ["sh", "-c", "echo started; trap '' TERM INT; sleep 60 & wait; sleep 60"],
            timeout=0.3 if backend == "namespace" else 3,
        )
        assert done.verdict.ended is Ended.TIMED_OUT
        assert done.stdout == b"started\n"
        assert box.run(["true"]).verdict.ok


def test_wall_limit_ends_the_sandbox(project: Path, backend: str) -> None:
    wall = "400ms" if backend == "namespace" else "10s"  # it counts from the machine's start
    with Sandbox(of(project, limits=Limits(wall=wall))) as box:
        done = box.run(["sleep", "600"])
        assert done.verdict.ended is Ended.TIMED_OUT
        assert done.verdict.shell_code == 124
        with pytest.raises(SandboxClosed, match="timed out"):
            box.run(["true"])


def test_memory_limit(project: Path) -> None:
    with Sandbox(of(project, limits=Limits(memory="96M"))) as box:
        done = box.run([sys.executable, "-c", "x = []\nwhile True: x.append(bytearray(1 << 20))"], timeout=600)
        assert done.verdict.ended is Ended.OUT_OF_MEMORY
        assert done.verdict.shell_code == 137
    with Sandbox(of(project, limits=Limits(memory="96M"))) as box:
        assert box.run([sys.executable, "-c", "bytearray(20 << 20)"]).verdict.ok


def test_pids_limit(project: Path) -> None:
    program = "import os\nn = 0\ntry:\n  while n < 100:\n    if os.fork() == 0: os.read(0, 1); os._exit(0)\n    n += 1\n"
    program += "except BlockingIOError: pass\nprint(n)"
    with Sandbox(of(project, limits=Limits(pids=16))) as box:
        with box.popen([sys.executable, "-c", program], stdin=PIPE, stdout=PIPE) as process:
            assert process.stdout is not None
            made = int(process.stdout.readline())
            assert 10 <= made <= 16


def test_sandboxes_do_not_share_a_pids_limit(project: Path) -> None:
    """All at once, and each with most of what it may have."""
    spec = of(project, limits=Limits(pids=12))
    with contextlib.ExitStack() as stack:
        boxes = [stack.enter_context(Sandbox(spec)) for _ in range(4)]
        script = "for i in 1 2 3 4 5 6 7 8; do sleep 60 & done; echo started; wait"
        for box in boxes:
            process = box.popen(["sh", "-c", script], stdout=PIPE)
            stack.callback(process.close)
            assert process.stdout is not None
            assert process.stdout.readline() == b"started\n"


def test_disk_limit(project: Path) -> None:
    with Sandbox(of(project, limits=Limits(disk="2M"))) as box:
        done = box.run(["sh", "-c", "head -c 1000000 /dev/zero > /tmp/ok && head -c 9000000 /dev/zero > big"])
        assert b"No space left" in done.stderr


def test_cpu_limit_is_kept_or_refused(project: Path, backend: str) -> None:
    spec = of(project, backend=backend, limits=Limits(cpus=0.2))
    if backend == "namespace" and not Hierarchy.find().can("cpu"):
        with pytest.raises(FeatureMissing, match="cgroup"):
            Sandbox(spec).run(["true"])
        return
    with Sandbox(spec) as box:
        done = box.run([sys.executable, "-c", "import time\nend = time.time() + 1\nwhile time.time() < end: pass"])
        assert done.usage.cpu / done.usage.wall < 0.35


def test_output_is_bounded(project: Path) -> None:
    with Sandbox(of(project)) as box:
        done = box.run(["sh", "-c", "head -c 3000000 /dev/zero; echo e >&2"], output_limit="1M")
        assert len(done.stdout) == 1 << 20
        assert done.truncated
        assert done.stderr == b"e\n"


def test_background_processes_do_not_keep_run_waiting(project: Path) -> None:
    with Sandbox(of(project)) as box:
        done = box.run(["sh", "-c", "sleep 6000 & echo done"], timeout=600)
        assert (done.stdout, done.verdict.ok) == (b"done\n", True)


def test_popen_signals_and_streams(project: Path) -> None:
    with Sandbox(of(project)) as box:
        with box.popen(["cat"], stdin=PIPE, stdout=PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"ping\n")
            assert process.stdout.readline() == b"ping\n"
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            verdict = process.wait(60)
        assert verdict is not None
        assert (verdict.ended, verdict.status) == (Ended.SIGNALLED, signal.SIGTERM)
        both = ["sh", "-c", "cat; echo out; echo err >&2"]
        with box.popen(both, stdin=subprocess.DEVNULL, stdout=PIPE, stderr=subprocess.STDOUT) as process:
            assert process.communicate().stdout == b"out\nerr\n"
        with (project / "log").open("w+b") as log, (project / "data.txt").open("rb") as data:
            assert box.popen(["cat"], stdin=data, stdout=log, stderr=log).communicate().verdict.ok
            log.seek(0)
            assert log.read() == b"original"
        for wrong in (log, 9999, -5, "log.txt", 1 << 40):
            with pytest.raises(SpecError, match="stdout must be an open file"):
                box.popen(["true"], stdout=wrong)  # type: ignore[arg-type]
            with pytest.raises(SpecError, match="pass_fds"):
                box.popen(["true"], pass_fds=[wrong])  # type: ignore[list-item]
        assert box.run(["echo", "alive"], timeout=600).stdout == b"alive\n"


def test_two_threads_use_one_sandbox(project: Path) -> None:
    results: list[bytes] = []
    with Sandbox(of(project)) as box:
        threads = [
            threading.Thread(target=lambda n=n: results.append(box.run(["sh", "-c", f"sleep 0.1; echo {n}"]).stdout))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == [b"0\n", b"1\n", b"2\n", b"3\n"]


def test_sandbox_made_in_a_thread_outlives_it(project: Path) -> None:
    boxes: list[Sandbox] = []

    def make() -> None:
        box = Sandbox(of(project))
        box.run(["true"])
        boxes.append(box)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    with boxes[0] as box:
        assert box.run(["echo", "alive"]).stdout == b"alive\n"


def test_closed(project: Path) -> None:
    box = Sandbox(of(project))
    with box:
        box.run(["true"])
    box.close()
    with pytest.raises(SandboxClosed):
        box.run(["true"])


def test_nesting(project: Path, backend: str) -> None:
    program = "from isolation import *\nwith Sandbox(SandboxSpec()) as box: print(box.run(['echo', 'inner']).stdout)"
    with Sandbox(of(project, nesting=True)) as box:
        done = box.run([sys.executable, "-c", program], timeout=600)
        assert done.stdout == b"b'inner\\n'\n", done.stderr.decode()
    if backend == "microvm":
        return  # a machine's own kernel is for its guest to use, whatever the spec says
    with Sandbox(of(project)) as box:
        error = box.run([sys.executable, "-c", program], timeout=600).stderr
        assert b"refused" in error
        assert b"--nesting" in error


@pytest.mark.parametrize("nested", [False, True])
def test_what_its_owner_has_not_written_yet(project: Path, backend: str, nested: bool) -> None:
    """It is the owner's to write, once: whatever was forked off meanwhile."""
    spec = "SandboxSpec()" if nested else f"SandboxSpec(backend={backend!r})"
    program = (
        "from isolation import *\n"
        "print('one')\n"
        f"with Sandbox({spec}) as box: box.run(['true'])\n"
        "print('two')\n"
        f"with Sandbox({spec}) as box: print(box.run(['echo', 'three']).stdout)\n"
        "print('four')\n"
    )
    if nested:
        with Sandbox(of(project, nesting=True)) as box:
            out = box.run([sys.executable, "-c", program], timeout=600).stdout
    else:
        out = subprocess.run([sys.executable, "-c", program], cwd=project, stdout=subprocess.PIPE, timeout=600).stdout
    assert out.split() == [b"one", b"two", b"b'three\\n'", b"four"]


def test_nothing_of_the_environment(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "hunter2")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    with Sandbox(of(project, env={"GIVEN": "yes"})) as box:
        seen = box.run(["env"]).stdout.decode()
    assert "hunter2" not in seen
    assert "LC_ALL=C.UTF-8" in seen
    assert "GIVEN=yes" in seen


def test_kill_minus_nine_of_the_host(project: Path, backend: str) -> None:
    """Killed at any moment, it leaves nothing: `nothing_left` looks."""
    program = (
        "from isolation import *\n"
        "import sys\n"
        f"spec = SandboxSpec({backend!r}, limits=Limits(memory='64M'))\n"
        "box = Sandbox(spec)\n"
        "while True: box = Sandbox(spec); box.run(['sleep', '0.01']); box.close()"
    )
    delays = (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5) if backend == "namespace" else (0.3, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
    for delay in delays:
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
    deadline = time.monotonic() + 300
    while leftovers(program.encode()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert leftovers(program.encode()) == set()


def test_one_thread_waits_and_another_kills() -> None:
    with Sandbox() as box:
        process = box.popen(["sleep", "1000"])
        found: list[object] = []
        waiter = threading.Thread(target=lambda: found.append(process.wait()), daemon=True)
        waiter.start()
        time.sleep(0.3)
        killer = threading.Thread(target=process.kill, daemon=True)
        killer.start()
        killer.join(60)
        assert not killer.is_alive()
        waiter.join(60)
        assert found
        process.close()


def test_a_fork_of_the_host_closes_nothing() -> None:
    with Sandbox() as box:
        pid = os.fork()
        if pid == 0:
            try:
                box.close()
            finally:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert box.run(["echo", "alive"]).stdout == b"alive\n"
