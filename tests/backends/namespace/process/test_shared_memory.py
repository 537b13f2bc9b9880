"""Memory that was shared before the fork: each fork has its own, with the content it had, and shares it with its children."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from isolation import Limits, Mount, SandboxSpec, registry
from isolation.backends.namespace.process import shared_memory as sharing
from isolation.guest import Guest
from isolation.template import Template

pytestmark = pytest.mark.usefixtures("nothing_left")
PAGE = mmap.PAGESIZE


def here(function: Callable[[Guest], object], **fields: object) -> Template:
    spec = SandboxSpec(**fields)  # type: ignore[arg-type]
    return registry.get("namespace").template(spec, function, None)  # type: ignore[arg-type]


def each(work: Callable[[], object], *, deep: bool) -> Callable[[Guest], None]:
    """Answers, in each fork, with what `work` returns: in a fork of the host's memory, or in one of a fork."""

    def payload(guest: Guest) -> None:
        for _job in guest.forks():
            for _deeper in guest.forks() if deep else [None]:
                guest.send({"found": work()})

    return payload


def twice(payload: Callable[[Guest], None], *, deep: bool, **fields: object) -> list[object]:
    """What two forks say, one after the other."""
    with here(payload, **fields) as root:
        template: Template | None = root
        if deep:
            branch = root.branch()
            template = branch.template(30)
            assert template is not None, branch.wait(5)
        assert template is not None
        found = []
        for _ in range(2):
            with template.fork() as fork:
                message = fork.receive(30)
                assert message is not None, fork.wait(5)
                found.append(message["found"])
        return found


def in_child(work: Callable[[], object]) -> int:
    """Its status, as of waitpid(2)."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("deep", [False, True])
def test_each_fork_has_its_own_and_shares_it_with_its_children(project: Path, tmp_path: Path, deep: bool) -> None:
    for path in (project / "in", tmp_path / "out", project / "unlinked"):
        path.write_bytes(b"0" * PAGE)
    with (
        (project / "in").open("r+b") as one,
        (tmp_path / "out").open("r+b") as two,
        (project / "unlinked").open("r+b") as three,
    ):
        (project / "unlinked").unlink()
        maps = [mmap.mmap(file.fileno(), PAGE) for file in (one, two, three)] + [mmap.mmap(-1, PAGE)]
        maps[3][:1] = b"0"
        named = shared_memory.SharedMemory(create=True, size=PAGE)
        named.buf[0] = ord("0")

        def change(to: bytes) -> None:
            for area in maps:
                area[:1] = to
            named.buf[0] = ord(to)

        def work() -> list[object]:
            begun = b"".join(area[:1] for area in maps) + bytes(named.buf[:1])
            status = in_child(lambda: change(b"1"))
            shared = b"".join(area[:1] for area in maps) + bytes(named.buf[:1])
            three.seek(0)
            files = (project / "in").read_bytes()[:1] + three.read(1)
            attached = shared_memory.SharedMemory(named.name)
            files += bytes(attached.buf[:1])
            attached.close()
            return [begun.decode(), status, shared.decode(), files.decode()]

        try:
            mounts = [Mount.overlay(str(project))]
            found = twice(each(work, deep=deep), deep=deep, mounts=mounts, workdir=str(project))
            assert found == [["00000", 0, "11111", "111"]] * 2
            assert b"".join(area[:1] for area in maps) + bytes(named.buf[:1]) == b"00000"
            assert (project / "in").read_bytes()[:1] == (tmp_path / "out").read_bytes()[:1] == b"0"
        finally:
            named.close()
            named.unlink()


@pytest.mark.parametrize("deep", [False, True])
def test_what_is_huge_and_mostly_empty_is_not_read(tmp_path: Path, deep: bool) -> None:
    """A page that has never been written stays one that takes no memory, of the host's or of the fork's."""
    sparse = tmp_path / "sparse"
    with sparse.open("w+b") as file:
        file.truncate(100 << 30)
        of_file = mmap.mmap(file.fileno(), 100 << 30)
    of_file[50 << 30] = 1
    nameless = mmap.mmap(-1, 8 << 30)
    nameless[4 << 30] = 2
    fd = os.memfd_create("test")
    os.ftruncate(fd, 8 << 30)
    of_memfd = mmap.mmap(fd, 8 << 30)
    of_memfd[5 << 30] = 3

    def work() -> list[int]:
        found = [of_file[50 << 30], nameless[4 << 30], of_memfd[5 << 30], of_file[99 << 30], nameless[1 << 30]]
        of_file[50 << 30] = nameless[4 << 30] = of_memfd[5 << 30] = 9
        return found

    try:
        found = twice(each(work, deep=deep), deep=deep, limits=Limits(memory="256M"))
        assert found == [[1, 2, 3, 0, 0]] * 2
        assert [of_file[50 << 30], nameless[4 << 30], of_memfd[5 << 30]] == [1, 2, 3]
        assert os.stat(sparse).st_blocks * 512 < 1 << 20
        assert os.fstat(fd).st_blocks * 512 < 1 << 20
    finally:
        os.close(fd)
        for area in (of_file, nameless, of_memfd):
            area.close()


def test_what_is_larger_than_a_copy_for_each_is_copied_on_write() -> None:
    size = sharing._COPY_AT_MOST + PAGE
    nameless = mmap.mmap(-1, size)
    nameless[:] = b"x" * size

    def work() -> list[int]:
        found = [nameless[0], nameless[size - 1]]
        nameless[0] = 0
        return found

    assert twice(each(work, deep=False), deep=False) == [[ord("x"), ord("x")]] * 2
    assert nameless[0] == ord("x")
    nameless.close()


def test_memory_of_a_device_is_not_there() -> None:
    nameless = mmap.mmap(-1, PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(nameless))
    item = sharing.Object(
        "/dev/gpu", 1, [sharing.Area(start, start + PAGE, mmap.PROT_READ | mmap.PROT_WRITE, 0)], device=True
    )

    def touch() -> None:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        sharing.adopt([item], [])
        nameless[0] = 1

    assert os.WTERMSIG(in_child(touch)) == signal.SIGSEGV
    assert nameless[0] == 0


SMAPS = """
7f00000000-7f00001000 rw-s 00000000 00:01 7                              /dev/zero (deleted)
Swap:                  4 kB
VmFlags: rd wr sh mr mw me ms sd
7f00002000-7f00003000 rw-s 00000000 00:05 9                              /dev/dri/renderD128
VmFlags: rd wr sh mr mw me ms pf io dc de dd
7f00004000-7f00005000 r--s 00001000 08:01 11                             /a b/c
Swap:                  0 kB
VmFlags: rd sh mr mw me ms sd
7f00005000-7f00006000 r--s 00000000 08:01 11                             /a b/c
VmFlags: rd sh mr mw me ms sd
7f00006000-7f00007000 rw-s 00000000 00:0d 12                             anon_inode:[io_uring]
VmFlags: rd wr sh mr mw me ms sd
7f00007000-7f00008000 rw-s 00000000 00:0d 13                             /drm mm object (deleted)
VmFlags: rd wr sh mr mw me ms pf sd
7f00008000-7f00009000 rw-p 00000000 00:00 0
VmFlags: rd wr mr mw me ac sd
"""


def test_what_there_is_is_read_from_the_kernels_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_read", lambda path: SMAPS.strip().encode())
    found = {item.name: item for item in sharing._objects()}
    assert list(found) == ["/dev/zero (deleted)", "/a b/c", "anon_inode:[io_uring]", "/drm mm object (deleted)"]
    assert [item.device for item in found.values()] == [False, False, True, True]
    assert [item.whole for item in found.values()] == [True, False, False, False]
    assert (found["/a b/c"].size, len(found["/a b/c"].areas), found["/a b/c"].writable) == (0x2000, 2, False)
