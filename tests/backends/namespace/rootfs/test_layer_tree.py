"""Which layers there are, and what an overlay of them is told: plain data."""

from __future__ import annotations

import pytest

from isolation.backends.namespace.checkpoints import remount
from isolation.backends.namespace.checkpoints.remount import Place, lowers_of, places
from isolation.backends.namespace.rootfs import layer_tree
from isolation.backends.namespace.rootfs.layer_tree import Layers
from isolation.backends.namespace.rootfs.mounts import (
    CopiedFile,
    DevPts,
    Directory,
    FreshOperation,
    Overlay,
    Private,
    Proc,
    Rebind,
    overlay_options,
)


def keep(tree: Layers) -> int:
    change = tree.keep()
    tree.succeeded(change)
    assert change.keeps is not None
    return change.keeps


def restore(tree: Layers, kept: int) -> tuple[int, ...]:
    change = tree.restore(kept)
    tree.succeeded(change)
    assert set(change.removes) == tree.doomed
    tree.removed(change)
    return change.removes


def test_kept_states_are_a_tree() -> None:
    tree = Layers()
    a = keep(tree)
    b = keep(tree)
    assert (a, b, tree.chain()) == (1, 2, (3, 2, 1))
    assert restore(tree, a) == (3,)
    assert tree.chain() == (4, 1)
    c = keep(tree)
    assert restore(tree, b) == (5,)
    assert tree.chain() == (6, 2, 1)
    assert tree.forget(c).removes == (4,)
    with pytest.raises(OSError, match="no state of the files is kept as number 4"):
        tree.restore(c)
    with pytest.raises(OSError, match="no state"):
        tree.forget(c)


def test_what_something_kept_or_live_lies_on_stays() -> None:
    tree = Layers()
    a = keep(tree)
    b = keep(tree)
    assert tree.forget(a).removes == ()
    assert tree.forget(b).removes == ()
    assert tree.chain() == (3, 2, 1)


def test_what_could_not_be_removed_is_tried_again() -> None:
    tree = Layers()
    a = keep(tree)
    failed = tree.keep()
    tree.failed(failed)
    assert (tree.chain(), tree.doomed) == ((2, 1), {3})
    again = tree.restore(a)
    assert again.removes == (2, 3)
    tree.succeeded(again)
    assert tree.chain() == (4, 1)  # no number is used twice
    assert tree.keep().removes == (2, 3)


def test_the_depth_is_bounded_and_going_back_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_tree, "MOST", 3)
    tree = Layers()
    a, _b = keep(tree), keep(tree)
    with pytest.raises(OSError, match="3 layers lie upon each other already; go back to a state that was kept earlier"):
        tree.keep()
    assert tree.chain() == (3, 2, 1)
    restore(tree, a)
    keep(tree)


def test_the_longest_chain_fits_into_a_page() -> None:
    beneath = range(100_000, 100_000 - layer_tree.MOST, -1)
    for operation in (Private("/tmp", 9999), Overlay("/project", "/project", 9999)):
        options = overlay_options(lowers_of(operation, [*[*beneath][:-1], layer_tree.ORIGIN]), "kept/100001/private9999")
        assert len(options) < remount._PAGE


def test_the_lower_layers() -> None:
    assert lowers_of(Private("/tmp", 3), (7, 2, 1)) == ["kept/7/private3/upper", "kept/2/private3/upper", "private/3"]
    assert lowers_of(Overlay("/p", "/p", 0), (7, 1)) == ["kept/7/0/upper", "layers/0/upper", "/.isolation/lower/0"]


def test_places() -> None:
    tmp, home = Private("/tmp", 1, 0o1777), Private("/tmporary", 2)
    project, view = Overlay("/tmp/p", "/p", 3), Rebind("/tmp/p/view", "/.isolation/base/4", True, Directory("/x"))
    copied = CopiedFile("/tmp/file", "/.isolation/base/5")
    fresh: list[FreshOperation] = [tmp, home, DevPts(), project, copied, view, Proc(())]
    assert places(fresh) == (Place(tmp, (project, view)), Place(home, ()))
    with pytest.raises(OSError, match="/dev/pts is mounted beneath /dev"):
        places([Private("/dev", 1), DevPts()])
