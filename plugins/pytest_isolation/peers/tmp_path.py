"""pytest's own `tmp_path`: what a test that failed has left in it, is on the host at the same path."""

from __future__ import annotations

import base64
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolation.plain import os
from pytest_isolation.peers.carrier import Carrier, Refused
from pytest_isolation.wire import tmp_paths

_FILES_AT_MOST = 2000  # of one test
_BYTES_AT_MOST = 16 << 20
_FILES_IN_ALL = 100_000  # of one run
_BYTES_IN_ALL = 1 << 30
_NAME_AT_MOST = 255
_DEEPEST = 50

File = tuple[tuple[str, ...], bytes | None]  # names below the directory; content, None for a directory


class TmpPathCarrier(Carrier):
    """Regular files and directories only, readable by their owner, none executable."""

    name = "tmp_path"

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._paths: tmp_paths.TmpPaths | None = None
        self._cut: list[str] = []
        self._only_failed = config.getini("tmp_path_retention_policy") == "failed"
        self._files, self._bytes = _FILES_IN_ALL, _BYTES_IN_ALL
        self._kept: set[str] = set()
        self._full = False

    @classmethod
    def of(cls, config: pytest.Config) -> TmpPathCarrier | None:
        if not config.pluginmanager.hasplugin("tmpdir"):
            return None
        policy = config.getini("tmp_path_retention_policy")
        return cls(config) if policy in ("all", "failed") else None

    def collect(self, item: pytest.Item, phase: str) -> object | None:
        paths = self._of(item)
        top = paths.path_of(item)
        if phase or top is None or not item.stash.get(tmp_paths.failed, False) or not top.is_dir():
            return None
        found: list[list[Any]] = []
        left = _BYTES_AT_MOST
        cut = False
        for parts, path in _walk(top, ()):
            try:
                size = -1 if path.is_dir() else path.stat().st_size
                cut = cut or size > left or len(found) >= _FILES_AT_MOST
                if cut:
                    break
                content = None if size < 0 else base64.b64encode(path.read_bytes()).decode()
            except OSError:
                continue  # the test has made it unreadable, or something removes it meanwhile
            left -= max(0, size)
            found.append([list(parts), content])
        return {"files": found, "cut": cut}

    def check(self, item: pytest.Item, sent: Any) -> tuple[list[File], bool]:
        found: list[File] = []
        total = 0
        if len(sent["files"]) > _FILES_AT_MOST:
            raise Refused("too many files")
        for parts, content in sent["files"]:
            if not isinstance(parts, list) or not 0 < len(parts) <= _DEEPEST or not all(map(_is_name, parts)):
                raise Refused("no path below the directory")
            data = None if content is None else base64.b64decode(content, validate=True)
            total += len(data or b"")
            if total > _BYTES_AT_MOST:
                raise Refused("too much")
            found.append((tuple(parts), data))
        return found, bool(sent["cut"])

    def apply(self, item: pytest.Item, value: tuple[list[File], bool]) -> None:
        files, cut = value
        top = self._of(item).path_of(item)
        wanted = item.stash.get(tmp_paths.failed, False) or not self._only_failed
        if top is None or not wanted or item.nodeid in self._kept:
            return
        self._kept.add(item.nodeid)
        self._files -= len(files)
        self._bytes -= sum(len(content or b"") for _parts, content in files)
        if min(self._files, self._bytes) < 0:
            self._full = True
            return
        if cut:
            self._cut.append(item.nodeid)
        top.mkdir(mode=0o700, exist_ok=True)
        for parts, content in files:
            # Every directory on the way was made here, or is the run's own, so no link is followed.
            path = top.joinpath(*parts)
            try:
                if content is None:
                    path.mkdir(mode=0o700, exist_ok=True)
                else:
                    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                    with open(fd, "wb") as file:
                        file.write(content)
            except OSError:
                continue  # a second run of the same test, or no place left

    def notes(self) -> list[str]:
        full = [f"no more than {_FILES_IN_ALL} files, or {_BYTES_IN_ALL >> 30}G, were kept"] if self._full else []
        return full + [f"of the files of {nodeid}, the first {_BYTES_AT_MOST >> 20}M were kept" for nodeid in self._cut]

    def _of(self, item: pytest.Item) -> tmp_paths.TmpPaths:
        if self._paths is None:
            self._paths = tmp_paths.TmpPaths(self._config, item.session.items)
        return self._paths


def _walk(directory: Path, parts: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Regular files and directories, parents first."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        here = (*parts, entry.name)
        try:
            mode = entry.stat(follow_symlinks=False).st_mode
        except OSError:
            continue
        if stat.S_ISDIR(mode) and len(here) < _DEEPEST:
            yield here, Path(entry.path)
            yield from _walk(Path(entry.path), here)
        elif stat.S_ISREG(mode):
            yield here, Path(entry.path)


def _is_name(part: object) -> bool:
    return (
        isinstance(part, str) and part not in ("", ".", "..") and "/" not in part and "\0" not in part
        and len(os.fsencode(part)) <= _NAME_AT_MOST
    )  # fmt: skip
