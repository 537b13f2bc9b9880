"""Taking in what a sandbox leaves, from somebody who may say anything: frames of the wire, a strict order, bounded sizes.

The guest chooses the content, and names below a directory that the user has named; every name is checked, and so is, by
the kind of the artefact, what may stand there. What is refused is said, and the rest still comes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from isolation.errors import SandboxClosed, WireError
from isolation.sandbox import PIPE, Process, Sandbox
from isolation.units import format_size
from isolation.wire import Decoder, Message
from pytest_isolation.sealed.arguments import Artefact, Kind
from pytest_isolation.sealed.collect import CHUNK, DEPTH
from pytest_isolation.sealed.places import BadPlace, Places

FILE_AT_MOST: Final = 256 << 20
FILES_AT_MOST: Final = 20_000
_CACHE_FILE_AT_MOST: Final = 16 << 20  # held in memory to be checked
_SECONDS: Final = 300.0
_SILENT_SECONDS: Final = 30.0
_JSON_AT_MOST: Final = 64 << 10
_SAID_AT_MOST: Final = 5  # of each kind, for one artefact
_NAME_AT_MOST: Final = 255

_WHY: Final = {
    "link": "a symbolic link",
    "fifo": "a FIFO",
    "socket": "a socket",
    "device": "a device",
    "unreadable": "not readable",
    "other": "no regular file",
    "name": "named, or nested, as nothing that comes out may be",
    "no JSON": "no JSON, as pytest's cache is",
    "large": "too large",
    "many": "too many",
    "directory": "a directory, where a file was asked for",
    "file": "a file, where a directory was asked for",
}

# In a directory, nobody has named these one by one; and each is executed, or obeyed, by something that is run beside it.
_CODE_SUFFIXES: Final = (
    ".py", ".pyc", ".pyo", ".pyd", ".pyw", ".pyx", ".pyz", ".pth", ".so", ".egg", ".egg-link", ".whl", ".zip", ".sh",
    ".bash", ".pl", ".rb", ".mk", ".cfg", ".ini", ".toml", ".service", ".desktop", ".ipynb", ".pkl", ".pickle",
)  # fmt: skip
_CODE_NAMES: Final = frozenset(
    ".coveragerc .envrc .git .gitattributes .gitconfig .gitmodules .hg .svn .idea .vscode .direnv .mailcap .netrc .profile "
    ".bashrc .ssh __pycache__ conftest makefile gnumakefile justfile dockerfile jenkinsfile noxfile tasks.json".split()
)
_CACHE_OWN: Final = ("README.md", ".gitignore", "CACHEDIR.TAG")


class Stopped(Exception):
    """No more is taken from this guest; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What to tell: `failures` are things that were asked for and are not there, `notes` are not worth an exit code."""

    failures: tuple[str, ...]
    notes: tuple[str, ...]


def bring_out(
    box: Sandbox, python: str, kit: str, wanted: Sequence[Artefact], places: Places, limit: int, *, mirror_cache: bool
) -> Outcome:
    """Write what `box` has of `wanted` to the host. `kit` is where the inside finds these packages."""
    receiver = _Receiver(wanted, places, limit)
    order = {
        "kit": kit,
        "wanted": [artefact.path for artefact in wanted],
        "size": min(FILE_AT_MOST, limit),
        "total": limit,
        "count": FILES_AT_MOST,
    }
    program = f"{kit}/pytest_isolation/sealed/collect.py"
    process = box.popen([python, "-I", "-S", program, json.dumps(order)], stdout=PIPE, cwd="/")
    try:
        _receive(process, receiver)
    except (Stopped, WireError) as error:
        receiver.failures.append(f"the rest of what was asked for stays inside: {error}")
    finally:
        receiver.abandon()
        with contextlib.suppress(SandboxClosed):
            process.kill()
        process.close()
    receiver.summarize()
    if mirror_cache and receiver.ended:
        _mirror_cache(wanted, receiver, places)
    return Outcome(tuple(receiver.failures), tuple(receiver.notes))


def _receive(process: Process, receiver: _Receiver) -> None:
    assert process.stdout is not None
    fd = process.stdout.fileno()
    os.set_blocking(fd, False)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    decoder = Decoder(max_json=_JSON_AT_MOST, max_data=CHUNK)
    deadline = time.monotonic() + _SECONDS
    while not receiver.ended:
        if not poller.poll(_SILENT_SECONDS * 1000):
            raise Stopped(f"nothing came for {_SILENT_SECONDS:g}s")
        if time.monotonic() > deadline:
            raise Stopped(f"it did not come within {_SECONDS:g}s")
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            continue
        if not data:
            raise Stopped("the program that sends it ended too early")
        decoder.feed(data)
        while not receiver.ended and (message := decoder.next_message()) is not None:
            receiver.take(message)


def _mirror_cache(wanted: Sequence[Artefact], receiver: _Receiver, places: Places) -> None:
    """After --cache-clear, what was in the cache before is not to come back with the next run."""
    for number, artefact in enumerate(wanted):
        if artefact.kind is Kind.CACHE:
            kept = [parts[1:] for parts in receiver.written[number] if parts[0] == "v"]
            with contextlib.suppress(BadPlace):
                places.keep_only(os.path.join(artefact.path, "v"), kept)


class _Receiver:
    """The messages of one collection, in the order in which they may come."""

    def __init__(self, wanted: Sequence[Artefact], places: Places, limit: int) -> None:
        self.ended = False
        self.failures: list[str] = []
        self.notes: list[str] = []
        self.written: list[set[tuple[str, ...]]] = [set() for _ in wanted]
        self._wanted = wanted
        self._places = places
        self._limit = limit
        self._total = self._files = self._messages = 0
        self._refused: Counter[tuple[int, str]] = Counter()
        self._code: Counter[int] = Counter()
        self._current: _Incoming | None = None

    def take(self, message: Message) -> None:
        """Raises Stopped for anything that an honest sender does not send."""
        self._messages += 1
        if self._messages > 4 * FILES_AT_MOST + self._limit // CHUNK * 2 + 1000:
            raise Stopped("too many messages")
        data = message.pop("data", b"")
        match message:
            case {"more": True} if self._current is not None:
                self._more(self._current, data)
            case {"close": True} if self._current is not None:
                self._close(self._current)
            case {"file": number, "path": path} if self._current is None:
                self._open(self._number(number), _parts(path))
            case {"refused": number, "path": path, "why": why} if self._current is None:
                self._refuse(self._number(number), _parts(path), why if isinstance(why, str) else "")
            case {"absent": number} if self._current is None:
                self._number(number)
            case {"end": True} if self._current is None:
                self.ended = True
            case _:
                raise Stopped("the program that sends it does not keep to the order")

    def _number(self, number: object) -> int:
        if type(number) is not int or not 0 <= number < len(self._wanted):
            raise Stopped("it is of an artefact that nobody asked for")
        return number

    def _open(self, number: int, parts: tuple[str, ...]) -> None:
        artefact = self._wanted[number]
        self._files += 1
        if self._files > FILES_AT_MOST:
            raise Stopped(f"more than {FILES_AT_MOST} files")
        why = _objection(artefact.kind, parts)
        if why == "code":
            self._code[number] += 1
        elif why:
            self._refuse(number, () if why == "directory" else parts, why)
        incoming = self._current = _Incoming(number, parts, checked=artefact.kind is Kind.CACHE and parts[:1] == ("v",))
        if not why and parts in self.written[number]:
            raise Stopped("the same file twice")
        if not why and not incoming.checked:
            self._guard(incoming, lambda: incoming.open(self._places, self._path(incoming)))
        incoming.wanted = incoming.wanted and not why

    def _more(self, incoming: _Incoming, data: bytes) -> None:
        self._total += len(data)
        if self._total > self._limit:
            raise Stopped(f"more than {format_size(self._limit)} (raise --export-limit)")
        incoming.size += len(data)
        if incoming.wanted:
            if incoming.size > (_CACHE_FILE_AT_MOST if incoming.checked else FILE_AT_MOST):
                self._refuse(incoming.number, incoming.parts, "large")
                incoming.abandon()
            else:
                self._guard(incoming, lambda: incoming.write(data))

    def _close(self, incoming: _Incoming) -> None:
        self._current = None
        if incoming.wanted and incoming.checked:
            try:
                json.loads(bytes(incoming.held))
            except (ValueError, RecursionError):
                self._refuse(incoming.number, incoming.parts, "no JSON")
                return
            self._guard(incoming, lambda: incoming.open(self._places, self._path(incoming)))
            self._guard(incoming, lambda: incoming.flush())
        self._guard(incoming, lambda: incoming.finish())
        if incoming.wanted:
            self.written[incoming.number].add(incoming.parts)

    def _guard(self, incoming: _Incoming, action: Callable[[], None]) -> None:
        """What the host's file system refuses is one artefact's misfortune."""
        if not incoming.wanted:
            return
        try:
            action()
        except (BadPlace, OSError) as error:
            incoming.abandon()
            said = str(error) if isinstance(error, BadPlace) else f"{self._path(incoming)}: {error.strerror}"
            if self._wanted[incoming.number].kind is not Kind.CACHE:
                self._say(incoming.number, "host", said)
            elif not self.notes:
                self.notes.append(f"note: the cache cannot be written: {said}")  # no more than a warning of pytest's, too

    def _path(self, incoming: _Incoming) -> str:
        return os.path.join(self._wanted[incoming.number].path, *incoming.parts)

    def _refuse(self, number: int, parts: tuple[str, ...], why: str) -> None:
        path = os.path.join(self._wanted[number].path, *parts)
        why = why if why in _WHY else "other"
        if why == "many":
            reason = f"it and what follows are more than {FILES_AT_MOST} files, or {format_size(self._limit)}"
            self._say(number, why, f"{path} stays inside: {reason} (--export-limit)")
        elif why == "large":
            most = _CACHE_FILE_AT_MOST if self._wanted[number].kind is Kind.CACHE else min(FILE_AT_MOST, self._limit)
            self._say(number, why, f"{path} stays inside: it is larger than {format_size(most)}")
        else:
            self._say(number, why, f"{path} stays inside: it is {_WHY[why]}")

    def _say(self, number: int, why: str, message: str) -> None:
        self._refused[number, why] += 1
        if self._refused[number, why] <= (1 if why == "directory" else _SAID_AT_MOST):
            self.failures.append(f"{self._wanted[number].option}: {message}")

    def abandon(self) -> None:
        """Nothing more will come: a file of which a part is there is not written."""
        if self._current is not None:
            self._current.abandon()
            self._current = None

    def summarize(self) -> None:
        """Add what was too much to say one by one, and what never came."""
        for number, artefact in enumerate(self._wanted):
            if artefact.required and self.ended and not self.written[number] and not self._has_refused(number):
                self.failures.append(f"{artefact.option}: {artefact.path} was not written")
        for (number, why), count in self._refused.items():
            if count > _SAID_AT_MOST and why != "directory":
                self.failures.append(f"{self._wanted[number].option}: {count - _SAID_AT_MOST} more like the last one")
        for number, count in self._code.items():
            artefact = self._wanted[number]
            if artefact.kind is Kind.CACHE:
                continue  # nobody asked for more
            self.notes.append(
                f"note: {artefact.option}: {count} file{'s' if count > 1 else ''} in {artefact.path} stayed inside, which "
                "something could execute; --export names such a file itself"
            )

    def _has_refused(self, number: int) -> bool:
        return number in self._code or any(refused == number for refused, _why in self._refused)


class _Incoming:
    """One file on its way. With `checked` it is held in memory until all of it is there."""

    def __init__(self, number: int, parts: tuple[str, ...], *, checked: bool) -> None:
        self.number = number
        self.parts = parts
        self.checked = checked
        self.wanted = True
        self.size = 0
        self.held = bytearray()
        self._fd = -1
        self._stack = contextlib.ExitStack()

    def open(self, places: Places, path: str) -> None:
        self._fd = self._stack.enter_context(places.file(path))

    def write(self, data: bytes) -> None:
        if self.checked:
            self.held += data
            return
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def flush(self) -> None:
        self.checked = False
        self.write(bytes(self.held))

    def finish(self) -> None:
        self._stack.close()

    def abandon(self) -> None:
        """Whatever was written of it is removed."""
        self.wanted = False
        try:
            self._stack.__exit__(Stopped, Stopped(), None)
        except (Stopped, OSError):
            pass


def _parts(path: object) -> tuple[str, ...]:
    """Names below an artefact, empty for itself. Raises Stopped for what is no list of names."""
    if not isinstance(path, list) or len(path) > DEPTH or not all(isinstance(part, str) for part in path):
        raise Stopped("a path that is none")
    for part in path:
        if part in ("", ".", "..") or "/" in part or not part.isprintable() or len(os.fsencode(part)) > _NAME_AT_MOST:
            raise Stopped("a file has a name that is none, or cannot be shown")
    return tuple(path)


def _objection(kind: Kind, parts: tuple[str, ...]) -> str:
    """Why there may be no such file in an artefact of this kind; empty when there may."""
    if not parts:
        return "file" if kind in (Kind.TREE, Kind.CACHE) else ""
    if kind is Kind.FILE:
        return "directory"
    if any(_is_code(part) for part in parts):
        return "code"
    if kind is Kind.CACHE and parts[0] != "v" and parts not in {(name,) for name in _CACHE_OWN}:
        return "code"  # `d/`: what plug-ins keep there is theirs, and may be a pickle
    return ""


def _is_code(name: str) -> bool:
    """Or is taken for an option by a program that is given all names of a directory."""
    folded = name.casefold()
    return folded.startswith(("-", "conftest", "sitecustomize")) or folded.endswith(_CODE_SUFFIXES) or folded in _CODE_NAMES
