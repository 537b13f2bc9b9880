"""What of the host every backend shows in a sandbox: system directories, the Python environment, harmless variables."""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Iterable, Mapping

from isolation.backends import linked
from isolation.plain import os
from isolation.spec import SandboxSpec

PREFIX = "isolation-host"  # of the names of memfds that are for the host alone: no fork of its process gets a copy
SYSTEM = ("bin", "etc", "gnu", "lib", "lib32", "lib64", "libx32", "nix", "opt", "sbin", "usr")
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
        elif any(os.access(os.path.join(entry, name), os.X_OK) for name in ("python3", "python")):
            kept.append(os.path.join(sys.prefix, "bin"))
    kept = list(dict.fromkeys(kept))
    return os.pathsep.join(kept) or os.defpath


def python_environment() -> list[str]:
    """Every directory and file that this interpreter imports from, wherever it lies.

    Prefixes, `sys.path`, what packages are symbolic links to, and the roots of modules that are found in some other way
    (editable installs with an import hook). A home directory, or `/`, that happens to stand on `sys.path` is not an
    environment, and left out.
    """
    found = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, sys.executable]
    found += [entry for entry in sys.path if entry]
    found += _module_roots(found)
    found += linked.places(entry for entry in sys.path if entry)
    virtual_env = os.environ.get("VIRTUAL_ENV")
    if virtual_env:
        found += [virtual_env, *_venv_home(virtual_env)]
        if os.path.realpath(virtual_env) != os.path.realpath(sys.prefix):
            found += linked.places(packages_of(virtual_env), within=linked.caches())
    paths: dict[str, None] = {}
    for path in found:
        absolute = os.path.abspath(path)
        if os.path.exists(absolute) and not linked.too_wide(absolute):
            paths[absolute] = None
    return sorted(paths, key=len)  # a directory before what lies in it, which then needs no mount of its own


def packages_of(prefix: str) -> list[str]:
    """Where an environment has its packages."""
    return glob.glob(os.path.join(glob.escape(prefix), "lib*", "python3.*", "site-packages"))


def _module_roots(known: Iterable[str]) -> list[str]:
    prefixes = tuple(os.path.join(os.path.abspath(path), "") for path in known if path)
    roots = []
    for name, module in list(sys.modules.items()):
        if "." in name:
            continue
        locations = list(getattr(module, "__path__", None) or ())
        if name.startswith("__editable__"):  # an import hook of setuptools', and where it finds what it is for
            mapping = getattr(module, "MAPPING", None)
            locations += list(mapping.values()) if isinstance(mapping, dict) else []
        file = getattr(module, "__file__", None)
        for location in locations or ([file] if isinstance(file, str) else []):
            if isinstance(location, str) and os.path.isabs(location) and not location.startswith(prefixes):
                roots.append(location)
    return roots


def _venv_home(virtual_env: str) -> list[str]:
    """The installation that a virtual environment was made from (PEP 405)."""
    try:
        with open(os.path.join(virtual_env, "pyvenv.cfg"), encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition("=")
                if key.strip().lower() == "home":
                    return [os.path.dirname(value.strip())]
    except OSError:
        pass
    return []
