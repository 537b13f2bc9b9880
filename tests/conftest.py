"""Shared by all tests: a project directory, and what is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


def leftovers() -> set[str]:
    """Processes of ours, and cgroups: what must be gone when nothing runs."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                text = Path(f"/proc/{name}/comm").read_text().strip()
            except OSError:
                continue
            if text.startswith("isolation"):
                found.add(f"process {name} {text}")
    for directory, names, _files in os.walk("/sys/fs/cgroup"):
        found |= {f"cgroup {directory}/{name}" for name in names if name.startswith("isolation-")}
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a process or a cgroup behind."""
    before = leftovers()
    yield
    assert leftovers() - before == set()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory to be somebody's project."""
    path = tmp_path / "project"
    path.mkdir()
    (path / "data.txt").write_text("original")
    return path
