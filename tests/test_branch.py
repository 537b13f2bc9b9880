"""Forks of forks: a template of any depth, as sealed as what is made from it."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import isolation
from isolation import Ended, LaunchError, Limits, Mount, Sandbox, SandboxSpec, registry
from isolation.guest import Guest
from isolation.template import Branch, Template

pytestmark = pytest.mark.usefixtures("nothing_left")

DEEPER = """
from pathlib import Path
steps = []

def main(guest):
    while True:
        for job in guest.forks():
            if isinstance(job, str):
                steps.append(job)
                with open("steps.txt", "a") as file:
                    file.write(job)
                break
            guest.send({"steps": steps, "file": Path("steps.txt").read_text()})
        else:
            return
"""


def here(function: object, **fields: object) -> Template:
    spec = SandboxSpec(**fields)  # type: ignore[arg-type]
    return registry.get("namespace").template(spec, function, None)  # type: ignore[arg-type]


def made(branch: Branch) -> Template:
    template = branch.template(20)
    assert template is not None, os.read(branch.stderr, 10_000)
    return template


def ask(template: Template, job: object = None) -> Any:
    with template.fork(job) as fork:
        message = fork.receive(20)
        assert message is not None, (fork.wait(60), os.read(fork.stderr, 10_000))
        return message


def steps_of(project: Path) -> Any:
    """A payload: a job that is text is done in the template that it makes; others tell what there is, and spoil it."""
    done: list[str] = []

    def made_in_tmp() -> list[str]:
        return sorted(path.name for path in Path("/tmp").glob("of-*"))

    def payload(guest: Guest) -> None:
        while True:
            for job in guest.forks():
                if isinstance(job, str):
                    done.append(job)
                    (project / "data.txt").open("a").write(f" {job}")
                    Path("/tmp/of-" + job).touch()
                    guest.send({"did": job})
                    break
                places = {"done": list(done), "text": (project / "data.txt").read_text(), "tmp": made_in_tmp()}
                done.append("spoilt")
                (project / "data.txt").unlink()
                for path in Path("/tmp").glob("of-*"):
                    path.unlink()
                guest.send(places | {"left": made_in_tmp(), "there": (project / "data.txt").exists()})
            else:
                return

    return payload


def test_what_a_template_did_is_seen_and_what_a_fork_does_is_not(project: Path) -> None:
    with here(steps_of(project), mounts=[Mount.overlay(project)]) as root, root.branch("a") as branch:
        first = made(branch)
        assert branch.receive(60) == {"did": "a"}
        second, other = made(first.branch("b")), made(first.branch("c"))
        third = made(second.branch("d"))
        for template, names in ((first, "a"), (second, "ab"), (other, "ac"), (third, "abd"), (first, "a"), (root, "")):
            for _ in range(2):
                assert ask(template, 1) == {
                    "done": list(names),
                    "text": " ".join(["original", *names]),
                    "tmp": [f"of-{name}" for name in names],
                    "left": [],
                    "there": False,
                }
    assert (project / "data.txt").read_text() == "original"


def test_a_template_goes_on(project: Path) -> None:
    with here(steps_of(project), mounts=[Mount.overlay(project)]) as root, root.branch("a") as branch:
        template = made(branch)
        assert ask(template, 1)["done"] == ["a"]
        for number, name in enumerate("bcd", 2):
            template = made(template.advance(name))
            found = ask(template, 1)
            assert found["done"] == list("abcd"[:number])
            assert found["text"] == " ".join(["original", *"abcd"[:number]])


def test_depth_has_an_end(project: Path) -> None:
    with here(steps_of(project), mounts=[Mount.overlay(project)]) as template:
        kept = []
        for name in "abcde":
            kept.append(template.branch(name))
            template = made(kept[-1])
        assert ask(template, 1)["done"] == list("abcde")
        with pytest.raises(LaunchError, match="at most 5 deep"):  # now, or when it is asked
            with template.branch("f") as branch:
                branch.receive(20)
        for branch in reversed(kept):
            branch.close()


def test_how_forks_of_a_branch_end() -> None:
    def payload(guest: Guest) -> None:
        for _level in guest.forks():
            for job in guest.forks():
                if job == "hang":
                    threading.Event().wait()
                if job == "memory":
                    hoard = []
                    while True:
                        hoard.append(bytearray(1 << 20))
                if isinstance(job, list):
                    os._exit(job[0])
                os.kill(os.getpid(), job)

    # Much: where no cgroup holds the limit, the fork's share of this very process counts, too.
    with here(payload, limits=Limits(memory="1G", pids=50)) as root, root.branch("x") as branch:
        template = made(branch)
        for job, ended, status in (([0], Ended.EXITED, 0), ([7], Ended.EXITED, 7), (11, Ended.SIGNALLED, 11)):
            with template.fork(job) as fork:
                assert list(fork) == []
                verdict = fork.wait(60)
                assert verdict is not None
                assert (verdict.ended, verdict.status) == (ended, status)
        with template.fork("memory") as fork:
            assert list(fork) == []
            verdict = fork.wait(60)
            assert verdict is not None
            assert verdict.ended is Ended.OUT_OF_MEMORY
            assert "in payload" in fork.stacks()
        with template.fork("hang") as fork:
            with pytest.raises(TimeoutError):
                fork.receive(0.2)
            from isolation import Verdict

            fork.end(Verdict(Ended.TIMED_OUT))
            assert "in payload" in fork.stacks()


def test_several_at_a_time() -> None:
    def payload(guest: Guest) -> None:
        for _level in guest.forks():
            for job in guest.forks():
                message = guest.receive()
                guest.send({"job": job, "told": message, "pids": sorted(p for p in os.listdir("/proc") if p.isdigit())})

    with here(payload) as root, root.branch("x") as branch:
        template = made(branch)
        forks = [template.fork(number) for number in range(5)]
        for number, fork in reversed(list(enumerate(forks))):
            fork.send({"n": number})
            assert fork.receive(60) == {"job": number, "told": {"n": number}, "pids": ["1", "3"]}
            fork.close()


def test_open_files_of_a_template_are_the_forks_own(project: Path) -> None:
    def payload(guest: Guest) -> None:
        for _level in guest.forks():
            database = sqlite3.connect(project / "base.sqlite")
            database.execute("create table t (x)")
            database.execute("insert into t values (1)")
            database.commit()
            log = (project / "log.txt").open("w")
            log.write("warm ")
            log.flush()
            for job in guest.forks():
                database.execute("insert into t values (?)", (job,))
                database.commit()
                log.write(f"fork {job}")
                log.flush()
                with sqlite3.connect(project / "base.sqlite") as again:
                    rows = again.execute("select x from t").fetchall()
                guest.send({"rows": [row[0] for row in rows], "log": (project / "log.txt").read_text()})

    with here(payload, mounts=[Mount.overlay(project)]) as root, root.branch("x") as branch:
        template = made(branch)
        for job in (5, 6):
            assert ask(template, job) == {"rows": [1, job], "log": f"warm fork {job}"}


def test_a_branch_that_ends() -> None:
    def payload(guest: Guest) -> None:
        for job in guest.forks():
            if job == "raise":
                raise ValueError("while it was set up")
            if job == "kill":
                os.kill(os.getpid(), signal.SIGKILL)

    with here(payload) as root:
        for job, status in (("raise", 1), ("kill", 9), ("return", 0)):
            with root.branch(job) as branch:
                with pytest.raises(LaunchError):
                    branch.template(20)
                verdict = branch.wait(60)
                assert verdict is not None
                assert verdict.status == status
        with root.branch("return") as branch:
            pass  # closed at once


def test_this_package_is_where_no_sandbox_shows_it(tmp_path: Path) -> None:
    """A checkout beneath /tmp, say: whoever makes forks of forks inside has to have read all of it before."""
    shutil.copytree(Path(isolation.__file__).parent, tmp_path / "isolation")
    program = tmp_path / "program.py"
    program.write_text(
        "import isolation\n"
        "from isolation import SandboxSpec, registry\n"
        "def payload(guest):\n"
        "    for outer in guest.forks():\n"
        "        for inner in guest.forks():\n"
        "            guest.send({'jobs': [outer, inner]})\n"
        "with registry.get('namespace').template(SandboxSpec(workdir='/'), payload, None) as template:\n"
        "    with template.branch(1) as branch, branch.template(20).fork(2) as fork:\n"
        "        print(isolation.__file__, fork.receive(20))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, program], env=environment, cwd="/", capture_output=True, text=True, timeout=600)
    assert done.stdout == f"{tmp_path}/isolation/__init__.py {{'jobs': [1, 2]}}\n", done.stderr


def test_closing_a_branch_ends_what_came_of_it() -> None:
    def payload(guest: Guest) -> None:
        for _level in guest.forks():
            for _job in guest.forks():
                threading.Event().wait()

    with here(payload) as root:
        branch = root.branch("x")
        fork = made(branch).fork("y")
        branch.close()
        assert list(fork) == []
        fork.close()


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def test_neither_template_nor_fork_has_privileges() -> None:
    new = {"NEWUSER": 0x10000000, "NEWNS": 0x20000, "NEWNET": 0x40000000, "both": 0x10020000, "setns": 0}

    def look() -> dict[str, Any]:
        status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
        found: dict[str, Any] = {name: status[name] for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")}
        found["mount"] = _libc().mount(b"none", b"/tmp", b"tmpfs", 0, None)
        found["hidden"] = os.listdir("/.isolation")
        for name, flag in new.items():
            child = os.fork()
            if child == 0:
                if name == "setns":
                    os._exit(
                        0
                        if _libc().setns(os.open("/proc/self/ns/user", os.O_RDONLY), 0x10000000) == 0
                        else ctypes.get_errno()
                    )
                failed = _libc().unshare(flag)
                if not failed and name == "NEWUSER":
                    failed = not _libc().mount(b"none", b"/tmp", b"tmpfs", 0, None)
                os._exit(1 if failed else 0)
            found[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return found

    def payload(guest: Guest) -> None:
        for _level in guest.forks():
            guest.send(look())
            for _job in guest.forks():
                guest.send(look())

    with here(payload) as root, root.branch("x") as branch:
        template = made(branch)
        of_template, of_fork = branch.receive(60), ask(template)
    assert of_template is not None
    for found in (of_template, of_fork):
        for name in ("CapEff", "CapBnd"):
            assert int(found[name], 16) == 0
        assert (found["NoNewPrivs"], found["Seccomp"], found["mount"], found["hidden"]) == ("1", "2", -1, [])
        assert found["NEWNS"] == found["NEWNET"] == found["both"] == 1
    assert of_fork["NEWUSER"] == 1
    assert of_fork["setns"] == 1  # EPERM of the filter; a template gets EINVAL from the kernel: it is in it
    assert of_template["setns"] == 22


def test_a_fork_reaches_neither_its_template_nor_its_siblings(project: Path) -> None:
    def payload(guest: Guest) -> None:
        for _level in guest.forks():
            server = socket.socket()
            server.bind(("127.0.0.1", 0))
            server.listen()
            abstract = socket.socket(socket.AF_UNIX)
            abstract.bind("\0template")
            abstract.listen()
            for _job in guest.forks():
                found = []
                for family, address in ((socket.AF_INET, server_address), (socket.AF_UNIX, "\0template")):
                    with socket.socket(family) as client:
                        client.settimeout(1)
                        try:
                            client.connect(address)
                        except OSError as error:
                            found.append(type(error).__name__)
                guest.send(
                    {"found": found, "kill": _libc().kill(-1, 0), "open": sorted(map(int, os.listdir("/proc/self/fd")))}
                )

    server_address = ("127.0.0.1", 1)
    with here(payload) as root, root.branch("x") as branch:
        template = made(branch)
        found = ask(template)
    assert found["found"] == ["ConnectionRefusedError", "ConnectionRefusedError"]
    assert found["kill"] == -1  # nobody else is there


def test_a_template_that_makes_no_forks() -> None:
    """It has the supervisor's socket, and may do with it as it likes; only its own forks suffer."""

    def payload(guest: Guest) -> None:
        for job in guest.forks():
            if job == "subreaper":
                _libc().prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
            descent = guest._fork.__self__  # type: ignore[union-attr]
            if job == "refuse":
                descent._fork_into = lambda order, given, guest, inherited: None
            if job == "lie":
                descent._fork_channel.send(b"nonsense")
                time.sleep(30)
            if job == "alone":  # a process without namespaces says that it is the fork

                def alone(order: Any, given: list[int], guest: Guest, inherited: Any) -> None:
                    control_socket = socket.socket(fileno=os.dup(given[len(order["namespaces"])]))
                    control_socket.send(b"b")
                    control_socket.recv(1)

                descent._fork_into = alone
            for _job in guest.forks():
                guest.send({"here": True})

    with here(payload) as root:
        with root.branch("refuse") as branch:
            template = made(branch)
            with pytest.raises(LaunchError, match="no copy of itself"), template.fork() as fork:
                fork.receive(60)
        with root.branch("lie") as branch, pytest.raises(LaunchError):
            branch.template(10)
        with root.branch("alone") as branch, made(branch).fork() as fork:
            assert fork.receive(60) is None
            fork.wait(60)
        with root.branch("subreaper") as branch:
            template = made(branch)
            for _ in range(3):
                assert ask(template) == {"here": True}
        with root.branch("honest") as branch:
            assert ask(made(branch)) == {"here": True}


@pytest.fixture
def deeper_project(project: Path) -> Path:
    (project / "deeper.py").write_text(DEEPER)
    (project / "steps.txt").touch()
    return project


def test_branches_of_a_sealed_template(deeper_project: Path) -> None:
    spec = SandboxSpec(mounts=[Mount.overlay(deeper_project)], workdir=str(deeper_project))
    with Sandbox(spec) as box, box.template("deeper:main") as root, root.branch("a") as branch:
        first = made(branch)
        second = made(first.branch("b"))
        assert ask(second, 1) == {"steps": ["a", "b"], "file": "ab"}
        assert ask(first, 1) == {"steps": ["a"], "file": "a"}
        assert ask(made(first.advance("c")), 1) == {"steps": ["a", "c"], "file": "ac"}


@pytest.fixture
def leaving_nothing() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 2


@pytest.mark.usefixtures("leaving_nothing")
def test_many_forks_of_a_branch_cost_the_same() -> None:
    def payload(guest: Guest) -> None:
        while True:
            for job in guest.forks():
                if job == "deeper":
                    break
                guest.send({"job": job, "files": len(os.listdir("/proc/self/fd"))})
            else:
                return

    with here(payload) as root, root.branch("deeper") as branch:
        template = made(branch)
        descriptors, inside, memory = [], [], []
        for number in range(200):
            if number % 40 == 0:
                template = made(template.advance("deeper"))
            found = ask(template, number)
            assert found["job"] == number
            inside.append(found["files"])
            descriptors.append(len(os.listdir("/proc/self/fd")))
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert max(descriptors[10:]) - min(descriptors[10:]) <= 4
    assert max(inside) == min(inside)
    assert memory[-1] - memory[20] < 4096
