"""The initramfs: its bytes, and what it does in a real machine (QEMU without KVM, some seconds each)."""

from __future__ import annotations

import importlib.util
import marshal
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from isolation.backends.microvm.artifacts import initramfs, layers, tools
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.kernel import Kernel
from isolation.errors import SpecError

pytestmark = pytest.mark.once

AGENT = [("isolation/__init__.py", b""), ("isolation/backends/microvm/guest/agent.py", b"def main():\n    return 42\n")]
QEMU = shutil.which("qemu-system-x86_64")
needs_qemu = pytest.mark.skipif(
    QEMU is None or shutil.which("mksquashfs") is None or os.uname().machine != "x86_64",
    reason="needs QEMU and squashfs-tools",
)


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """{name: (mode, content)} of a newc archive."""
    found = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        start = (at + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        assert name not in found
        assert os.path.dirname(name) in (*found, "")
        found[name] = (fields[1], archive[start : start + fields[6]])
        at = (start + fields[6] + 3) // 4 * 4


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    (tmp_path / "busybox").write_bytes(b"\x7fELF busybox")
    return tmp_path / "busybox"


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    modules = []
    for name in ("00-virtio.ko", "01-overlay.ko"):
        (tmp_path / name).write_bytes(name.encode())
        modules.append(tmp_path / name)
    return Kernel(tmp_path / "vmlinux", True, "6.1.0", tuple(modules), "d1", "test", "key")


def test_what_is_in_it(kernel: Kernel, busybox: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    path = initramfs.build(kernel, busybox, AGENT, cache)
    found = entries(path.read_bytes())
    assert found["init"][0] == 0o100755
    assert found["bin/busybox"] == (0o100755, b"\x7fELF busybox")
    assert found["modules/00-virtio.ko"][1] == b"00-virtio.ko"
    assert found["agent/isolation/backends/microvm/guest/agent.py"][1] == AGENT[1][1]
    assert found["i"][0] == 0o040755
    tag = sys.implementation.cache_tag
    pyc = found[f"agent/isolation/backends/microvm/guest/__pycache__/agent.{tag}.pyc"][1]
    assert pyc[:4] == importlib.util.MAGIC_NUMBER
    assert pyc[4:8] == b"\x01\0\0\0"  # by hash, and never checked
    names: dict[str, object] = {}
    exec(marshal.loads(pyc[16:]), names)
    assert names["main"]() == 42  # type: ignore[operator]
    assert subprocess.run(["sh", "-n"], input=found["init"][1], check=False).returncode == 0
    assert subprocess.run(["sh", "-n"], input=found["start"][1], check=False).returncode == 0


def test_the_same_input_makes_the_same_bytes_and_other_input_others(kernel: Kernel, busybox: Path, tmp_path: Path) -> None:
    first = initramfs.build(kernel, busybox, AGENT, Cache(tmp_path / "one"))
    second = initramfs.build(kernel, busybox, list(reversed(AGENT)), Cache(tmp_path / "two"))
    assert first.read_bytes() == second.read_bytes()
    cache = Cache(tmp_path / "one")
    assert initramfs.build(kernel, busybox, AGENT, cache) == first
    assert initramfs.build(kernel, busybox, [*AGENT, ("x.py", b"")], cache) != first
    busybox.write_bytes(b"another")
    assert initramfs.build(kernel, busybox, AGENT, cache) != first


def test_the_agent_comes_with_all_it_imports(tmp_path: Path) -> None:
    """In a Python that sees nothing but these files and the standard library."""
    files = dict(initramfs.agent_files())
    assert {"isolation/__init__.py", "isolation/errors.py", "isolation/wire.py", "isolation/guest/__init__.py"} <= set(files)
    guest, packages = (
        "isolation/backends/microvm/guest/",
        ("isolation/backends/__init__.py", "isolation/backends/microvm/__init__.py"),
    )
    assert not [name for name in files if name.startswith("isolation/backends") and not name.startswith((guest, *packages))]
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    modules = [
        name[:-3].replace("/", ".").removesuffix(".__init__")
        for name in files
        if name.startswith((guest, "isolation/guest/"))
    ]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfor name in {modules!r}: __import__(name)"
    done = subprocess.run([sys.executable, "-I", "-S", "-B", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_arguments() -> None:
    text = initramfs.arguments(layers=3, size="75%", python="/opt/my python/bin/pythön", library_path="/a:/b c")
    assert text.split(" ") == [
        "isolation.layers=3", "isolation.size=75%", r"isolation.python=/opt/my\0040python/bin/pyth\0303\0266n",
        r"isolation.ldpath=/a:/b\0040c",
    ]  # fmt: skip
    shell = subprocess.run(["sh", "-c", 'printf %b "$1"', "sh", text.split("python=")[1].split(" ")[0]], capture_output=True)
    assert shell.stdout.decode() == "/opt/my python/bin/pythön"
    for wrong in ({"layers": 0}, {"layers": 25}, {"layers": 1, "library_path": "x" * 2000}):
        with pytest.raises(SpecError):
            initramfs.arguments(**({"size": 1, "python": "/p"} | wrong))  # type: ignore[arg-type]


class Machine:
    """Boots a kernel with tiny layers; the guest's "Python" is a shell script."""

    def __init__(self, kernel: Kernel, cache: Cache, tmp_path: Path) -> None:
        self.kernel, self.cache, self.tmp_path = kernel, cache, tmp_path
        self.busybox = tools.busybox(cache)
        self.images: list[Path] = []

    def layer(self, name: str, files: dict[str, bytes]) -> None:
        source = self.tmp_path / name
        for path, data in files.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(data)
            (source / path).chmod(0o755)
        self.images.append(layers.tree(self.cache, source, at="/").path)

    def boot(self, arguments: str) -> str:
        """What it wrote to the console. Fails when it does not end by itself."""
        initrd = initramfs.build(self.kernel, self.busybox, [*AGENT, ("x", b"data")], self.cache)
        info = Path("/proc/cpuinfo").read_text()
        mhz = re.search(r"bogomips\s*: ([\d.]+)", info)
        clock = f"tsc_early_khz={int(float(mhz[1]) * 500)} tsc=reliable " if mhz and "constant_tsc" in info else ""
        assert QEMU is not None
        command = [
            QEMU, "-M", "microvm,memory-backend=ram", "-accel", "tcg,tb-size=48", "-cpu", "max", "-m", "256", "-nodefaults",
            "-no-user-config", "-no-reboot", "-nographic", "-object", "memory-backend-memfd,id=ram,size=256M,share=on",
            "-kernel", str(self.kernel.image), "-initrd", str(initrd),
            "-append", f"console=ttyS0 quiet reboot=t panic=-1 mitigations=off {clock}{arguments}",
            "-chardev", f"file,id=con,path={self.tmp_path}/console", "-serial", "chardev:con", "-device", "virtio-rng-device",
        ]  # fmt: skip
        for number, image in enumerate(self.images):
            command += ["-drive", f"id=d{number},file={image},format=raw,if=none,readonly=on"]
            command += ["-device", f"virtio-blk-device,drive=d{number}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return (self.tmp_path / "console").read_text(errors="replace")


@pytest.fixture
def machine(fetched_kernel: Kernel, downloads: Cache, tmp_path: Path) -> Machine:
    made = Machine(fetched_kernel, downloads, tmp_path)
    made.layer(
        "zero",
        {"bin/busybox": made.busybox.read_bytes(), "etc/who": b"zero", "etc/both": b"zero", "bin/broken": b"#!/no/loader\n"},
    )
    return made


SCRIPT = rb"""#!/bin/busybox sh
b=/bin/busybox
exec >/dev/console 2>&1
echo "PID $$"
for a in "$@"; do echo "ARG $a"; done
echo "LD $LD_LIBRARY_PATH"
echo "WHO $($b cat /etc/who) $($b cat /etc/both) $($b cat /.isolation/layers/0/etc/both)"
echo "LS $(echo /.isolation/* /.isolation/agent/*) $($b stat -c %a /.isolation)"
echo "UPPER $($b find /.isolation/rw/upper | $b sort | $b tr '\n' ' ')"
echo changed >/etc/who; $b rm /etc/both; $b mknod /dev/mine c 1 3
echo "UPPER $($b find /.isolation/rw/upper | $b sort | $b tr '\n' ' ')"
echo "WHITEOUT $($b stat -c %F /.isolation/rw/upper/etc/both)"
echo "LO $($b ip link show lo | $b grep -c UP) $($b ping -c 1 127.0.0.1 | $b grep -c '1 packets received')"
echo "SIZE $($b df -k /.isolation | $b tail -1)"
$b mount | $b sed 's/^/MOUNT /'
$b reboot -f
"""


@needs_qemu
def test_it_boots_into_the_layers(machine: Machine) -> None:
    machine.layer("one", {"etc/who": b"one", "opt/my python/run": SCRIPT})
    arguments = initramfs.arguments(layers=2, size=20 << 20, python="/opt/my python/run", library_path="/opt/lib x:/y")
    said = machine.boot(arguments)
    lines = [line.strip() for line in said.splitlines()]
    assert "PID 1" in lines, said
    assert [line for line in lines if line.startswith("ARG")][:5] == ["ARG -I", "ARG -S", "ARG -B", "ARG -u", "ARG -c"]
    assert any("from isolation.backends.microvm.guest.agent import main" in line for line in lines)
    assert "LD /opt/lib x:/y" in lines
    assert "WHO one zero zero" in lines  # later layers over earlier ones; and each to be had alone
    assert any(line.startswith("LS ") and line.endswith(" 700") and "/.isolation/agent/isolation" in line for line in lines)
    empty, changed = (line.split()[1:] for line in lines if line.startswith("UPPER"))
    assert {path.removeprefix("/.isolation/rw/upper") for path in empty} <= {"", "/.isolation", "/proc", "/sys", "/dev"}
    assert set(changed) - set(empty) == {f"/.isolation/rw/upper/etc{name}" for name in ("", "/who", "/both")}
    assert "WHITEOUT character special file" in lines
    assert "LO 1 1" in lines
    assert any(line.startswith("SIZE") and "20480" in line for line in lines)
    mounts = [line for line in lines if line.startswith("MOUNT")]
    assert any("overlay on / type overlay" in line and "nosuid" in line for line in mounts), mounts
    assert any("/dev/vdb on /.isolation/layers/1 type squashfs (ro,nosuid,nodev" in line for line in mounts), mounts


@needs_qemu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("isolation.layers=1 isolation.python=/no/python", "there is no /no/python in any layer"),
        ("isolation.layers=1 isolation.python=/bin/broken", "cannot run /bin/broken"),
        ("isolation.layers=2 isolation.python=/bin/x", "cannot mount layer 1 from /dev/vdb: .*[Ii]nvalid"),
        ("isolation.layers=x isolation.python=/bin/x", "isolation.layers=x is not a number of layers"),
        ("isolation.layers=1", "isolation.python= is missing"),
        ("isolation.layers=1 isolation.size=lots isolation.python=/x", "no tmpfs of size lots"),
    ],
)
def test_what_fails_is_said_in_one_line_and_the_machine_ends(machine: Machine, arguments: str, message: str) -> None:
    (machine.tmp_path / "junk").write_bytes(os.urandom(1 << 16))
    machine.images.append(machine.tmp_path / "junk")
    said = machine.boot(arguments)
    found = [line.strip() for line in said.splitlines() if "isolation-init:" in line]
    assert len(found) == 1, said
    assert re.search(f"isolation-init: {message}", found[0]), said
