"""Kernels and their modules: real ones from the distribution, and made-up, damaged and foreign ones."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from isolation.backends.microvm.artifacts import apt, deb, kernel, modules, tools, vmlinux
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.progress import SILENT
from isolation.errors import BackendUnavailable, IsolationError, LaunchError

pytestmark = pytest.mark.once

x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="made-up kernels are for x86_64")


def lz4(data: bytes) -> bytes:
    """LZ4's legacy frame, of literals only."""
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        piece = data[at : at + (8 << 20)]
        rest = len(piece) - 15
        block = b"\xf0" + b"\xff" * (rest // 255) + bytes([rest % 255]) + piece
        out += struct.pack("<I", len(block)) + block
    return out


def elf(*, machine: int = 62, pvh: bool = True, size: int = 100_000) -> bytes:
    note = struct.pack("<III", 4, 8, 18 if pvh else 6) + b"Xen\0" + struct.pack("<Q", 0x1000000)
    header = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, 1000, 0, 0, size - 1000, size, 4096)
    notes = struct.pack("<IIQQQQQQ", 4, 4, 500, 0, 0, len(note), len(note), 4)
    data = (header + load + notes).ljust(500, b"\0") + note
    return (data.ljust(1000, b"\0") + b"Linux version 6.9.1-test (me@here)\n").ljust(size, b"k")


def bzimage(payload: bytes, *, release: bytes = b"6.9.1-test", flags: int = 1) -> bytes:
    setup = bytearray(4 * 512)
    setup[0x1F1] = 3
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x20F)
    struct.pack_into("<H", setup, 0x20E, 0x300 - 0x200)
    struct.pack_into("<H", setup, 0x236, flags)
    setup[0x300 : 0x300 + len(release) + 8] = release + b" (me@it)"
    struct.pack_into("<II", setup, 0x248, 64, len(payload))
    body = (bytes(64) + payload).ljust((64 + len(payload) + 15) // 16 * 16, b"\0")
    struct.pack_into("<I", setup, 0x1F4, len(body) // 16)
    return bytes(setup) + body


def module(depends: str = "", *, release: str = "6.9.1-test") -> bytes:
    """An ELF file with nothing but .modinfo."""
    info = f"license=GPL\0depends={depends}\0vermagic={release} SMP mod_unload\0".encode()
    names = b"\0.modinfo\0.shstrtab\0"
    start = 64
    sections = start + len(info) + len(names)
    header = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, sections, 0, 64, 0, 0, 64, 3, 2)
    )
    table = bytes(64)
    table += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, start, len(info), 0, 0, 1, 0)
    table += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, start + len(info), len(names), 0, 0, 1, 0)
    return header + info + names + table


MODULES = {
    "kernel/drivers/virtio/virtio_mmio.ko": module("virtio,virtio_ring"),
    "kernel/drivers/virtio/virtio.ko.xz": lzma.compress(module("")),
    "kernel/drivers/virtio/virtio_ring.ko.gz": gzip.compress(module("")),
    "kernel/drivers/block/virtio_blk.ko": module("virtio_ring,virtio"),
    "kernel/drivers/char/virtio_console.ko": module("virtio_ring,virtio"),
    "kernel/drivers/char/hw_random/virtio-rng.ko": module("virtio,virtio_ring"),
    "kernel/fs/squashfs/squashfs.ko": module("lz4-decompress"),
    "kernel/lib/lz4_decompress.ko": module(""),
    "kernel/fs/overlayfs/overlay.ko": module(""),
    "kernel/drivers/net/virtio_net.ko": module("net_failover"),
    "kernel/drivers/net/other.ko": module("missing"),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A /lib/modules/<release>."""
    path = tmp_path / "6.9.1-test"
    for name, data in MODULES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_lz4() -> None:
    block = b"\x51hello\x05\x00\x30xyz"  # five literals, a match of five from five back, three literals
    assert vmlinux.unlz4(b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block) == b"hellohelloxyz"
    block = b"\x1fa\x01\x00\x05\x10b"  # one literal, repeated over itself 19 + 5 times, one literal
    assert vmlinux.unlz4(b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block) == b"a" * 25 + b"b"
    for size in (15, 16, 300, 20_000_000):
        data = os.urandom(1000) * (size // 1000 + 1)
        assert vmlinux.unlz4(lz4(data[:size])) == data[:size]
    for wrong in (b"\x51hel", b"\x11a\x09\x00", b"\x11a\x00\x00", b"\xf0\xff\xff"):
        with pytest.raises((ValueError, IndexError)):
            vmlinux.unlz4(b"\x02\x21\x4c\x18" + struct.pack("<I", len(wrong)) + wrong)


@pytest.mark.skipif(shutil.which("lz4") is None, reason="needs the program lz4")
def test_lz4_as_the_program_makes_it() -> None:
    data = b"".join(b"%d some text, repeated %d\n" % (number, number % 7) for number in range(100_000))
    packed = subprocess.run(["lz4", "-l", "-9", "-c"], input=data, capture_output=True, check=True).stdout
    assert vmlinux.unlz4(packed) == data


@x86_64
@pytest.mark.parametrize(
    "pack",
    [
        lambda data: lz4(data) + struct.pack("<I", len(data)),
        lambda data: gzip.compress(data),
        lambda data: lzma.compress(data, check=lzma.CHECK_CRC32) + b"\1\2\3\4",
        lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE) + b"\1\2\3\4",
        lambda data: bz2.compress(data) + b"\1\2\3\4",
    ],
)
def test_the_plain_kernel_is_taken_out_however_it_is_packed(pack: Callable[[bytes], bytes]) -> None:
    assert vmlinux.extract(bzimage(pack(elf())), "k") == elf()
    assert vmlinux.extract(bzimage(pack(elf(pvh=False))), "k") is None
    with pytest.raises(vmlinux.NotAKernel, match="damaged"):
        vmlinux.extract(bzimage(pack(elf())[:20] + b"\xff" * 60), "k")


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the program zstd")
def test_zstd_by_the_program_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = subprocess.run(["zstd", "-c", "-q"], input=elf(), capture_output=True, check=True).stdout
    assert vmlinux.extract(bzimage(packed + b"\1\2\3\4"), "k") == elf()
    assert deb.unzstd(packed, "it") == elf()
    with pytest.raises(LaunchError, match="it is damaged"):
        deb.unzstd(packed[:100], "it")
    monkeypatch.setenv("PATH", "/no/such")
    assert vmlinux.extract(bzimage(packed + b"\1\2\3\4"), "k") is None  # the bzImage will do
    with pytest.raises(LaunchError, match="apt-get install zstd"):
        deb.unzstd(packed, "it")


@x86_64
def test_a_kernel_that_is_given(cache: Cache, tmp_path: Path, directory: Path) -> None:
    image = tmp_path / "my kernel"
    image.write_bytes(bzimage(lz4(elf()) + b"\0\0\0\0"))
    found = kernel.given(cache, image, directory, SILENT)
    assert found.image.name == "vmlinux"
    assert found.image.read_bytes() == elf()
    assert (found.pvh, found.release, found.source) == (True, "6.9.1-test", str(image))
    names = [path.name[3:-3] for path in found.modules]
    assert names[:3] == ["virtio", "virtio_ring", "virtio_mmio"]
    assert set(names) == {
        "virtio", "virtio_ring", "virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng", "lz4_decompress", "squashfs",
        "overlay",
    }  # fmt: skip
    assert names.index("lz4_decompress") < names.index("squashfs")
    assert [path.name[:2] for path in found.modules] == [f"{number:02}" for number in range(len(names))]
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in found.modules)
    assert kernel.given(cache, image, directory, SILENT) == found
    assert kernel.given(cache, image, directory.parent, SILENT).modules != ()  # /lib/modules itself
    image.write_bytes(bzimage(lz4(elf(size=200_000)) + b"\0\0\0\0"))
    assert kernel.given(cache, image, directory, SILENT).digest != found.digest
    image.write_bytes(bzimage(lz4(elf(pvh=False)) + b"\0\0\0\0"))
    plain = kernel.given(cache, image, None, SILENT)
    assert (plain.image.name, plain.pvh, plain.modules, plain.release) == ("bzImage", False, (), "6.9.1-test")
    image.write_bytes(elf())
    assert kernel.given(cache, image, None, SILENT).release == "6.9.1-test"


@x86_64
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"not a kernel" * 100, "not a Linux kernel"),
        (elf()[:50_000], "cut off"),
        (elf(machine=183), "for aarch64, and this machine is x86_64"),
        (elf(machine=8), "another architecture"),
        (bzimage(lz4(elf()))[:60_000], "cut off"),
        (bzimage(lz4(elf()))[:700], "cut off"),
        (bzimage(lz4(elf()), flags=0), "32-bit"),
        (bzimage(lz4(elf())[:6] + os.urandom(5000)), "damaged"),
        (bytes(0x38) + b"ARM\x64" + bytes(1000), "for aarch64"),
    ],
)
def test_what_is_no_kernel_for_this_machine_is_told(cache: Cache, tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "image").write_bytes(data)
    with pytest.raises(IsolationError, match=message) as caught:
        kernel.given(cache, tmp_path / "image", None, SILENT)
    assert str(tmp_path / "image") in str(caught.value)
    assert cache.entries() == []


def test_modules_that_are_missing_or_built_in(directory: Path, tmp_path: Path) -> None:
    (directory / "kernel/fs/overlayfs/overlay.ko").unlink()
    with pytest.raises(LaunchError, match=r"module overlay is not in .*--modules"):
        modules.collect(directory, None, "6.9.1-test")
    (directory / "modules.builtin").write_text("kernel/fs/overlayfs/overlay.ko\nkernel/drivers/virtio/virtio-ring.ko\n")
    names = [each.name for each in modules.collect(directory, None, "6.9.1-test")]
    assert "overlay" not in names
    assert "virtio_ring" not in names
    (directory / "modules.builtin").unlink()
    (tmp_path / "config").write_text("CONFIG_OVERLAY_FS=y\n")
    assert "overlay" not in [each.name for each in modules.collect(directory, tmp_path / "config", "6.9.1-test")]
    (directory / "kernel/lib/lz4_decompress.ko").unlink()
    with pytest.raises(LaunchError, match="module lz4_decompress, which squashfs needs, is not in"):
        modules.collect(directory, tmp_path / "config", "6.9.1-test")


def test_optional_modules_come_with_what_they_need_or_not_at_all(directory: Path) -> None:
    assert "virtio_net" not in [each.name for each in modules.collect(directory, None, "")]
    (directory / "net_failover.ko").write_bytes(module("failover"))
    (directory / "failover.ko").write_bytes(module())
    names = [each.name for each in modules.collect(directory, None, "")]
    assert names[-3:] == ["failover", "net_failover", "virtio_net"]


def test_damaged_and_foreign_modules_are_told(directory: Path) -> None:
    path = directory / "kernel/fs/overlayfs/overlay.ko"
    for data in (b"", b"\x7fELF\x02", module()[:100], module()[:-100], b"garbage" * 100):
        path.write_bytes(data)
        with pytest.raises(LaunchError, match=r"overlay\.ko is damaged"):
            modules.collect(directory, None, "6.9.1-test")
    path.write_bytes(module(release="5.1"))
    with pytest.raises(LaunchError, match=r"for kernel 5\.1, and the kernel is 6\.9\.1-test"):
        modules.collect(directory, None, "6.9.1-test")
    path.unlink()
    (directory / "kernel/fs/overlayfs/overlay.ko.xz").write_bytes(lzma.compress(module())[:50])
    with pytest.raises(LaunchError, match="damaged"):
        modules.collect(directory, None, "6.9.1-test")


def test_modules_in_a_circle_end(directory: Path) -> None:
    (directory / "kernel/drivers/virtio/virtio_ring.ko.gz").write_bytes(gzip.compress(module("virtio")))
    (directory / "kernel/drivers/virtio/virtio.ko.xz").write_bytes(lzma.compress(module("virtio_ring")))
    assert len(modules.collect(directory, None, "6.9.1-test")) == 9


@x86_64
def test_a_kernel_in_the_cache_that_was_damaged_is_told(cache: Cache, tmp_path: Path, directory: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bzimage(lz4(elf()) + b"\0\0\0\0"))
    found = kernel.given(cache, image, directory, SILENT)
    os.truncate(found.image, 1000)
    with pytest.raises(BackendUnavailable, match=r"not as it was.*setup --refresh"):
        kernel.load(cache, found.key)
    assert kernel.given(cache, image, directory, SILENT).image.read_bytes() == elf()  # made again
    found.modules[0].unlink()
    with pytest.raises(BackendUnavailable, match="not as it was"):
        kernel.load(cache, found.key)
    (found.image.parent / "kernel.json").write_text("{}")
    with pytest.raises(BackendUnavailable, match="damaged"):
        kernel.load(cache, found.key)
    with pytest.raises(BackendUnavailable, match="isolation microvm setup"):
        kernel.load(cache, "none")


def make_deb(data: bytes, name: str = "data.tar.xz") -> bytes:
    out = b"!<arch>\n"
    for member, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"xyz"), (name, data)):
        out += (
            f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    return out


def make_tar(name: str = "./usr/a", data: bytes = b"content") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture(params=["with filters", "without"])
def filters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """tarfile got them with Python 3.11.4."""
    if request.param == "without":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


@pytest.mark.usefixtures("filters")
def test_packages_are_unpacked(tmp_path: Path) -> None:
    for number, (name, pack) in enumerate({
        "data.tar.xz": lzma.compress, "data.tar.gz": gzip.compress, "data.tar.bz2": bz2.compress, "data.tar": bytes,
    }.items()):  # fmt: skip
        (tmp_path / "p.deb").write_bytes(make_deb(pack(make_tar()), name))
        deb.unpack(tmp_path / "p.deb", tmp_path / str(number))
        assert (tmp_path / str(number) / "usr/a").read_bytes() == b"content"


@pytest.mark.usefixtures("filters")
@pytest.mark.parametrize(
    "data",
    [
        b"", b"!<arch>\n", b"garbage" * 100, make_deb(lzma.compress(make_tar()))[:-50], make_deb(b"garbage"),
        make_deb(lzma.compress(make_tar("../../outside"))), make_deb(b"x", "data.tar.rar"),
        make_deb(gzip.compress(make_tar())[:-20], "data.tar.gz"), make_deb(gzip.compress(make_tar())[:40] + b"x" * 90, "data.tar.gz"),
    ],
)  # fmt: skip
def test_damaged_and_hostile_packages_are_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p.deb").write_bytes(data)
    with pytest.raises(LaunchError, match="damaged"):
        deb.unpack(tmp_path / "p.deb", tmp_path / "a/b")
    assert not (tmp_path / "outside").exists()


def test_without_apt_the_way_out_is_told(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/no/such")
    monkeypatch.setattr(kernel, "_metapackage", lambda: "linux-image-cloud-amd64")
    with pytest.raises(LaunchError, match=r"no apt-get.*--kernel PATH \[--modules DIR\]"):
        kernel.fetched(cache, SILENT)
    monkeypatch.undo()
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": "fedora", "PRETTY_NAME": "Fedora Linux 44"})
    with pytest.raises(LaunchError, match=r"Fedora Linux 44.*--kernel PATH"):
        kernel.fetched(cache, SILENT)


def test_nothing_is_fetched_onto_a_full_disk(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_metapackage", lambda: "linux-image-cloud-amd64")
    monkeypatch.setattr(apt, "available", lambda: True)
    monkeypatch.setattr(apt, "_ROOM", 1 << 62)
    with pytest.raises(LaunchError, match="no space left for the microvm cache"):
        kernel.fetched(cache, SILENT)
    assert cache.entries() == []


def test_the_running_kernel(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: "0.0.0-none")
    with pytest.raises(LaunchError, match=r"0\.0\.0-none is not in /boot"):
        kernel.host(cache, SILENT)


# Real ones, from the distribution's archive.


def test_the_fetched_kernel(fetched_kernel: kernel.Kernel, downloads: Cache) -> None:
    assert fetched_kernel.image.stat().st_size > 10 << 20
    if os.uname().machine == "x86_64" and fetched_kernel.pvh:
        assert vmlinux.has_pvh_entry(fetched_kernel.image.read_bytes())
    names = [path.name[3:-3] for path in fetched_kernel.modules]
    assert len(names) == len(set(names))
    for path in fetched_kernel.modules:
        for needed in modules.depends(path.read_bytes(), str(path), fetched_kernel.release):
            assert names.index(needed) < names.index(path.name[3:-3])
    assert kernel.fetched(downloads, SILENT) == fetched_kernel
    assert not list(downloads.root.glob("apt/archives/*.deb"))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb to compare with")
def test_a_real_package_is_unpacked_as_dpkg_does(downloads: Cache, tmp_path: Path) -> None:
    with apt.Apt(downloads, SILENT) as archive:
        archive.update("")
        archive._download("busybox-static", tmp_path, "")
    (package,) = tmp_path.glob("*.deb")
    deb.unpack(package, tmp_path / "ours")
    subprocess.run(["dpkg-deb", "-x", package, tmp_path / "theirs"], check=True)

    def tree(root: Path) -> dict[str, object]:
        return {
            str(path.relative_to(root)): path.read_bytes() if path.is_file() else path.is_symlink()
            for path in root.rglob("*")
        }

    assert tree(tmp_path / "ours") == tree(tmp_path / "theirs")


def test_tools_are_fetched_where_there_are_none(downloads: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, **rest: None if name.startswith(("busybox", "mksquashfs")) else real(name, **rest)
    )
    busybox = tools.busybox(downloads)
    assert downloads.root in busybox.parents
    assert tools.is_static(str(busybox))
    assert b"ash" in subprocess.run([busybox, "--list"], capture_output=True, check=True).stdout
    program = tools.mksquashfs(downloads)
    assert str(downloads.root) in program.path
    (tmp_path / "f").write_text("x")
    archive = subprocess.run(["tar", "-cC", tmp_path, "f"], capture_output=True, check=True).stdout
    done = subprocess.run(
        [program.path, "-", tmp_path / "o", "-tar", "-comp", "lz4", "-quiet"], input=archive, capture_output=True,
        env=os.environ | program.env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_old_mksquashfs_is_not_used(cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "mksquashfs"
    fake.write_text("#!/bin/sh\necho mksquashfs version 4.4 '(2019/08/29)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + ":/usr/bin:/bin")
    monkeypatch.setattr(apt, "available", lambda: False)
    with pytest.raises(LaunchError, match=r"is version 4\.4, and 4\.5 is needed.*no apt-get"):
        tools.mksquashfs(cache)


def test_what_is_static() -> None:
    assert not tools.is_static(sys.executable) or not os.path.exists("/lib64/ld-linux-x86-64.so.2")
    assert not tools.is_static("/etc/passwd")
    assert not tools.is_static("/no/such")
