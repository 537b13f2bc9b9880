"""Which ids of the host's a sandbox of real root has."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from isolation import Process, Sandbox, SandboxSpec
from isolation.linux import userns

MARK = str(100000 + os.getpid())


def test_a_range_is_one_that_nobody_else_hands_out() -> None:
    """systemd's UIDS-GIDS.md: containers are within 524288 to 1879048191, and begin at a multiple of 65536."""
    chosen = {userns.choose_range() for _ in range(100)}
    assert len(chosen) > 1
    for base in chosen:
        assert base % userns.RANGE_SIZE == 0
        assert 524288 <= base < base + userns.RANGE_SIZE - 1 <= 1879048191


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user stays that user inside")
@pytest.mark.usefixtures("nothing_left")
def test_each_run_has_ids_of_its_own() -> None:
    """So that what the kernel counts by user is not counted for all of them together."""
    found = set()
    for number in range(4):
        with (
            Sandbox(SandboxSpec(env={"RUN": str(number)})) as box,
            box.popen(["sleep", MARK], stdin=subprocess.DEVNULL) as process,
        ):
            pid = _pid_of_command(process)
            found.add(Path(f"/proc/{pid}/uid_map").read_text().split()[1])
            process.kill()
    assert len(found) > 1
    assert "0" not in found


def _pid_of_command(process: Process) -> int:
    while True:
        assert process.poll() is None
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if line.read_bytes() == f"sleep\0{MARK}\0".encode():
                    return int(line.parent.name)
