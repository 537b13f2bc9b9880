"""Memory that modules and wide fixtures have mapped: each test has it as it was, and the host's stays as it is."""

from __future__ import annotations

import sqlite3

import pytest

pytestmark = pytest.mark.usefixtures("nothing_left")


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:randomly", "--isolation", *arguments)


def test_what_modules_make_is_each_tests_own(pytester: pytest.Pytester) -> None:
    data = pytester.path / "data.bin"
    data.write_bytes(b"\0" * 4096)
    pytester.makepyfile("""
        import mmap, multiprocessing, pytest
        from multiprocessing import shared_memory
        VALUE = multiprocessing.Value("i", 0)
        ARRAY = multiprocessing.RawArray("i", 4)
        ANONYMOUS = mmap.mmap(-1, 4096)
        FILE = open("data.bin", "r+b"); MAP = mmap.mmap(FILE.fileno(), 0)
        LOCK, EVENT = multiprocessing.Lock(), multiprocessing.Event()
        NAMED = shared_memory.SharedMemory(create=True, size=64)

        def bump():
            with LOCK:
                VALUE.value += 1

        @pytest.mark.parametrize("time", [1, 2])
        def test_it(time):
            assert (VALUE.value, ARRAY[0], ANONYMOUS[:1], MAP[:4], NAMED.buf[0]) == (0, 0, b"\\0", b"\\0" * 4, 0)
            assert open("data.bin", "rb").read(4) == b"\\0" * 4
            assert not EVENT.is_set()
            children = [multiprocessing.get_context("fork").Process(target=bump) for _ in range(3)]
            for child in children: child.start()
            for child in children: child.join()
            assert VALUE.value == 3
            ARRAY[0] = 7; ANONYMOUS[:1] = b"7"; MAP[:4] = b"EVIL"; MAP.flush(); EVENT.set(); NAMED.buf[0] = 7
            assert open("data.bin", "rb").read(4) == b"EVIL"
            assert LOCK.acquire(timeout=2)

        def teardown_module(): NAMED.close(); NAMED.unlink()
    """)
    run(pytester).assert_outcomes(passed=2)
    assert data.read_bytes() == b"\0" * 4096


def test_what_wide_fixtures_make_is_set_up_once(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import mmap, multiprocessing, pytest, sqlite3

        @pytest.fixture(scope="session")
        def lock(): print("up"); return multiprocessing.Lock(), multiprocessing.Value("i", 3)

        @pytest.fixture(scope="session")
        def database(tmp_path_factory):
            print("up")
            made = sqlite3.connect(tmp_path_factory.mktemp("w") / "w.db")
            assert made.execute("pragma journal_mode=wal").fetchone() == ("wal",)
            made.execute("create table t(x)"); made.commit()
            return made

        @pytest.fixture(scope="session")
        def read(tmp_path_factory):
            print("up")
            path = tmp_path_factory.mktemp("m") / "m.bin"
            path.write_bytes(bytes(4096))
            file = open(path, "r+b")
            return file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)

        @pytest.fixture(scope="module")
        def narrower(): return 1

        @pytest.mark.parametrize("time", [1, 2])
        def test_it(lock, database, read, narrower, time):
            assert lock[0].acquire(timeout=2)
            assert lock[1].value == 3
            lock[1].value += 1
            assert database.execute("select count(*) from t").fetchone() == (0,)
            database.execute("insert into t values(1)"); database.commit()
            assert database.execute("select count(*) from t").fetchone() == (1,)
            file, mapped = read
            assert mapped[:3] == bytes(3)
            file.write(b"abc"); file.flush()
            assert mapped[:3] == b"abc"
    """)
    result = run(pytester, "-rA")
    result.assert_outcomes(passed=2)
    assert result.outlines.count("up") == 3
    result.stdout.no_fnmatch_line("*cannot carry*")


def test_a_database_of_the_hosts_own_loses_nothing(pytester: pytest.Pytester) -> None:
    """In WAL mode its index is shared memory, and a test that has the connection, too, wrote into that."""
    pytester.makeconftest("""
        import sqlite3
        connection = sqlite3.connect("runs.db")
        connection.execute("pragma journal_mode=wal"); connection.execute("create table t(x)"); connection.commit()
        def pytest_runtest_logfinish(nodeid):
            connection.executemany("insert into t values(?)", [(nodeid,)] * 100); connection.commit()
    """)
    pytester.makepyfile("""
        import pytest
        from conftest import connection
        @pytest.mark.parametrize("number", range(5))
        def test_it(number):
            before = connection.execute("select count(*) from t").fetchone()[0]
            connection.executemany("insert into t values(?)", [("mine",)] * 1000); connection.commit()
            assert connection.execute("select count(*) from t").fetchone() == (before + 1000,)
    """)
    run(pytester, "-p", "no:xdist").assert_outcomes(passed=5)
    with sqlite3.connect(pytester.path / "runs.db") as found:
        assert found.execute("select count(*), count(distinct x) from t").fetchone() == (500, 5)
        assert found.execute("pragma integrity_check").fetchone() == ("ok",)
    found.close()
