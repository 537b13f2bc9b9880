"""The `sandbox` fixture, in pytest's own process and in a test's sandbox."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from isolation import Sandbox, registry
from isolation.errors import LaunchError


@contextlib.contextmanager
def make_sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Inside a sandbox no other can be made, so the host makes it, and lends the wire to it."""
    worker = request.config.pluginmanager.getplugin("isolation-worker")
    if worker is None or not worker.lends:
        from pytest_isolation.plugin import wanted_backend
        from pytest_isolation.settings import Reader

        # In a virtual machine, which no descriptor reaches, a container can be made as well as here.
        backend = "namespace" if worker is not None else wanted_backend(request.config) or "auto"
        assert isinstance(request.node, pytest.Item)
        spec = Reader(request.config, backend).of_item(request.node).spec.replace(inherit_env=False)
        if worker is not None:
            spec = spec.replace(backend=backend)
        with Sandbox(spec) as box:
            yield box
        return
    guest = worker.guest
    guest.send({"sandbox": True})
    answer = guest.receive()
    if answer is None or "error" in answer:
        raise LaunchError(f"the host could not make a sandbox: {answer['error'] if answer else 'it is gone'}")
    machine = registry.get(answer["backend"]).borrow(answer["sandbox"], guest.wire.take_fds(answer["fds"]))
    with Sandbox.borrowed(machine) as box:
        yield box
