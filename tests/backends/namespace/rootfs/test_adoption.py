"""What an ordinary user may write is writable inside, whoever owns it, and discarded: in a directory that a group shares, say.

Only root can make such directories. So where root runs the tests, they drop to a user without a name, in another process,
with a Python that any user may run; an ordinary user's run has those of the groups that this user is in.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolation import Mount, Sandbox, SandboxSpec
from isolation.backends.namespace.rootfs import adoption

pytestmark = pytest.mark.usefixtures("nothing_left")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away; root's run has this")

USER, GROUP, LAB, OTHER = 20_401, 20_402, 20_403, 20_404
PYTHON = "/usr/bin/python3"
ROOT = Path(__file__).parents[4]

# Becomes the user: in a mount namespace of its own, where the project's file system is mounted if it is to be another.
DRIVER = """
import json, os, sys
told = json.loads(sys.argv[1])
sys.path[:0] = told["path"]
from isolation.linux import syscalls
syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
if told["fstype"]:
    syscalls.mount(told["fstype"], told["project"], told["fstype"], 0, told["options"])
    os.umask(0)
    exec(told["fill"], {"project": told["project"]})
os.setgroups(told["groups"]); os.setgid(told["gid"]); os.setuid(told["uid"])
os.umask(0o022)
os.environ.update(HOME="/nonexistent", PATH="/usr/bin:/bin", PYTHONPATH=":".join(told["path"]))
os.chdir(told["project"])
sys.argv[1:] = told["arguments"]
exec(told["program"])
"""
RUN = "from isolation.cli import main; sys.exit(main(sys.argv[1:]))"
PYTEST = (
    "import pytest; sys.exit(pytest.main(['-p', 'pytest_isolation.plugin', '-p', 'no:cacheprovider', '-q', *sys.argv[1:]]))"
)

# Every way to write what the user may write; and what the user may not.
WRITES = """
set -e
echo more >> shared.txt
echo more >> sub/shared.txt
echo new > new.txt
echo new > sub/new.txt
mkdir sub/deep/er
mv sub/deep/old.txt sub/deep/er/moved.txt
rm sub/gone.txt
chmod 600 sub/new.txt
! echo no 2>/dev/null >> readable.txt
! touch 2>/dev/null locked/no
cat shared.txt sub/shared.txt new.txt sub/deep/er/moved.txt readable.txt
"""
WRITTEN = "text\nmore\ntext\nmore\nnew\ntext\ntext\n"
FILL = f"""
import os
from pathlib import Path
top = Path(project)
for name in ("sub", "sub/deep", "locked"):
    (top / name).mkdir()
for name in ("shared.txt", "readable.txt", "sub/shared.txt", "sub/gone.txt", "sub/deep/old.txt", "locked/in.txt"):
    (top / name).write_text("text\\n")
def give(uid, gid, directory, file):
    for path in [top, *top.rglob("*")]:
        os.chown(path, uid, gid)
        path.chmod(directory if path.is_dir() else file)
    for path, mode in ((top / "readable.txt", 0o644), (top / "locked", 0o755)):
        os.chown(path, {OTHER}, 0)
        path.chmod(mode)
"""
CASES = {
    "own": (USER, GROUP, 0o755, 0o644),
    "supplementary group": (USER, LAB, 0o775, 0o664),
    "setgid": (USER, LAB, 0o2775, 0o664),
    "of somebody else in the group": (OTHER, LAB, 0o2770, 0o660),
    "root's and world-writable": (0, 0, 0o777, 0o666),
    "root's and sticky": (0, LAB, 0o1777, 0o666),
    "of nobody known": (4_000_000, 4_000_001, 0o777, 0o666),
}


@pytest.fixture(scope="module")
def packages() -> Iterator[list[str]]:
    """What the user's Python imports, where that user can read it."""
    top = Path(tempfile.mkdtemp(prefix="isolation-adoption-", dir="/tmp"))
    top.chmod(0o755)
    for source in (ROOT / "isolation", ROOT / "plugins" / "pytest_isolation"):
        shutil.copytree(source, top / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pytest", "pluggy", "iniconfig", "packaging", "pygments"):
        for file in importlib.metadata.distribution(name).files or ():
            if file.suffix == ".py" and ".." not in file.parts:
                (top / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(str(file.locate())), top / file)
    yield [str(top)]
    shutil.rmtree(top)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that another user can come to."""
    top = Path(tempfile.mkdtemp(prefix="isolation-adoption-", dir="/tmp"))
    top.chmod(0o755)
    (top / "project").mkdir()
    yield top / "project"
    shutil.rmtree(top)


def as_user(
    packages: list[str], project: Path, program: str, *arguments: str, fstype: str = "", options: str = "", fill: str = ""
) -> subprocess.CompletedProcess[str]:
    told = {
        "path": packages, "project": str(project), "fstype": fstype, "options": options, "fill": fill, "program": program,
        "uid": USER, "gid": GROUP, "groups": [GROUP, LAB], "arguments": arguments,
    }  # fmt: skip
    words = [PYTHON, "-s", "-B", "-c", DRIVER, json.dumps(told)]
    return subprocess.run(words, capture_output=True, text=True, timeout=600)


def filled(case: str) -> str:
    return f"{FILL}\ngive{CASES[case]!r}"


def snapshot(top: Path) -> dict[str, Any]:
    found = {}
    for path in [top, *top.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_uid, status.st_gid, status.st_mode, status.st_mtime_ns, content)
    return found


@root_only
@pytest.mark.parametrize("case", CASES)
def test_what_the_user_may_write_is_writable(packages: list[str], shared: Path, case: str) -> None:
    exec(filled(case), {"project": str(shared)})
    before = snapshot(shared)
    done = as_user(
        packages, shared, RUN, "run", "--backend", "namespace", "--mount", f"{shared}:{shared}:overlay", "sh", "-c", WRITES
    )
    assert (done.stdout, done.stderr, done.returncode) == (WRITTEN, "", 0)
    assert snapshot(shared) == before


@root_only
@pytest.mark.parametrize("case", CASES)
def test_real_root_may_write_everything(shared: Path, case: str) -> None:
    """Inside it has no capability that would let it, which on the host it has."""
    exec(filled(case), {"project": str(shared)})
    before = snapshot(shared)
    writes = WRITES.replace("! echo no 2>/dev/null", "echo no").replace("! touch 2>/dev/null", "touch")
    with Sandbox(SandboxSpec("namespace", mounts=[Mount.overlay(shared)], workdir=shared)) as box:
        done = box.run(["sh", "-c", writes])
    assert (done.stdout.decode(), done.stderr) == (WRITTEN + "no\n", b"")
    assert snapshot(shared) == before


@root_only
@pytest.mark.parametrize("fstype", ["tmpfs", "overlay"])
def test_on_another_file_system(packages: list[str], shared: Path, fstype: str) -> None:
    options = ""
    if fstype == "overlay":
        for name in ("lower", "upper", "work"):
            (shared.parent / name).mkdir()
        options = ",".join(f"{key}dir={shared.parent}/{key}" for key in ("lower", "upper", "work"))
    done = as_user(
        packages, shared, RUN, "run", "--backend", "namespace", "--mount", f"{shared}:{shared}:overlay", "sh", "-c", WRITES,
        fstype=fstype, options=options, fill=filled("setgid"),
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == (WRITTEN, "", 0)


@root_only
@pytest.mark.parametrize("case", ["setgid", "root's and world-writable"])
def test_pytest_in_a_shared_directory(packages: list[str], shared: Path, case: str) -> None:
    """The example that leaks, and tests that write what is there, to what a wide fixture wrote, too (a fork of a fork)."""
    hidden = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(ROOT / "examples" / "leaky", shared, ignore=hidden, dirs_exist_ok=True)
    (shared / "test_write.py").write_text(
        "import pytest\n"
        "@pytest.fixture(scope='module', autouse=True)\n"
        "def wide():\n    open('sub/shared.txt', 'a').write('wide ')\n\n"
        "@pytest.mark.parametrize('number', range(2))\n"
        "def test_write(number):\n"
        "    open('sub/shared.txt', 'a').write('test')\n"
        "    assert open('sub/shared.txt').read() == 'text\\nwide test'\n"
    )
    exec(filled(case), {"project": str(shared)})
    before = snapshot(shared)
    done = as_user(packages, shared, PYTEST, "--isolation")
    assert done.returncode == 0, done.stdout + done.stderr
    assert snapshot(shared) == before


REFRESH = """
from isolation import Mount, Sandbox, SandboxSpec
top = sys.argv[1]
def put(name, text):
    with open(f"{top}/~", "w") as file:
        file.write(text)
    os.replace(f"{top}/~", f"{top}/{name}")
    os.chown(f"{top}/{name}", -1, told["groups"][1])
with Sandbox(SandboxSpec("namespace", mounts=[Mount.overlay(top)], workdir=top)) as box:
    def run(code):
        done = box.run(["sh", "-c", code])
        print(done.stdout.decode() + done.stderr.decode(), end="")
    run("cat shared.txt sub/shared.txt; ls sub; echo inside > sub/gone.txt")
    put("shared.txt", "outside\\n"); put("sub/shared.txt", "outside\\n"); put("sub/gone.txt", "outside\\n")
    put("later.txt", "later\\n"); os.unlink(f"{top}/sub/deep/old.txt"); os.rmdir(f"{top}/sub/deep")
    box.refresh_files()
    run("cat shared.txt sub/shared.txt sub/gone.txt; ls sub; echo more >> shared.txt; echo more >> later.txt; cat shared.txt later.txt")
"""


@root_only
def test_the_copies_follow_the_host(packages: list[str], shared: Path) -> None:
    """And what is new there, and of another group, is adopted, too."""
    exec(filled("setgid"), {"project": str(shared)})
    done = as_user(packages, shared, REFRESH, str(shared))
    before = "text\ntext\ndeep\ngone.txt\nshared.txt\n"
    after = "outside\noutside\ninside\ngone.txt\nshared.txt\noutside\nmore\nlater\nmore\n"
    assert (done.stderr, done.stdout) == ("", before + after)


@root_only
def test_what_is_too_large_is_said_before_the_run(packages: list[str], shared: Path) -> None:
    exec(filled("setgid"), {"project": str(shared)})
    (shared / "sub" / "large.bin").touch()
    os.truncate(shared / "sub" / "large.bin", (64 << 20) + 1)
    os.chown(shared / "sub" / "large.bin", USER, LAB)
    words = "stat -c %s sub/large.bin; touch 2>/dev/null sub/large.bin || echo read-only"
    done = as_user(
        packages, shared, RUN, "run", "--backend", "namespace", "--mount", f"{shared}:{shared}:overlay", "sh", "-c", words
    )
    assert done.stdout == f"{(64 << 20) + 1}\nread-only\n"
    assert f"read-only inside, though you may write it: sub/large.bin in {shared}" in done.stderr
    assert "chgrp" in done.stderr
    told = as_user(
        packages, shared, RUN, "run", "--backend", "namespace", "--mount", f"{shared}:{shared}:overlay", "--explain"
    )
    assert f"adopted  {shared} (" in told.stdout
    assert "note       read-only inside" in told.stdout
    (shared / "test_it.py").write_text("def test_it(): pass\n")
    said = as_user(packages, shared, PYTEST, "--isolation").stdout
    assert "read-only inside, though you may write it: sub/large.bin" in said
    assert said.index("read-only inside") < said.index("1 passed")


@root_only
def test_of_a_symlink_nothing_is_copied_but_itself(packages: list[str], shared: Path, tmp_path: Path) -> None:
    """Who shares the directory may exchange a file after it was looked at: the copy is not of what it leads to."""
    secret = shared.parent / "secret"
    secret.write_text("secret")
    entries = [adoption.Entry("", stat.S_IFDIR | 0o755, 0), adoption.Entry("d", stat.S_IFDIR | 0o755, 0)]
    entries += [adoption.Entry(name, stat.S_IFREG | 0o644, 6) for name in ("file", "fifo", "d/secret", "missing")]
    (shared / "file").symlink_to(secret)
    (shared / "d").symlink_to(shared.parent)
    os.mkfifo(shared / "fifo")
    adoption.copy(str(shared), str(tmp_path), entries)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["d"]


def test_in_a_directory_of_another_group_of_mine(project: Path) -> None:
    """As whoever runs the tests, in each group that is there."""
    (project / "sub").mkdir()
    (project / "sub" / "old.txt").write_text("old")
    for group in dict.fromkeys([os.getegid(), *os.getgroups()]):
        for path in (project, *project.rglob("*")):
            os.chown(path, -1, group)
        project.chmod(0o2775)
        with Sandbox(SandboxSpec("namespace", mounts=[Mount.overlay(project)], workdir=project)) as box:
            done = box.run(
                ["sh", "-c", "echo more >> sub/old.txt && echo more >> data.txt && touch sub/new && cat sub/old.txt"]
            )
            assert done.stdout == b"oldmore\n", done.stderr
            assert {Path(change.path).name for change in box.changes()} == {"data.txt", "old.txt", "new"}
        assert (project / "sub" / "old.txt").read_text() == "old"


def test_what_is_the_users_own_is_only_looked_at(project: Path) -> None:
    (project / ".venv").mkdir()
    (project / ".venv" / "pyvenv.cfg").touch()
    status = project.stat()
    own = adoption.survey(str(project), adoption.Own(status.st_uid, status.st_gid))
    assert own == ((), ())
    assert own.note("/x") == ""


def test_there_is_a_bound(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest first; directories always."""
    monkeypatch.setattr(adoption, "_BYTES_AT_MOST", 10)
    status = project.stat()
    (project / "d").mkdir()
    for name, size in (("a", 6), ("d/b", 5), ("c", 4)):
        (project / name).write_bytes(bytes(size))
    found = adoption.survey(str(project), adoption.Own(status.st_uid, status.st_gid + 1))
    assert [entry.path for entry in found.entries] == ["", "c", "d", "d/b"]
    assert found.left == ("a", "data.txt")
    assert "a, data.txt in /x" in found.note("/x")
