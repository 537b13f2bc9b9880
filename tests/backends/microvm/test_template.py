"""Templates of machines: what every fork has of its own, and what all have in common."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import alive, machines

from isolation import Ended, LaunchError, Limits, Mount, Sandbox, SandboxClosed, SandboxSpec, Verdict
from isolation.backends.microvm.template import MicrovmTemplate
from isolation.backends.namespace.host import supervisor_pool
from isolation.guest import Guest
from isolation.template import Template

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("microvm_ready")]

WARM = """
import os, random, socket, subprocess, sys, threading, time, uuid
from pathlib import Path
try:
    import numpy
except ImportError:
    numpy = None
try:
    import ssl
except ImportError:  # a Python without it
    ssl = None

def values():
    found = {
        "urandom": os.urandom(8).hex(), "random": random.random(), "uuid": str(uuid.uuid4()), "ssl": ssl and ssl.RAND_bytes(8).hex(),
        "child": subprocess.run([sys.executable, "-c", "import random; print(random.random())"], capture_output=True).stdout.decode(),
        "hostname": socket.gethostname(), "machine-id": Path("/etc/machine-id").read_text() if os.path.exists("/etc/machine-id") else "",
    }
    if numpy is not None:
        found["numpy"] = float(numpy.random.random())
    return found

def serve(listener):
    count = 0
    while True:
        other, _ = listener.accept()
        count += 1
        other.sendall(str(count).encode())
        other.close()

def main(guest):
    values()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    background = subprocess.Popen(["sh", "-c", "while sleep 0.1; do echo x >> /tmp/beat; done"])
    Path("warm.txt").write_text("warm")
    count = 0
    for job in guest.forks():
        count += 1
        if job == "hang":
            hang()
        if job == "values":
            guest.send(values())
        if job == "time":
            guest.send({"time": time.time(), "monotonic": time.monotonic()})
        if job == "fresh":
            fresh = {"count": count, "mine": Path("mine.txt").exists(), "tmp": Path("/tmp/mine").exists()}
            Path("mine.txt").touch()
            Path("/tmp/mine").touch()
            fresh["warm"] = Path("warm.txt").read_text()
            fresh["server"] = socket.create_connection(listener.getsockname()).recv(10).decode()
            size = os.stat("/tmp/beat").st_size if os.path.exists("/tmp/beat") else 0
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and (os.stat("/tmp/beat").st_size if os.path.exists("/tmp/beat") else 0) == size:
                time.sleep(0.05)
            fresh["beats"] = os.stat("/tmp/beat").st_size > size
            fresh["background"] = background.poll()
            guest.send(fresh)
        while isinstance(job, dict):
            for inner in guest.forks():
                if isinstance(inner, dict):
                    job = inner
                    break
                guest.send({"outer": job, "inner": inner, "count": count, "mine": Path("mine.txt").exists()})
                Path("mine.txt").touch()

def hang():
    print("hanging", flush=True)
    time.sleep(1000)

def plain(guest):
    for job in guest.forks():
        guest.send({"job": job})
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("project")
    (path / "warm_machine.py").write_text(WARM)
    return path


def spec(directory: Path, **fields: Any) -> SandboxSpec:
    return SandboxSpec(backend="microvm", mounts=[Mount.overlay(directory)], workdir=str(directory), **fields)


@pytest.fixture(scope="module")
def template(directory: Path, microvm_ready: None) -> Iterator[Template]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        with Sandbox(spec(directory)).template("warm_machine:main") as made:
            time.sleep(2)  # so that a clock that stood still would show
            yield made
        supervisor_pool.release()
        assert machines(os.getpid()) == set()


def ask(template: Template, job: object, **more: Any) -> Any:
    with template.fork(job, **more) as fork:
        message = fork.receive(120)
        assert message is not None, (fork.wait(60), os.read(fork.stderr, 10_000))
        return message


def test_forks_are_fresh_and_what_was_started_lives_on(template: Template) -> None:
    for _ in range(2):
        assert ask(template, "fresh") == {
            "count": 1, "mine": False, "tmp": False, "warm": "warm", "server": "1", "beats": True, "background": None,
        }  # fmt: skip


def test_no_two_forks_share_a_value(template: Template) -> None:
    found = [ask(template, "values") for _ in range(3)]
    for name in found[0]:
        if found[0][name]:
            assert len({message[name] for message in found}) == 3, name
    assert len({message["hostname"] for message in found}) == 3


def test_forks_with_the_same_random_numbers(template: Template) -> None:
    found = [ask(template, "values", reseed=False) for _ in range(2)]
    for name in ("random", "hostname", "machine-id", "numpy"):
        assert found[0].get(name) == found[1].get(name), name


def test_the_clock_is_the_hosts(template: Template) -> None:
    with template.fork("time") as fork:
        message = fork.receive(120)
        now = time.time()
    assert message is not None
    assert abs(message["time"] - now) < 1
    again = ask(template, "time")
    assert again["time"] - message["time"] < 120


def test_forks_of_a_fork(template: Template) -> None:
    with template.branch({"level": 1}) as one, template.branch({"level": 2}) as two:
        branch, other = one.template(120), two.template(120)
        assert branch is not None
        assert other is not None
        for name, made in (("a", branch), ("b", other), ("c", branch)):
            level = 1 if made is branch else 2
            assert ask(made, name) == {"outer": {"level": level}, "inner": name, "count": 1, "mine": False}
        assert ask(template, "time")
    with template.branch("hang-not-known-and-over") as over, pytest.raises(LaunchError):
        over.template(120)


def test_a_template_goes_on(template: Template) -> None:
    with template.branch({"level": 1}) as branch:
        first = branch.template(120)
        assert first is not None
        with first.advance({"level": "further"}) as later:
            second = later.template(120)
            assert second is not None
            assert ask(second, "a") == {"outer": {"level": "further"}, "inner": "a", "count": 1, "mine": False}


def test_a_fork_that_hangs_is_ended(template: Template) -> None:
    with template.fork("hang") as fork:
        output = b""
        while b"hanging" not in output:
            time.sleep(0.05)
            try:
                output += os.read(fork.stdout, 1000)
            except BlockingIOError:
                assert fork.wait(0) is None
        fork.end(Verdict(Ended.TIMED_OUT))
        assert "in hang" in fork.stacks()
        assert fork.wait() == Verdict(Ended.TIMED_OUT)
        assert fork.usage().wall > 0
    with pytest.raises(Exception):  # noqa: B017, PT011
        fork.receive(1)


def test_a_fork_whose_machine_is_killed(template: Template) -> None:
    before = machines(os.getpid())
    with template.fork("hang") as fork:
        for pid in before | machines(os.getpid()):
            with contextlib.suppress(ProcessLookupError):  # one of a fork that was closed just now
                os.kill(pid, signal.SIGKILL)  # the spare one, too
        assert list(fork) == []
        verdict = fork.wait(60)
        assert verdict is not None
        assert verdict.ended is Ended.LOST
        assert str(verdict).isprintable()
    assert ask(template, "time")  # a spare that has died is not noticed


def test_a_guest_that_does_not_read(template: Template) -> None:
    from isolation.errors import WireError

    with template.fork("hang") as fork:

        def send() -> None:
            for _ in range(100):
                fork.send({"more": "x" * (1 << 20)})

        with pytest.raises(WireError):
            send()


def test_many_forks_leave_nothing(template: Template) -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    seen = []
    for _ in range(30):
        assert ask(template, "time")
        seen.append(count())
    fds, threads = (max(values[10:]) - min(values[:10]) for values in zip(*seen, strict=True))
    assert fds <= 12  # forks that were closed just now may not be gone yet
    assert threads <= 3


def test_threads_that_fork_at_once(template: Template) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(ask(template, "values")), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len({message["uuid"] for message in found}) == 4


def test_saved_and_loaded(template: Template, directory: Path, tmp_path: Path) -> None:
    assert isinstance(template, MicrovmTemplate)
    template.save(tmp_path / "kept")
    # With its plan: the environment is whatever is on sys.path, and somebody may be working on that just now.
    with MicrovmTemplate.load(template._plan, "warm_machine:main", None, str(tmp_path / "kept")) as loaded:
        found = [ask(loaded, "values"), ask(template, "values")]
        assert found[0]["uuid"] != found[1]["uuid"]
        assert ask(loaded, "fresh")["server"] == "1"
    for changed, payload, config, reason in (
        (spec(directory), "warm_machine:plain", None, "another payload"),
        (spec(directory), "warm_machine:main", {"x": 1}, "another payload"),
        (spec(directory, limits=Limits(memory="800M")), "warm_machine:main", None, "other hardware|another payload"),
        (spec(directory, env={"X": "1"}), "warm_machine:main", None, "another payload"),
        (SandboxSpec(backend="microvm"), "warm_machine:main", None, "mounted directories"),
    ):
        with pytest.raises(LaunchError, match=reason):
            Sandbox(changed).load_template(tmp_path / "kept", payload, config)
    about = json.loads((tmp_path / "kept" / "snapshot.json").read_text())
    assert "memory" in about
    with (tmp_path / "kept" / "memory").open("r+b") as file:
        file.seek(os.path.getsize(tmp_path / "kept" / "memory") // 2)
        file.write(b"damage")
    with pytest.raises(LaunchError, match="damaged"):
        MicrovmTemplate.load(template._plan, "warm_machine:main", None, str(tmp_path / "kept"))


def test_closing_in_every_order(directory: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        before = machines(os.getpid())
        box = Sandbox(spec(directory))
        first, second = (box.template("warm_machine:plain") for _ in range(2))
        forks = [made.fork(number) for number, made in enumerate((first, second, first))]
        box.close()
        assert forks[0].receive(60) == {"job": 0}
        first.close()
        first.close()
        assert forks[2].wait(60) is not None  # its machine ended with its template
        assert forks[1].receive(60) == {"job": 1}
        with pytest.raises(SandboxClosed):
            first.fork()
        with pytest.raises(SandboxClosed):
            first.branch()
        assert ask(second, "still") == {"job": "still"}
        for fork in forks:
            fork.close()
            fork.close()
        mine = machines(os.getpid()) - before
        assert mine  # the one made ahead
        second.close()
        assert alive(mine) == set()


def test_templates_of_both_backends_in_one_process(directory: Path, template: Template) -> None:
    """Forks of this very process, made while threads keep its machines going."""
    from isolation import registry

    def payload(guest: Guest) -> None:
        for job in guest.forks():
            guest.send({"job": job, "threads": threading.active_count()})

    with registry.get("namespace").template(SandboxSpec(), payload, None) as here:
        for number in range(5):
            with here.fork(number) as fork, template.fork("time") as other:
                assert fork.receive(60) == {"job": number, "threads": 1}
                assert other.receive(60) is not None
