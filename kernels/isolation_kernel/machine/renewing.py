"""Starts a process of its own, which makes a new saved machine while kernels are still forked from the old one.

It belongs to no frontend, and ends when it is done.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from isolation.spec import SandboxSpec

# With `-I -m` it would look in this interpreter's own places only, and these modules may have been found in others. What it
# unpickles comes from the launcher that has started it.
_PROGRAM: Final = """
import json, os, pickle, sys
os.nice(10)
sys.path[:] = json.loads(sys.stdin.buffer.readline())
from isolation_kernel.machine import snapshot_cache
snapshot_cache.renew(*pickle.load(sys.stdin.buffer))
"""


def start(spec: SandboxSpec, arguments: Sequence[str]) -> None:
    """Begin, and do not wait."""
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM], cwd="/", start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        process.returncode = 0  # nobody waits for it
        assert process.stdin is not None
        with process.stdin as file:
            file.write(json.dumps(sys.path).encode() + b"\n" + pickle.dumps((spec, list(arguments))))
