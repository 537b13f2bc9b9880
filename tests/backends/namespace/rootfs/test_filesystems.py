"""A project may lie on any file system: one that cannot be id-mapped is copied, for real root; the rest is shown as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolation import Mount, Sandbox, SandboxSpec

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def on_tmpfs() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def on_overlay(tmp_path: Path) -> Iterator[Path]:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "merged"], check=True)
    yield tmp_path / "merged"
    subprocess.run(["umount", tmp_path / "merged"], check=True)


def check(project: Path) -> None:
    (project / "data").write_text("original")
    (project / "sub").mkdir()
    (project / "sub" / "old").write_text("old")
    for _ in range(2):
        with Sandbox(SandboxSpec("namespace", mounts=[Mount.overlay(project)], workdir=project)) as box:
            done = box.run(["sh", "-c", "cat data sub/old && echo more >> data && rm sub/old && touch new && id -u"])
            assert done.stdout == f"originalold{os.getuid()}\n".encode(), done.stderr
            assert {Path(change.path).name for change in box.changes()} == {"data", "old", "new"}
    assert (project / "data").read_text() == "original"
    assert sorted(os.listdir(project)) == ["data", "sub"]


def test_tmpfs(on_tmpfs: Path) -> None:
    check(on_tmpfs)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount an overlay for the test")
def test_overlay(on_overlay: Path) -> None:
    check(on_overlay)
