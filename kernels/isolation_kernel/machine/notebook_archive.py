"""The notebook's directory on its way into a machine: copied when the kernel starts, so no saved machine depends on it."""

from __future__ import annotations

import os
import tarfile
from typing import BinaryIO, Final

from isolation.errors import LaunchError
from isolation.units import format_size

AT_MOST: Final = 64 << 20  # bytes of content
_ENTRIES_AT_MOST: Final = 20_000
_LEFT_OUT: Final = ("__pycache__", ".git", ".venv", ".ipynb_checkpoints", "node_modules")


def pack(directory: str, target: BinaryIO, *, writable: bool) -> None:
    """An archive of `directory` without what no notebook reads. Raises LaunchError when it is too much."""
    room, entries = AT_MOST, 0

    def checked(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        nonlocal room, entries
        if os.path.basename(entry.name) in _LEFT_OUT or not (entry.isreg() or entry.isdir() or entry.issym()):
            return None
        entries += 1
        room -= entry.size
        if room < 0 or entries > _ENTRIES_AT_MOST:
            raise LaunchError(
                f"the notebook's directory {directory} holds more than {format_size(AT_MOST)} or {_ENTRIES_AT_MOST} files, "
                "too much to be copied into a machine for each kernel: install the kernel with --notebook none, and with "
                f"--mount {directory} to show it"
            )
        entry.mode = entry.mode | 0o600 if writable or entry.isdir() else entry.mode & ~0o222
        return entry

    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(os.listdir(directory)):
            try:
                archive.add(os.path.join(directory, name), name, filter=checked)
            except PermissionError:
                continue  # not readable for the user, so neither for the kernel
