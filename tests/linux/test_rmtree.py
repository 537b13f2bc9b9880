"""What a guest has filled is removed, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isolation.linux.rmtree import remove


@pytest.fixture
def directory(tmp_path: Path) -> int:
    return os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)


def test_everything_is_removed_and_no_link_followed(tmp_path: Path, directory: int) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("stays")
    for name in ("a/b/c", "a/moved.0/moved.1", "moved.0/x"):
        (tmp_path / "full" / name).mkdir(parents=True)
    (tmp_path / "full" / "a" / "b" / "file").write_text("x")
    (tmp_path / "full" / "moved.1").write_text("x")
    os.mkfifo(tmp_path / "full" / "a" / "fifo")
    (tmp_path / "full" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "full" / "a" / "b" / "c" / "link").symlink_to(tmp_path / "other")
    remove(directory, "full")
    assert sorted(os.listdir(tmp_path)) == ["other"]
    assert os.listdir(tmp_path / "other") == ["file"]
    remove(directory, "full")  # it is gone already
    os.close(directory)


def test_no_tree_is_too_deep(tmp_path: Path, directory: int) -> None:
    (tmp_path / "full").mkdir()
    fd = os.open(tmp_path / "full", os.O_RDONLY)
    for _ in range(3000):  # more than a path, or Python's stack, holds
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    remove(directory, "full")
    assert os.listdir(tmp_path) == []
    os.close(directory)


def test_what_leads_elsewhere_is_not_a_directory(tmp_path: Path, directory: int) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "full").symlink_to("other")
    with pytest.raises(NotADirectoryError):
        remove(directory, "full")
    os.close(directory)
