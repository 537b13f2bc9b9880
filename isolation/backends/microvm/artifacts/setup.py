"""What `isolation microvm setup` makes, and what a launch then finds.

The cache's `settings.json` remembers what the user chose and which entries belong to it:

    {"format": 1, "kernel": key, "choice": {"kernel": "" | "host" | path, "modules": "" | path}, "exclude": [path, …]}
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isolation.backends.microvm.artifacts import initramfs, kernel, layers, tools
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.kernel import Kernel
from isolation.backends.microvm.artifacts.layers import Layer
from isolation.backends.microvm.artifacts.progress import SILENT, Progress
from isolation.errors import BackendUnavailable
from isolation.plain import json

SETTINGS = "settings.json"
_FORMAT = 1
_RUN_SETUP = "run 'isolation microvm setup'"


@dataclass(frozen=True)
class Settings:
    """kernel: its key; image and modules: as the user gave them, "" where they are fetched; exclude: from the base."""

    kernel: str
    image: str = ""
    modules: str = ""
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Images:
    """Everything that a machine is started with. The base layer is that of the last setup."""

    cache: Cache
    kernel: Kernel
    busybox: Path
    base: Layer
    exclude: tuple[str, ...] = ()
    progress: Progress = field(default=SILENT, compare=False)

    def initramfs(self, files: Sequence[tuple[str, bytes]] | None = None) -> Path:
        """With these files beneath /.isolation/agent (default: the guest's package, and what it imports). Cached."""
        files = initramfs.agent_files() if files is None else files
        return initramfs.build(self.kernel, self.busybox, files, self.cache, self.progress)

    def environment(self, *, without: Iterable[str] = ()) -> tuple[Layer, ...]:
        """Of the running Python; none where the base has it all. `without`: directories that are shown in another way."""
        return layers.environment(self.cache, self.progress, exclude=self.exclude, without=without)

    def tree(self, source: str | os.PathLike[str], *, without: Iterable[str] = (), at: str | None = None) -> Layer:
        """Of one directory or file, as it is now: `tree` or `file` at the image's root, or `at` another path there."""
        return layers.tree(self.cache, source, self.progress, without=without, at=at)


def qemu() -> str:
    """The program that emulates this machine's architecture. Raises BackendUnavailable."""
    name = f"qemu-system-{platform.machine()}"
    path = shutil.which(name) or shutil.which(name, path="/usr/bin:/usr/local/bin:/usr/libexec")
    if path is None:
        package = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}.get(platform.machine(), "qemu-system")
        raise BackendUnavailable(f"there is no {name}: apt-get install --no-install-recommends {package}")
    return path


class Before:
    """used: the base was that of a system which has changed since."""

    used = False


_before: contextvars.ContextVar[Before | None] = contextvars.ContextVar("_before", default=None)


@contextlib.contextmanager
def system_as_before() -> Iterator[Before]:
    """Within it, a machine may show the system as it was when one was used last: nothing waits for a new image of it."""
    found = Before()
    token = _before.set(found)
    try:
        yield found
    finally:
        _before.reset(token)


def _base(cache: Cache, progress: Progress, exclude: Sequence[str]) -> Layer:
    before = _before.get()
    if before is not None and cache.get(layers.BASE, layers.base_key(exclude)) is None:
        old = layers.base_before(cache, exclude)
        if old is not None:
            before.used = True
            return old
    return layers.base(cache, progress, exclude=exclude)


def load(cache: Cache | None = None, progress: Progress = SILENT) -> Images:
    """What was set up; the base layer is made again where the system has changed since, which takes a minute
    (`system_as_before` is for those who cannot wait).

    Raises BackendUnavailable when nothing was, or it is damaged.
    """
    cache = cache or Cache.default()
    settings = read(cache)
    if settings is None:
        raise BackendUnavailable(f"the microvm backend is not set up: {_RUN_SETUP}")
    found = kernel.load(cache, settings.kernel)
    base = _base(cache, progress, settings.exclude)
    return Images(cache, found, tools.busybox(cache, progress), base, settings.exclude, progress)


def make(
    cache: Cache,
    progress: Progress,
    *,
    image: str | None = None,
    modules: str | None = None,
    exclude: Sequence[str] | None = None,
    refresh: bool = False,
) -> Images:
    """Make all that is missing (with `refresh`: all), and remember the choices; None stands for what was chosen before.

    Raises IsolationError.
    """
    qemu()
    before = read_or_none(cache) or Settings("")
    if image is None:
        image, modules = before.image, modules or before.modules
    modules = modules or ""
    chosen = tuple(sorted(set(before.exclude if exclude is None else exclude)))
    if image == "":
        found = kernel.fetched(cache, progress, refresh=refresh)
    elif image == "host":
        found = kernel.host(cache, progress, refresh=refresh)
    else:
        directory = Path(modules) if modules else None
        found = kernel.given(cache, Path(image), directory, progress, refresh=refresh)
    busybox = tools.busybox(cache, progress)
    base = layers.base(cache, progress, exclude=chosen, refresh=refresh)
    images = Images(cache, found, busybox, base, chosen, progress)
    layers.environment(cache, progress, exclude=chosen, refresh=refresh)
    images.initramfs()
    write(cache, Settings(found.key, image, modules, chosen))
    return images


def read(cache: Cache) -> Settings | None:
    """None when nothing was set up. Raises BackendUnavailable for settings that cannot be read."""
    try:
        raw = cache.read(SETTINGS)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cache.error(error) from error
    try:
        data: Any = json.loads(raw)
        if data["format"] != _FORMAT:
            raise ValueError("of another version of isolation-kit")
        choice = data["choice"]
        texts = [data["kernel"], choice["kernel"], choice["modules"], *data["exclude"]]
        if not isinstance(data["exclude"], list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("not text where text belongs")
        cache.path(kernel.KIND, data["kernel"])
        return Settings(data["kernel"], choice["kernel"], choice["modules"], tuple(data["exclude"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BackendUnavailable(f"{cache.root / SETTINGS} is damaged ({error}): {_RUN_SETUP}") from error


def read_or_none(cache: Cache) -> Settings | None:
    """As `read`, for who writes new ones anyway."""
    try:
        return read(cache)
    except BackendUnavailable:
        return None


def write(cache: Cache, settings: Settings) -> None:
    data = {
        "format": _FORMAT,
        "kernel": settings.kernel,
        "choice": {"kernel": settings.image, "modules": settings.modules},
        "exclude": list(settings.exclude),
    }
    cache.write(SETTINGS, json.dumps(data, indent=1).encode() + b"\n")
