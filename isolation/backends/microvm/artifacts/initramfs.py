"""The guest's first file system: busybox, kernel modules, the agent's sources, and a script that mounts the layers.

A cpio archive ("newc", Documentation/driver-api/early-userspace/buffer-format.rst), uncompressed: unpacking would cost the
guest more than reading does. The same input makes the same bytes.

The kernel's command line tells the script what to do, see `arguments`. In the guest, from then on:

    /                      overlay of all layers, later ones over earlier ones, with a tmpfs as the upper layer
    /.isolation            a tmpfs of its own, mode 0700
    /.isolation/agent      the agent's sources; on sys.path
    /.isolation/layers/N   layer N, read-only
    /.isolation/rw/upper   what the guest has written: the overlay's upper layer
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import marshal
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import isolation
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.kernel import Kernel
from isolation.backends.microvm.artifacts.progress import SILENT, Progress
from isolation.errors import SpecError

KIND = "initramfs"
MOST_LAYERS = 24
_KEEP = 8
_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/._-+:@%,~")
_LONGEST = 1500  # bytes; the kernel's own limit for its whole command line is 2048 on x86

# PID 1 until it becomes the agent. /i is moved into the new root as a whole, with everything mounted in it.
_INIT = r"""#!/bin/busybox sh
b=/bin/busybox
fail() { echo "isolation-init: $*" >/dev/console; $b reboot -f; while :; do $b sleep 60; done; }
$b mount -t proc proc /proc || { $b reboot -f; }
$b mount -t sysfs sysfs /sys || fail "cannot mount /sys"
$b mount -t devtmpfs devtmpfs /dev || fail "cannot mount /dev (a kernel without CONFIG_DEVTMPFS?)"
exec 2>>/error
layers= size=75% python= ldpath=
for word in $($b cat /proc/cmdline); do
    case $word in
        isolation.layers=*) layers=${word#*=} ;;
        isolation.size=*) size=${word#*=} ;;
        isolation.python=*) python=$(printf %b "${word#*=}") ;;
        isolation.ldpath=*) ldpath=$(printf %b "${word#*=}") ;;
    esac
done
case $layers in ''|*[!0-9]*|0) fail "isolation.layers=$layers is not a number of layers" ;; esac
[ -n "$python" ] || fail "isolation.python= is missing"
why() { $b tail -n 1 /error; }
for module in /modules/*.ko; do
    [ -e "$module" ] || continue
    $b insmod "$module" || fail "cannot load ${module##*/}: $(why)"
done
$b ip link set lo up || fail "cannot bring lo up: $(why)"
$b mount -t tmpfs -o "size=$size,mode=0700,nosuid" isolation /i || fail "no tmpfs of size $size: $(why)"
$b mkdir -p /i/rw/upper /i/rw/work /i/layers && $b chmod 755 /i/rw/upper || fail "cannot make directories: $(why)"
letters=abcdefghijklmnopqrstuvwxyz n=0 lower=
while [ $n -lt $layers ]; do
    device=/dev/vd$(printf %s "$letters" | $b cut -c $((n + 1)))
    tries=0
    until [ -b $device ] || [ $tries -ge 50 ]; do $b usleep 100000; tries=$((tries + 1)); done
    $b mkdir /i/layers/$n
    $b mount -t squashfs -o ro,nosuid,nodev $device /i/layers/$n || fail "cannot mount layer $n from $device: $(why)"
    lower=/i/layers/$n${lower:+:$lower}
    n=$((n + 1))
done
options=lowerdir=$lower,upperdir=/i/rw/upper,workdir=/i/rw/work
$b mount -t overlay -o nosuid,nodev,$options overlay /newroot || fail "cannot mount the overlay: $(why)"
for name in proc sys dev .isolation; do
    [ -d /newroot/$name ] || $b mkdir /newroot/$name || fail "cannot make /$name: $(why)"
done
$b cp -r /agent /bin/busybox /start /i/ || fail "cannot copy the agent: $(why)"
exec 2>/dev/console
for name in proc sys dev; do
    $b mount --move /$name /newroot/$name || fail "cannot move /$name"
done
$b mount --move /i /newroot/.isolation || fail "cannot move /.isolation"
export python ldpath
exec $b switch_root /newroot /.isolation/busybox sh /.isolation/start
"""

# In the new root: only here can be seen whether there is such a Python, links on the way included. The shell removes
# itself; what it then needs is built in.
_START = r"""b=/.isolation/busybox
fail() { echo "isolation-init: $*" >/dev/console; $b reboot -f; while :; do $b sleep 60; done; }
[ -x "$python" ] || fail "there is no $python in any layer"
[ -n "$ldpath" ] && export LD_LIBRARY_PATH="$ldpath"
p=$python
unset python ldpath
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/ TERM=dumb
trap 'echo "isolation-init: cannot run $p" >/dev/console; exec $b reboot -f' EXIT
exec "$p" -I -S -B -u -c \
    'import sys; sys.path.insert(0, "/.isolation/agent"); from isolation.backends.microvm.guest.agent import main; main()'
"""


def arguments(*, layers: int, size: str | int, python: str, library_path: str = "") -> str:
    """For the kernel's command line: how many layers there are (/dev/vda, /dev/vdb, … in this order), how much the guest may
    write (bytes, or a percentage of its memory), the Python that runs the agent, and its LD_LIBRARY_PATH.

    Raises SpecError where that cannot be said.
    """
    if not 1 <= layers <= MOST_LAYERS:
        raise SpecError(f"a guest has 1 to {MOST_LAYERS} layers, not {layers}: mount fewer directories")
    text = f"isolation.layers={layers} isolation.size={size} isolation.python={_quoted(python)}"
    if library_path:
        text += f" isolation.ldpath={_quoted(library_path)}"
    if len(text) > _LONGEST:
        raise SpecError(f"the path of Python and its LD_LIBRARY_PATH are too long for the kernel's command line: {text}")
    return text


def agent_files() -> list[tuple[str, bytes]]:
    """(path, content) of the guest's package and of every module of this package that it imports, as they lie here."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(_file(isolation))))
    todo = ["isolation/__init__.py"]
    for directory, directories, files in os.walk(os.path.join(root, "isolation/backends/microvm/guest")):
        directories[:] = sorted(name for name in directories if name != "__pycache__")
        todo += [os.path.relpath(os.path.join(directory, name), root) for name in sorted(files) if name.endswith(".py")]
    found: dict[str, bytes] = {}
    while todo:
        name = todo.pop()
        if name in found:
            continue
        with open(os.path.join(root, name), "rb") as file:
            found[name] = file.read()
        for module in _imports(found[name], name):
            base = module.replace(".", "/")
            for candidate in (f"{base}.py", f"{base}/__init__.py"):
                if os.path.exists(os.path.join(root, candidate)):
                    todo.append(candidate)
    return sorted(found.items())


def _imports(source: bytes, name: str) -> Iterator[str]:
    """The modules of this package that are imported when `name` is, and the packages that they lie in."""
    todo: list[ast.AST] = [ast.parse(source, name)]
    while todo:
        node = todo.pop()
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        for module in modules:
            parts = module.split(".")
            if parts[0] == "isolation":
                yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def build(
    kernel: Kernel, busybox: Path, files: Sequence[tuple[str, bytes]], cache: Cache, progress: Progress = SILENT
) -> Path:
    """The initramfs for this kernel and these files (path beneath /.isolation/agent, content).

    Python sources among them are accompanied by their bytecode for the running Python, which the guest's is. Raises
    LaunchError.
    """
    program = busybox.read_bytes()
    digest = hashlib.sha256(f"{kernel.digest} {sys.version} {_INIT} {_START}".encode())
    for name, data in [("busybox", program), *files]:
        digest.update(b"%d %s\0" % (len(data), os.fsencode(name)) + data)

    def write(target: Path) -> None:
        archive = Archive()
        for directory in ("agent", "bin", "dev", "i", "modules", "newroot", "proc", "sys"):
            archive.directory(directory)
        archive.file("init", _INIT.encode(), 0o755)
        archive.file("start", _START.encode(), 0o644)
        archive.file("bin/busybox", program, 0o755)
        for module in kernel.modules:
            archive.file(f"modules/{module.name}", module.read_bytes())
        for name, data in sorted([*files, *_compiled(files)]):
            archive.file(f"agent/{name}", data)
        target.write_bytes(archive.finish())

    path = cache.make(KIND, digest.hexdigest()[:40], write, progress)
    cache.prune(KIND, _KEEP)
    return path


class Archive:
    """A cpio archive in memory. Parent directories are added as needed."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0
        self._directories: set[str] = set()

    def directory(self, name: str, mode: int = 0o755) -> None:
        if name and name not in self._directories:
            self.directory(os.path.dirname(name))
            self._directories.add(name)
            self._add(name, 0o040000 | mode, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self.directory(os.path.dirname(name))
        self._add(name, 0o100000 | mode, data)

    def finish(self) -> bytes:
        self._inode = -1
        self._add("TRAILER!!!", 0, b"")
        return self._out.getvalue()

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._inode += 1
        raw = os.fsencode(name) + b"\0"
        links = 2 if mode & 0o040000 else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + raw)
        self._pad()
        self._out.write(data)
        self._pad()

    def _pad(self) -> None:
        self._out.write(bytes(-self._out.tell() % 4))


def _compiled(files: Iterable[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Bytecode that is never checked against its source (PEP 552): the guest would only lose time with that."""
    found = []
    tag = sys.implementation.cache_tag
    for name, data in files:
        if name.endswith(".py") and tag:
            code = compile(data, f"/.isolation/agent/{name}", "exec", dont_inherit=True, optimize=0)
            flags = (0b01).to_bytes(4, "little")
            pyc = importlib.util.MAGIC_NUMBER + flags + importlib.util.source_hash(data) + marshal.dumps(code)
            directory, base = os.path.split(name)
            found.append((os.path.join(directory, "__pycache__", f"{base[:-3]}.{tag}.pyc"), pyc))
    return found


def _quoted(text: str) -> str:
    """For `printf %b`: no space or quote may stand in one word of the kernel's command line."""
    return "".join(chr(byte) if byte in _SAFE else f"\\0{byte:03o}" for byte in os.fsencode(text))


def _file(module: ModuleType) -> str:
    assert module.__file__ is not None
    return module.__file__
