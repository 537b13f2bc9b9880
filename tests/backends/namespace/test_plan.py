"""Plans are data, and executing one makes exactly the system calls that it says: recorded, not made."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isolation import plain
from isolation.backends.namespace.planner import make_plan
from isolation.backends.namespace.process import inherited
from isolation.backends.namespace.rootfs import mounts
from isolation.backends.namespace.rootfs.adoption import Seed
from isolation.backends.namespace.rootfs.mounts import (
    Bind,
    FreshOperation,
    Ground,
    Lower,
    Overlay,
    Private,
    Proc,
    ReadOnlyView,
    Rebind,
    Symlink,
)
from isolation.backends.namespace.rootfs.view import View
from isolation.backends.showing import environment_for
from isolation.errors import FeatureMissing, SpecError
from isolation.linux import syscalls
from isolation.linux.cgroup import Hierarchy, oom_kills
from isolation.linux.mountinfo import MountPoint, MountTable
from isolation.linux.syscall_script import SyscallScript
from isolation.spec import Limits, Mount, SandboxSpec


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """System calls and file operations, recorded."""
    made: list[tuple[Any, ...]] = []
    for name in ("mount", "umount2", "pivot_root", "open_tree", "move_mount", "mount_setattr"):

        def record(*arguments: Any, name: str = name, **keywords: Any) -> int:
            made.append((name, *arguments))
            return 99

        monkeypatch.setattr(syscalls, name, record)
    for name in ("mkdir", "chmod", "chown", "utime", "symlink", "close"):
        monkeypatch.setattr(plain.os, name, lambda *arguments, name=name, **_: made.append((name, *arguments)))
    monkeypatch.setattr(plain.os, "stat", lambda path: os.lstat("/"))
    return made


def written(operation: FreshOperation) -> list[tuple[Any, ...]]:
    """What a fresh operation writes down: names of system calls, and their arguments."""
    script = SyscallScript()
    operation.write(script, Ground())
    return [(step.name, *step.arguments) for step in script.steps]


def test_overlay() -> None:
    steps = written(Overlay("/project", "/home/me/project", 3))
    data = next(step[5] for step in steps if step[0] == "mount")
    assert data.startswith("lowerdir=/.isolation/lower/3,upperdir=/.isolation/store/layers/3/upper,workdir=")
    assert "userxattr" in data
    assert [step[0] for step in steps].index("fchownat") < [step[0] for step in steps].index("utimensat")


@pytest.mark.parametrize(
    ("owner", "mode", "shown"),
    [((0, 0), 0o755, None), ((5, 0), 0o750, 0o550), ((0, 5), 0o777, 0o777), ((5, 5), 0o700, 0o500)],
)
def test_a_directory_of_somebody_else_is_not_the_guests_to_write(
    owner: tuple[int, int], mode: int, shown: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = Overlay("/project", "/home/you/project", 3)
    found = os.stat_result((0o40000 | mode, 1, 1, 2, *owner, 0, 0, 0, 0))
    monkeypatch.setattr(plain.os, "stat", lambda path: found)
    assert overlay.mode_for_guest() == shown
    if shown is not None:
        steps = written(replace(overlay, foreign_mode=shown))
        assert "fchownat" not in [step[0] for step in steps]
        assert next(step[3] for step in steps if step[0] == "fchmodat") == shown


def test_view_escapes_what_overlayfs_reads(calls: list[tuple[Any, ...]]) -> None:
    ReadOnlyView("/x", "/a,b:c\\d", "/old/a,b:c\\d").execute()
    data = next(call[5] for call in calls if call[0] == "mount")
    assert r"/old/a\,b\:c\\d," in data


@pytest.mark.parametrize(
    ("writable", "device", "read_only", "no_devices"),
    [(False, False, True, True), (True, False, False, True), (False, True, True, False)],
)
def test_bind(calls: list[tuple[Any, ...]], writable: bool, device: bool, read_only: bool, no_devices: bool) -> None:
    Bind("/data", "/srv/data", "/old/srv/data", True, writable, device).execute()
    attributes = next(call[2] for call in calls if call[0] == "mount_setattr")
    assert bool(attributes & syscalls.MOUNT_ATTR_RDONLY) is read_only
    assert bool(attributes & syscalls.MOUNT_ATTR_NODEV) is no_devices
    assert attributes & syscalls.MOUNT_ATTR_NOSUID


def test_proc_is_masked() -> None:
    steps = written(Proc(("scsi", "keys"), frozenset({"scsi"})))
    assert [step[1:3] for step in steps] == [
        ("proc", "/proc"),
        ("/.isolation/empty", "/proc/scsi"),
        ("/dev/null", "/proc/keys"),
    ]


def test_a_directory_is_made_once_and_again_where_something_has_covered_it() -> None:
    script, ground = SyscallScript(), Ground()
    for operation in (Private("/a/b", 1), Private("/a/b/c", 2), Private("/a/d", 3), Private("/a", 4), Private("/a/b", 5)):
        operation.write(script, ground)
    shown = [
        step.arguments[1] for step in script.steps if step.name == "mkdirat" and not str(step.arguments[1]).startswith("/.")
    ]
    assert shown == ["/a", "/a/b", "/a/b/c", "/a/d", "/a/b"]


def table(*paths: str) -> MountTable:
    return MountTable([MountPoint("/", "ext4", frozenset()), *(MountPoint(path, "ext4", frozenset()) for path in paths)])


def test_a_directory_without_mounts_beneath_is_one_overlay(tmp_path: Path) -> None:
    view = View(table())
    view.show(str(tmp_path), writable=True)
    base, fresh = view.operations()
    assert [type(operation) for operation in fresh] == [Overlay]
    assert any(isinstance(operation, Lower) for operation in base)
    assert view.shows(str(tmp_path / "anything"))


def test_a_directory_with_mounts_beneath_is_shown_entry_by_entry(tmp_path: Path) -> None:
    for name in ("plain", "mounted"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    view = View(table(str(tmp_path / "mounted")))
    view.show(str(tmp_path), writable=True)
    fresh = {operation.target: type(operation).__name__ for operation in view.operations()[1]}
    assert fresh == {
        str(tmp_path): "Private",
        f"{tmp_path}/plain": "Overlay",
        f"{tmp_path}/mounted": "Overlay",
        f"{tmp_path}/file": "CopiedFile",
        f"{tmp_path}/link": "FreshSymlink",
    }


def test_what_lies_beneath_something_fresh_is_bound_there(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    view = View(table())
    view.show(str(tmp_path / "env"), writable=False)
    view.private(str(tmp_path))
    base, fresh = view.operations()
    assert [type(operation) for operation in fresh] == [Private, Rebind]
    assert any(operation.target.startswith("/.isolation/base/") for operation in base)


def test_a_file_is_copied_where_the_copy_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    view = View(table())
    view.private("/tmp")
    view.copy(str(tmp_path / "file"), "/tmp/of/file")
    view.copy(str(tmp_path / "file"), "/elsewhere")
    base, fresh = view.operations()
    assert [(type(operation).__name__, operation.target) for operation in fresh] == [
        ("Private", "/tmp"), ("CopiedFile", "/tmp/of/file"),
    ]  # fmt: skip
    assert ("Bind", "/elsewhere") in [(type(operation).__name__, operation.target) for operation in base]


def test_a_directory_is_copied_into_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "copied" / "inner").mkdir(parents=True)
    (tmp_path / "copied" / "inner" / "file").write_text("x")
    (tmp_path / "shown").mkdir()
    view = View(table())
    view.private("/tmp", 0o1777)
    view.private("/run")
    view.show(str(tmp_path / "shown"), "/shown", writable=True)
    assert view.seed(str(tmp_path / "copied"), "/tmp/of/copy")
    assert not view.seed(str(tmp_path / "copied"), "/shown/copy")
    assert not view.seed(str(tmp_path / "copied"), "/elsewhere")
    base, fresh = view.operations()
    assert {operation.target: type(operation).__name__ for operation in fresh} == {
        "/tmp": "Overlay", "/run": "Private", "/shown": "Overlay",
    }  # fmt: skip
    (seed,) = (operation for operation in base if isinstance(operation, Seed))
    assert seed.mode == 0o1777
    assert [(one.path, [entry.path for entry in one.entries]) for one in seed.copied] == [
        ("of/copy", ["", "inner", "inner/file"]),
    ]  # fmt: skip


def test_symlinks_on_the_way_are_shown(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    view = View(table())
    view.show(str(tmp_path / "link"), writable=True)
    base, fresh = view.operations()
    assert Symlink(str(tmp_path / "link"), "real") in base
    assert [operation.target for operation in fresh] == [str(tmp_path / "real")]


def test_symlink_loops_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(SpecError, match="symbolic links"):
        View(table()).show(str(tmp_path / "a"), writable=True)


def test_a_plan_can_be_read(tmp_path: Path) -> None:
    plan = make_plan(SandboxSpec(mounts=[Mount.overlay(tmp_path)], workdir=str(tmp_path), limits=Limits(pids=9)))
    text = plan.describe()
    for expected in ("namespaces user, mount, pid, network, ipc, uts, cgroup, time", "own loopback only", "pids 9",
                     f"overlay  {tmp_path} (copy-on-write)", "proc     /proc"):  # fmt: skip
        assert expected in text
    assert "/.isolation" not in text


def test_what_cannot_be_had_is_refused() -> None:
    for fields in ({"network": "nat"}, {"image": "debian"}):
        with pytest.raises(FeatureMissing):
            make_plan(SandboxSpec(**fields))  # type: ignore[arg-type]


def test_mountinfo_escapes(tmp_path: Path) -> None:
    line = r"36 35 98:0 / /mnt/with\040space\134 rw,noatime master:1 - ext3 /dev/root rw,errors=continue"
    from isolation.linux.mountinfo import _parse

    point = _parse(line.replace("\\\\", "\\"))
    assert (point.path, point.fstype) == ("/mnt/with space\\", "ext3")


def test_environment_is_an_allowlist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        plain.os, "environ", {"PATH": "/usr/bin:/nowhere", "SECRET": "x", "LC_TIME": "C", "LD_PRELOAD": "/evil.so"}
    )
    env = environment_for(SandboxSpec(env={"MINE": "1"}), lambda path: path.startswith("/usr"))
    assert env == {"PATH": "/usr/bin", "LC_TIME": "C", "MINE": "1"}


def test_cgroup_v1_and_v2_are_found(tmp_path: Path) -> None:
    for name in ("memory", "cpu", "unified/mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "unified/mine/cgroup.controllers").write_text("cpu memory pids\n")
    v1 = tmp_path / "mountinfo1"
    v1.write_text(
        f"1 0 0:1 / {tmp_path}/memory rw - cgroup cgroup rw,memory\n1 0 0:1 / {tmp_path}/cpu rw - cgroup cgroup rw,cpu\n"
    )
    (tmp_path / "cgroup1").write_text("4:memory:/\n1:cpu:/\n0::/\n")
    found = Hierarchy.find(str(tmp_path / "cgroup1"), str(v1))
    assert (found.version, sorted(found.parents)) == (1, ["cpu", "memory"])
    v2 = tmp_path / "mountinfo2"
    v2.write_text(f"1 0 0:1 / {tmp_path}/unified rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "cgroup2").write_text("0::/mine\n")
    found = Hierarchy.find(str(tmp_path / "cgroup2"), str(v2))
    assert (found.version, found.can("memory"), found.can("cpu")) == (2, True, True)


def test_cgroup_v2_limits_are_written(tmp_path: Path) -> None:
    parent = tmp_path / "mine"
    parent.mkdir()
    (parent / "cgroup.subtree_control").write_text("cpu memory")
    group = Hierarchy(2, {"memory": str(parent), "cpu": str(parent)})
    made = parent / "7"
    made.mkdir()
    for name in ("memory.max", "memory.swap.max", "memory.oom.group", "cpu.max"):
        (made / name).write_text("")
    from isolation.linux.cgroup import Cgroup

    Cgroup(2, {"memory": str(made), "cpu": str(made)}).apply(memory=64 << 20, cpus=0.5)
    assert (made / "memory.max").read_text() == str(64 << 20)
    assert (made / "memory.swap.max").read_text() == "0"
    assert (made / "cpu.max").read_text() == "50000 100000"
    assert group.can("memory")


def test_oom_kills() -> None:
    assert oom_kills("low 0\noom 2\noom_kill 1\n") == 1
    assert oom_kills("oom_kill_disable 0\nunder_oom 0\n") == 0


def test_descriptors_are_classified(tmp_path: Path) -> None:
    import socket
    import tempfile

    (tmp_path / "f").write_text("x")
    with (tmp_path / "f").open() as file, tempfile.TemporaryFile() as gone, socket.socket() as sock:
        directory = os.open(tmp_path, os.O_RDONLY)
        found = {item.fd: item for item in inherited.inventory()}
        os.close(directory)
        assert found[file.fileno()].path == str(tmp_path / "f")
        assert found[gone.fileno()].scratch
        assert not found[sock.fileno()].path
        assert not found[sock.fileno()].scratch
        assert found[directory].path == str(tmp_path)


def test_names_of_operations_do_not_collide() -> None:
    kinds = [*mounts.BaseOperation.__subclasses__(), *mounts.FreshOperation.__subclasses__()]
    assert len({kind.__name__ for kind in kinds}) == len(kinds) > 10


def test_system_directories_are_never_the_users_own() -> None:
    """Whether they are a Python's prefix, or were asked for; what lies in them can be a project."""
    view = View(MountTable.read(), "/tmp")
    view.system()
    view.environment("/usr")
    view.environment("/usr/lib")
    view.show("/usr", writable=True)
    view.show("/usr", "/elsewhere", writable=False)
    view.show("/", "/host", writable=False)
    assert view.staged
    assert [source.path for source in view.staged if source.owned] == []
    view.show("/usr/local", writable=True)
    assert [source.path for source in view.staged if source.owned] == [os.path.realpath("/usr/local")]


def test_a_limit_that_nobody_asked_for_moves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a cgroup could be made, too (version 2: by moving all processes beside it)."""
    found = Hierarchy(2, dict.fromkeys(("memory", "cpu", "cpuacct"), "/sys/fs/cgroup/x"))
    monkeypatch.setattr(Hierarchy, "find", lambda: found)
    plan = make_plan(SandboxSpec(limits=Limits(memory="1G", watched=True)))
    assert (plan.cgroup, plan.watch_memory) == (None, True)
    assert "watched" not in plan.limits.describe()
    plan = make_plan(SandboxSpec(limits=Limits(memory="1G")))
    assert (plan.cgroup, plan.watch_memory) == (found, False)
    plan = make_plan(SandboxSpec(limits=Limits(memory="1G", cpus=1, watched=True)))
    assert (plan.cgroup, plan.watch_memory) == (found, False)
