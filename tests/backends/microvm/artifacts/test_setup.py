"""`isolation microvm setup`, `status` and `clean`; what a launch finds, and what it says when it finds nothing."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isolation.backends.microvm.artifacts import commands, initramfs, layers, setup
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.kernel import Kernel
from isolation.backends.microvm.artifacts.progress import SILENT
from isolation.errors import BackendUnavailable, LaunchError

pytestmark = pytest.mark.once

needs_tools = pytest.mark.skipif(
    not all(map(shutil.which, ("mksquashfs", "busybox", f"qemu-system-{os.uname().machine}"))),
    reason="needs QEMU, squashfs-tools and busybox-static",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return Cache.default()


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small system and a small Python, instead of this machine's."""
    root = tmp_path / "system"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/tool").write_text("tool")
    (root / "etc").mkdir()
    (root / "python").mkdir()
    (root / "python/os.py").write_text("os")
    monkeypatch.setattr(layers, "base", functools.partial(layers.base, root=str(root)))
    monkeypatch.setattr(layers, "base_key", functools.partial(layers.base_key, root=str(root)))
    monkeypatch.setattr(layers.showing, "python_environment", lambda: [str(root / "python")])
    return root


@pytest.fixture
def image(fetched_kernel: Kernel, tmp_path: Path) -> list[str]:
    """--kernel and --modules, of a real one, so that nothing is fetched."""
    directory = tmp_path / "modules" / fetched_kernel.release
    directory.mkdir(parents=True)
    for path in fetched_kernel.modules:
        shutil.copy(path, directory / path.name[3:])
    shutil.copy(fetched_kernel.image, tmp_path / "vmlinux")
    return ["--kernel", str(tmp_path / "vmlinux"), "--modules", str(directory)]


def test_nothing_set_up(cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendUnavailable, match="run 'isolation microvm setup'"):
        setup.load(cache)
    assert commands.main(["status"]) == 1
    assert "not set up: run 'isolation microvm setup'" in capfd.readouterr().out
    assert commands.main(["clean", "--all"]) == 0
    assert not cache.root.exists()


@needs_tools
def test_setup_status_clean(cache: Cache, system: Path, image: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["setup", *image, "--exclude", "/usr/games"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert any(line.startswith("image of the system's files: ") for line in lines)
    assert lines[-1].startswith("microvm is set up (")
    assert "\r" not in err

    assert commands.main(["setup"]) == 0  # all remembered
    assert capfd.readouterr().err.count("\n") == 1

    found = setup.load(cache)
    assert found.exclude == ("/usr/games",)
    assert found.kernel.source == image[1]
    assert found.base.entries > 3
    (environment,) = found.environment()
    assert environment.entries == 2
    assert found.environment(without=[system / "python"]) == ()  # type: ignore[list-item]
    assert found.tree(system / "etc").name == "tree"
    assert found.initramfs() == found.initramfs(initramfs.agent_files())

    assert commands.main(["status", "--json"]) == 0
    status = json.loads(capfd.readouterr().out)
    assert status["ready"] is True
    assert status["exclude"] == ["/usr/games"]
    assert status["kernel"]["release"] == found.kernel.release
    assert status["base"]["current"] is True
    assert {entry["kind"] for entry in status["entries"]} == {"base", "environment", "initramfs", "kernel", "tree"}
    assert status["size"] == sum(entry["size"] for entry in status["entries"]) > 10 << 20
    assert commands.main(["status"]) == 0
    assert capfd.readouterr().out.startswith("microvm    ready\n")

    (system / "etc/new").write_text("changed")
    assert commands.main(["status"]) == 1
    assert "the system has changed since" in capfd.readouterr().out
    assert setup.load(cache).base.key != found.base.key  # made again

    assert commands.main(["clean"]) == 0
    assert {entry.kind for entry in cache.entries()} == {"base", "kernel"}
    assert len(cache.entries()) == 2
    setup.load(cache)
    assert commands.main(["clean", "--all"]) == 0
    assert not cache.root.exists()


@needs_tools
def test_choices_are_remembered_until_others_are_made(cache: Cache, system: Path, image: list[str]) -> None:
    assert commands.main(["setup", "--quiet", *image, "--exclude", "/usr/a", "--exclude", "/usr/b"]) == 0
    settings = setup.read(cache)
    assert settings is not None
    assert (settings.image, settings.modules, settings.exclude) == (image[1], image[3], ("/usr/a", "/usr/b"))
    assert commands.main(["setup", "--quiet", "--exclude", ""]) == 0
    settings = setup.read(cache)
    assert settings is not None
    assert (settings.image, settings.exclude) == (image[1], ())


@needs_tools
def test_quiet_is_quiet_and_refresh_makes_all_anew(
    cache: Cache, system: Path, image: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["setup", "--quiet", *image]) == 0
    before = {(entry.kind, entry.key): entry.path.stat().st_ino for entry in cache.entries()}
    assert commands.main(["setup", "--quiet", "--refresh"]) == 0
    assert capfd.readouterr() == ("", "")
    after = {(entry.kind, entry.key): entry.path.stat().st_ino for entry in cache.entries()}
    assert before.keys() == after.keys()
    assert all(before[entry] != after[entry] for entry in before if entry[0] in ("base", "kernel", "environment"))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '"x"', '{"format": 1}', '{"format": 99, "kernel": "k", "choice": {}, "exclude": []}',
        '{"format": 1, "kernel": 7, "choice": {"kernel": "", "modules": ""}, "exclude": []}',
        '{"format": 1, "kernel": "../../etc", "choice": {"kernel": "", "modules": ""}, "exclude": []}',
        '{"format": 1, "kernel": "k", "choice": {"kernel": "", "modules": ""}, "exclude": "abc\\u0000"}',
        '{"format": 1, "kernel": "k", "choice": {"kernel": null, "modules": ""}, "exclude": []}',
        '{"format": 1, "kernel": "k", "choice": {"kernel": "", "modules": ""}, "exclude": [["x"]]}', "[" * 100_000, "\udcff",
    ],
)  # fmt: skip
def test_settings_that_are_garbage_are_told(cache: Cache, text: str) -> None:
    cache.write("settings.json", text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BackendUnavailable, match=r"settings\.json is damaged .*run 'isolation microvm setup'"):
        setup.load(cache)
    assert commands.main(["status"]) == 1
    assert setup.read_or_none(cache) is None


@needs_tools
def test_a_damaged_cache_is_told_at_launch_and_mended_by_setup(cache: Cache, system: Path, image: list[str]) -> None:
    assert commands.main(["setup", "--quiet", *image]) == 0
    images = setup.load(cache)
    os.truncate(images.kernel.image, 100)
    with pytest.raises(BackendUnavailable, match="isolation microvm setup"):
        setup.load(cache)
    assert commands.main(["setup", "--quiet"]) == 0
    os.truncate(images.base.path, 100)
    mended = setup.load(cache).base  # made again at once; of a living system, whose times may have changed meanwhile
    assert (mended.path, mended.size, mended.entries) == (images.base.path, images.base.size, images.base.entries)
    assert os.path.getsize(mended.path) == mended.size
    shutil.rmtree(images.kernel.image.parent)
    with pytest.raises(BackendUnavailable, match="gone from the cache: run 'isolation microvm setup'"):
        setup.load(cache)
    assert commands.main(["setup", "--quiet"]) == 0
    setup.load(cache)


def test_without_qemu_the_package_is_named(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda name, **_rest: None)
    with pytest.raises(BackendUnavailable, match=r"apt-get install --no-install-recommends qemu-system-x86$"):
        setup.qemu()
    assert commands.main(["setup"]) == 125
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("isolation: there is no qemu-system-x86_64: apt-get install")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [[], ["frobnicate"], ["setup", "--no-such"], ["setup", "--kern", "x"], ["status", "extra"], ["setup", "--kernel"]],
)
def test_usage_errors_end_with_125(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        commands.main(argv)
    assert caught.value.code == 125
    assert "isolation: " in capfd.readouterr().err


@needs_tools
def test_what_the_user_gave_wrongly_is_told_in_one_line(
    cache: Cache, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no\x1bkernel").write_text("text")
    for argv, message in (
        (["--kernel", "/no/such\nkernel"], "cannot read the kernel: /no/such kernel: No such file"),
        (["--kernel", str(tmp_path / "no\x1bkernel")], "no?kernel is not a Linux kernel"),
        (["--kernel", str(tmp_path)], "irectory"),
        (["--modules", "/lib/modules/x"], "--modules belongs to a --kernel"),
    ):
        assert commands.main(["setup", *argv]) == 125
        err = capfd.readouterr().err
        assert message in err
        assert err.splitlines()[-1].startswith("isolation: ")
        assert "\x1b" not in err


@needs_tools
def test_ctrl_c_leaves_a_cache_that_the_next_setup_goes_on_with(
    cache: Cache, system: Path, image: list[str], tmp_path: Path
) -> None:
    real, begun = shutil.which("mksquashfs"), tmp_path / "begun"
    assert real is not None
    slow = tmp_path / "bin/mksquashfs"  # begins an image, and has no end
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n[ "$1" = - ] || exec {real} "$@"\necho part > "$2"; echo > {begun}; exec sleep 1000\n')
    slow.chmod(0o755)
    code = (
        "import sys, functools; from isolation.backends.microvm.artifacts import commands, layers\n"
        f"layers.base = functools.partial(layers.base, root={str(system)!r})\n"
        f"layers.showing.python_environment = lambda: [{str(system / 'python')!r}]\n"
        "sys.exit(commands.main(sys.argv[1:]))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    env["PATH"] = f"{slow.parent}:{env['PATH']}"
    process = subprocess.Popen([sys.executable, "-c", code, "setup", *image], stderr=subprocess.PIPE, text=True, env=env)
    while not begun.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 130
    assert [entry.kind for entry in cache.entries()] == ["kernel"]
    assert [name for name in os.listdir(cache.root / "base") if name.endswith(".tmp")] == []
    assert setup.read(cache) is None
    assert commands.main(["setup", "--quiet", *image]) == 0
    setup.load(cache)


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, system: Path) -> None:
    with pytest.raises(LaunchError, match="the microvm cache"):
        layers.tree(Cache("/proc/nowhere"), system, SILENT)
