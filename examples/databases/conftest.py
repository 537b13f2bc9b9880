"""Two real servers, started once for the whole run: Debian's PostgreSQL and Redis.

    pytest --isolation=microvm examples/databases

On a microVM a fork has the machine's memory, with all that runs in it, so every test has its own running copy of both, as
they were when the fixtures had set them up. A fork of a process cannot carry a child process: on namespaces each test starts
its own servers, which is as isolated, takes longer, and is said at the end of the run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import NotHere, Postgres, Redis


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    try:
        server = Postgres(Path(os.path.realpath(found)).parent, tmp_path_factory.mktemp("postgres"))
    except NotHere as error:
        pytest.skip(str(error))
    server.sql("create table stock (item text primary key, number int)")
    server.sql("insert into stock values ('apples', 5), ('pears', 7)")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("Redis is not installed (Debian: redis-server)")
    server = Redis(program, tmp_path_factory.mktemp("redis"))
    server("SET", "visits", "10")
    yield server
    server.stop()
