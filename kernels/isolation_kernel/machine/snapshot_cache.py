"""The machine that a kernel's own is a fork of: one in which a kernel stands by, saved in the user's cache.

It depends on the spec, but not on the notebook's directory, which is copied into it later; on its path only where that is
neither in the user's home nor in /tmp, as nobody else can make a directory there. What else it depends on (the images, QEMU,
the interpreter) the backend knows, and refuses one that does not fit any more; then it is made anew. Where nothing but the
system has changed (an update, say), it serves once more, while a process of its own (renewing.py) makes the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from isolation.backends.microvm.artifacts import setup
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.showing import SYSTEM, python_environment
from isolation.errors import IsolationError, LaunchError
from isolation.paths import is_within
from isolation.sandbox import Sandbox
from isolation.spec import Mount, SandboxSpec
from isolation.template import Template
from isolation_kernel.container.session import say
from isolation_kernel.machine import renewing

PAYLOAD: Final = "isolation_kernel.inside.bridge:main"
_KEPT_VARIABLES: Final = ("HOME", "LOGNAME", "SHELL", "USER", "XDG_CACHE_HOME")
_KEPT: Final = 4  # saved machines, of some 200 MB each


def root() -> Path:
    """Where they are: a directory of this user's alone. Raises LaunchError when somebody else can write there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(base) / "isolation-kit" / "kernels"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    Cache(path).check()
    return path


def spec_for(spec: SandboxSpec, cwd: str) -> tuple[SandboxSpec, bool]:
    """The machine's, and whether the notebook's directory is to be copied into it; else it is a mount."""
    if not any(mount.target == mount.source == cwd and mount.mode in ("overlay", "ro") for mount in spec.mounts):
        return spec, False
    if _is_shown(cwd):
        return spec, False  # in parts, and read-only, as something that Python imports from: a mount goes over that
    home = os.path.normpath(os.path.expanduser("~"))
    if os.geteuid() == 0 or any(cwd.startswith(f"{place}/") for place in (home, "/tmp") if place != "/"):
        return spec.replace(mounts=tuple(mount for mount in spec.mounts if mount.target != cwd), workdir="/"), True
    empty = root() / "empty"
    empty.mkdir(mode=0o700, exist_ok=True)
    mounts = [Mount(empty, mount.target, "overlay") if mount.target == cwd else mount for mount in spec.mounts]
    return spec.replace(mounts=tuple(mounts)), True


def _is_shown(cwd: str) -> bool:
    real = os.path.realpath(cwd)
    if real.split("/")[1] in SYSTEM:
        return True
    shown = [os.path.realpath(path) for path in python_environment()]
    return is_within(real, shown) or any(is_within(path, [real]) for path in shown)


def template(spec: SandboxSpec, arguments: Sequence[str]) -> Template:
    """The saved one, or a new one, which is then saved; with a kernel that has these arguments. Raises IsolationError."""
    given = list(arguments)
    place = _place(spec, given)
    with _plain_environment():
        sandbox = Sandbox(spec)
        if place.exists():
            try:
                with setup.system_as_before() as before, _lock(fcntl.LOCK_SH):
                    found = sandbox.load_template(place, PAYLOAD, given)
            except LaunchError:
                pass  # something has changed since
            else:
                os.utime(place)
                if before.used:
                    say("the system has changed since: this kernel has the old one, and a new one is being made")
                    renewing.start(spec, given)
                return found
        made = sandbox.template(PAYLOAD, given)
    with contextlib.suppress(OSError, IsolationError):  # one that cannot be kept (a full disk) serves this kernel
        _keep(made, place)
    return made


def renew(spec: SandboxSpec, arguments: Sequence[str]) -> None:
    """Make the saved one again, of the system as it is now; the old one serves until then. Where several processes are asked
    to, one works. What goes wrong is told by nobody: who finds no new one, and cannot use the old, will."""
    with contextlib.suppress(OSError, IsolationError), _lock(fcntl.LOCK_EX | fcntl.LOCK_NB, ".renewing"):
        with _plain_environment():
            made = Sandbox(spec).template(PAYLOAD, list(arguments))
        with made:
            _keep(made, _place(spec, arguments))


@contextlib.contextmanager
def _lock(how: int, name: str = ".lock") -> Iterator[None]:
    """Nobody reads a saved machine while it is replaced. Raises BlockingIOError."""
    fd = os.open(root() / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


def _place(spec: SandboxSpec, arguments: Sequence[str]) -> Path:
    said = repr((spec, list(arguments), sys.executable, sys.version))
    return root() / hashlib.sha256(said.encode()).hexdigest()[:32]


@contextlib.contextmanager
def _plain_environment() -> Iterator[None]:
    """The same for every frontend of this user's, so that one saved machine serves them all. What differs (language, time
    zone, width) each kernel is told when it is handed over."""
    before = dict(os.environ)
    try:
        for name in before:
            if name not in _KEPT_VARIABLES:
                del os.environ[name]
        os.environ["PATH"] = f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _keep(made: Template, place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="new-", dir=place.parent) as directory:
        made.save(os.path.join(directory, "machine"))
        with _lock(fcntl.LOCK_EX):
            if place.exists():
                os.rename(place, os.path.join(directory, "old"))
            os.rename(os.path.join(directory, "machine"), place)
    others = sorted(
        (path for path in place.parent.iterdir() if path.name not in ("empty", place.name) and len(path.name) == 32),
        key=lambda path: path.stat().st_mtime,
    )
    for old in others[: -(_KEPT - 1)]:
        shutil.rmtree(old, ignore_errors=True)
