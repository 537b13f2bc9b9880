"""A kernel's host while a kernel asks: it has everything else to do, too."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from isolation_kernel.container.requests import Services
from isolation_kernel.options import Options

from isolation import SandboxSpec
from isolation.hookspecs import CHANGES
from isolation.result import Change
from isolation.wire import Wire


@pytest.fixture
def kernel() -> Any:
    """The kernel's end of the wire, the services at the other, and an event that ends the look at its files."""
    ours, theirs = Wire.pair()
    found = threading.Event()

    def changes() -> list[Change]:
        assert found.wait(600)
        return [Change("/project/a", "added", "file", 3)]

    backend = SimpleNamespace(name="namespace", features=lambda: {CHANGES})
    box = SimpleNamespace(
        wire=Wire(ours), sandbox=SimpleNamespace(backend=backend, changes=changes), signal=lambda _number: None
    )
    services = Services(box, Options(cell_timeout="1h"), SandboxSpec())  # type: ignore[arg-type]
    yield SimpleNamespace(wire=Wire(theirs), services=services, found=found)
    found.set()
    ours.close()
    theirs.close()


def test_a_look_at_what_was_changed_holds_up_nothing(kernel: Any) -> None:
    """However much the guest has made, and however often it asks."""
    for _ in range(3):
        kernel.wire.send({"op": "changes"})
    kernel.wire.send({"op": "status"})
    assert kernel.services.read()
    answers = [kernel.wire.receive(60) for _ in range(3)]
    assert [list(answer) for answer in answers] == [["error"], ["error"], ["answer"]]
    assert "one look" in answers[0]["error"]
    assert 0 < kernel.services.patience() < 1
    kernel.found.set()
    while kernel.services._walk is not None:
        kernel.services.go_on()
    assert kernel.wire.receive(60) == {"answer": [[["added", "file", "/project/a", 3]], 1, 0]}
    kernel.wire.send({"op": "changes"})
    assert kernel.services.read()
    while kernel.services._walk is not None:
        kernel.services.go_on()
    assert "answer" in kernel.wire.receive(60)
