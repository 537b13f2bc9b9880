"""Which Python the suite runs on, and what of it must be seen inside. It is looked at, and never executed, on the host.

A virtual environment may be the project's own, and so may say anything: what its links and its pyvenv.cfg name is shown
only where it is the root of a Python installation, or lies in the cache of an installer. Of an environment elsewhere only
what environments consist of is shown: somebody may have made one in the root of another project, with all that there is
beside it.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from isolation.backends import linked
from isolation.backends.showing import SYSTEM, packages_of
from isolation.errors import SpecError

_LINKS_AT_MOST: Final = 40
_CONFIG_AT_MOST: Final = 1 << 16
_ENVIRONMENT: Final = ("pyvenv.cfg", "bin", "include", "lib", "lib64", "share")


@dataclass(frozen=True)
class Interpreter:
    """`path` inside, and the directories it needs: (on the host, inside)."""

    path: str
    shown: tuple[tuple[str, str], ...]


def find(named: str | None, virtual_env: str | None, cwd: str) -> Interpreter:
    """The one that the user has named, that of the active environment, or the one that runs this. Raises SpecError."""
    if named:
        path = os.path.join(cwd, os.path.expanduser(named))
        what = f"--python {named}"
    elif virtual_env:
        path = os.path.join(virtual_env, "bin", "python")
        what = f"VIRTUAL_ENV={virtual_env}"
    else:
        return Interpreter(sys.executable, ())  # what it needs is shown in any case
    if os.path.isdir(path):
        path = os.path.join(path, "bin", "python")
    directory = os.path.realpath(os.path.dirname(path))
    if os.path.dirname(directory) != os.path.realpath(os.path.dirname(os.path.dirname(path))):
        raise SpecError(f"{what}: its directory is a symbolic link to {directory}; name that, if it is what you mean")
    path = os.path.join(directory, os.path.basename(path))
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        raise SpecError(f"{what}: there is no interpreter {path}; name one, such as .venv/bin/python")
    shown: dict[str, str] = {}
    prefix = os.path.dirname(os.path.dirname(path))
    if os.path.isfile(os.path.join(prefix, "pyvenv.cfg")):
        whole = _is_beneath(prefix, os.path.realpath(cwd))
        parts = [prefix] if whole else [os.path.join(prefix, name) for name in _ENVIRONMENT]
        shown.update((part, part) for part in parts if os.path.exists(part))
        linked_to = linked.places(packages_of(prefix), within=linked.caches())
        shown.update((place, os.path.realpath(place)) for place in linked_to)
        places = [*_hops(path), *_home(prefix)]
    else:
        places = list(_hops(path))
    found = False
    for place in places:
        root = os.path.dirname(os.path.dirname(place))
        if _is_installation(root):
            found = True
            shown[root] = os.path.realpath(root)
    if not found:
        raise SpecError(f"{what}: {path} does not belong to a Python installation that can be shown inside")
    return Interpreter(path, tuple((source, target) for target, source in shown.items() if not _is_system(target)))


def _hops(path: str) -> Iterator[str]:
    """`path`, and what it is a symbolic link to, step by step."""
    for _ in range(_LINKS_AT_MOST):
        yield path
        yield os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        if not os.path.islink(path):
            return
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))


def _home(prefix: str) -> Iterator[str]:
    """An interpreter where pyvenv.cfg says that the installation is (PEP 405)."""
    with open(os.path.join(prefix, "pyvenv.cfg"), encoding="utf-8", errors="replace") as file:
        for line in file.read(_CONFIG_AT_MOST).splitlines():
            key, _, value = line.partition("=")
            if key.strip().lower() == "home" and os.path.isabs(value.strip()) and "\0" not in value:
                yield os.path.join(os.path.normpath(value.strip()), "python")


def _is_installation(root: str) -> bool:
    """Whether it has a standard library, and is not somebody's home, which may have one beside all else."""
    real = os.path.realpath(root)
    home = os.path.realpath(os.path.expanduser("~"))
    if real == "/" or (home + os.sep).startswith(real + os.sep):
        return False
    return bool(glob.glob(os.path.join(glob.escape(real), "lib", "python3.*", "os.py")))


def _is_beneath(path: str, directory: str) -> bool:
    return path.startswith(os.path.join(directory, ""))


def _is_system(path: str) -> bool:
    """Shown in every sandbox."""
    return path.split("/")[1] in SYSTEM
