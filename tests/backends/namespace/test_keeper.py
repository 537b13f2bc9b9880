"""What a keeper holds of a sandbox, it lets go of."""

from __future__ import annotations

import os
import socket

import pytest

from isolation.backends.namespace.serving import Child


def test_a_child_that_is_gone_holds_no_descriptor() -> None:
    leash, theirs = socket.socketpair()
    with theirs:
        child = Child(1, 0, -1, leash, None)
        child.mounts, child.crash = os.pipe()
        child.close()
        for fd in (child.mounts, child.crash):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        assert theirs.recv(1) == b""
