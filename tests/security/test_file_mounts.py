"""A file that is shown for reading shares no lock and no lease with the host's programs; one that is shown for writing does."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isolation import Mount, Sandbox, SandboxSpec

pytestmark = pytest.mark.usefixtures("nothing_left")

HOLD = """
import contextlib, fcntl, sys
file = open("/given/file")
fcntl.flock(file, fcntl.LOCK_EX)
with contextlib.suppress(OSError):  # of somebody else's file
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
print(file.read(), flush=True)
sys.stdin.read()
"""


def hindrances(path: Path) -> list[str]:
    """What a program on the host finds."""
    found = []
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # which does not wait for a lease to be broken (open(2))
    except BlockingIOError:
        return ["lease"]
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        found.append("lock")
    os.close(fd)
    return found


@pytest.mark.parametrize(("mode", "shared"), [("ro", False), ("rw", True)])
def test_locks_and_leases(tmp_path: Path, mode: str, shared: bool) -> None:
    path = tmp_path / "file"
    path.write_text("content")
    spec = SandboxSpec(mounts=[Mount(str(path), "/given/file", mode)])
    with (
        Sandbox(spec) as box,
        box.popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"content\n"
        assert bool(hindrances(path)) is shared


def test_a_file_that_is_written_to_is_seen(tmp_path: Path) -> None:
    """It is the host's, not a copy."""
    path = tmp_path / "a file: with, odd\\characters"
    path.write_text("before")
    with Sandbox(SandboxSpec(mounts=[Mount(str(path), "/given", "ro")])) as box:
        assert box.run(["cat", "/given"], timeout=600).stdout == b"before"
        path.write_text("after")
        assert box.run(["cat", "/given"], timeout=600).stdout == b"after"
        assert box.run(["sh", "-c", "echo x > /given"], timeout=600).returncode != 0
        assert box.run(["ls", "/"], timeout=600).stdout.split().count(b"given") == 1
    assert path.read_text() == "after"
