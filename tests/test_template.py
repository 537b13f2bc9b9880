"""Templates: warm once, forked often; each fork fresh."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from isolation import Ended, LaunchError, Limits, Mount, Sandbox, SandboxSpec, SpecError, registry
from isolation.guest import Guest
from isolation.template import Template

pytestmark = pytest.mark.usefixtures("nothing_left")

WARM = """
import os
from pathlib import Path

warm = []

def main(guest):
    warm.append(os.getpid())
    Path("made-while-warm.txt").write_text(guest.config["text"])
    for job in guest.forks():
        seen = Path("made-while-warm.txt").read_text()
        Path("mine.txt").write_text(str(job))
        guest.send({"job": job, "pid": os.getpid(), "warm": len(warm), "seen": seen, "files": sorted(os.listdir("."))})

def deeper(guest):
    level = 1
    for job in guest.forks():
        level += 1
        for inner in guest.forks():
            guest.send({"job": job, "inner": inner, "level": level})

def broken(guest):
    raise RuntimeError("while warming up")
"""


def here(function: object, **fields: object) -> Template:
    spec = SandboxSpec(**fields)  # type: ignore[arg-type]
    return registry.get("namespace").template(spec, function, None)  # type: ignore[arg-type]


def test_output_of_the_host_is_not_a_forks(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A template is a fork of this process, and inherits what Python has buffered and not yet written."""
    buffered = os.fdopen(os.dup(1), "w", buffering=4096)
    monkeypatch.setattr(sys, "stdout", buffered)
    buffered.write("the host's\n")

    def payload(guest: Guest) -> None:
        for job in guest.forks():
            guest.send({"job": job})

    with here(payload) as template:
        for job in range(2):
            with template.fork(job) as fork:
                assert [message["job"] for message in fork] == [job]
                assert fork.wait(60)
                assert os.read(fork.stdout, 100) == b""
    buffered.close()
    assert capfd.readouterr().out == "the host's\n"


def test_forks_are_fresh(project: Path) -> None:
    state = {"count": 0}

    def payload(guest: Guest) -> None:
        state["count"] += 1
        for job in guest.forks():
            state["count"] += 1
            Path("/tmp/x").touch(exist_ok=False)
            guest.send({"job": job, "count": state["count"], "pid": os.getpid(), "random": random.random()})

    with here(payload) as template:
        messages = []
        for job in ("a", {"b": [1]}):
            with template.fork(job) as fork:
                messages += list(fork)
                verdict = fork.wait(60)
                assert verdict is not None
                assert verdict.ok
    assert [message["job"] for message in messages] == ["a", {"b": [1]}]
    assert {(message["count"], message["pid"]) for message in messages} == {(2, 2)}
    assert messages[0]["random"] != messages[1]["random"]
    assert state["count"] == 0


def test_how_forks_end() -> None:
    def payload(guest: Guest) -> None:
        for job in guest.forks():
            if job == "raise":
                raise ValueError("no")
            if job == "hang":
                time.sleep(60)
            os.kill(os.getpid(), job)

    with here(payload) as template:
        for job, ended, status in (
            ("raise", Ended.EXITED, 1),
            (signal.SIGSEGV, Ended.SIGNALLED, 11),
            (9, Ended.SIGNALLED, 9),
        ):
            with template.fork(job) as fork:
                assert list(fork) == []
                verdict = fork.wait(60)
                assert verdict is not None
                assert (verdict.ended, verdict.status) == (ended, status)
        with template.fork("hang") as fork:
            with pytest.raises(TimeoutError):
                fork.receive(0.2)
            from isolation import Verdict

            fork.end(Verdict(Ended.TIMED_OUT))
            assert "in payload" in fork.stacks()
            assert list(fork) == []


def test_memory_limit_of_a_fork() -> None:
    def payload(guest: Guest) -> None:
        for _job in guest.forks():
            hoard = []
            while True:
                hoard.append(bytearray(1 << 20))

    # Much: where no cgroup holds the limit, the fork's share of this very process counts, too.
    with here(payload, limits=Limits(memory="1G")) as template, template.fork() as fork:
        assert list(fork) == []
        verdict = fork.wait(60)
        assert verdict is not None
        assert verdict.ended is Ended.OUT_OF_MEMORY
        assert "in payload" in fork.stacks()
        assert (fork.usage().memory_peak or 0) > 60 << 20


def test_open_files_live_on_inside(project: Path) -> None:
    """A file of the project that is open in the template is open in a fork, at the same place; an unlinked one, too."""
    held = (project / "data.txt").open("r+")
    assert held.read(4) == "orig"
    import tempfile

    scratch = tempfile.TemporaryFile("w+")
    scratch.write("kept")
    scratch.flush()

    def payload(guest: Guest) -> None:
        for _job in guest.forks():
            held.seek(0)
            content = held.read()
            held.write("-changed")
            held.flush()
            scratch.seek(0)
            guest.send({"file": content, "scratch": scratch.read(), "again": (project / "data.txt").read_text()})

    with here(payload, mounts=[Mount.overlay(project)]) as template, template.fork() as fork:
        assert fork.receive(60) == {"file": "original", "scratch": "kept", "again": "original-changed"}
    assert (project / "data.txt").read_text() == "original"
    held.close()
    scratch.close()


def test_fork_hooks_that_start_threads() -> None:
    """OpenTelemetry's does; unshare(2) and clone(2) would fail in such a fork."""
    started: list[threading.Thread] = []

    def hook() -> None:
        thread = threading.Thread(target=time.sleep, args=(0.5,), daemon=True)
        thread.start()
        started.append(thread)

    armed = True
    os.register_at_fork(after_in_child=lambda: hook() if armed else None)
    try:
        with here(lambda guest: [guest.send({"ok": job}) for job in guest.forks()]) as template, template.fork(1) as fork:
            assert fork.receive(60) == {"ok": 1}
    finally:
        armed = False


def test_threads_of_the_template_do_not_matter() -> None:
    stop = threading.Event()
    threads = [threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(stop.is_set, True)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with here(lambda guest: [guest.send({"n": threading.active_count()}) for _ in guest.forks()]) as template:
            for _ in range(20):
                with template.fork() as fork:
                    assert fork.receive(60) == {"n": 1}
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.fixture
def warm_project(project: Path) -> Path:
    (project / "warm.py").write_text(WARM)
    return project


def sealed(project: Path) -> Sandbox:
    return Sandbox(SandboxSpec(mounts=[Mount.overlay(project)], workdir=str(project)))


def test_sealed_template(warm_project: Path) -> None:
    with sealed(warm_project) as box, box.template("warm:main", {"text": "hello"}) as template:
        for job in (1, 2):
            with template.fork(job) as fork:
                message = fork.receive(20)
            assert message == {"job": job, "pid": 2, "warm": 1, "seen": "hello",
                               "files": ["__pycache__", "data.txt", "made-while-warm.txt", "mine.txt", "warm.py"]}  # fmt: skip
    assert sorted(path.name for path in warm_project.iterdir()) == ["data.txt", "warm.py"]


def test_sealed_template_that_fails(warm_project: Path) -> None:
    with sealed(warm_project) as box:
        with pytest.raises(LaunchError, match="nothing_like_it"):
            box.template("warm:nothing_like_it")
        with pytest.raises(SpecError):
            box.template("no colon here")


@pytest.mark.parametrize("forks", [300])
def test_many_forks_cost_the_same(forks: int) -> None:
    """No descriptor and no memory is lost on the way; `benchmarks/endurance.py` makes 10,000."""
    with here(lambda guest: [guest.send({"job": job}) for job in guest.forks()]) as template:
        descriptors = []
        memory = []
        for number in range(forks):
            with template.fork(number) as fork:
                assert fork.receive(60) == {"job": number}
            descriptors.append(len(os.listdir("/proc/self/fd")))
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert max(descriptors[10:]) - min(descriptors[10:]) <= 4
    assert memory[-1] - memory[20] < 4096
