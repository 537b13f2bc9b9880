"""Packages that are symbolic links: what these lead to must be shown, too, or nothing can be imported.

uv (`--link-mode=symlink`), pdm and conda link what they install to their caches, file by file or by directories; a strict
editable install of setuptools is a tree of links to a project's files. Who links one file of a package so, links them all:
of each, only some are looked at.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator

from isolation.paths import is_within
from isolation.plain import os

_PACKAGES = ("site-packages", "dist-packages")
_STRICT = "__editable__."
_PEP_582 = "__pypackages__"
_AT_MOST = 256  # places; each is a mount
_PACKAGES_AT_MOST = 10_000
_LOOKED_AT, _LOOKED_AT_STRICT = 3, 5000  # files of a package
_LINKS_AT_MOST = 10_000


def too_wide(path: str) -> bool:
    """Whether it is no environment, and no package, but where much else lies: a home directory, or what holds such."""
    real = os.path.realpath(path)
    home = os.path.realpath(os.path.expanduser("~"))
    wide = {"/", "/home", "/root", "/tmp", "/var/tmp", os.path.realpath(tempfile.gettempdir())}
    return real in wide or is_within(home, [real])


def caches() -> list[str]:
    """Where installers keep packages."""
    found = [os.environ.get("UV_CACHE_DIR"), os.environ.get("PDM_CACHE_DIR")]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    found += [os.path.join(home, name) for name in ("uv", "pdm")]
    return [os.path.realpath(path) for path in found if path and os.path.isabs(path) and not too_wide(path)]


def places(directories: Iterable[str], *, within: Iterable[str] | None = None) -> list[str]:
    """What links in those of `directories` that hold installed packages lead to, as the links say it. `within`: nothing but
    what lies there, for an environment that is not trusted."""
    allowed = None if within is None else [f"{path}/" for path in within]
    found: dict[str, dict[str, None]] = {}  # names by the directory that has them
    for directory in dict.fromkeys(map(os.path.realpath, directories)):
        if _holds_packages(directory):
            for link in itertools.islice(_links(directory), _LINKS_AT_MOST):
                place = _place(link, directory)
                if place is None or is_within(place, [directory]):
                    continue
                if allowed is None or os.path.realpath(place).startswith(tuple(allowed)):
                    found.setdefault(os.path.dirname(place), {})[os.path.basename(place)] = None
    shown = []
    for parent, names in found.items():
        shown += [parent] if _is_whole(parent, names) else [os.path.join(parent, name) for name in names]
    return shown[:_AT_MOST]


def _holds_packages(directory: str) -> bool:
    name = os.path.basename(directory)
    return name in _PACKAGES or name.startswith(_STRICT) or f"/{_PEP_582}/" in directory


def _links(directory: str) -> Iterator[str]:
    """Symbolic links in it, and some in each directory in it; in those of metadata only where there are others."""
    some = _LOOKED_AT_STRICT if os.path.basename(directory).startswith(_STRICT) else _LOOKED_AT
    metadata = []
    found = False
    for entry in itertools.islice(_entries(directory), _PACKAGES_AT_MOST):
        if entry.is_symlink():
            found = True
            yield entry.path
        elif entry.name.endswith((".dist-info", ".egg-info")):
            metadata.append(entry.path)
        elif entry.name != "__pycache__" and entry.is_dir(follow_symlinks=False):
            for link in _linked_files(entry.path, some):
                found = True
                yield link
    for path in metadata if found else ():
        yield from _linked_files(path, some)


def _linked_files(directory: str, some: int) -> Iterator[str]:
    return (entry.path for entry in itertools.islice(_beneath(directory), some) if entry.is_symlink())


def _beneath(directory: str) -> Iterator[os.DirEntry[str]]:
    """What is no directory, the nearest first."""
    waiting = [directory]
    while waiting:
        inner = []
        for path in waiting:
            for entry in _entries(path):
                if not entry.is_dir(follow_symlinks=False):
                    yield entry
                elif entry.name != "__pycache__":
                    inner.append(entry.path)
        waiting = inner


def _entries(directory: str) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        yield from entries


def _place(link: str, directory: str) -> str | None:
    """What is to be shown for a link in a directory of packages: the whole package where the link is one of its files and
    has the same name there; else no more than it leads to."""
    try:
        target = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))
    except OSError:
        return None
    if not os.path.exists(target):
        return None
    name = os.path.relpath(link, directory)
    package, inner, _rest = name.partition("/")
    if inner and target.endswith(f"/{name}"):
        whole = target[: -len(name)] + package
        if not too_wide(whole):
            return whole
    return None if too_wide(target) else target


def _is_whole(parent: str, names: Iterable[str]) -> bool:
    """Whether the directory has these, and nothing else: then one mount does."""
    wanted = set(names)
    with contextlib.suppress(OSError):
        return len(wanted) > 1 and not too_wide(parent) and wanted.issuperset(os.listdir(parent))
    return False
