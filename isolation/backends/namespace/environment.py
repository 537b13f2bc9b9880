"""Environment variables: which ones untrusted code gets, and how the rest is made unreadable."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping

from isolation.backends.namespace import syscalls
from isolation.spec import SandboxSpec

# Names that tell how to behave, not who someone is. Everything else of the caller's (tokens, sockets, proxies with
# passwords, PYTHON* that change what runs) stays outside unless the spec names it.
ALLOWED = frozenset(
    "COLORTERM COLUMNS CONDA_PREFIX FORCE_COLOR HOME LANG LANGUAGE LINES LOGNAME NO_COLOR PATH SHELL TERM TZ USER "
    "VIRTUAL_ENV".split()
)
_ALLOWED_PREFIX = "LC_"


def environment_for(spec: SandboxSpec, shows: Callable[[str], bool]) -> dict[str, str]:
    """The guest's variables; `shows` tells whether a path of the host is seen inside."""
    host: Mapping[str, str] = os.environ
    env = {
        name: value
        for name, value in host.items()
        if spec.inherit_env or name in ALLOWED or name.startswith(_ALLOWED_PREFIX)
    }
    if not spec.inherit_env:
        env["PATH"] = _visible_path(env.get("PATH", os.defpath), shows)
    env.update(spec.env)
    return env


def _visible_path(path: str, shows: Callable[[str], bool]) -> str:
    """PATH without directories that are not there. One that held a `python` (a version manager's shims, say) is
    replaced by this interpreter's own, so that `python` means the same inside."""
    kept: list[str] = []
    for entry in path.split(os.pathsep):
        if not entry:
            continue
        if shows(os.path.realpath(entry)):
            kept.append(entry)
        elif shutil.which("python3", path=entry) or shutil.which("python", path=entry):
            kept.append(os.path.join(sys.prefix, "bin"))
    kept = list(dict.fromkeys(kept))
    return os.pathsep.join(kept) or os.defpath


def scrub() -> None:
    """Overwrite the block that /proc/PID/environ shows; for processes that serve, and never need a variable again.

    There is no execve(2) to replace that memory, and clearing `os.environ` does not touch it (proc(5), stat fields
    50 and 51).
    """
    os.environ.clear()
    syscalls.clearenv()
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    if 0 < start < end:
        syscalls.clear_memory(start, end)
