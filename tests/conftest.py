"""Shared by all tests: a project directory, and what is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolation.backends.namespace import launcher

pytest_plugins = ["pytester"]


def leftovers(mark: bytes) -> set[str]:
    """Processes whose command line holds `mark`, and cgroups whose keeper is gone."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                command = Path(f"/proc/{name}/comm").read_text().strip()
                line = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith("isolation") and mark in line:
                found.add(f"process {name} {command}")
    for directory, names, _files in os.walk("/sys/fs/cgroup"):
        for name in names:
            if name.startswith("isolation-") and not os.path.exists(f"/proc/{name.split('-')[1]}"):
                found.add(f"cgroup {directory}/{name}")
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a process of this one, or a cgroup, behind."""
    mine = Path("/proc/self/cmdline").read_bytes()
    before = leftovers(mine)
    yield
    launcher.release()
    assert leftovers(mine) - before == set()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory to be somebody's project."""
    path = tmp_path / "project"
    path.mkdir()
    (path / "data.txt").write_text("original")
    return path
