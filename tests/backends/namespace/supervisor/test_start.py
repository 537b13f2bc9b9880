"""What a supervisor holds of a sandbox, it lets go of."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from isolation import Sandbox, SandboxSpec
from isolation.backends.namespace.host import supervisor_pool
from isolation.backends.namespace.supervisor.child import Child
from isolation.backends.namespace.supervisor.handle import SupervisorHandle


def test_a_child_that_is_gone_holds_no_descriptor() -> None:
    control_socket, theirs = socket.socketpair()
    with theirs:
        child = Child(1, 0, -1, control_socket, None)
        child.mounts, child.crash = os.pipe()
        child.close()
        for fd in (child.mounts, child.crash):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        assert theirs.recv(1) == b""


def test_a_supervisor_that_was_interrupted_before_its_first_word_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """That word may be read and lost then; whoever waited for it again would wait for ever."""
    spec = SandboxSpec(backend="namespace")
    with Sandbox(spec):
        pass  # from the second sandbox on, a supervisor stays
    plain = SupervisorHandle.ready

    def interrupted(process: SupervisorHandle, timeout: float | None) -> int | None:
        plain(process, timeout)
        raise KeyboardInterrupt

    supervisor_pool.release()
    with Sandbox(spec):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(SupervisorHandle, "ready", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _ = Sandbox(spec).machine
    ran: list[bool] = []

    def run() -> None:
        with Sandbox(spec) as box:
            ran.append(box.run(["true"], timeout=10).verdict.ok)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert ran == [True]
