"""Making squashfs images with mksquashfs, and looking at them before they are used.

mksquashfs gets a tar archive on its standard input, and not the names of files: what goes in is then decided, opened and
read by one process (trees.py), names are bytes with no meaning, and nothing is looked up by path twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from isolation.backends.microvm.artifacts.tools import Program
from isolation.backends.microvm.artifacts.trees import Report, Tar
from isolation.errors import BackendUnavailable, LaunchError
from isolation.plain import subprocess

_MAGIC = 0x73717368  # "hsqs"
_SUPERBLOCK = struct.Struct("<IIIIIHHHHHHQQ")
_ROOT_AT = 32  # in the superblock: where the root's inode is
_INODES_AT = 64
_INODE_TIME_AT = 8  # in every inode
_BLOCK = 8192  # of metadata, behind a header of two bytes
_LZ4 = 5
_F_SETPIPE_SZ = 1031  # linux/fcntl.h; fcntl.F_SETPIPE_SZ, which some builds of Python lack
_PIPE = 1 << 20
# lz4: measured best of all for images that are read under emulation. Extended attributes (capabilities of files, labels)
# mean something else to another kernel. Inodes as they are: some megabytes, in which the root's time can be set.
_OPTIONS = ("-tar", "-comp", "lz4", "-noI", "-no-xattrs", "-noappend", "-no-progress", "-quiet", "-exports",
            "-mkfs-time", "0")  # fmt: skip
_ROOT = ("-root-mode", "755", "-root-uid", "0", "-root-gid", "0")


def make(program: Program, image: Path, fill: Callable[[Tar], None], report: Report) -> None:
    """Make `image` of what `fill` writes to the archive. Raises LaunchError, and leaves a part of the image behind then."""
    env = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"} | program.env
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [program.path, "-", str(image), *_OPTIONS, *_ROOT],
            stdin=subprocess.PIPE, stdout=errors, stderr=errors, env=env, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        fd = process.stdin.fileno()
        try:
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE)  # fewer switches between the two
            tar = Tar(fd, report)
            try:
                fill(tar)
                tar.close()
            except BrokenPipeError:
                pass  # mksquashfs says why
            process.stdin.close()
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
    if status or "FATAL ERROR" in said or "ignoring" in said.lower():
        if "No space left" in said:
            raise OSError(28, "No space left on device", str(image))
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        told = next((line for line in lines if "FATAL" in line or "ERROR" in line), lines[0] if lines else "it said nothing")
        raise LaunchError(f"mksquashfs failed (status {status}): {told}")
    check(image)
    _set_root_time(image)


def _set_root_time(image: Path) -> None:
    """To zero: with an archive, mksquashfs does not heed -root-time, and no two images of one tree would be equal, nor fit a
    machine that was saved with the other (kernel: fs/squashfs/squashfs_fs.h)."""
    with open(image, "r+b") as file:

        def number(place: int, layout: str) -> int:
            file.seek(place)
            found: int = struct.unpack(layout, file.read(struct.calcsize(layout)))[0]
            return found

        root, table = number(_ROOT_AT, "<Q"), number(_INODES_AT, "<Q")
        block, offset = divmod(root, 1 << 16)
        if not number(table + block, "<H") & 0x8000:
            raise LaunchError("mksquashfs has compressed what it was told not to")
        for place in range(offset + _INODE_TIME_AT, offset + _INODE_TIME_AT + 4):
            file.seek(table + block + 2 + place + (2 if place >= _BLOCK else 0))  # the next block has a header, too
            file.write(b"\0")


def check(image: Path) -> int:
    """The image's size in bytes. Raises BackendUnavailable when it is gone, cut off, or no squashfs of ours.

    Cheap: reads the superblock only. Content that is damaged in between is the guest kernel's to notice.
    """
    again = "run 'isolation microvm setup --refresh' (or 'isolation microvm clean')"
    try:
        with open(image, "rb") as file:
            head = file.read(_SUPERBLOCK.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BackendUnavailable(f"the image {image} cannot be read ({error.strerror}): {again}") from error
    if len(head) < _SUPERBLOCK.size:
        raise BackendUnavailable(f"the image {image} is cut off ({size} bytes): {again}")
    magic, _, _, _, _, compression, _, _, _, major, _, _, used = _SUPERBLOCK.unpack(head)
    if magic != _MAGIC or major != 4 or compression != _LZ4:
        raise BackendUnavailable(f"the image {image} is damaged (no squashfs superblock): {again}")
    if size < used:
        raise BackendUnavailable(f"the image {image} is cut off ({size} bytes of {used}): {again}")
    return size
