"""Layers: read-only images of parts of the host's file tree, each made once for what it holds, and kept in the cache.

    base         the system: what everyone may read of it, whoever makes the layer
    environment  Python's prefixes and sys.path, where they are not part of the base
    tree         any other directory or file, as `tree` or `file` at the image's root, for the agent to put in place

A cache entry is a directory: `image` (squashfs), and `about.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isolation.backends import showing
from isolation.backends.microvm.artifacts import squashfs, stamp, tools
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.progress import SILENT, Progress, megabytes
from isolation.backends.microvm.artifacts.trees import Report, Rules, Tar, digest
from isolation.errors import BackendUnavailable, SpecError
from isolation.paths import is_within
from isolation.plain import json

BASE, ENVIRONMENT, TREE = "base", "environment", "tree"
_FORMAT = "2"  # part of every key: changes when images are made in another way
_SYSTEM = ("bin", "etc", "gnu", "lib", "lib32", "lib64", "libx32", "nix", "sbin", "usr")
_WITHOUT = (
    *(f"usr/share/{name}" for name in ("doc", "gtk-doc", "help", "info", "man")),
    *(f"{lib}/{name}" for lib in ("lib", "usr/lib") for name in ("debug", "firmware", "modules")),
    "usr/src",
)
# Empty, for the guest's own mounts: were they made there, they would be told as changes.
_EMPTY = {
    ".isolation": 0o700, "dev": 0o755, "home": 0o755, "mnt": 0o755, "opt": 0o755, "proc": 0o755, "root": 0o700, "run": 0o755,
    "srv": 0o755, "sys": 0o755, "tmp": 0o1777, "var": 0o755, "var/lib": 0o755, "var/tmp": 0o1777,
}  # fmt: skip
_PACKAGES = ("var/lib/dpkg/status", "var/lib/rpm", "usr/lib/sysimage/rpm", "var/lib/pacman/local", "lib/apk/db/installed")
_DEEP = 3  # levels of directories in /usr whose times are looked at
_KEEP_BASES, _KEEP_ENVIRONMENTS, _KEEP_TREES = 2, 12, 16
_MOST_ENVIRONMENTS = 6  # layers; every one is a device of the guest
_TRIES = 3  # to read a tree that changes meanwhile
_MANY_LINKS = 40  # as the kernel: path_resolution(7)


@dataclass(frozen=True)
class Layer:
    """path: the squashfs image; size: its bytes; key: the same for the same bytes (SHA-256, shortened), whatever it was made
    from; name: "base", "environment", "tree" or "file" (the latter two are also what it holds at its root); entries: files
    and directories in it; left_out: those that could not be read; entry: its key in the cache."""

    path: Path
    size: int
    key: str
    name: str
    entries: int = 0
    left_out: int = 0
    entry: str = ""


def base(
    cache: Cache, progress: Progress = SILENT, *, exclude: Sequence[str] = (), root: str = "/", refresh: bool = False
) -> Layer:
    """The system's own directories. `exclude`: paths of the host. Raises LaunchError."""
    names = (*_WITHOUT, *(path.strip("/") for path in exclude))
    without = frozenset(os.fsencode(os.path.join(root, name)) for name in names)
    rules = Rules(public=True, without=without, skipped=_identity(cache.root))

    def fill(tar: Tar, tell: Callable[[Report], None]) -> None:
        for name, mode in _EMPTY.items():
            tar.directory(name, mode)
        resolv = _resolv(root)
        if resolv is not None:
            tar.content("etc/resolv.conf", resolv)
        for name in _SYSTEM:
            path = os.path.join(root, name)
            if os.path.islink(path):
                tar.symlink(name, os.readlink(path))
            elif os.path.isdir(path):
                for report in tar.tree(path, name, rules):
                    tell(report)

    key = base_key(exclude, root=root)
    about = {"exclude": sorted(exclude)}
    layer = _make(cache, BASE, key, BASE, "the system's files", fill, progress, refresh=refresh, about=about)
    cache.prune(BASE, _KEEP_BASES)
    return layer


def base_before(cache: Cache, exclude: Sequence[str] = ()) -> Layer | None:
    """The one that was used last, whatever the system has become since; None where none leaves out the same."""
    for entry in sorted(cache.entries(BASE, sizes=False), key=lambda entry: entry.used, reverse=True):
        with contextlib.suppress(BackendUnavailable, OSError, ValueError):
            if json.loads((entry.path / "about.json").read_bytes()).get("exclude") == sorted(exclude):
                return load(cache, BASE, entry.key)
    return None


def base_key(exclude: Sequence[str] = (), root: str = "/") -> str:
    """Changes when the base layer should be made again; a fraction of a second.

    Looked at: the package manager's records, everything in /etc and /usr/local, and the times of the directories in /usr
    to a depth of three, by which files that come, go or are renamed there are noticed. Not noticed: a file in /usr that was
    overwritten in place, and any change further down, by other than the package manager: `setup --refresh` is for that.
    """
    made = hashlib.sha256(f"{_FORMAT} {sorted(exclude)} {root}".encode("utf-8", "surrogateescape"))
    for name in _PACKAGES:
        try:
            status = os.stat(os.path.join(root, name))
            made.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError:
            continue
    resolv = _resolv(root)
    made.update(b"none" if resolv is None else hashlib.sha256(resolv).digest())
    for name in _SYSTEM:
        path = os.path.join(root, name)
        if os.path.islink(path):
            made.update(f"{name} -> {os.readlink(path)}\n".encode("utf-8", "surrogateescape"))
        elif os.path.isdir(path) and name != "etc":
            _add_times(made, path, _DEEP)
    without = frozenset(os.fsencode(os.path.join(root, path.strip("/"))) for path in exclude)
    deep = [os.path.join(root, name) for name in ("etc", "usr/local")]
    made.update(digest([path for path in deep if os.path.isdir(path)], Rules(public=True, without=without)).encode())
    return made.hexdigest()[:40]


def environment(
    cache: Cache,
    progress: Progress = SILENT,
    *,
    paths: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    without: Iterable[str] = (),
    refresh: bool = False,
) -> tuple[Layer, ...]:
    """Where Python and its packages lie, at the same places as on the host; none where the base layer has all of that.

    A layer for each place (installation, virtual environment, …), so that one more package does not make all of them
    anew; where there are many, the last ones share a layer. `paths` is by default that of this interpreter; `exclude` is
    the base layer's; what lies beneath `without` is left out (the project, which is shown in another way). Raises
    LaunchError.
    """
    hidden = frozenset(os.path.realpath(path) for path in without)
    links: dict[str, str] = {}
    trees: list[str] = []
    for path in showing.python_environment() if paths is None else paths:
        real = _follow(path, links)
        covered = is_within(real, trees) or is_within(real, hidden) or _in_base(real, exclude)
        if os.path.lexists(real) and not covered:
            trees = [tree for tree in trees if not is_within(tree, [real])] + [real]
    shown = {path: to for path, to in links.items() if not is_within(path, trees) and not _in_base(path, exclude)}
    trees.sort()
    groups = [[each] for each in trees[: _MOST_ENVIRONMENTS - 1]]
    if trees[_MOST_ENVIRONMENTS - 1 :] or (shown and not groups):
        groups.append(trees[_MOST_ENVIRONMENTS - 1 :])
    rules = Rules(without=frozenset(map(os.fsencode, hidden)), skipped=_identity(cache.root))
    made = []
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        made.append(_environment(cache, group, shown if last else {}, rules, progress, refresh=refresh))
    cache.prune(ENVIRONMENT, _KEEP_ENVIRONMENTS)
    return tuple(made)


def _environment(
    cache: Cache, group: list[str], links: dict[str, str], rules: Rules, progress: Progress, *, refresh: bool
) -> Layer:
    hidden = frozenset(path for path in rules.without if is_within(os.fsdecode(path), group))
    within = Rules(without=hidden, skipped=rules.skipped)
    start = _FORMAT + json.dumps([sorted(links.items()), group, sorted(map(os.fsdecode, within.without))])

    def key() -> str:
        return _key(start, group, within)

    def fill(tar: Tar, tell: Callable[[Report], None]) -> None:
        for path, to in sorted(links.items()):
            tar.symlink(path, to)
        for each in group:
            for report in tar.tree(each, each, within):
                tell(report)

    what = ", ".join(group) or "symbolic links"
    return _make_unchanged(cache, ENVIRONMENT, key, ENVIRONMENT, what, fill, progress, refresh=refresh)


def tree(
    cache: Cache,
    source: str | os.PathLike[str],
    progress: Progress = SILENT,
    *,
    without: Iterable[str] = (),
    at: str | None = None,
) -> Layer:
    """One directory or file of the host's: what the caller may read of it, but for the paths in `without`. Its image has it
    as `tree` or `file` at its root (`layer.name` tells which), or `at` another path ("/": a directory as the root itself).

    Raises SpecError when there is no such thing, and LaunchError.
    """
    real = os.path.realpath(source)
    try:
        status = os.stat(real)
    except OSError as error:
        raise SpecError(f"cannot show {os.fspath(source)!r} in a sandbox: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        name = "tree"
    elif stat.S_ISREG(status.st_mode):
        name = "file"
    else:
        raise SpecError(f"{os.fspath(source)!r} is neither a file nor a directory: it cannot be shown in a virtual machine")
    hidden = frozenset(os.fsencode(os.path.realpath(path)) for path in without)
    rules = Rules(without=hidden, skipped=_identity(cache.root))
    target = name if at is None else at.strip("/")
    if not target and name == "file":
        raise SpecError(f"{os.fspath(source)!r} is a file, and cannot be the root of a file tree")
    origin = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]

    def key() -> str:
        return f"{origin}-{_key(f'{_FORMAT} {target!r} {sorted(hidden)!r}', [real], rules)}"

    def fill(tar: Tar, tell: Callable[[Report], None]) -> None:
        for report in tar.tree(real, target, rules):
            tell(report)

    layer = _make_unchanged(cache, TREE, key, name, real, fill, progress)
    cache.prune(TREE, _KEEP_TREES, prefix=origin)
    return layer


def load(cache: Cache, kind: str, key: str) -> Layer:
    """A layer that is in the cache. Raises BackendUnavailable when it is gone, or damaged."""
    place = cache.get(kind, key)
    if place is None:
        raise BackendUnavailable(f"the {kind} image is gone from the cache: run 'isolation microvm setup'")
    size = squashfs.check(place / "image")
    try:
        if changed := stamp.changed(place):
            raise ValueError(f"{changed} is not as it was put there")
        about: Any = json.loads((place / "about.json").read_bytes())
        content = str(about["digest"])[:40]
        return Layer(
            place / "image", size, content, str(about["name"]), int(about["entries"]), int(about["unreadable"]), key
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        again = "run 'isolation microvm setup --refresh'"
        raise BackendUnavailable(f"the image in {place} is damaged ({error}): {again}") from error


def check(layer: Layer) -> None:
    """Raises BackendUnavailable when the layer's image is gone, cut off, or damaged at its beginning."""
    squashfs.check(layer.path)


def _make_unchanged(
    cache: Cache,
    kind: str,
    key: Callable[[], str],
    name: str,
    what: str,
    fill: Callable[[Tar, Callable[[Report], None]], None],
    progress: Progress,
    *,
    refresh: bool = False,
) -> Layer:
    """As _make; and the key is that of what was really read, also where the tree changes meanwhile."""
    now = key()
    for _ in range(_TRIES):
        if not refresh and cache.get(kind, now) is not None:
            return _make(cache, kind, now, name, what, fill, progress)
        layer = _make(cache, kind, now, name, what, fill, progress, refresh=refresh)
        before, now = now, key()
        if now == before:
            return layer
        cache.remove(kind, before)
    # It changes all the time (a log file, say): use one image of it, which nobody else takes for another.
    return _make(cache, kind, f"{now}-changing-{os.getpid()}", name, what, fill, progress, refresh=True)


def _make(
    cache: Cache,
    kind: str,
    key: str,
    name: str,
    what: str,
    fill: Callable[[Tar, Callable[[Report], None]], None],
    progress: Progress,
    *,
    refresh: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Layer:
    def build(target: Path) -> None:
        program = tools.mksquashfs(cache, progress)
        progress.start(f"making an image of {what}")
        report = Report()

        def write(tar: Tar) -> None:
            fill(tar, lambda report: progress.update(f"{report.entries} files, {megabytes(report.size)}"))
            progress.update("finishing")

        os.makedirs(target)
        squashfs.make(program, target / "image", write, report)
        size = squashfs.check(target / "image")
        progress.update("finishing")
        with open(target / "image", "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        said = {"name": name, "what": what, "digest": content, **asdict(report), **(about or {})}
        (target / "about.json").write_text(json.dumps(said))
        left = f" ({report.unreadable} unreadable files left out)" if report.unreadable and kind != BASE else ""
        progress.done(f"image of {what}: {megabytes(size)}, {report.entries} entries{left}")

    cache.make(kind, key, build, progress, refresh=refresh)
    try:
        return load(cache, kind, key)
    except BackendUnavailable:
        if refresh:
            raise
        cache.make(kind, key, build, progress, refresh=True)  # damaged by whatever; what it is made of is still there
        return load(cache, kind, key)


def _key(start: str, trees: Sequence[str], rules: Rules) -> str:
    made = hashlib.sha256(start.encode("utf-8", "surrogateescape"))
    made.update(digest(trees, rules).encode())
    return made.hexdigest()[:32]


def _add_times(made: hashlib._Hash, path: str, depth: int) -> None:
    try:
        made.update(f"{path} {os.stat(path).st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        with os.scandir(path) as listing:
            directories = sorted(entry.path for entry in listing if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    if depth:
        for directory in directories:
            _add_times(made, directory, depth - 1)


def _resolv(root: str) -> bytes | None:
    try:
        with open(os.path.join(root, "etc/resolv.conf"), "rb") as file:
            return file.read(1 << 20)
    except OSError:
        return None


def _in_base(path: str, exclude: Sequence[str]) -> bool:
    """Whether the base layer has this: the path (without links) lies in it, and everyone may look there."""
    name = path.strip("/").split("/")[0]
    if name not in _SYSTEM or is_within(path, [*("/" + each for each in _WITHOUT), *exclude]):
        return False
    while path != "/":
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            return False
        if (stat.S_ISDIR(mode) and mode & 0o005 != 0o005) or (stat.S_ISREG(mode) and not mode & 0o004):
            return False
        path = os.path.dirname(path)
    return True


def _follow(path: str, links: dict[str, str]) -> str:
    """Resolve `path` step by step, noting each symlink that is met: all of them are entries of the image, too."""
    done, todo = "/", [part for part in path.split("/") if part]
    count = 0
    while todo:
        step = os.path.normpath(os.path.join(done, todo.pop(0)))
        if os.path.islink(step):
            count += 1
            if count > _MANY_LINKS:
                raise SpecError(f"too many symbolic links in {path!r}")
            to = os.readlink(step)
            links[step] = to
            todo[:0] = [part for part in to.split("/") if part]
            done = "/" if to.startswith("/") else done
        else:
            done = step
    return done


def _identity(path: Path) -> frozenset[tuple[int, int]]:
    """The cache is never part of an image: it would grow by itself."""
    try:
        status = os.stat(path)
    except OSError:
        return frozenset()
    return frozenset([(status.st_dev, status.st_ino)])
