"""The two servers, each with a client that needs nothing but the standard library and what comes with the server."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path


class NotHere(Exception):
    """A server cannot run where we are."""


class Postgres:
    """A server on a unix socket; `sql` asks it by psql."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self._programs = programs
        self._directory = directory
        # PostgreSQL refuses to be root, which one is in a sandbox only as far as the number goes: so it is another there.
        self._prefix = ["unshare", "--user", "--map-user=1000"] if os.getuid() == 0 else []
        if self._prefix and subprocess.run([*self._prefix, "true"], capture_output=True, check=False).returncode:
            raise NotHere("PostgreSQL refuses to be root, and this sandbox has no other user; run as an ordinary user")
        data = directory / "data"
        self._run("initdb", "--no-sync", "--auth=trust", "--username=test", "--no-locale", "--pgdata", data)
        options = f"-F -k {directory} -c listen_addresses= -c shared_buffers=16MB -c autovacuum=off -c max_connections=10"
        self._run("pg_ctl", "--pgdata", data, "--wait", "--log", directory / "log", "-o", options, "start")

    def _run(self, program: str, *arguments: object) -> str:
        command = [*self._prefix, str(self._programs / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{program}: {done.stderr or done.stdout}"
        return done.stdout

    def sql(self, text: str) -> list[str]:
        """The rows of a query, each as text."""
        found = self._run("psql", "-h", self._directory, "-U", "test", "-d", "postgres", "-qAtc", text)
        return found.splitlines()

    def stop(self) -> None:
        self._run("pg_ctl", "--pgdata", self._directory / "data", "--mode=immediate", "stop")


class Redis:
    """A server on a unix socket, spoken to in its own protocol."""

    def __init__(self, program: str, directory: Path) -> None:
        self._socket = directory / "redis.sock"
        command = [program, "--port", "0", "--unixsocket", str(self._socket), "--save", "", "--dir", str(directory)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, "redis-server did not start"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Whether it does already. That its socket is there is not enough: `bind` makes the file, only `listen` opens it."""
        try:
            return self("PING") == "+PONG"
        except OSError:
            return False

    def __call__(self, *words: str) -> str:
        """One command; its answer's first line, or the text that it announces."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self._socket))
            parts = [f"*{len(words)}", *(line for word in words for line in (f"${len(word)}", word)), ""]
            client.sendall("\r\n".join(parts).encode())
            answer = client.makefile("r", newline="\r\n")
            first = answer.readline().strip()
            return answer.readline().strip() if first[:1] == "$" and first != "$-1" else first

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
