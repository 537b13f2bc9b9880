"""What forks of one memory image must not share: random numbers, the clock, and names.

A restored machine would otherwise hand out the same "random" bytes as its siblings (Firecracker: docs/snapshotting/
random-for-clones.md; here the first `os.urandom` of two forks was the same before this was written).
"""

from __future__ import annotations

import random
import socket
import sys
import time

from isolation.backends.microvm.guest import linux
from isolation.backends.microvm.guest.tree import Tree

SEED_SIZE = 128  # bytes: 32 for the kernel's pool, 16 for names, 32 for numpy, 48 for a process's own generators
_KERNEL, _NAMES, _NUMPY, _PROCESS = slice(0, 32), slice(32, 48), slice(48, 80), slice(80, 128)


def machine(seed: bytes | None, now: tuple[int, int], tree: Tree) -> None:
    """For the whole machine, before anything in it runs on. `now` is the host's clock, in seconds and nanoseconds;
    without a seed only the clock is set, and the random numbers of all such forks are the same.

    No hash, no text file: in a machine that has just been restored, all code is slow the first time it runs.
    """
    time.clock_settime_ns(time.CLOCK_REALTIME, now[0] * 1_000_000_000 + now[1])
    if seed is None:
        return
    linux.add_entropy(seed[_KERNEL])
    name = seed[_NAMES].hex()
    socket.sethostname(f"isolation-{name[:12]}")
    tree.own_file("/etc/machine-id", name + "\n")


def process(seed: bytes) -> None:
    """For this process: the generators that a Python program has seeded long ago, as far as they are known by name.

    A `random.Random` or a numpy `Generator` of the program's own keeps its state, as it does after os.fork.
    """
    random.seed(int.from_bytes(seed[_PROCESS], "big"))
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        words = seed[_NUMPY]
        numpy.seed([int.from_bytes(words[place : place + 4], "big") for place in range(0, 32, 4)])
    ssl = sys.modules.get("ssl")
    if ssl is not None:
        # OpenSSL has a pool of its own, and notices a fork by the process number only.
        ssl.RAND_add(seed[_PROCESS], len(seed[_PROCESS]))
