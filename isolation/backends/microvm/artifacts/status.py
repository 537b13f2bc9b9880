"""What is in the cache: for `isolation microvm status` and `clean`."""

from __future__ import annotations

import shutil
from typing import Any

from isolation.backends.microvm.artifacts import kernel, layers, setup
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.progress import megabytes
from isolation.errors import IsolationError
from isolation.plain import subprocess, time


def collect(cache: Cache) -> dict[str, Any]:
    """As `isolation microvm status --json` prints it; sizes are allocated bytes, times seconds since the epoch.

    {"ready", "problem", "cache", "qemu", "kernel", "base": {"current", …} | None, "exclude", "entries": […], "size"}
    """
    found: dict[str, Any] = {"ready": False, "problem": "", "cache": str(cache.root)}
    found |= {"qemu": None, "kernel": None, "base": None, "exclude": []}
    problems = []
    try:
        program = setup.qemu()
        found["qemu"] = {"path": program, "version": _version(program)}
    except IsolationError as error:
        problems.append(str(error))
    try:
        settings = setup.read(cache)
        if settings is None:
            problems.append("not set up: run 'isolation microvm setup'")
        else:
            found["exclude"] = list(settings.exclude)
            image = kernel.load(cache, settings.kernel)
            found["kernel"] = {
                "release": image.release, "source": image.source, "path": str(image.image), "pvh": image.pvh,
                "modules": len(image.modules),
            }  # fmt: skip
            found["base"] = _base(cache, settings, problems)
    except IsolationError as error:
        problems.append(str(error))
    found["problem"] = "; ".join(problems)
    found["ready"] = not problems
    entries = cache.entries()
    found["entries"] = [
        {"kind": entry.kind, "key": entry.key, "size": entry.size, "used": round(entry.used, 3)} for entry in entries
    ]
    found["size"] = sum(entry.size for entry in entries)
    return found


def _base(cache: Cache, settings: setup.Settings, problems: list[str]) -> dict[str, Any] | None:
    key = layers.base_key(settings.exclude)
    existing = cache.entries(layers.BASE, sizes=False)
    current = any(entry.key == key for entry in existing)
    if not current:
        problems.append(
            "the system has changed since: run 'isolation microvm setup'"
            if existing
            else "the system's image is not made: run 'isolation microvm setup'"
        )
        return {"current": False, "key": key} if existing else None
    layer = layers.load(cache, layers.BASE, key)
    return {"current": True, "key": key, "path": str(layer.path), "size": layer.size, "entries": layer.entries}


def as_text(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"microvm    {'ready' if found['ready'] else 'not ready: ' + found['problem']}"]
    lines.append(f"cache      {found['cache']}: {megabytes(found['size'])}")
    if found["qemu"]:
        lines.append(f"qemu       {found['qemu']['version']} ({found['qemu']['path']})")
    if found["kernel"]:
        lines.append(f"kernel     {found['kernel']['release']} ({found['kernel']['source']})")
    if found["exclude"]:
        lines.append("excluded   " + " ".join(found["exclude"]))
    if found["entries"]:
        lines.append("")
    for entry in found["entries"]:
        size, used = megabytes(entry["size"]), _ago(entry["used"])
        lines.append(f"{entry['kind']:<12} {size:>10}  used {used:<14} {entry['key'][:32]}")
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def clean(cache: Cache, *, everything: bool) -> tuple[int, int]:
    """Remove what the last setup does not need, or `everything`; returns (bytes freed, entries in use, which stay)."""
    needed: set[tuple[str, str]] = set()
    settings = None if everything else setup.read_or_none(cache)
    if settings is not None:
        needed = {(kernel.KIND, settings.kernel), (layers.BASE, layers.base_key(settings.exclude))}
    freed = stay = 0
    for entry in cache.entries():
        if (entry.kind, entry.key) in needed or (settings is not None and entry.kind == "tools"):
            continue
        if cache.remove(entry.kind, entry.key):
            freed += entry.size
        else:
            stay += 1
    cache.sweep()
    if everything:
        freed += _clear(cache, stay)
    return freed, stay


def _clear(cache: Cache, stay: int) -> int:
    """Settings and apt's lists, too; and the directory itself, where nothing is in use."""
    with cache.exclusive("apt"):
        apt = cache.root / "apt"
        freed = sum(path.lstat().st_blocks * 512 for path in apt.rglob("*")) if apt.is_dir() else 0
        shutil.rmtree(apt, ignore_errors=True)
    cache.discard(setup.SETTINGS)
    if not stay:
        cache.remove_empty()
    return freed


def _version(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    return (done.stdout.splitlines() or ["does not run"])[0].removeprefix("QEMU emulator version ")


def _ago(when: float) -> str:
    seconds = max(0, time.time() - when)
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"
