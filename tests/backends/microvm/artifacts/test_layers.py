"""Layers, looked at with unsquashfs: what is in them, and what hostile trees do to them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest

from isolation.backends.microvm.artifacts import layers, setup, squashfs, tools, trees
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.progress import SILENT
from isolation.errors import BackendUnavailable, LaunchError, SpecError

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not (shutil.which("mksquashfs") and shutil.which("unsquashfs")), reason="needs squashfs-tools"),
]
ROOT = os.geteuid() == 0


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


def unpack(layer: layers.Layer, tmp_path: Path) -> Path:
    target = tmp_path / f"unpacked-{layer.key}"
    done = subprocess.run(["unsquashfs", "-q", "-n", "-d", target, layer.path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def listing(layer: layers.Layer) -> dict[bytes, tuple[str, str, int]]:
    """{path: (mode, "uid/gid", size)}"""
    out = subprocess.run(["unsquashfs", "-lln", layer.path], capture_output=True, check=True).stdout
    found = {}
    for line in re.findall(rb"^[-dlbcps][-rwxsStT]{9} .*$", out, re.MULTILINE):
        mode, owner, size, _day, _time, path = line.split(None, 5)
        path = path.split(b" -> ")[0] if mode.startswith(b"l") else path
        found[path.removeprefix(b"squashfs-root")] = (mode.decode(), owner.decode(), int(size.split(b",")[0]))
    return found


def test_a_tree_keeps_content_modes_times_and_links(cache: Cache, source: Path, tmp_path: Path) -> None:
    (source / "bin").mkdir()
    (source / "bin/tool").write_bytes(b"#!/bin/sh\n")
    (source / "bin/tool").chmod(0o751)
    os.utime(source / "bin/tool", (1, 1234567890))
    (source / "empty").mkdir(mode=0o700)
    (source / "none").write_bytes(b"")
    (source / "large").write_bytes(os.urandom(3_000_001))
    (source / "link").symlink_to("bin/tool")
    (source / "dangling").symlink_to("/no/such/" + "x" * 300)
    os.link(source / "large", source / "bin/also large")
    os.utime(source / "bin", (1, 1300000000))
    layer = layers.tree(cache, source)
    assert (layer.name, layer.left_out) == ("tree", 0)
    assert layer.size == layer.path.stat().st_size
    tree = unpack(layer, tmp_path) / "tree"
    assert sorted(os.listdir(tree)) == ["bin", "dangling", "empty", "large", "link", "none"]
    assert (tree / "bin/tool").read_bytes() == b"#!/bin/sh\n"
    assert stat.S_IMODE((tree / "bin/tool").stat().st_mode) == 0o751
    assert (tree / "bin/tool").stat().st_mtime == 1234567890
    assert (tree / "bin").stat().st_mtime == 1300000000
    assert stat.S_IMODE((tree / "empty").stat().st_mode) == 0o700
    assert (tree / "none").read_bytes() == b""
    assert (tree / "large").read_bytes() == (source / "large").read_bytes()
    assert (tree / "large").samefile(tree / "bin/also large")
    assert os.readlink(tree / "link") == "bin/tool"
    assert os.readlink(tree / "dangling") == "/no/such/" + "x" * 300


def test_names_are_bytes_without_meaning(cache: Cache, source: Path, tmp_path: Path) -> None:
    names = [
        b"new\nline", b"\xff\xfe not utf-8", b" space ", b"-e", b"--help", b"-", b"*", b"?", b"[a-z]", b"{a,b}", b"\\", b"#",
        b'"quoted"', b"'", b"$(touch x)", b"%s%n", b"\x1b[31m", b"a=b", b"a:b", b"~", b"!", b"...", b"\x01", "ü".encode(),
        b"z" * 255, b"././@LongLink",
    ]  # fmt: skip
    names = [name for name in names if b"/" not in name]
    for name in [*names, b"a", b"bb"]:
        with open(os.path.join(os.fsencode(source), name), "wb") as file:
            file.write(name)
    os.mkdir(os.path.join(os.fsencode(source), b"*dir\n"))
    with open(os.path.join(os.fsencode(source), b"*dir\n", b"- *"), "wb") as file:
        file.write(b"inner")
    tree = os.fsencode(unpack(layers.tree(cache, source), tmp_path) / "tree")
    assert sorted(os.listdir(tree)) == sorted([*names, b"a", b"bb", b"*dir\n"])
    for name in names:
        with open(os.path.join(tree, name), "rb") as file:
            assert file.read() == name
    with open(os.path.join(tree, b"*dir\n", b"- *"), "rb") as file:
        assert file.read() == b"inner"


def test_sockets_fifos_and_devices_are_not_in_it(cache: Cache, source: Path) -> None:
    os.mkfifo(source / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source / "socket"))
        if ROOT:
            os.mknod(source / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (source / "file").write_text("x")
        assert set(listing(layers.tree(cache, source))) == {b"", b"/tree", b"/tree/file"}


def test_what_the_caller_cannot_read_is_left_out_and_counted(cache: Cache, source: Path) -> None:
    if ROOT:
        pytest.skip("root reads everything")
    (source / "secret").write_text("x")
    (source / "secret").chmod(0)
    (source / "closed").mkdir(mode=0)
    (source / "file").write_text("x")
    layer = layers.tree(cache, source)
    (source / "closed").chmod(0o700)
    assert layer.left_out == 2
    assert set(listing(layer)) == {b"", b"/tree", b"/tree/closed", b"/tree/file"}


def test_owners_are_those_of_the_host(cache: Cache, source: Path) -> None:
    (source / "mine").write_text("x")
    expected = f"{os.getuid()}/{os.getgid()}"
    if ROOT:
        (source / "theirs").write_text("x")
        os.chown(source / "theirs", 3_000_000, 70_000)  # more than seven octal digits
        assert listing(layers.tree(cache, source))[b"/tree/theirs"][1] == "3000000/70000"
    assert listing(layers.tree(cache, source))[b"/tree/mine"][1] == expected
    assert (
        listing(layers.tree(cache, "/etc/hostname" if os.path.exists("/etc/hostname") else "/etc/passwd"))[b"/file"][1]
        == "0/0"
    )


def test_a_single_file_and_other_places(cache: Cache, source: Path, tmp_path: Path) -> None:
    (source / "one").write_text("content")
    layer = layers.tree(cache, source / "one")
    assert layer.name == "file"
    assert (unpack(layer, tmp_path) / "file").read_text() == "content"
    assert (unpack(layers.tree(cache, source, at="/"), tmp_path) / "one").read_text() == "content"
    layer = layers.tree(cache, source, at="/home/some one/project")
    assert (unpack(layer, tmp_path) / "home/some one/project/one").read_text() == "content"
    assert listing(layer)[b"/home/some one"][:2] == ("drwxr-xr-x", "0/0")
    with pytest.raises(SpecError, match="cannot show"):
        layers.tree(cache, source / "missing")
    with pytest.raises(SpecError, match="neither"):
        layers.tree(cache, "/dev/null")
    with pytest.raises(SpecError, match="root of a file tree"):
        layers.tree(cache, source / "one", at="/")


def test_parts_can_be_left_out(cache: Cache, source: Path) -> None:
    (source / "venv/lib").mkdir(parents=True)
    (source / "venv/lib/x").write_text("x")
    (source / "venvx").write_text("x")
    (source / "file").write_text("x")
    layer = layers.tree(cache, source, without=[source / "venv", source / "file"])  # type: ignore[list-item]
    assert set(listing(layer)) == {b"", b"/tree", b"/tree/venvx"}


def test_the_cache_is_never_in_its_own_image(source: Path) -> None:
    (source / "file").write_text("x")
    inside = Cache(source / ".cache")
    layers.tree(inside, source)
    (source / "file").write_text("changed")
    assert set(listing(layers.tree(inside, source))) == {b"", b"/tree", b"/tree/file"}


def test_very_long_paths_and_deep_trees(cache: Cache, source: Path, tmp_path: Path) -> None:
    place = os.open(source, os.O_RDONLY)
    for _ in range(30):  # 6,000 bytes: more than a path may have for one system call
        os.mkdir("d" * 200, dir_fd=place)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(os.open("end", os.O_CREAT | os.O_WRONLY, dir_fd=place))
    os.close(place)
    deep = source / "deep"
    deep.mkdir()
    place = os.open(deep, os.O_RDONLY)
    for _ in range(400):
        os.mkdir("x", dir_fd=place)
        inner = os.open("x", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    layer = layers.tree(cache, source)
    assert layer.left_out == 1  # what lies deeper than we have descriptors for
    found = listing(layer)
    assert b"/tree" + b"/" + b"/".join([b"d" * 200] * 30) + b"/end" in found


def test_large_and_sparse_files(cache: Cache, source: Path, tmp_path: Path) -> None:
    with open(source / "large", "wb") as file:
        file.write(b"start")
        file.seek(9 << 30)  # more than eleven octal digits
        file.write(b"end")
    (source / "hole").touch()
    os.truncate(source / "hole", 3_000_001)
    with open(source / "holes", "wb") as file:  # more pieces than one header has room for
        for number in range(60):
            file.seek(number * 1_000_000)
            file.write(b"%d" % number)
        file.truncate(70_000_123)
    (source / "next").write_text("intact")
    began = time.process_time()
    layer = layers.tree(cache, source)
    assert time.process_time() - began < 10  # not read as 9 GiB of zeros, which takes half a minute
    assert listing(layer)[b"/tree/large"][2] == (9 << 30) + 3
    assert layer.size < 10 << 20

    def cat(name: str) -> bytes:
        return subprocess.run(["unsquashfs", "-cat", layer.path, f"tree/{name}"], capture_output=True, check=True).stdout

    assert cat("hole") == bytes(3_000_001)
    assert cat("holes") == (source / "holes").read_bytes()
    assert cat("next") == b"intact"


def test_a_file_system_that_compresses_is_not_taken_for_holes(
    cache: Cache, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(source / "file", "wb") as file:  # st_blocks says less than st_size; and nobody says where the holes are
        file.write(b"start")
        file.seek(1_000_000)
        file.write(b"end")
    (source / "next").write_text("intact")
    monkeypatch.setattr(trees, "_data", lambda fd, size: [(0, size)])
    tree = unpack(layers.tree(cache, source), tmp_path) / "tree"
    assert (tree / "file").read_bytes() == (source / "file").read_bytes()
    assert (tree / "next").read_text() == "intact"


def test_content_goes_with_its_key(cache: Cache, source: Path, tmp_path: Path) -> None:
    (source / "file").write_text("one")
    first = layers.tree(cache, source)
    assert layers.tree(cache, source) == first
    (source / "file").write_text("two")
    second = layers.tree(cache, source)
    assert second.key != first.key
    assert (unpack(second, tmp_path) / "tree/file").read_text() == "two"
    assert (unpack(first, tmp_path) / "tree/file").read_text() == "one"


@pytest.mark.parametrize("change", ["mode", "mtime", "rename", "link", "remove", "add", "type"])
def test_the_key_notices(source: Path, change: str) -> None:
    (source / "file").write_text("x")
    (source / "link").symlink_to("aa")
    before = trees.digest([str(source)], trees.Rules())
    assert trees.digest([str(source)], trees.Rules()) == before
    status = source.stat()
    match change:
        case "mode":
            (source / "file").chmod(0o600 if stat.S_IMODE((source / "file").stat().st_mode) != 0o600 else 0o640)
        case "mtime":
            os.utime(source / "file", ns=(1, (source / "file").stat().st_mtime_ns + 1))
        case "rename":
            (source / "file").rename(source / "other")
        case "link":
            times = (source / "link").lstat()
            (source / "link").unlink()
            (source / "link").symlink_to("bb")
            os.utime(source / "link", ns=(1, times.st_mtime_ns), follow_symlinks=False)
        case "remove":
            (source / "file").unlink()
        case "add":
            (source / "more").touch()
        case "type":
            (source / "file").unlink()
            (source / "file").mkdir()
    os.utime(source, ns=(1, status.st_mtime_ns))
    assert trees.digest([str(source)], trees.Rules()) != before


def test_only_the_last_images_of_a_source_are_kept(
    cache: Cache, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_KEEP_TREES", 3)
    other = tmp_path / "other"
    other.mkdir()
    kept = layers.tree(cache, other)
    for number in range(6):
        (source / "file").write_text(str(number))
        last = layers.tree(cache, source)
        time.sleep(0.01)
    keys = [entry.key for entry in cache.entries(layers.TREE)]
    assert len(keys) == 4
    assert {kept.entry, last.entry} <= set(keys)


def test_a_file_that_shrinks_or_vanishes_meanwhile(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "a").write_bytes(b"x" * 1_000_000)
    (source / "b").write_bytes(b"y")
    (source / "c").write_bytes(b"z")
    real = os.fstat

    def shrink(fd: int) -> os.stat_result:
        status = real(fd)
        if stat.S_ISREG(status.st_mode) and status.st_size == 1_000_000:
            os.truncate(source / "a", 100_000)
            (source / "b").unlink()
        return status

    monkeypatch.setattr(os, "fstat", shrink)
    report = trees.Report()
    squashfs.make(tools.mksquashfs(Cache(tmp_path)), tmp_path / "image", lambda tar: run(tar, source), report)
    assert report.changed == 2
    monkeypatch.undo()
    out = subprocess.run(["unsquashfs", "-cat", tmp_path / "image", "tree/a"], capture_output=True, check=True).stdout
    assert out == b"x" * 100_000 + bytes(900_000)
    assert subprocess.run(["unsquashfs", "-cat", tmp_path / "image", "tree/c"], capture_output=True).stdout == b"z"


def run(tar: trees.Tar, source: Path, rules: trees.Rules = trees.Rules()) -> None:  # noqa: B008
    for _ in tar.tree(str(source), "tree", rules):
        pass


def test_a_directory_replaced_by_a_link_leads_nowhere(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("s")
    (source / "directory").mkdir()
    (source / "directory/secret").write_text("mine")
    (source / "file").write_text("mine")
    real = os.open

    def swap(path: str | bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        for name, to in ((b"directory", "outside"), (b"file", "outside/secret")):
            if path == name and not (source / os.fsdecode(name)).is_symlink():
                if name == b"directory":
                    shutil.rmtree(source / "directory")
                else:
                    (source / "file").unlink()
                (source / os.fsdecode(name)).symlink_to(tmp_path / to)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", swap)
    report = trees.Report()
    with open(tmp_path / "archive", "wb") as file:
        tar = trees.Tar(file.fileno(), report)
        run(tar, source)
        tar.close()
    monkeypatch.undo()
    assert report.changed == 2
    assert b"secret" not in (tmp_path / "archive").read_bytes()


def test_a_tree_that_changes_all_the_time_still_gives_an_image(cache: Cache, source: Path, tmp_path: Path) -> None:
    (source / "fixed").write_bytes(b"f" * 100_000)
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            (source / f"new{number % 7}").write_bytes(b"n" * (number % 5000))
            (source / "log").write_bytes(b"l" * number)
            (source / f"new{(number + 3) % 7}").unlink(missing_ok=True)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        made = [layers.tree(cache, source) for _ in range(3)]
    finally:
        stop.set()
        thread.join()
    for layer in made[-1:]:
        assert (unpack(layer, tmp_path) / "tree/fixed").read_bytes() == b"f" * 100_000
    # Nothing that was read while it changed may be taken for the tree as it is now.
    last = layers.tree(cache, source)
    tree = unpack(last, tmp_path) / "tree"
    assert {p.name: p.read_bytes() for p in tree.iterdir()} == {p.name: p.read_bytes() for p in source.iterdir()}


def test_the_base_is_what_everyone_may_read(cache: Cache, source: Path, tmp_path: Path) -> None:
    for path, mode in {
        "usr/bin/sh": 0o755, "usr/bin/su": 0o4755, "usr/bin/closed": 0o711, "etc/shadow": 0o640, "etc/passwd": 0o644,
        "etc/ssh/ssh_host_key": 0o600, "etc/private/key": 0o644, "usr/share/doc/x/copyright": 0o644, "usr/src/linux/a": 0o644,
        "usr/lib/modules/6/a.ko": 0o644, "usr/lib/python3/mod.py": 0o644, "opt/app/x": 0o644, "home/me/x": 0o644, "var/x": 0o644,
        "usr/share/my big data/x": 0o644, "usr/share/man": 0o644,
    }.items():  # fmt: skip
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(path)
        (source / path).chmod(mode)
    (source / "etc/private").chmod(0o750)
    (source / "bin").symlink_to("usr/bin")
    (source / "run").mkdir()
    (source / "run/resolv.conf").write_text("nameserver 192.0.2.1\n")
    (source / "etc/resolv.conf").symlink_to("../run/resolv.conf")
    layer = layers.base(cache, root=str(source), exclude=["/usr/share/my big data"])
    found = listing(layer)
    files = {path.decode() for path, (mode, _, _) in found.items() if mode.startswith("-")}
    assert files == {"/usr/bin/sh", "/usr/bin/su", "/etc/passwd", "/usr/lib/python3/mod.py", "/etc/resolv.conf"}
    assert b"/etc/private" in found
    assert found[b"/tmp"][0] == "drwxrwxrwt"
    assert found[b"/.isolation"][0] == "drwx------"
    root = unpack(layer, tmp_path)
    assert (root / "etc/resolv.conf").read_text() == "nameserver 192.0.2.1\n"
    assert os.readlink(root / "bin") == "usr/bin"


def test_the_base_is_made_again_when_the_system_has_changed(source: Path) -> None:
    for path in ("etc/a/b", "usr/local/lib/deep/er/still/x", "usr/lib/python3/dist-packages/p", "var/lib/dpkg/status"):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text("x")
    keys = [layers.base_key(root=str(source))]
    assert layers.base_key(root=str(source)) == keys[0]
    for change in (
        lambda: (source / "etc/a/b").write_text("longer"),
        lambda: (source / "usr/local/lib/deep/er/still/x").write_text("longer"),
        lambda: (source / "usr/lib/python3/dist-packages/q").touch(),
        lambda: (source / "var/lib/dpkg/status").write_text("installed"),
        lambda: (source / "lib").symlink_to("usr/lib"),
    ):
        change()
        keys.append(layers.base_key(root=str(source)))
    keys.append(layers.base_key(["/usr/x"], root=str(source)))
    assert len(set(keys)) == len(keys)


def test_the_environment_with_its_links(cache: Cache, source: Path, tmp_path: Path) -> None:
    (source / "data/py/bin").mkdir(parents=True)
    (source / "data/py/bin/python").write_text("#!python")
    (source / "data/py/lib").mkdir()
    (source / "data/py/lib/os.py").write_text("os")
    (source / "data/project/src").mkdir(parents=True)
    (source / "data/project/src/m.py").write_text("m")
    (source / "current").symlink_to("data/py")
    (source / "one.py").write_text("one")
    found = layers.environment(
        cache,
        paths=[f"{source}/current", f"{source}/current/lib", f"{source}/data/py", f"{source}/data/project/src", f"{source}/one.py",
               "/usr/lib", f"{source}/data/missing"],
        without=[f"{source}/data/project"],
    )  # fmt: skip
    assert len(found) == 2  # the installation, and the single file with the link
    merged: dict[bytes, tuple[str, str, int]] = {}
    for layer in found:
        merged |= listing(layer)
    prefix = os.fsencode(source)
    assert {path[len(prefix) :] for path in merged if path.startswith(prefix + b"/")} == {
        b"/current", b"/data", b"/data/py", b"/data/py/bin", b"/data/py/bin/python", b"/data/py/lib", b"/data/py/lib/os.py",
        b"/one.py",
    }  # fmt: skip
    link = next(path for path in merged if path.startswith(prefix + b"/current"))
    assert merged[link][0].startswith("l")


def test_many_environments_share_a_layer(cache: Cache, source: Path) -> None:
    for number in range(10):
        (source / f"d{number}").mkdir()
        (source / f"d{number}/m.py").write_text("m")
    found = layers.environment(cache, paths=[f"{source}/d{number}" for number in range(10)])
    assert len(found) == 6
    assert sum(b"m.py" in path for layer in found for path in listing(layer)) == 10
    assert layers.environment(cache, paths=["/usr/lib"]) == ()


def test_an_environment_in_a_private_part_of_the_system_is_not_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layers, "_SYSTEM", (str(tmp_path).split("/")[1],))
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "closed").mkdir(mode=0o700)
    public = [path for path in tmp_path.parents if path != Path("/")]
    if all(path.stat().st_mode & 0o005 == 0o005 for path in [tmp_path, *public]):
        assert layers._in_base(str(tmp_path / "open"), ())
    assert not layers._in_base(str(tmp_path / "closed"), ())
    assert not layers._in_base(str(tmp_path / "open"), (str(tmp_path / "open"),))


def test_damage_is_noticed_and_mended(cache: Cache, source: Path) -> None:
    (source / "file").write_bytes(os.urandom(100_000))
    layer = layers.tree(cache, source)
    layers.check(layer)
    whole = layer.path.read_bytes()
    for damaged in (whole[:-8192], whole[:20], b"", b"\0" * 96 + whole[96:]):
        layer.path.write_bytes(damaged)
        with pytest.raises(BackendUnavailable, match="isolation microvm"):
            layers.check(layer)
    assert layers.tree(cache, source) == layer  # made again
    assert layer.path.stat().st_size == len(whole)
    layer.path.unlink()
    with pytest.raises(BackendUnavailable, match="cannot be read"):
        layers.check(layer)


def test_the_system_as_it_was_before(cache: Cache, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves who cannot wait for a new image, but nobody who leaves out something else."""
    (source / "usr").mkdir()
    assert layers.base_before(cache) is None
    old = layers.base(cache, root=str(source))
    assert layers.base_before(cache) == old
    assert layers.base_before(cache, ["/opt/secret"]) is None
    monkeypatch.setattr(layers, "base_key", lambda exclude=(): "0" * 40)  # it has changed
    with setup.system_as_before() as before:
        assert setup._base(cache, SILENT, ()) == old
        assert before.used
    made: list[object] = []
    monkeypatch.setattr(layers, "base", lambda *_given, **named: made.append(named))
    setup._base(cache, SILENT, ())
    with setup.system_as_before() as before:
        setup._base(cache, SILENT, ("/opt/secret",))
        assert not before.used
    assert made == [{"exclude": ()}, {"exclude": ("/opt/secret",)}]


@pytest.mark.parametrize("number", [0, 252, 253, 254, 255, 600])
def test_the_root_has_no_time(source: Path, tmp_path: Path, number: int) -> None:
    """Wherever its inode lies: with 253, across two blocks of metadata (8 bytes before the end of the first)."""
    (source / "link").symlink_to("x" * 32)
    for name in range(number):
        (source / f"{name:03}").touch()
    image = layers.tree(Cache(tmp_path / "a"), source).path
    listed = subprocess.run(["unsquashfs", "-lln", "-UTC", str(image)], capture_output=True, text=True, check=True).stdout
    assert listed.splitlines()[0].split()[3:5] == ["1970-01-01", "00:00"]
    assert len(listed.splitlines()) >= number + 2


def test_the_same_tree_makes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for number in range(50):
        (source / f"{number}").write_bytes(os.urandom(2000))
    one = layers.tree(Cache(tmp_path / "a"), source)
    made = int(time.time())
    while int(time.time()) == made:  # the time of making is nowhere in it
        time.sleep(0.01)
    two = layers.tree(Cache(tmp_path / "b"), source)
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.key == two.key
    os.utime(source, (1, 1))
    assert layers.tree(Cache(tmp_path / "a"), source).key != one.key


def test_a_layer_made_afresh_from_what_its_cheap_key_did_not_notice_has_another_key(cache: Cache, source: Path) -> None:
    """The machine side keeps memory images by it: those of another file system would crash, or worse."""
    place = source / "usr/a/b/c/d/e"
    place.mkdir(parents=True)
    (place / "file").write_text("one")
    before = layers.base(cache, root=str(source))
    (place / "file").write_text("two")
    assert layers.base(cache, root=str(source)) == before
    assert layers.base(cache, root=str(source), refresh=True).key != before.key


def test_what_mksquashfs_says_is_passed_on(
    cache: Cache, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin/mksquashfs"
    fake.parent.mkdir()
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    start = "#!/bin/sh\n[ $1 = -version ] && { echo mksquashfs version 4.6; exit; }\n"
    fake.write_text(start + "echo 'FATAL ERROR: tar file is strange' >&2; exit 1\n")
    fake.chmod(0o755)
    with pytest.raises(LaunchError, match="tar file is strange"):
        layers.tree(cache, source)
    fake.write_text(start + "echo 'Write failed because No space left on device' >&2; echo 'FATAL ERROR: x' >&2; exit 1\n")
    with pytest.raises(LaunchError, match="no space left for the microvm cache"):
        layers.tree(cache, source)
    fake.write_text(start + "cat >/dev/null; exit 0\n")  # says that all is well, and writes nothing
    with pytest.raises(BackendUnavailable, match="cannot be read"):
        layers.tree(cache, source)
    assert cache.entries(layers.TREE) == []


def test_a_project_that_has_not_changed_is_not_read_again(
    cache: Cache, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in range(100):
        (source / f"package{directory}").mkdir()
        for number in range(30):
            (source / f"package{directory}/m{number}.py").write_bytes(os.urandom(5000) + b"x" * 5000)
    made = layers.tree(cache, source)

    def read(*_arguments: object) -> None:
        raise AssertionError("an image is made")

    monkeypatch.setattr(squashfs, "make", read)
    assert layers.tree(cache, source) == made
    (source / "package7/m7.py").write_text("changed")
    with pytest.raises(AssertionError, match="an image is made"):
        layers.tree(cache, source)
