"""Inside, when pytest has ended: sends what was asked for to standard output, as frames of the wire.

Run as `python -I -S collect.py ORDER`, with the guest's rights: it can read nothing that the suite could not. The host
believes nothing of what it says; that it looks for itself only makes the messages better.

    {"file": number, "path": […]}  {"more": true} + data …  {"close": true}     a regular file, by its number in the order
    {"refused": number, "path": […], "why": word}                               something that is none
    {"absent": number}
    {"end": true}
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any

CHUNK = 1 << 18
DEPTH = 32
_KINDS = {
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def main(order: dict[str, Any]) -> None:
    """Send everything that `order` names: {"wanted": [[path, …], …], "size": …, "total": …, "count": …}."""
    sys.path.insert(0, order["kit"])
    from isolation.wire import encode

    out = os.fdopen(os.dup(1), "wb")
    left = [order["total"], order["count"]]
    for number, path in enumerate(order["wanted"]):
        out.writelines(encode(*frame) for frame in _artefact(number, path, order["size"], left))
    out.write(encode({"end": True}))
    out.flush()


def _artefact(number: int, top: str, size: int, left: list[int]) -> Iterator[tuple[dict[str, Any], bytes]]:
    if not os.path.lexists(top):
        yield {"absent": number}, b""
        return
    for path, parts in _files(top, []):
        if len(parts) > DEPTH or not all(part.isprintable() for part in parts):
            yield {"refused": number, "path": [], "why": "name"}, b""
            continue
        try:
            if os.path.realpath(os.path.dirname(path)) != os.path.dirname(path):
                raise _Refused("link")  # a directory above it
            yield from _file(number, path, parts, size, left)
        except _Refused as refused:
            yield {"refused": number, "path": parts, "why": refused.why}, b""
            if refused.why == "many":
                return
        except OSError:
            yield {"refused": number, "path": parts, "why": "unreadable"}, b""


class _Refused(Exception):
    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


def _files(path: str, parts: list[str]) -> Iterator[tuple[str, list[str]]]:
    """All that is no directory, depth first, in a stable order."""
    todo = [(path, parts)]
    while todo:
        path, parts = todo.pop()
        try:
            names = sorted(os.listdir(path)) if stat.S_ISDIR(os.lstat(path).st_mode) else None
        except OSError:
            names = None
        if names is None:
            yield path, parts
        else:
            todo += [(os.path.join(path, name), [*parts, name]) for name in reversed(names)]


def _file(number: int, path: str, parts: list[str], size: int, left: list[int]) -> Iterator[tuple[dict[str, Any], bytes]]:
    kind = stat.S_IFMT(os.lstat(path).st_mode)
    if kind != stat.S_IFREG:
        raise _Refused(_KINDS.get(kind, "unreadable"))
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb", buffering=0) as file:
        length = os.fstat(fd).st_size
        if length > size:
            raise _Refused("large")
        if length > left[0] or not left[1]:
            raise _Refused("many")
        left[0] -= length
        left[1] -= 1
        yield {"file": number, "path": parts}, b""
        while length > 0 and (data := file.read(min(CHUNK, length))):
            length -= len(data)
            yield {"more": True}, data
        yield {"close": True}, b""


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
