"""Which layers a sandbox's files lie in, which of them are kept, and which nobody needs any more.

A layer is what was written between two moments. They form a tree, whose root is what the sandbox was made with, the
*origin*; from the live one, which the guest writes to, a chain leads down to it. A kept state is a frozen layer, and what
lies beneath it. Nothing is done here: what is to be done is planned, and told of once it was.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

ORIGIN = 1
# Looking for a file that does not exist asks every layer; and their names must fit into a page (mount(2)).
MOST = 100


class Change(NamedTuple):
    """What a wish comes to.

    new      a live layer, over the chain `beneath`, the nearest first; None: only room is made
    keeps    what is frozen, if that is wished for
    removes  what nobody needs then
    failed   of that, what has never been in use: it may go first, and make room
    """

    new: int | None = None
    beneath: tuple[int, ...] = ()
    keeps: int | None = None
    removes: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()


class Layers:
    """One sandbox's. `doomed`: layers that are of no use, but may still be there."""

    def __init__(self) -> None:
        self.live = ORIGIN
        self.doomed: set[int] = set()
        self._failed: set[int] = set()
        self._below: dict[int, int | None] = {ORIGIN: None}
        self._kept: set[int] = set()
        self._last = ORIGIN

    def chain(self) -> tuple[int, ...]:
        """Of the live layer, which is the first."""
        return self._chain(self.live)

    def keep(self) -> Change:
        """Freeze what is live. Raises OSError."""
        return self._grow(self.chain(), keeps=self.live)

    def restore(self, kept: int) -> Change:
        """Go on from a kept state. Raises OSError."""
        self._check(kept)
        return self._grow(self._chain(kept))

    def forget(self, kept: int) -> Change:
        """Done at once: nothing can fail but making room. Raises OSError."""
        self._check(kept)
        self._kept.discard(kept)
        self._prune()
        return Change(removes=tuple(sorted(self.doomed)))

    def succeeded(self, change: Change) -> None:
        """The new layer is the live one."""
        if change.new is not None:
            self._below[change.new] = change.beneath[0]
            self.live = change.new
            if change.keeps is not None:
                self._kept.add(change.keeps)
            self._prune()

    def removed(self, change: Change) -> None:
        """What nobody needed is gone."""
        self.doomed -= set(change.removes)
        self._failed -= set(change.removes)

    def failed(self, change: Change) -> None:
        """All is as it was, but for what there may be of the new layer."""
        if change.new is not None:
            self.doomed.add(change.new)
            self._failed.add(change.new)

    def _grow(self, beneath: tuple[int, ...], keeps: int | None = None) -> Change:
        if len(beneath) >= MOST:
            raise OSError(
                errno.EMLINK,
                f"{MOST} layers lie upon each other already; go back to a state that was kept earlier, or start anew",
            )
        self._last += 1
        useless = self.doomed | (set(self._below) - self._needed(beneath))
        return Change(self._last, beneath, keeps, tuple(sorted(useless)), tuple(sorted(self._failed)))

    def _check(self, kept: int) -> None:
        if kept not in self._kept:
            raise OSError(errno.ENOENT, f"no state of the files is kept as number {kept}")

    def _chain(self, layer: int | None) -> tuple[int, ...]:
        found = []
        while layer is not None:
            found.append(layer)
            layer = self._below[layer]
        return tuple(found)

    def _needed(self, beneath: tuple[int, ...]) -> set[int]:
        """What is kept, and the chain of what is live."""
        return {*beneath, *(layer for kept in self._kept for layer in self._chain(kept))}

    def _prune(self) -> None:
        for layer in set(self._below) - self._needed(self.chain()):
            del self._below[layer]
            self.doomed.add(layer)
