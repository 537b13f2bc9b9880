"""The cache: built once, whole or not at all, whoever dies meanwhile."""

from __future__ import annotations

import errno
import io
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isolation.backends.microvm.artifacts import stamp
from isolation.backends.microvm.artifacts.cache import Cache, CacheError
from isolation.backends.microvm.artifacts.progress import SILENT, Progress
from isolation.errors import LaunchError

pytestmark = pytest.mark.once

BUILDER = """
import sys, time, os
from pathlib import Path
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.progress import Progress
root, seconds, log = sys.argv[1:]
def build(target):
    with open(log, "a") as file: file.write("built\\n")
    os.mkdir(target)
    (target / "part").write_text("x")
    print("building", flush=True)
    time.sleep(float(seconds))
    (target / "whole").write_text("y")
path = Cache(root).make("kind", "key", build, Progress.stderr())
assert (path / "whole").read_text() == "y"
print("done", flush=True)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "a/cache")


def write(text: str):  # type: ignore[no-untyped-def]
    return lambda target: target.write_text(text)


def builder(cache: Cache, seconds: float, log: Path) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TERM": "dumb"}
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(cache.root), str(seconds), str(log)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip


def hidden(cache: Cache, ending: str) -> list[str]:
    return [name for name in os.listdir(cache.root / "kind") if name.endswith(ending)]


def test_made_once_and_found_again(cache: Cache) -> None:
    assert cache.get("kind", "key") is None
    path = cache.make("kind", "key", write("one"))
    assert path.read_text() == "one"
    assert cache.make("kind", "key", write("two")) == path
    assert path.read_text() == "one"
    assert cache.make("kind", "key", write("three"), refresh=True).read_text() == "three"
    assert stat.S_IMODE(cache.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(cache.root.parent.stat().st_mode) == 0o700
    assert hidden(cache, ".tmp") == []


def test_a_failed_build_leaves_nothing(cache: Cache) -> None:
    def build(target: Path) -> None:
        target.mkdir()
        (target / "part").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.make("kind", "key", build)
    assert cache.get("kind", "key") is None
    assert [name for name in os.listdir(cache.root / "kind") if not name.endswith(".lock")] == []
    cache.make("kind", "key", write("x"))
    with pytest.raises(KeyboardInterrupt):
        cache.make("kind", "key", build, refresh=True)
    assert cache.path("kind", "key").read_text() == "x"


def test_two_at_once_build_once(cache: Cache, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = builder(cache, 1.0, log)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    second = builder(cache, 1.0, log)
    outputs = [process.communicate(timeout=600) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert outputs[1][0] == "done\n"
    assert "waiting for another process" in outputs[1][1]
    assert log.read_text() == "built\n"


def test_a_killed_build_is_cleared_away_by_the_next(cache: Cache, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = builder(cache, 60, log)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert hidden(cache, ".tmp") == [".key.tmp"]
    assert cache.get("kind", "key") is None
    cache.make("kind", "other", write("x"))  # of the same kind, and not even the same key
    assert hidden(cache, ".tmp") == []
    cache.make("kind", "key", write("x"))


def test_what_is_being_built_is_left_alone(cache: Cache, tmp_path: Path) -> None:
    process = builder(cache, 1.5, tmp_path / "log")
    assert process.stdout is not None
    process.stdout.readline()
    cache.make("kind", "other", write("x"))
    cache.clean()
    assert hidden(cache, ".tmp") == [".key.tmp"]
    output = process.communicate(timeout=600)
    assert process.returncode == 0, output


def test_the_least_recently_used_are_pruned_and_those_in_use_are_not(cache: Cache) -> None:
    for number in range(5):
        cache.make("kind", f"a{number}", write("x"))
        os.utime(cache.path("kind", f"a{number}"), (number + 1, number + 1))
    cache.make("kind", "b", write("x"))
    os.utime(cache.path("kind", "b"), (0, 0))
    cache.get("kind", "a0")
    with cache.hold("kind", "a1") as held:
        assert held is not None
        os.utime(held, (2, 2))
        cache.prune("kind", 2, prefix="a")
        assert {entry.key for entry in cache.entries()} == {"a0", "a1", "a4", "b"}
        assert [entry.key for entry in cache.clean()] == ["a1"]
        assert held.read_text() == "x"
    assert cache.clean() == []
    assert cache.entries() == []
    with cache.hold("kind", "a1") as held:
        assert held is None


def test_entries_tell_sizes_and_use(cache: Cache) -> None:
    def build(target: Path) -> None:
        target.mkdir()
        with open(target / "sparse", "wb") as file:
            file.write(os.urandom(100_000))
            file.truncate(1 << 30)

    before = time.time()
    cache.make("kind", "key", build)
    (entry,) = cache.entries("kind")
    assert (entry.kind, entry.key) == ("kind", "key")
    assert 100_000 <= entry.size < 1 << 20
    assert abs(entry.used - before) < 60


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "a\n", "a b", "ä"])
def test_names_stay_in_the_cache(cache: Cache, name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        cache.get("kind", name)
    with pytest.raises(ValueError, match="not a name"):
        cache.make(name, "key", write("x"))


def test_a_full_disk_is_told_with_what_mends_it(cache: Cache) -> None:
    def full(_target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CacheError, match=r"no space left .*isolation microvm clean.*XDG_CACHE_HOME") as caught:
        cache.make("kind", "key", full)
    assert isinstance(caught.value, LaunchError)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"cannot be used|cannot write"):
        Cache("/proc/no/such").make("kind", "key", write("x"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be used"):
        Cache(tmp_path / "file").make("kind", "key", write("x"))
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(CacheError, match=r"cannot write .*XDG_CACHE_HOME"):
            Cache(tmp_path / "closed/cache").make("kind", "key", write("x"))


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("use", ["get", "make", "read", "write", "exclusive"])
def test_nothing_is_used_where_others_can_write(tmp_path: Path, level: int, use: str) -> None:
    """What is in it is run, by the host, too: a cache that another user has made would be his way in."""
    cache = Cache(tmp_path / "cache/isolation-kit/microvm")
    cache.make("kind", "key", write("x"))
    cache.write("name", b"x")
    directory = (cache.root, *cache.root.parents)[level]

    def used() -> None:
        again = Cache(cache.root)
        if use == "make":
            again.make("kind", "other", write("x"))
        elif use == "exclusive":
            with again.exclusive("name"):
                pass
        else:
            {
                "get": lambda: again.get("kind", "key"),
                "read": lambda: again.read("name"),
                "write": lambda: again.write("n", b""),
            }[use]()

    used()
    directory.chmod(0o777)
    with pytest.raises(CacheError, match=r"other users can write .*XDG_CACHE_HOME"):
        used()
    directory.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(directory, 65534, 0)
        with pytest.raises(CacheError, match=r"belongs to another user .*sudo -H"):
            used()


def test_what_has_changed_since_is_noticed(cache: Cache) -> None:
    def build(target: Path) -> None:
        (target / "below").mkdir(parents=True)
        (target / "below/image").write_bytes(bytes(100_000))

    path = cache.make("kind", "key", build)
    assert cache.get("kind", "key") == path  # and marks it as used
    assert stamp.changed(path) is None
    image = path / "below/image"
    before = image.stat()
    with image.open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size, and the same time
    assert stamp.changed(path) == "below/image"
    image.unlink()
    assert stamp.changed(path) == "below/image"
    image.write_bytes(bytes(100_000))
    (path / "more").touch()
    assert stamp.changed(path) == "more"


def test_a_cache_that_was_restored_from_a_copy_is_as_good(cache: Cache, tmp_path: Path) -> None:
    """As CI systems do it: other inodes, and other times."""

    def build(target: Path) -> None:
        target.mkdir()
        (target / "image").write_bytes(b"content")

    path = cache.make("kind", "key", build)
    image = path / "image"
    image.unlink()
    image.write_bytes(b"content")
    assert stamp.changed(path) is None
    known = (path / stamp.NAME).read_bytes()
    assert stamp.changed(path) is None
    assert (path / stamp.NAME).read_bytes() == known  # the digest was asked once
    image.write_bytes(b"CONTENT")
    assert stamp.changed(path) == "image"


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/cache")
    assert Cache.default().root == Path("/x/cache/isolation-kit/microvm")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Cache.default().root == Path("/home/somebody/.cache/isolation-kit/microvm")


def test_small_files_are_written_whole(cache: Cache) -> None:
    cache.write("settings.json", b"one")
    cache.write("settings.json", b"two")
    assert os.listdir(cache.root) == ["settings.json"]
    assert (cache.root / "settings.json").read_bytes() == b"two"
    assert cache.entries() == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_plain_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.start("making\x1b[31m it")
    progress.update("half")
    progress.done("made")
    assert stream.getvalue() == "making?[31m it\nmade\n"
    SILENT.note("nothing")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    progress = Progress(terminal)
    progress.start("making")
    time.sleep(0.15)
    progress.update("x" * 500)
    progress.close()
    lines = terminal.getvalue().split("\r\x1b[K")
    assert lines[1] == "making …"
    assert lines[2].startswith("making: xxx")
    assert len(lines[2]) < 500
    assert lines[-1] == ""
    terminal.close()
    progress.note("nobody listens any more")
