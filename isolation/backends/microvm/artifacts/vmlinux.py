"""What a kernel file is, and the plain ELF file inside a compressed one.

QEMU starts an ELF kernel with a PVH note directly, and saves the guest from decompressing itself: 0.65 s less under
emulation. Sources: Documentation/arch/x86/boot.rst (the header), LZ4's frame format (the legacy frame, as the kernel
uses it), xen/include/public/elfnote.h.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from typing import Any

from isolation.backends.microvm.artifacts.deb import unzstd
from isolation.errors import LaunchError

_HDRS = 0x202
_LZ4 = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 << 20
_AT_MOST = 512 << 20  # bytes of a kernel
_PHYS32_ENTRY = 18
_MACHINES = {62: "x86_64", 183: "aarch64"}


class NotAKernel(LaunchError):
    """The file is no kernel that can be booted here; the message says what is wrong with it."""


def architecture(data: bytes, name: str) -> str:
    """ "x86_64" or "aarch64", for which the kernel is. Raises NotAKernel for what is none, or is cut off."""
    if data[:4] == b"\x7fELF":
        if len(data) < 64 or data[4] != 2:
            raise NotAKernel(f"{name} is not a 64-bit kernel")
        (machine,) = struct.unpack_from("<H", data, 18)
        if machine not in _MACHINES:
            raise NotAKernel(f"{name} is a kernel for another architecture (ELF machine {machine})")
        phoff, phentsize, phnum = _program_headers(data)
        for index in range(phnum):
            at = phoff + index * phentsize
            if at + 56 > len(data):
                raise NotAKernel(f"{name} is cut off: its program headers are missing")
            _, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", data, at)
            if offset + size > len(data):
                raise NotAKernel(f"{name} is cut off: {len(data)} bytes, of at least {offset + size}")
        return _MACHINES[machine]
    if data[_HDRS : _HDRS + 4] == b"HdrS":
        if len(data) < 0x260:
            raise NotAKernel(f"{name} is cut off")
        (syssize,) = struct.unpack_from("<I", data, 0x1F4)
        needed = _setup_size(data) + syssize * 16
        if len(data) < needed - 15:  # counted in paragraphs of 16 bytes
            raise NotAKernel(f"{name} is cut off: {len(data)} bytes, of {needed}")
        (xloadflags,) = struct.unpack_from("<H", data, 0x236)
        if not xloadflags & 1:
            raise NotAKernel(f"{name} is a 32-bit kernel")
        return "x86_64"
    if data[0x38:0x3C] == b"ARM\x64":
        return "aarch64"
    if not data:
        raise NotAKernel(f"{name} is empty")
    raise NotAKernel(f"{name} is not a Linux kernel (neither a bzImage, nor an ELF vmlinux, nor an arm64 Image)")


def extract(data: bytes, name: str) -> bytes | None:
    """The ELF kernel with a PVH entry in a bzImage; None where there is none, or it is packed in a way that we cannot
    unpack: the bzImage itself can be booted. Raises NotAKernel when the payload is damaged."""
    if data[:4] == b"\x7fELF":
        return data if has_pvh_entry(data) else None
    if data[_HDRS : _HDRS + 4] != b"HdrS" or struct.unpack_from("<H", data, 0x206)[0] < 0x208:
        return None
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = _setup_size(data) + offset
    payload = data[start : start + length]
    if len(payload) != length or length < 8:
        raise NotAKernel(f"{name} is cut off: its payload is missing")
    try:
        found = _decompressed(payload, name)
    except (ValueError, IndexError, EOFError, OSError, struct.error, zlib.error, lzma.LZMAError) as error:
        raise NotAKernel(f"{name} is damaged: its payload cannot be decompressed ({error})") from error
    if found is None or found[:4] != b"\x7fELF" or not has_pvh_entry(found):
        return None
    return found


def _decompressed(payload: bytes, name: str) -> bytes | None:
    """All but LZ4 and gzip carry their decompressed size in four more bytes at the end, which the decoders ignore."""
    if payload[:4] == _LZ4:
        return unlz4(payload[:-4])
    if payload[:2] == b"\x1f\x8b":
        return _whole(zlib.decompressobj(31), payload)
    if payload[:6] == b"\xfd7zXZ\x00":
        return _whole(lzma.LZMADecompressor(), payload)
    if payload[:3] == b"BZh":
        return _whole(bz2.BZ2Decompressor(), payload)
    if payload[:3] == b"\x5d\x00\x00":
        return _whole(lzma.LZMADecompressor(format=lzma.FORMAT_ALONE), payload)
    if payload[:4] == b"\x28\xb5\x2f\xfd":
        try:
            return unzstd(payload[:-4], f"the kernel {name}")
        except LaunchError:
            return None  # no program; or damaged, which the kernel will say
    return None


def _whole(decoder: Any, payload: bytes) -> bytes:
    """What a decoder of the standard library makes of it, bounded. Raises ValueError when that is not all."""
    data: bytes = decoder.decompress(payload, _AT_MOST)
    if not decoder.eof:
        raise ValueError("its end is missing")
    return data


def unlz4(data: bytes) -> bytes:
    """Decompress an LZ4 legacy stream. Raises ValueError or IndexError for a damaged one. 50 MB take a second."""
    if data[:4] != _LZ4:
        raise ValueError("not an LZ4 legacy stream")
    blocks = []
    at, total = 4, 0
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if size > len(data) - at:
            raise ValueError("a block ends after the data")
        block = _unlz4_block(data[at : at + size])
        total += len(block)
        if total > _AT_MOST:
            raise ValueError("too large")
        blocks.append(block)
        at += size
    return b"".join(blocks)


def _unlz4_block(source: bytes) -> bytes:
    out = bytearray()
    at, end = 0, len(source)
    while at < end:
        token = source[at]
        at += 1
        length = token >> 4
        if length == 15:
            while True:
                more = source[at]
                at += 1
                length += more
                if more != 255:
                    break
        if length:
            if at + length > end:
                raise ValueError("literals end after the block")
            out += source[at : at + length]
            at += length
        if at >= end:
            break  # the last sequence has no match
        distance = source[at] | source[at + 1] << 8
        at += 2
        length = (token & 15) + 4
        if length == 19:
            while True:
                more = source[at]
                at += 1
                length += more
                if more != 255:
                    break
        start = len(out) - distance
        if distance == 0 or start < 0:
            raise ValueError("a match before the beginning")
        if distance >= length:
            out += out[start : start + length]
        else:  # it overlaps what it makes: a repetition
            piece = bytes(out[start:])
            out += (piece * (length // distance + 1))[:length]
        if len(out) > _LZ4_BLOCK:
            raise ValueError("a block is too large")
    return bytes(out)


def has_pvh_entry(data: bytes) -> bool:
    """Whether an ELF file has the note XEN_ELFNOTE_PHYS32_ENTRY, by which QEMU starts it."""
    try:
        phoff, phentsize, phnum = _program_headers(data)
        for index in range(phnum):
            kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", data, phoff + index * phentsize)
            if kind == 4 and _has_note(data[offset : offset + size]):  # PT_NOTE
                return True
    except struct.error:
        pass
    return False


def _has_note(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        namesz, descsz, kind = struct.unpack_from("<III", notes, at)
        if kind == _PHYS32_ENTRY and notes[at + 12 : at + 12 + namesz] == b"Xen\0":
            return True
        at += 12 + (namesz + 3) // 4 * 4 + (descsz + 3) // 4 * 4
    return False


def _program_headers(data: bytes) -> tuple[int, int, int]:
    (phoff,) = struct.unpack_from("<Q", data, 32)
    phentsize, phnum = struct.unpack_from("<HH", data, 54)
    return phoff, phentsize, phnum


def _setup_size(data: bytes) -> int:
    return ((data[0x1F1] or 4) + 1) * 512
