"""Differences to what was there before, over layers that lie upon each other."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from isolation.linux import overlay_upper
from isolation.linux.overlay_upper import Entry

OPAQUE = "<opaque>"
GONE = None
Tree = dict[str, str | None]


def fill(directory: Path, tree: Tree) -> None:
    directory.mkdir()
    for name, content in tree.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is GONE:
            os.mknod(path, stat.S_IFCHR | 0o600, 0)
        elif content == OPAQUE:
            path.mkdir(exist_ok=True)
            os.setxattr(path, "user.overlay.opaque", b"y")
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_text(content)


def found(base: Path, source: Tree | None, *layers: Tree) -> dict[str, str]:
    """The kinds of changes, by path; the first layer is the undermost."""
    if source is not None:
        fill(base / "source", source)
    for number, layer in enumerate(layers):
        fill(base / str(number), layer)
    fd = os.open(base, os.O_RDONLY)
    try:
        tops = [str(number) for number in range(len(layers) - 1, -1, -1)]
        changes = overlay_upper.walk_layers(fd, tops, "/p", "" if source is None else str(base / "source"))
    finally:
        os.close(fd)
    assert len({change.path for change in changes}) == len(changes)
    return {change.path.removeprefix("/p/"): change.kind for change in changes}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    try:
        os.mknod(tmp_path / "probe", stat.S_IFCHR | 0o600, 0)  # whiteouts are for everybody (Linux 5.8)
        (tmp_path / "probe").unlink()
    except PermissionError:
        pytest.skip("whiteouts cannot be made here")
    return tmp_path


def test_a_file_over_its_life(base: Path) -> None:
    source: Tree = {"a": "", "b": "", "c": "", "d": "", "e": ""}
    assert found(
        base,
        source,
        {"a": "1", "b": GONE, "new": "1", "gone": "1", "c": "1", "again": "1"},
        {"b": "2", "gone": GONE, "c": GONE, "d": GONE, "again": GONE},
        {"d": GONE, "again": "3"},
    ) == {"a": "changed", "b": "changed", "new": "added", "c": "deleted", "d": "deleted", "again": "added"}


def test_directories(base: Path) -> None:
    assert found(
        base,
        {"kept/a": "", "kept/b": "", "replaced/a": "", "replaced/b": "", "gone/a": "", "file": "", "dir/a": ""},
        {"kept/a": "1", "replaced": GONE, "new/a": "1", "new/b": "1", "file": GONE, "dir": GONE},
        {"kept/b": GONE, "replaced": OPAQUE, "replaced/b": "2", "replaced/c": "2", "gone": GONE, "new/a": GONE, "file/": "", "dir": "2"},
        {"new": OPAQUE, "new/c": "3"},
    ) == {
        "kept/a": "changed", "kept/b": "deleted", "replaced/a": "deleted", "replaced/b": "changed", "replaced/c": "added",
        "gone": "deleted", "new": "added", "new/c": "added", "file": "changed", "dir": "changed",
    }  # fmt: skip


def test_an_opaque_directory_hides_what_layers_beneath_have(base: Path) -> None:
    assert found(
        base,
        {"d/a": "", "d/b/c": "", "d/e": ""},
        {"d/a": "1", "d/x": "1", "d/b/y": "1"},
        {"d": OPAQUE, "d/b/z": "2", "d/e": "2"},
        {"d/e": GONE, "d/b/c": "3"},
    ) == {"d/a": "deleted", "d/b/z": "added", "d/e": "deleted", "d/b/c": "changed"}


def test_where_nothing_was_before(base: Path) -> None:
    assert found(
        base, None, {"a": "1", "d/a": "1", "d/b": "1", "e/a": "1"}, {"a": GONE, "d/a": GONE, "e": GONE}, {"d/c": "3"}
    ) == {"d": "added", "d/b": "added", "d/c": "added"}


def test_one_layer_is_what_it_was(base: Path) -> None:
    fill(base / "source", {"old": "", "d/x": ""})
    fill(base / "top", {"old": GONE, "d/x": "1", "n/x": "1"})
    fd = os.open(base, os.O_RDONLY)
    assert sorted(overlay_upper.walk(fd, "top", "/p", str(base / "source"))) == [
        Entry("/p/d/x", "changed", "file", 1), Entry("/p/n", "added", "directory"), Entry("/p/n/x", "added", "file", 1),
        Entry("/p/old", "deleted", "other"),
    ]  # fmt: skip
    assert len(overlay_upper.walk(fd, "top", "/p", str(base / "source"), most=2)) == 2
    os.close(fd)
