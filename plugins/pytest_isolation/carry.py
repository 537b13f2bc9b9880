"""What a fork of a process cannot carry: threads, child processes, sockets and the like, shared memory.

On namespaces a fork is fork(2): one thread of one process, with files of its own tree. A fixture that leaves anything else
behind is not the same in a fork.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import dataclass

_KINDS = {"socket": "socket", "pipe": "pipe", "anon_inode": "event descriptor"}


@dataclass(frozen=True)
class Held:
    """What this process has of them, by what tells one from another."""

    threads: frozenset[str]
    processes: frozenset[str]
    descriptors: frozenset[tuple[str, str]]
    mappings: frozenset[str]

    @classmethod
    def now(cls) -> Held:
        """Python's own threads only: a library's (OpenBLAS, say) look after themselves when a process is forked."""
        threads = frozenset(f"{thread.name} ({thread.ident})" for thread in threading.enumerate())
        return cls(threads, frozenset(_processes()), frozenset(_descriptors()), frozenset(_mappings()))

    def beyond(self, before: Held) -> str:
        """What is new since then, in words; "" for nothing."""
        found = Counter({
            "thread": len(self.threads - before.threads),
            "process": len(self.processes - before.processes),
            "shared memory mapping": len(self.mappings - before.mappings),
        })  # fmt: skip
        for kind, _what in self.descriptors - before.descriptors:
            found[kind] += 1
        words = []
        for what, number in found.items():
            plural = what + ("es" if what.endswith("s") else "s")
            words += [f"a {what}" if number == 1 else f"{number} {plural}"] if number else []
        return ", ".join(words)


def _processes() -> list[str]:
    """All that run in this PID namespace: a server that became a daemon is nobody's child but PID 1's."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    if file.read().rpartition(")")[2].split()[0] not in ("Z", "X"):
                        found.append(name)
            except (OSError, IndexError):
                continue  # it has just ended
    return found


def _descriptors() -> list[tuple[str, str]]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        kind = _KINDS.get(target.partition(":")[0])
        if kind is not None:
            found.append((kind, f"{name} {target}"))
    return found


def _mappings() -> list[str]:
    """Writable and shared: a fork's writes would reach its template."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        return [line.split(" ", 1)[0] for line in file if line[:80].split(" ", 2)[1] == "rw-s"]
