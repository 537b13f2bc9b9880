"""What a guest wrote: its store, walked from the host."""

from __future__ import annotations

from collections.abc import Sequence

from isolation.backends.namespace.rootfs.layer_tree import ORIGIN
from isolation.backends.namespace.rootfs.mounts import KEPT, PRIVATE, Operation, Overlay, Private, upper_of
from isolation.linux import overlay_upper
from isolation.result import Change


def of_store(
    store: int,
    operations: Sequence[Operation],
    *,
    level: int = 1,
    chain: Sequence[int] = (ORIGIN,),
    most: int = overlay_upper.AT_MOST,
) -> list[Change]:
    """Every path added, changed or deleted in the store behind the descriptor, sorted; at most `most`. `level`: how many
    forks away from the host; what was there before is in the stores of the levels above. `chain`: the layers that the
    files lie in, the uppermost first (layer_tree.py)."""
    found: list[Change] = []
    for operation in operations:
        if isinstance(operation, Overlay):
            origin, source = upper_of(".", operation.layer), operation.source
        elif isinstance(operation, Private):
            source = ""
            origin = f".{PRIVATE}/{operation.number}" if level == 1 else upper_of(".", operation.layer)
        else:
            continue
        tops = [origin if layer == ORIGIN else f".{KEPT}/{layer}/{operation.layer}/upper" for layer in chain]
        entries = overlay_upper.walk_layers(store, tops, operation.target, source, most=most - len(found))
        found += [Change(*entry) for entry in entries]
    # A mount point inside another private directory is part of the tree, not of what the guest did.
    shown = {operation.target for operation in operations}
    made = {parent for target in shown for parent in overlay_upper.parents(target)}
    return sorted(change for change in found if change.path not in shown | made)
