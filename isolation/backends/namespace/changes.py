"""What a guest wrote: its store, walked from the host."""

from __future__ import annotations

from collections.abc import Sequence

from isolation.backends.namespace.operations import LAYERS, PRIVATE, Operation, Overlay, Private
from isolation.guest import upper
from isolation.result import Change


def of_store(store: int, operations: Sequence[Operation]) -> list[Change]:
    """Every path added, changed or deleted in the store behind the descriptor, sorted; at most 100,000."""
    found: list[Change] = []
    for operation in operations:
        if isinstance(operation, Overlay):
            top, source = f".{LAYERS}/{operation.number}/upper", operation.source
        elif isinstance(operation, Private):
            top, source = f".{PRIVATE}/{operation.number}", ""
        else:
            continue
        found += upper.walk(store, top, operation.target, source, most=upper.AT_MOST - len(found))
    # A mount point inside another private directory is part of the tree, not of what the guest did.
    shown = {operation.target for operation in operations}
    made = {parent for target in shown for parent in upper.parents(target)}
    return sorted(change for change in found if change.path not in shown | made)
