"""Walking directories of the host, and writing what is found there as one tar archive.

The host's trees are not trusted: names hold any byte, and what lies there changes while it is read. So every directory is
opened without following links, relative to the one before; a file is opened before its size is believed; and exactly that
size is written, whatever happens to the file meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_DEEPEST = 300  # directories in each other; every one is an open descriptor
_NAMED = 20  # how many of the paths that were left out are told
_MOST_SECONDS = (1 << 32) - 1  # squashfs keeps times in 32 bits, unsigned
_BLOCK = 512
_BUFFER = 1 << 18
_SMALL = 1 << 16  # bytes; larger files go from the page cache to the pipe without passing through this process
_ZEROS = bytes(1 << 16)
_KEPT = frozenset((stat.S_IFDIR, stat.S_IFLNK, stat.S_IFREG))
_GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ESTALE)  # removed, or replaced by something else
# File systems that are windows into the kernel, or mount on access.
_VIRTUAL = frozenset(
    "autofs binfmt_misc bpf cgroup cgroup2 configfs debugfs devpts devtmpfs efivarfs fusectl hugetlbfs mqueue nsfs "
    "proc pstore rpc_pipefs securityfs selinuxfs sysfs tracefs".split()
)


@dataclass(frozen=True)
class Rules:
    """public: only what everyone may read; without: paths of the host that are left out, with all beneath;
    skipped: device and inode of directories that are."""

    public: bool = False
    without: frozenset[bytes] = frozenset()
    skipped: frozenset[tuple[int, int]] = frozenset()


@dataclass
class Report:
    """What happened while a tree was read. `left_out` names the first few of `unreadable` paths."""

    entries: int = 0
    size: int = 0
    unreadable: int = 0
    changed: int = 0
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, path: bytes) -> None:
        self.unreadable += 1
        if len(self.left_out) < _NAMED:
            self.left_out.append(os.fsdecode(path))


@dataclass(frozen=True, slots=True)
class Found:
    """One entry of a tree: its path on the host, what lstat(2) says, and where to open it while the walk stands here."""

    path: bytes
    status: os.stat_result
    parent: int
    name: bytes


def walk(source: str, rules: Rules, report: Report) -> Iterator[Found]:
    """`source` (absolute, without symlinks) and everything beneath it, each directory before what lies in it, in the order
    of their names. Sockets, fifos, devices, and file systems that are windows into the kernel are not in it."""
    virtual = _virtual_devices()
    root = os.fsencode(source)
    above, name = os.path.dirname(root), os.path.basename(root) or b"."
    # One frame for each directory that the walk stands in: its descriptor, its path with a slash, its entries still to come.
    # Not a generator for each: every entry would pass through all of them.
    frames: list[tuple[int, bytes, Iterator[tuple[bytes, os.stat_result]]]] = []
    try:
        fd = os.open(above, _DIRECTORY & ~os.O_NOFOLLOW)
        frames.append((fd, above.rstrip(b"/") + b"/", iter(())))
        try:
            frames[0] = (fd, frames[0][1], iter([(name, os.stat(name, dir_fd=fd, follow_symlinks=False))]))
        except FileNotFoundError:
            report.changed += 1
        while frames:
            parent, prefix, entries = frames[-1]
            for name, status in entries:
                path = prefix + name if name != b"." else b"/"
                kind = stat.S_IFMT(status.st_mode)
                if kind not in _KEPT or path in rules.without:
                    continue
                if kind != stat.S_IFDIR:
                    if rules.public and kind == stat.S_IFREG and not status.st_mode & 0o004:
                        report.leave_out(path)
                    else:
                        yield Found(path, status, parent, name)
                    continue
                if status.st_dev in virtual or (status.st_dev, status.st_ino) in rules.skipped:
                    continue
                found = Found(path, status, parent, name)
                yield found
                opened = _enter(found, rules, report, len(frames))
                if opened is not None:
                    frames.append((opened, path.rstrip(b"/") + b"/", _entries(opened, path, report)))
                    break
            else:
                os.close(frames.pop()[0])
    finally:
        for fd, _, _ in frames:
            os.close(fd)


def _enter(found: Found, rules: Rules, report: Report, depth: int) -> int | None:
    """A descriptor of a directory, unless it may not be read, or is gone by now."""
    if depth > _DEEPEST or (rules.public and found.status.st_mode & 0o005 != 0o005):
        report.leave_out(found.path)
        return None
    try:
        fd = os.open(found.name, _DIRECTORY, dir_fd=found.parent)
    except OSError as error:
        if error.errno in _GONE:
            report.changed += 1
        else:
            report.leave_out(found.path)
        return None
    if not os.path.samestat(os.fstat(fd), found.status):
        report.changed += 1
    return fd


def _entries(fd: int, path: bytes, report: Report) -> Iterator[tuple[bytes, os.stat_result]]:
    """(name, status), sorted by name."""
    entries = []
    with os.scandir(fd) as listing:
        for entry in listing:
            try:
                entries.append((os.fsencode(entry.name), entry.stat(follow_symlinks=False)))
            except OSError as error:
                if error.errno in _GONE:
                    report.changed += 1
                else:
                    report.leave_out(os.path.join(path, os.fsencode(entry.name)))
    entries.sort(key=_first)
    return iter(entries)


def _first(pair: tuple[bytes, os.stat_result]) -> bytes:
    return pair[0]


def digest(sources: Iterable[str], rules: Rules) -> str:
    """Tells whether trees have changed, by all that lstat(2) says of every entry but its access time. SHA-256, hex.

    What it cannot notice: content that was changed with its size and mtime put back.
    """
    made = hashlib.sha256()
    report = Report()
    for source in sources:
        made.update(b"\0\0")
        for found in walk(source, rules, report):
            s = found.status
            made.update(
                b"%b\0%x %x %x %x %x %x %x\0"
                % (found.path, s.st_mode, s.st_uid, s.st_gid, s.st_mtime_ns & (1 << 64) - 1,
                   s.st_size if not stat.S_ISDIR(s.st_mode) else 0, s.st_ino if s.st_nlink > 1 else 0, s.st_nlink)
            )  # fmt: skip
            if stat.S_ISLNK(s.st_mode):
                try:
                    made.update(os.readlink(found.name, dir_fd=found.parent))
                except OSError:
                    made.update(b"gone")
    return made.hexdigest()


class Tar:
    """Writes a tar archive (GNU's variant: names of any length and any bytes, numbers of any size) to a descriptor."""

    def __init__(self, fd: int, report: Report) -> None:
        self._fd = fd
        self._report = report
        self._buffer = bytearray()
        self._links: dict[tuple[int, int], bytes] = {}
        self._seen: set[bytes] = set()

    def directory(self, path: str, mode: int, mtime: int = 0) -> None:
        """A directory of root's, unless there is one already, and those above it."""
        raw = os.fsencode(path).strip(b"/")
        if raw and raw not in self._seen:
            self.directory(os.path.dirname(os.fsdecode(raw)), 0o755)
            self._seen.add(raw)
            self._header(raw, mode, 0, 0, 0, mtime, b"5")

    def symlink(self, path: str, to: str) -> None:
        raw = os.fsencode(path).strip(b"/")
        if raw not in self._seen:
            self.directory(os.path.dirname(os.fsdecode(raw)), 0o755)
            self._seen.add(raw)
            self._header(raw, 0o777, 0, 0, 0, 0, b"2", os.fsencode(to))

    def content(self, path: str, data: bytes, mode: int = 0o644, mtime: int = 0) -> None:
        """A regular file of root's."""
        raw = os.fsencode(path).strip(b"/")
        if raw in self._seen:
            return
        self.directory(os.path.dirname(os.fsdecode(raw)), 0o755)
        self._seen.add(raw)
        self._header(raw, mode, 0, 0, len(data), mtime, b"0")
        self._buffer += data + bytes(-len(data) % _BLOCK)
        self._flush(_BUFFER)

    def tree(self, source: str, target: str, rules: Rules) -> Iterator[Report]:
        """All of `source` at `target`; yields now and then, for whoever shows progress."""
        cut = len(os.fsencode(source).rstrip(b"/"))
        base = os.fsencode(target).strip(b"/")
        if base:
            self.directory(os.path.dirname(os.fsdecode(base)), 0o755)
        report = self._report
        for found in walk(source, rules, report):
            name = (base + found.path[cut:]).strip(b"/")
            if name and name not in self._seen:
                self._seen.add(name)
                self._add(found, name)
                report.entries += 1
                if not report.entries % 500:
                    yield report
        yield report

    def close(self) -> None:
        """The end of the archive."""
        self._buffer += bytes(2 * _BLOCK)
        self._flush(0)

    def _add(self, found: Found, name: bytes) -> None:
        status = found.status
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            self._status_header(name, status, 0, b"5")
            return
        if kind == stat.S_IFLNK:
            try:
                to = os.readlink(found.name, dir_fd=found.parent)
            except OSError:
                self._report.changed += 1
                return
            self._status_header(name, status, 0, b"2", to)
            return
        identity = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and identity in self._links:
            self._status_header(name, status, 0, b"1", self._links[identity])
            return
        try:
            fd = os.open(found.name, _FILE, dir_fd=found.parent)
        except OSError as error:
            if error.errno in _GONE or error.errno == errno.ENXIO:
                self._report.changed += 1
            else:
                self._report.leave_out(found.path)
            return
        try:
            self._file(fd, name, found)
        finally:
            os.close(fd)

    def _file(self, fd: int, name: bytes, found: Found) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            self._report.changed += 1
            return
        if not os.path.samestat(status, found.status):
            self._report.changed += 1  # another file than was looked at: what may be read of that was not asked
            return
        size = status.st_size
        try:
            start = os.read(fd, _SMALL) if size else b""  # an unreadable file (EIO, …) is met here, before its header is out
        except OSError:
            self._report.leave_out(found.path)
            return
        if status.st_nlink > 1:
            self._links[(status.st_dev, status.st_ino)] = name
        self._report.size += size
        if status.st_blocks * _BLOCK + _SMALL < size:  # holes; or a file system that compresses
            pieces = _data(fd, size)
            if len(pieces) > 1:
                self._sparse(fd, name, status, pieces)
                return
            os.lseek(fd, len(start), os.SEEK_SET)
        self._status_header(name, status, size, b"0")
        start = start[:size]
        self._buffer += start
        left = size - len(start)
        if left:
            self._flush(0)
            left = self._send(fd, left)
            if left:
                self._report.changed += 1
                self._zeros(left)
        self._buffer += bytes(-size % _BLOCK)
        self._flush(_BUFFER)

    def _sparse(self, fd: int, name: bytes, status: os.stat_result, pieces: list[tuple[int, int]]) -> None:
        """A file with holes, as pieces of data (offset, length); in GNU's old format (tar(5)), in which a header has room
        for four pieces, and each block after it for 21."""
        size = sum(length for _, length in pieces)
        mapped = [_number(offset, 12) + _number(length, 12) for offset, length in pieces]
        rest = [mapped[at : at + 21] for at in range(4, len(mapped), 21)]
        tail = bytes(41) + b"".join(mapped[:4]).ljust(96, b"\0") + (b"\1" if rest else b"\0") + _number(status.st_size, 12)
        self._status_header(name, status, size, b"S", tail=tail)
        for number, block in enumerate(rest):
            more = b"\1" if number < len(rest) - 1 else b"\0"
            self._buffer += b"".join(block).ljust(504, b"\0") + more + bytes(7)
        self._flush(0)
        for offset, length in pieces:
            os.lseek(fd, offset, os.SEEK_SET)
            left = self._send(fd, length)
            if left:
                self._report.changed += 1
                self._zeros(left)
        self._buffer += bytes(-size % _BLOCK)

    def _send(self, fd: int, left: int) -> int:
        """Copy `left` bytes, or what there is; returns how many were missing."""
        while left:
            try:
                sent = os.sendfile(self._fd, fd, None, min(left, 1 << 30))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    if error.errno == errno.EPIPE:
                        raise
                    return left
                data = os.read(fd, min(left, _BUFFER))  # a file system that cannot splice
                sent = len(data)
                self._write(data)
            if not sent:
                return left
            left -= sent
        return 0

    def _zeros(self, count: int) -> None:
        while count:
            self._write(_ZEROS[: min(count, len(_ZEROS))])
            count -= min(count, len(_ZEROS))

    def _status_header(
        self, name: bytes, status: os.stat_result, size: int, kind: bytes, to: bytes = b"", tail: bytes = b""
    ) -> None:
        mode = stat.S_IMODE(status.st_mode)
        self._header(name, mode, status.st_uid, status.st_gid, size, int(status.st_mtime), kind, to, tail)

    def _header(
        self,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        size: int,
        mtime: int,
        kind: bytes,
        to: bytes = b"",
        tail: bytes = b"",
    ) -> None:
        if len(to) > 100:
            self._long(b"K", to)
        if len(name) > 100:
            self._long(b"L", name)
        mtime = min(max(mtime, 0), _MOST_SECONDS)
        self._record(name, mode, uid, gid, size, mtime, kind, to, tail)
        self._flush(_BUFFER)

    def _long(self, kind: bytes, text: bytes) -> None:
        text += b"\0"
        self._record(b"././@LongLink", 0, 0, 0, len(text), 0, kind, b"")
        self._buffer += text + bytes(-len(text) % _BLOCK)

    def _record(
        self, name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, kind: bytes, to: bytes, tail: bytes = b""
    ) -> None:
        """`tail` is what a sparse file's header has after the owner's names and device numbers."""
        record = b"%b%b%b%b%b%b        %b%bustar  \0" % (
            name[:100].ljust(100, b"\0"), _number(mode, 8), _number(uid, 8), _number(gid, 8), _number(size, 12),
            _number(mtime, 12), kind, to[:100].ljust(100, b"\0"),
        )  # fmt: skip
        if tail:
            record += bytes(80) + tail
        checksum = b"%06o\0 " % sum(record)
        self._buffer += record[:148] + checksum + record[156:] + bytes(_BLOCK - len(record))

    def _flush(self, above: int) -> None:
        if len(self._buffer) > above:
            self._write(self._buffer)
            self._buffer = bytearray()

    def _write(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]


def _data(fd: int, size: int) -> list[tuple[int, int]]:
    """Where a file (of more than two blocks) has data, and how much: (offset, length) of every piece (lseek(2), SEEK_DATA).

    Its first and its last block count as data, and pieces consist of whole blocks, but for the file's end: mksquashfs reads
    past the end of a map that is otherwise (sparse_reader in its tar.c, 4.5 to 4.6).
    """
    last = (size - 1) // _BLOCK * _BLOCK
    pieces = [(0, _BLOCK)]
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError:
            break  # ENXIO: only a hole is left
        _add_piece(pieces, start // _BLOCK * _BLOCK, min(-(-at // _BLOCK) * _BLOCK, size))
    _add_piece(pieces, last, size)
    return pieces


def _add_piece(pieces: list[tuple[int, int]], start: int, end: int) -> None:
    before, length = pieces[-1]
    if start <= before + length:
        if end > before + length:
            pieces[-1] = (before, end - before)
    elif start < end:
        pieces.append((start, end - start))


def _number(value: int, width: int) -> bytes:
    """Octal, or where that has not digits enough, GNU's base-256."""
    if value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return b"\x80" + value.to_bytes(width - 1, "big")


def _virtual_devices() -> frozenset[int]:
    """Device numbers of file systems that are never part of a tree (proc(5): mountinfo)."""
    found = set()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.split(" ", 1)[0] in _VIRTUAL:
                major, minor = before.split(" ")[2].split(":")
                found.add(os.makedev(int(major), int(minor)))
    return frozenset(found)
