"""The files of a live sandbox, kept and restored: real sandboxes, with a guest that may be hostile."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolation import (
    PIPE,
    FeatureMissing,
    GuestError,
    Limits,
    Mount,
    Network,
    Sandbox,
    SandboxClosed,
    SandboxSpec,
)
from isolation.backends.namespace.checkpoints import remount, session
from isolation.backends.namespace.host import supervisor_pool
from isolation.backends.namespace.host.sandbox import NamespaceMachine
from isolation.backends.namespace.plugin import NamespaceBackend
from isolation.backends.namespace.rootfs import layer_tree
from isolation.hookspecs import FILE_CHECKPOINTS
from isolation.linux import syscalls

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(not remount.usable(), reason="a tmpfs has no user extended attributes before Linux 6.6"),
]

LOOK = """
import json, os, stat, sys
found = {}
def look(path, within):
    status = os.lstat(path)
    about = [oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns]
    if stat.S_ISREG(status.st_mode):
        about.append(open(path).read())
    elif stat.S_ISLNK(status.st_mode):
        about.append(os.readlink(path))
    elif stat.S_ISDIR(status.st_mode) and path not in sys.argv[1].split(":"):
        for name in sorted(os.listdir(path)):
            look(os.path.join(path, name), within)
    found[path] = about
for place in sys.argv[2:]:
    look(place, place)
json.dump(found, sys.stdout)
"""
FILL = """
echo A > A; echo A >> data.txt; echo A > both; mkdir -p dir/sub; echo A > dir/sub/file; chmod 751 dir; ln -s A link
echo A > exec; chmod 4755 exec; mkfifo fifo; touch -d 2001-02-03 old; rm -r gone; mkdir turned; echo x > turned/x
"""
CHANGE = """
rm A link; echo B > B; echo B > both; mv dir/sub/file moved; rmdir dir/sub; ln -s B link; chmod 700 exec; rm old
rm -r turned; echo file > turned; rm data.txt; mkdir data.txt; echo B > data.txt/B; rm -r kept; mkdir kept; echo B > kept/B
chmod 750 .; rm fifo
"""


def of(project: Path, *more: Mount, **fields: Any) -> SandboxSpec:
    mounts = [Mount.overlay(project), Mount.overlay(project, "/srv/again"), *more]
    return SandboxSpec("namespace", mounts=mounts, workdir=str(project), **fields)


def sh(box: Sandbox, script: str, **fields: Any) -> str:
    done = box.run(["sh", "-ec", script], **fields)
    assert done.verdict.ok, (script, done.verdict, done.stdout, done.stderr)
    return done.stdout.decode()


def python(box: Sandbox, script: str, *args: str) -> str:
    done = box.run([sys.executable, "-c", script, *args])
    assert done.verdict.ok, (done.verdict, done.stdout, done.stderr)
    return done.stdout.decode()


def look(box: Sandbox, *without: str) -> dict[str, Any]:
    """Everything about everything that the guest may write to."""
    home = sh(box, "echo $HOME").strip()
    hidden = ":".join([*without, sys.prefix, sys.base_prefix, *sys.path])
    found: dict[str, Any] = json.loads(python(box, LOOK, hidden, "/tmp", "/var/tmp", "/dev/shm", "/run", "/srv/again", home))
    return found


def kinds(box: Sandbox) -> dict[str, str]:
    return {change.path: change.kind for change in box.changes()}


@pytest.fixture
def project(project: Path) -> Path:
    for name in ("gone", "kept"):
        (project / name).mkdir()
        (project / name / "file").write_text("original")
    return project


@pytest.fixture(params=["own supervisor", "shared supervisor"])
def box(request: pytest.FixtureRequest, project: Path) -> Iterator[Sandbox]:
    supervisor_pool.release()
    if request.param == "shared supervisor":
        with Sandbox(of(project)):
            pass  # from the second sandbox on, a supervisor stays
    with Sandbox(of(project)) as made:
        yield made


@pytest.fixture(params=["as it is", "before Linux 6.5"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A supervisor is a fork of this process, and so is its helper."""
    if request.param != "as it is":
        plain = syscalls.move_mount_onto

        def move_mount_onto(from_fd: int, to_fd: int, *, beneath: bool = False) -> None:
            if beneath:
                raise OSError(22, "no such flag")
            plain(from_fd, to_fd)

        monkeypatch.setattr(syscalls, "move_mount_onto", move_mount_onto)
    supervisor_pool.release()
    return str(request.param)


@pytest.mark.usefixtures("kernel")
def test_states_are_kept_and_restored(box: Sandbox, project: Path) -> None:
    places = ". /srv/again /tmp ~ /dev/shm"
    for place in places.split():
        sh(box, f"cd {place}; touch data.txt; mkdir -p gone kept; {FILL}")
    at_a, changes_a = look(box), kinds(box)
    a = box.keep_files()
    assert (look(box), kinds(box)) == (at_a, changes_a)
    for place in places.split():
        sh(box, f"cd {place}; {CHANGE}")
    at_b, changes_b = look(box), kinds(box)
    assert at_b != at_a
    b = box.keep_files()
    assert (look(box), kinds(box)) == (at_b, changes_b)
    sh(box, "rm -r B kept; touch new /tmp/new; echo new > turned")
    for kept, files, changes in ((a, at_a, changes_a), (b, at_b, changes_b), (a, at_a, changes_a), (a, at_a, changes_a)):
        box.restore_files(kept)
        assert look(box) == files
        assert kinds(box) == changes
        sh(box, "rm -rf both turned /tmp/both; mkdir turned; touch turned/y ~/y")
    box.restore_files(a)
    box.forget_files(a)
    box.forget_files(b)
    assert look(box) == at_a
    assert sorted(os.listdir(project)) == ["data.txt", "gone", "kept"]
    assert (project / "data.txt").read_text() == "original"


def test_changes_are_those_to_the_original(box: Sandbox, project: Path) -> None:
    sh(box, "echo 1 > one; echo 1 >> data.txt; echo 1 > gone/new; rm kept/file; echo 1 > /tmp/one; mkdir -p /tmp/d/e")
    box.keep_files()
    sh(box, "echo 2 > two; rm one /tmp/one; rm -r gone; mkdir gone; echo 2 > gone/two; echo 2 > /tmp/two; rmdir /tmp/d/e")
    first = box.keep_files()
    expected = {
        f"{project}/data.txt": "changed", f"{project}/two": "added", f"{project}/kept/file": "deleted",
        f"{project}/gone/file": "deleted", f"{project}/gone/two": "added", "/tmp/two": "added", "/tmp/d": "added",
    }  # fmt: skip
    assert kinds(box) == expected
    sh(box, "echo original > kept/file; rm -r gone /tmp/two /tmp/d data.txt two")
    assert kinds(box) == {f"{project}/data.txt": "deleted", f"{project}/gone": "deleted", f"{project}/kept/file": "changed"}
    box.restore_files(first)
    assert kinds(box) == expected


def test_everything_goes_by_the_new_files(box: Sandbox, project: Path, tmp_path: Path) -> None:
    sh(box, "echo old > file")
    kept = box.keep_files()
    sh(box, "echo new > file")
    box.copy_out(f"{project}/file", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "new\n"
    (tmp_path / "in").write_text("from the host")
    box.copy_in(tmp_path / "in", f"{project}/in")
    assert sh(box, "pwd; cat in", cwd=str(project)) == f"{project}\nfrom the host"
    box.restore_files(kept)
    box.copy_out(f"{project}/file", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "old\n"
    with pytest.raises(GuestError):
        box.copy_out(f"{project}/in", tmp_path / "out")


def test_other_mounts_stay_as_they_are(project: Path, tmp_path: Path) -> None:
    """What is the host's is not kept, wherever it is mounted."""
    for name in ("library", "exchange"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("host")
    (tmp_path / "exchange").chmod(0o777)
    mounts = [Mount(tmp_path / "library", "/tmp/deep/library"), Mount(tmp_path / "exchange", "/tmp/deep/exchange", "rw"),
              Mount(tmp_path / "library" / "file", f"{project}/notes"), Mount.overlay(project, "/tmp/deep/library/kept")]  # fmt: skip
    (tmp_path / "library" / "kept").mkdir()
    exchange = "/tmp/deep/exchange"

    def look_at(box: Sandbox) -> dict[str, Any]:
        return {path: about for path, about in look(box, exchange).items() if path != exchange}

    with Sandbox(of(project, *mounts)) as box:
        before = look_at(box)
        kept = box.keep_files()
        assert look_at(box) == before
        sh(box, "cd /tmp/deep; ! echo x 2>&- > library/file; ! echo x 2>&- >> $OLDPWD/notes; ! touch library/new 2>&-"
                "; echo x > exchange/new; echo x > library/kept/new; echo x > other", env={"OLDPWD": str(project)})  # fmt: skip
        box.restore_files(kept)
        assert look_at(box) == before
        assert sh(box, "cat /tmp/deep/exchange/new notes; rm /tmp/deep/exchange/new") == "x\nhost"
    assert os.listdir(tmp_path / "exchange") == ["file"]


@pytest.mark.parametrize(
    "fields",
    [
        {"limits": Limits(memory="300M")},
        {"limits": Limits(disk="50M", pids=20)},
        {"network": Network.host()},
        {"nesting": True},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_whatever_the_sandbox_is_limited_to(project: Path, fields: dict[str, Any]) -> None:
    for _ in range(2):
        with Sandbox(of(project, **fields)) as box:
            before = look(box)
            kept = box.keep_files()
            sh(box, FILL)
            box.keep_files()
            box.restore_files(kept)
            assert look(box) == before


def test_in_a_sandbox_within_a_sandbox(project: Path) -> None:
    script = """
from isolation import Sandbox, SandboxSpec
for _ in range(2):
    with Sandbox(SandboxSpec("namespace")) as box:
        box.run(["sh", "-c", "echo a > /tmp/file"])
        kept = box.keep_files()
        box.run(["sh", "-c", "echo b > /tmp/file"])
        box.restore_files(kept)
        print(box.run(["cat", "/tmp/file"]).stdout, [change.path for change in box.changes()], flush=True)
"""
    with Sandbox(of(project, nesting=True)) as box:
        assert python(box, script).splitlines() == ["b'a\\n' ['/tmp/file']"] * 2


def test_space_is_freed(project: Path) -> None:
    fill, there = "head -c 30M /dev/zero > /tmp/big", "test -e /tmp/big"
    with Sandbox(of(project, limits=Limits(disk="50M"))) as box:
        empty = box.keep_files()
        sh(box, fill)
        full = box.keep_files()
        box.restore_files(empty)
        assert not box.run(["sh", "-c", fill]).verdict.ok
        sh(box, "rm -f /tmp/big")
        box.forget_files(full)
        sh(box, f"{fill}; {there}")
        box.restore_files(empty)  # and what nobody kept is gone at once
        sh(box, f"! {there}; {fill}")
        big = box.keep_files()
        box.forget_files(big)
        sh(box, there)  # it is what lies beneath


def test_a_full_store_is_told(project: Path) -> None:
    with Sandbox(of(project, limits=Limits(disk="8M"))) as box:
        kept = box.keep_files()
        box.run(["sh", "-c", "i=0; while mkdir /tmp/$i; do i=$((i + 1)); done 2>&-"])
        with pytest.raises(GuestError, match="could not be kept: No space left"):
            box.keep_files()
        box.restore_files(kept)  # for that there is always room
        sh(box, "test ! -e /tmp/1")
        box.run(["sh", "-c", "i=0; while mkdir /tmp/$i; do i=$((i + 1)); done 2>&-"])
        with pytest.raises(GuestError, match="could not be kept: No space left"):
            box.keep_files()
        sh(box, "rmdir /tmp/1 /tmp/2")
        box.forget_files(kept)
        sh(box, "test -d /tmp/3; rm -r /tmp/*[0-9]")
        box.keep_files()


def inventory(box: Sandbox) -> tuple[int, int, int, int]:
    machine = box.machine
    assert isinstance(machine, NamespaceMachine)
    supervisor = machine._supervisor.pid
    family = [supervisor, *(int(pid) for pid in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split())]
    try:
        held = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family)
    except PermissionError:
        held = 0  # not dumpable, and so not this user's to see
    return len(os.listdir("/proc/self/fd")), held, len(family), int(sh(box, "wc -l < /proc/self/mountinfo"))


def test_nothing_grows_with_use(box: Sandbox) -> None:
    kept = box.keep_files()
    first = box.keep_files()
    before = inventory(box)
    for number in range(20):
        sh(box, f"echo {number} > file")
        new = box.keep_files()
        box.forget_files(kept)
        kept = new
    for _ in range(20):
        box.restore_files(first)
    assert inventory(box) == before


def test_the_depth_is_bounded(box: Sandbox) -> None:
    """Up to the bound, the names of all layers fit into a page."""
    sh(box, "echo first > file")
    kept = [box.keep_files() for _ in range(layer_tree.MOST - 1)]
    sh(box, "echo last > file; test -e data.txt")
    with pytest.raises(GuestError, match="layers lie upon each other already; go back to a state that was kept earlier"):
        box.keep_files()
    assert sh(box, "cat file") == "last\n"
    box.restore_files(kept[0])
    assert sh(box, "cat file") == "first\n"
    box.keep_files()


def test_numbers_are_checked(box: Sandbox) -> None:
    with pytest.raises(GuestError, match="could not be restored: no state of the files is kept as number 1"):
        box.restore_files(1)
    kept = box.keep_files()
    box.forget_files(kept)
    with pytest.raises(GuestError, match="could not be forgotten"):
        box.forget_files(kept)


def test_a_process_that_stays_is_with_the_old_files_until_it_goes_there_again(box: Sandbox, project: Path) -> None:
    script = f"""
import os
def answer():
    print(os.path.exists("later"), os.path.exists("{project}/later"), flush=True)
while input() != "go":
    answer()
os.chdir("{project}")
open("written", "w").close()
answer()
"""
    sh(box, "echo old > file")
    with box.popen([sys.executable, "-u", "-c", script], stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(line: str) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(line.encode() + b"\n")
            found = b""
            while not found.endswith(b"\n"):
                found += process.stdout.read(1)
            return found.decode().strip()

        assert ask("") == "False False"
        box.keep_files()
        sh(box, "touch later")
        assert ask("") == "False True"
        assert ask("go") == "True True"
        sh(box, "test -e written")


def test_what_is_different_afterwards(box: Sandbox) -> None:
    """As the documentation of Sandbox.keep_files says."""
    serve = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind('socket'); s.listen(); print(flush=True); input()"
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('socket')"
    sh(box, "mkdir directory; echo x > one; ln one two")
    with box.popen([sys.executable, "-c", serve], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"\n"
        python(box, connect)
        box.keep_files()
        assert b"ConnectionRefusedError" in box.run([sys.executable, "-c", connect]).stderr
    assert b"Invalid cross-device link" in box.run([sys.executable, "-c", "import os; os.rename('directory', 'new')"]).stderr
    python(box, "import shutil; shutil.move('directory', 'newer')")
    assert sh(box, "mkdir young; mv young old; mv newer newest; echo y > one; cat two") == "x\n"


def test_what_is_frozen_cannot_be_written_by_who_stayed(box: Sandbox, project: Path) -> None:
    script = """
import os, sys
sys.stdin.read(1)
for where in sys.argv[1:]:
    try:
        os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=int(where))
    except OSError as error:
        print(error.errno)
"""
    opening = "exec 3<. 4</tmp 5</srv/again; echo ready; exec " + sys.executable + " -c '" + script + "' 3 4 5"
    for _ in range(2):
        with box.popen(["sh", "-c", opening], stdin=PIPE, stdout=PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.read(6) == b"ready\n"
            kept = box.keep_files()
            process.stdin.write(b"x")
            refused = b""
            while data := process.stdout.read(100):
                refused += data
            assert [line in (b"30", b"13") for line in refused.split()] == [True] * 3  # EROFS; EACCES: Landlock
        box.restore_files(kept)
        sh(box, f"! test -e x; ! test -e /tmp/x; ! test -e {project}/x")


def test_the_guest_can_do_what_it_could_and_no_more(box: Sandbox) -> None:
    look_for = "for at in / . /tmp ~ /dev/shm /proc /.isolation; do umount $at 2>&- && echo umounted $at; done; true"
    masks = "cat /proc/keys /proc/key-users /proc/timer_list; ls -A /proc/acpi /.isolation"
    for _ in range(3):
        assert sh(box, f"{masks}; {look_for}") == ("/.isolation:\n\n/proc/acpi:\n" if os.path.isdir("/proc/acpi") else "")
        sh(box, "for at in . /tmp /var/tmp ~ /dev/shm /run /srv/again; do echo x > $at/x; done; ! touch /usr/x 2>&-")
        sh(box, "! unshare -r true 2>&-; ! mount -t tmpfs none /tmp 2>&-")
        box.restore_files(box.keep_files())


def test_what_is_hidden_is_not_seen_for_a_moment(box: Sandbox) -> None:
    script = """
import os, sys
os.set_blocking(0, False)
print("ready", flush=True)
while sys.stdin.buffer.raw.read(1) is None:
    for _ in range(200):
        if os.listdir("/.isolation") or os.path.lexists("/.isolation/store"):
            print("seen")
        if open("/proc/keys").read() or open("/proc/timer_list").read():
            print("unmasked")
"""
    with box.popen([sys.executable, "-c", script], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(6) == b"ready\n"
        kept = box.keep_files()
        for _ in range(15):
            box.forget_files(box.keep_files())
            box.restore_files(kept)
        process.stdin.write(b"x")
        assert process.stdout.read() == b""


@pytest.mark.usefixtures("kernel")
def test_who_stayed_does_not_see_beneath_what_is_mounted(project: Path, tmp_path: Path) -> None:
    """Old mounts go, and what was mounted in them must not go before: it may hide something."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "none").touch()
    (project / "secrets").mkdir()
    (project / "secrets" / "password").write_text("1234")
    (project / "secret").write_text("1234")
    script = """
import os
print("ready", flush=True)
input()
print(os.listdir("secrets"), repr(open("secret").read()))
for call in (os.rename, os.link):
    for old, new in (("secret", "other"), ("secrets", "others"), ("data.txt", "secret"), ("kept", "secrets")):
        try:
            call(old, new)
        except OSError:
            pass
for name in ("rmdir secrets", "unlink secret"):
    try:
        getattr(os, name.split()[0])(name.split()[1])
    except OSError:
        pass
for directory, names, files in os.walk("."):
    for file in files:
        if "1234" in open(os.path.join(directory, file)).read():
            print("seen", directory, file)
"""
    mounts = [Mount(tmp_path / "empty", project / "secrets"), Mount(tmp_path / "none", project / "secret")]
    for target in (project, Path("/srv/again")):
        mounts = [Mount(tmp_path / "empty", target / "secrets"), Mount(tmp_path / "none", target / "secret")]
        with Sandbox(of(project, *mounts)) as box, contextlib.ExitStack() as stack:
            processes = []
            for keeps in range(3):
                process = box.popen([sys.executable, "-c", script], stdin=PIPE, stdout=PIPE, stderr=PIPE, cwd=str(target))
                stack.callback(process.close)
                assert process.stdout is not None
                assert process.stdout.read(6) == b"ready\n"
                processes.append(process)
                kept = box.keep_files()
                if keeps == 1:
                    box.restore_files(kept)
            for process in processes:
                done = process.communicate(b"\n")
                assert done.stdout == b"[] ''\n", done


def test_renamed_ancestors_are_noticed(box: Sandbox, project: Path) -> None:
    """The mount goes with what it lies in; by its old path, something else would be found."""
    first = "/".join(str(project).split("/")[:3])
    sh(box, "echo x > x")
    there = sh(box, "ls /tmp")
    for plant in ("true", f"ln -s /etc {first}", f"mkdir -p {project}", f"touch {first}", f"ln -s moved {first}"):
        sh(box, f"mv {first} /tmp/moved; {plant}", cwd="/")
        mounts = sh(box, "wc -l < /proc/self/mountinfo", cwd="/")
        with pytest.raises(GuestError, match=f"what was mounted at {project} is not there any more"):
            box.keep_files()
        assert sh(
            box, "cat /tmp/moved/*/*/project/x || cat /tmp/moved/project/x; wc -l < /proc/self/mountinfo", cwd="/"
        ).endswith(mounts)
        sh(box, f"rm -rf {first}; mv /tmp/moved {first}", cwd="/")
    kept = box.keep_files()
    sh(box, f"cp -r {first} /tmp/copy; ln -s /etc /tmp/link", cwd="/")
    box.restore_files(kept)
    assert sh(box, "cat x; ls /tmp") == "x\n" + there


def test_a_target_beneath_what_the_guest_can_rename(project: Path, tmp_path: Path) -> None:
    """It is in no directory of the sandbox's own."""
    (tmp_path / "shared" / "a" / "project").mkdir(parents=True)
    for path in (tmp_path / "shared", tmp_path / "shared" / "a"):
        path.chmod(0o777)
    mounts = [Mount(tmp_path / "shared", "/shared", "rw"), Mount.overlay(project, "/shared/a/project")]
    with Sandbox(of(project, *mounts)) as box:
        sh(box, "mv /shared/a /shared/b; ln -s /etc /shared/a")
        with pytest.raises(GuestError, match="what was mounted at /shared/a/project is not there any more"):
            box.keep_files()
        sh(box, "rm /shared/a; mv /shared/b /shared/a; echo x > /shared/a/project/x")
        kept = box.keep_files()
        sh(box, "rm /shared/a/project/x; mv /shared/a /shared/b; ln -s /etc /shared/a")
        box.restore_files(kept)  # known by its descriptor
        assert sh(box, "cat /shared/b/project/x") == "x\n"
    assert sorted(os.listdir(tmp_path / "shared")) == ["a", "b"]


@pytest.mark.usefixtures("kernel")
def test_a_busy_guest_disturbs_nothing(box: Sandbox, project: Path) -> None:
    busy = f"""
while :; do
    cd {project}; mkdir -p d/e/f; echo x > d/e/f/x; mv d/e d/g; mv d/g/f d/h; ln -s /etc d/e; rm -rf d
    cd /tmp; mkdir -p d/e; echo x > d/e/x; mv d k; rm -rf k
done 2>&-
"""
    sh(box, "mkdir quiet; echo kept > quiet/file; echo kept > ~/file")
    kept = box.keep_files()
    with contextlib.ExitStack() as stack:
        processes = [box.popen(["sh", "-c", busy]) for _ in range(2)]
        for process in processes:
            stack.callback(process.kill)
        for number in range(12):
            sh(box, f"echo {number} > quiet/file; rm -f ~/file; echo {number} > quiet/other")
            box.forget_files(box.keep_files())
            assert sh(box, "cat quiet/file") == f"{number}\n"
            box.restore_files(kept)
            assert sh(box, "cat quiet/file ~/file; ! test -e quiet/other") == "kept\nkept\n"
    for process in processes:
        process.wait()
    assert sh(box, "ls -A /.isolation; find /srv/again -type f | wc -l").strip() == "3"


def test_two_sandboxes_of_one_supervisor(project: Path) -> None:
    with Sandbox(of(project)):
        pass
    with Sandbox(of(project)) as one, Sandbox(of(project)) as two:
        sh(one, "echo one > file")
        sh(two, "echo two > file")
        numbers = one.keep_files(), two.keep_files()
        for box in (one, two):
            sh(box, "echo more >> file")
        one.restore_files(numbers[0])
        assert (sh(one, "cat file"), sh(two, "cat file")) == ("one\n", "two\nmore\n")
        errors: list[BaseException] = []

        def use(box: Sandbox, kept: int) -> None:
            try:
                for _ in range(5):
                    box.forget_files(box.keep_files())
                    box.restore_files(kept)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=use, args=pair) for pair in zip((one, two), numbers, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert (sh(one, "cat file"), sh(two, "cat file")) == ("one\n", "two\n")
        one.close()
        two.restore_files(numbers[1])
        with pytest.raises(SandboxClosed):
            one.keep_files()


def closed_by(box: Sandbox, end: Any, call: Any) -> BaseException | None:
    """What `call` raises while the sandbox ends."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.5)
    end()
    thread.join(30)
    assert not thread.is_alive()
    return raised[0] if raised else None


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("how", ["closed", "killed", "wall"])
def test_the_end_of_the_sandbox_in_the_middle(
    project: Path, monkeypatch: pytest.MonkeyPatch, how: str, shared: bool
) -> None:
    supervisor_pool.release()
    monkeypatch.setattr(remount, "_assemble", lambda *_: time.sleep(60))
    spec = of(project, limits=Limits(wall=3)) if how == "wall" else of(project)
    if shared:
        with Sandbox(spec):
            pass
    with Sandbox(spec) as box:
        machine = box.machine
        assert isinstance(machine, NamespaceMachine)
        ends = {
            "closed": box.close,
            "killed": lambda: machine._supervisor.request({"op": "kill", "id": machine._number}),
            "wall": lambda: None,
        }
        assert isinstance(closed_by(box, ends[how], box.keep_files), SandboxClosed)
        with pytest.raises(SandboxClosed):
            box.keep_files()


def test_what_takes_too_long_has_not_happened(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = remount._assemble

    def slow(*arguments: Any) -> str:
        if any(os.path.exists(f"layers/{number}/upper/slow") for number in range(9)):  # its working directory is the store
            time.sleep(60)
        return plain(*arguments)

    supervisor_pool.release()
    monkeypatch.setattr(session, "PATIENCE", 2.0)
    monkeypatch.setattr(remount, "_assemble", slow)
    with Sandbox(of(project)) as box:
        sh(box, "echo x > slow")
        before = look(box)
        for _ in range(2):
            with pytest.raises(GuestError, match="could not be kept: not done after"):
                box.keep_files()
            assert look(box) == before
        sh(box, "rm slow")
        kept = box.keep_files()
        sh(box, "echo y > y")
        box.restore_files(kept)
        sh(box, "! test -e y")


class Failing:
    """The move of the mount with this number fails; counted anew in each helper, which is a fork."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        self.counts = False
        self.plain, self.run = syscalls.move_mount_onto, remount._Exchange.run
        monkeypatch.setattr(syscalls, "move_mount_onto", self)
        monkeypatch.setattr(remount._Exchange, "run", lambda exchange: self.count(exchange))

    def count(self, exchange: remount._Exchange) -> None:
        self.counts = any(held.top >= 0 for held in exchange._held) or self.left < 0
        self.left = abs(self.left)
        self.run(exchange)

    def __call__(self, from_fd: int, to_fd: int, *, beneath: bool = False) -> None:
        if self.counts:
            self.left -= 1
            if self.left == 0:
                raise OSError(12, "Cannot allocate memory")
        self.plain(from_fd, to_fd, beneath=beneath)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("number", [1, -1, 2, 3, -3, 4])
def test_half_way_is_undone(project: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Negative: the first time already; else, all times but the first."""
    Failing(monkeypatch, number)
    with Sandbox(of(project)) as box:
        sh(box, FILL + "cp -r . /srv/again")
        if number > 0:
            kept = box.keep_files()
            sh(box, "echo more > A; rm both")
        before, mounts = look(box), inventory(box)
        for _ in range(2):
            with pytest.raises(GuestError, match="could not be kept: Cannot allocate memory"):
                box.keep_files()
            assert look(box) == before
            assert inventory(box) == mounts
        sh(box, "for at in . /tmp ~ /srv/again; do echo x > $at/x; done")
        if number > 0:
            with pytest.raises(GuestError, match="could not be restored: Cannot allocate memory"):
                box.restore_files(kept)
            box.forget_files(kept)


def test_a_helper_that_dies_is_no_harm(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor_pool.release()
    monkeypatch.setattr(remount, "_assemble", lambda *_: 1 // 0)
    with Sandbox(of(project)) as box:
        for _ in range(2):
            with pytest.raises(GuestError, match="the process that should do it died"):
                box.keep_files()
        sh(box, "echo x > x")


def test_neither_here_nor_there_is_the_end(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor_pool.release()
    monkeypatch.setattr(remount._Exchange, "finish", lambda _: os._exit(1))
    with Sandbox(of(project)) as box, pytest.raises(SandboxClosed):
        box.keep_files()


def test_where_it_cannot_be(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FILE_CHECKPOINTS in NamespaceBackend().features()
    monkeypatch.setattr(remount, "usable", lambda: False)
    assert FILE_CHECKPOINTS not in NamespaceBackend().features()
    with Sandbox(of(project)) as box, pytest.raises(FeatureMissing, match=r"Linux 6\.6"):
        box.keep_files()
