"""What a template tells of its open files is taken for what it is: a stranger's word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isolation.backends.namespace.process import inherited as fds
from isolation.backends.namespace.process import open_files
from isolation.backends.namespace.process.open_files import Aside, Held
from isolation.backends.namespace.rootfs.mounts import Overlay, Private, ReadOnlyView, Rebind

FRESH = [
    Private("/tmp", 1), Overlay("/project", "/project", 2), Rebind("/project/shared", "/.isolation/base/3", True, ReadOnlyView("", "", "")),
]  # fmt: skip


def aside_of(level: int) -> Aside:
    return Aside(None, FRESH, -1, level)  # type: ignore[arg-type]


def test_what_is_written_to_is_told(tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("read", "write", "append", "both")]
    for name in names:
        name.touch()
    with (
        names[0].open() as read, names[1].open("w") as write, names[2].open("a") as append, names[3].open("r+") as both,
        names[3].open("r+") as again,
    ):  # fmt: skip
        inherited = fds.inventory()
        files = open_files.held(inherited)
        found = [one for one in files if one.path.startswith(os.fsencode(tmp_path))]
        assert sorted(found) == sorted(
            Held(os.fsencode(file.name), os.fstat(file.fileno()).st_ino) for file in (write, append, both)
        )
        marked = {item.fd for item in open_files.mark(inherited, found[:]) if item.aside}
        assert marked == {file.fileno() for file in (write, append, both, again)}
        assert read.fileno() not in marked
    assert open_files.decode(open_files.encode(found).split(b"\0")[1:]) == found


def test_it_is_bounded() -> None:
    many = [fds.Inherited(number, (1, number), f"/tmp/{number}", os.O_RDWR) for number in range(3, 1000)]
    assert len(open_files.held(many)) <= 64
    assert len(open_files.decode([b"1 /a"] * 1000)) == 64


@pytest.mark.parametrize("text", [b"", b"x /a", b"1", b"1 a", b"-1 /a", b"9" * 30 + b" /a"])
def test_what_is_no_file_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="no file"):
        open_files.decode([text])


@pytest.mark.parametrize(
    "path", [b"/tmp/../etc/f", b"/tmp/./f", b"/tmp/a//f", b"/project/shared/f", b"/tmp", b"/elsewhere/f", b"/"]
)
def test_what_lies_in_no_layer_stays(path: bytes) -> None:
    assert aside_of(3)._overlay_of(path) is None


def test_where_the_layers_are() -> None:
    assert aside_of(1)._overlay_of(b"/tmp/f") is None  # it has none yet
    upper, lowers, names = aside_of(1)._overlay_of(b"/project/a/f") or (b"", [], [])
    assert (upper, lowers, names) == (b"/.isolation/store/layers/2/upper", [b"/.isolation/lower/2"], [b"a", b"f"])
    upper, lowers, names = aside_of(2)._overlay_of(b"/tmp/f") or (b"", [], [])
    assert (upper, lowers, names) == (b"/.isolation/store2/layers/private1/upper", [b"/.isolation/store/private/1"], [b"f"])


def test_no_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with open_files._directory(os.fsencode(tmp_path), [b"real"]):
        pass
    with (
        pytest.raises(OSError, match=r"Not a directory|Too many levels"),
        open_files._directory(os.fsencode(tmp_path), [b"link"]),
    ):
        pass
