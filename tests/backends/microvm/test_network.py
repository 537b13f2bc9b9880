"""What a machine's network reaches."""

from __future__ import annotations

import socket
import threading

import pytest

from isolation import Sandbox, SandboxSpec

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("microvm_ready", "nothing_left")]

_PROGRAM = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)
print(connection.recv(100).decode())
"""


@pytest.fixture
def port() -> int:
    """Of a server of the host's, on its loopback interface."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()

    def serve() -> None:
        with server, server.accept()[0] as connection:
            connection.sendall(b"from the host")

    threading.Thread(target=serve, daemon=True).start()
    found: int = server.getsockname()[1]
    return found


def test_nat_reaches_out(port: int) -> None:
    """10.0.2.2 is the host, for QEMU's user networking."""
    with Sandbox(SandboxSpec("microvm", network="nat")) as box:
        done = box.run(["python3", "-c", _PROGRAM, "10.0.2.2", str(port)], timeout=600)
        assert done.stdout == b"from the host\n", done.stderr


def test_without_it_there_is_nothing(port: int) -> None:
    with Sandbox(SandboxSpec("microvm")) as box:
        for address in ("10.0.2.2", "127.0.0.1"):
            done = box.run(["python3", "-c", _PROGRAM, address, str(port)], timeout=600)
            assert b"OSError" in done.stderr or b"ConnectionRefusedError" in done.stderr
    with socket.create_connection(("127.0.0.1", port)) as connection:  # it was there all the time
        assert connection.recv(100) == b"from the host"
