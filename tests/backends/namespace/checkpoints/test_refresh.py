"""What changes on the host is seen in a live sandbox, when it is asked to look again."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolation import PIPE, Mount, Sandbox, SandboxSpec
from isolation.backends.namespace.checkpoints import remount, session
from isolation.backends.namespace.planner import make_plan
from isolation.linux import syscalls

pytestmark = pytest.mark.usefixtures("nothing_left")
LOOK = "for f in data.txt sub/b.txt late.txt dir/x.txt; do printf '%s ' \"$(cat $f 2>/dev/null || echo -)\"; done; ls"


@pytest.fixture(params=["overlay", "ro"])
def box(request: pytest.FixtureRequest, project: Path) -> Iterator[Sandbox]:
    (project / "sub").mkdir()
    (project / "sub" / "b.txt").write_text("old")
    with Sandbox(SandboxSpec("namespace", mounts=[Mount(project, mode=request.param)], workdir=project)) as box:
        assert look(box) == ["original", "old", "-", "-", "data.txt", "sub"]
        yield box


def look(box: Sandbox) -> list[str]:
    return box.run(["sh", "-c", LOOK]).stdout.decode().split()


def put(path: Path, text: str) -> None:
    """As editors do."""
    beside = path.with_name("beside~")
    beside.write_text(text)
    beside.replace(path)


def test_added_replaced_and_removed(box: Sandbox, project: Path) -> None:
    put(project / "data.txt", "new")
    put(project / "sub" / "b.txt", "new")
    put(project / "late.txt", "there")
    (project / "dir").mkdir()
    put(project / "dir" / "x.txt", "x")
    box.refresh_files()
    assert look(box) == ["new", "new", "there", "x", "data.txt", "dir", "late.txt", "sub"]
    (project / "data.txt").unlink()
    shutil.rmtree(project / "dir")
    (project / "sub").rename(project / "other")
    box.refresh_files()
    assert look(box) == ["-", "-", "there", "-", "late.txt", "other"]
    (project / "sub").mkdir()
    put(project / "sub" / "b.txt", "another")
    box.refresh_files()
    assert look(box) == ["-", "another", "there", "-", "late.txt", "other", "sub"]


def test_what_was_written_inside_stays_above(project: Path) -> None:
    (project / "gone.txt").write_text("gone")
    with Sandbox(SandboxSpec("namespace", mounts=[Mount.overlay(project)], workdir=project)) as box:
        assert box.run(["sh", "-c", "echo inside > data.txt; rm gone.txt; echo inside > late.txt"]).returncode == 0
        for name in ("data.txt", "gone.txt", "late.txt", "other.txt"):
            put(project / name, "outside")
        box.refresh_files()
        assert look(box) == ["inside", "-", "inside", "-", "data.txt", "late.txt", "other.txt"]
        assert box.run(["cat", "other.txt"]).stdout == b"outside"


def test_open_files_and_working_directories_stay(box: Sandbox, project: Path) -> None:
    program = "exec 3< data.txt; cd sub; echo ready; read line; cat <&3; echo; cat b.txt; echo; cat ../late.txt"
    process = box.popen(["sh", "-c", program], stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    put(project / "data.txt", "new")
    put(project / "sub" / "b.txt", "new")
    put(project / "late.txt", "there")
    box.refresh_files()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert process.stdout.read() == b"original\nnew\nthere"
    assert process.wait().ok
    process.close()


@pytest.mark.skipif(not remount.usable(), reason="files can be kept since Linux 6.6")
def test_between_layers_that_are_kept(project: Path) -> None:
    with Sandbox(SandboxSpec("namespace", mounts=[Mount.overlay(project)], workdir=project)) as box:
        assert box.run(["sh", "-c", "echo inside > mine.txt"]).returncode == 0
        kept = box.keep_files()
        assert look(box)[2] == "-"
        assert box.run(["sh", "-c", "echo later > mine.txt"]).returncode == 0
        put(project / "late.txt", "there")
        box.refresh_files()
        assert look(box)[2] == "there"
        box.restore_files(kept)
        put(project / "late.txt", "again")
        box.refresh_files()
        assert look(box)[2] == "again"
        assert box.run(["cat", "mine.txt"]).stdout == b"inside\n"
        assert {Path(change.path).name for change in box.changes()} == {"mine.txt"}


def test_a_guest_that_has_put_the_directory_elsewhere(project: Path) -> None:
    """And something else in its place: it sees what it likes, and nothing else happens."""
    target = "/tmp/a/b/project"
    with Sandbox(SandboxSpec("namespace", mounts=[Mount.overlay(project, target)], workdir=target)) as box:
        moved = box.run(["sh", "-c", "cd /tmp; mv a c && mkdir a && ln -s /etc a/b; cat c/b/project/data.txt"])
        assert moved.stdout == b"original", moved.stderr
        box.refresh_files()
        assert (
            box.run(["sh", "-c", "cd /tmp/c/b/project && echo more >> data.txt && cat data.txt"], cwd="/").stdout
            == b"originalmore\n"
        )


def test_nobody_waits_for_a_look_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed. If even that takes too long, it works for the guest in the kernel, and the sandbox has to end."""
    plan = make_plan(SandboxSpec())
    files = session.KeptFiles(plan, -1)
    monkeypatch.setattr(session.refresh, "live", lambda *_arguments: signal.pause())
    files.begin({"do": "refresh", "id": 1, "ask": 1})
    with monkeypatch.context() as patch:
        patch.setattr(session, "wait_readable", lambda *_arguments: False)
        with pytest.raises(session.Inconsistent):
            files.give_up()
    assert files.give_up()["errno"] == errno.ETIME
    assert files.fileno() == -1
    files.close()


def test_a_guest_that_makes_names_all_the_time(box: Sandbox, project: Path) -> None:
    flood = "i=0; while :; do i=$((i+1)); [ -e no-$i ]; [ $i = 1000 ] && echo ready; done"
    processes = [box.popen(["sh", "-c", flood], stdout=PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    put(project / "late.txt", "there")
    box.refresh_files()
    assert look(box)[2] == "there"
    for process in processes:
        process.kill()
        process.close()


def test_attributes_of_mounts_stay(box: Sandbox, project: Path) -> None:
    """What is read-only stays so, and the rest as it was."""
    before = box.run(["cat", "/proc/self/mountinfo"]).stdout
    box.refresh_files()
    assert box.run(["cat", "/proc/self/mountinfo"]).stdout == before


def test_what_is_no_mount_is_refused(project: Path) -> None:
    fd = os.open(project, os.O_PATH)
    try:
        with pytest.raises(OSError, match="fspick"):
            syscalls.reconfigure(fd)
    finally:
        os.close(fd)
