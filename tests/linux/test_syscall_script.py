"""A script makes the calls that were written down, and says which failed. These run for real."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from isolation.linux import machine_code
from isolation.linux.syscall_script import SixthArgument, SyscallScript
from isolation.linux.syscalls import AT_FDCWD, STAT_OFFSETS


def run(script: SyscallScript) -> SyscallScript:
    script.finish()
    script.run()
    return script


def test_results_are_arguments_of_later_steps(tmp_path: Path) -> None:
    script = SyscallScript()
    path = str(tmp_path / "file")
    file = script.call("openat", AT_FDCWD, path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o640)
    wrote = script.call("write", file, b"hello", 5, only=5)
    script.call("close", file)
    assert run(script).result(wrote) == 5
    assert Path(path).read_bytes() == b"hello"


def test_it_can_run_again_with_other_values() -> None:
    script = SyscallScript()
    slot = script.slot()
    got = script.call("write", slot.value(), b"x", 1)
    script.finish()
    for _ in range(3):
        ours, theirs = os.pipe()
        script.set(slot, theirs)
        script.run()
        assert os.read(ours, 2) == b"x"
        os.close(ours)
        os.close(theirs)
    assert script.result(got) == 1


def test_the_first_failure_ends_it_and_is_named(tmp_path: Path) -> None:
    script = SyscallScript()
    script.call("mkdirat", AT_FDCWD, str(tmp_path / "no" / "such"), 0o755, about="a directory")
    script.call("mkdirat", AT_FDCWD, str(tmp_path / "after"), 0o755)
    with pytest.raises(OSError, match="a directory: No such file") as caught:
        run(script)
    assert caught.value.errno == errno.ENOENT
    assert not (tmp_path / "after").exists()


def test_what_is_accepted_is_no_failure(tmp_path: Path) -> None:
    script = SyscallScript()
    for code in (errno.EEXIST, errno.ENOENT):
        script.call("mkdirat", AT_FDCWD, str(tmp_path), 0o755, accept=(code, errno.EEXIST))
    script.call("close", -1, accept_any=True)
    run(script)
    strict = SyscallScript()
    strict.call("mkdirat", AT_FDCWD, str(tmp_path), 0o755, accept=(errno.ENOENT,))
    with pytest.raises(FileExistsError):
        run(strict)


def test_only_one_result_will_do() -> None:
    ours, theirs = os.pipe()
    os.close(theirs)
    script = SyscallScript()
    script.call("read", ours, script.memory(bytes(8)), 1, only=1, about="the other end")  # 0: it is closed
    with pytest.raises(OSError, match="the other end") as caught:
        run(script)
    os.close(ours)
    assert caught.value.errno == errno.EPROTO


def test_only_a_part(tmp_path: Path) -> None:
    script = SyscallScript()
    marks = []
    for name in "abc":
        marks.append(script.mark())
        script.call("mkdirat", AT_FDCWD, str(tmp_path / name), 0o700)
    script.finish()
    script.run(marks[1], marks[2])
    assert os.listdir(tmp_path) == ["b"]


def test_memory_is_read_and_written_by_calls(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o1751)
    os.utime(tmp_path, (1000, 2000))
    (tmp_path / "copy").mkdir()
    script = SyscallScript()
    status = script.memory(bytes(256))
    mode, _uid, _gid, times = (status.at(offset) for offset in STAT_OFFSETS)
    script.call("newfstatat", AT_FDCWD, str(tmp_path), status, 0)
    script.call("fchmodat", AT_FDCWD, str(tmp_path / "copy"), mode.value())
    script.call("utimensat", AT_FDCWD, str(tmp_path / "copy"), times, 0)
    script.finish()
    os.utime(tmp_path, (1000, 2000))
    script.run()
    copy = os.stat(tmp_path / "copy")
    assert (copy.st_mode & 0o7777, copy.st_atime, copy.st_mtime) == (0o1751, 1000, 2000)


def test_a_pointer_in_memory_and_a_result_behind_a_sixth_argument() -> None:
    ours, theirs = os.pipe()
    script = SyscallScript()
    vector = script.memory(struct.pack("=QQ", 0, 3))
    script.point(vector, script.memory(b"abc"))
    script.call("writev", theirs, vector, 1, only=3)
    opened = script.call("openat", AT_FDCWD, "/", os.O_PATH, 0, 0, 0x1234)
    script.call("write", theirs, SixthArgument(opened.step), 12, only=12)
    run(script)
    assert os.read(ours, 3) == b"abc"
    assert os.read(ours, 12) == struct.pack("=Qi", 0x1234, script.result(opened))
    for fd in (ours, theirs, script.result(opened)):
        os.close(fd)


def test_its_memory_is_private_and_its_code_read_only() -> None:
    """A guest must not change what its supervisor runs."""
    script = SyscallScript()
    at = script.call("getpid")
    run(script)
    child = os.fork()
    if child == 0:
        script.run()
        os._exit(0)
    os.waitpid(child, 0)
    assert script.result(at) == os.getpid()
    code = machine_code.MachineCode(b"\0" * 8)
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if start <= code.address < end:
            assert line.split()[1] == "r-xp"
