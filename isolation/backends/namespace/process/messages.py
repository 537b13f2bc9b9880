"""What the processes of a sandbox, while they become one, and its supervisor say to one another: a byte each."""

from __future__ import annotations

from typing import Final

# Of a process that becomes a sandbox; the supervisor does it, and answers with the same.
JOIN_CGROUP: Final = b"c"
MAP_RANGE: Final = b"m"  # the ids of its user namespace, as real root alone can
MAP_INNER: Final = b"i"  # those of the guest's own, below that
BORN: Final = b"b"  # a fork of a fork, with its credentials: it has entered its namespaces

# Without an answer.
MOUNTS: Final = b"n"  # its mount namespace, as forks of it want it
PLACES: Final = b"w"  # its /proc and its store, for the supervisor to look at
ACTIVE: Final = b"a"  # it has a process to watch again
FAILED: Final = b"x"  # with errno and text

# Of a template that is a fork itself, to the supervisor of its forks.
SEALED: Final = b"s"  # with its mount and its user namespace; answered
WARM: Final = b"t"  # with the number of private files that a fork wants, and what is held in them
