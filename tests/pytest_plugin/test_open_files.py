"""Files that modules and wide fixtures have open: in every test each is the same file, as it was, at every level."""

from __future__ import annotations

import os
import pwd
import shutil
import sqlite3
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("nothing_left")

DATABASES = """
    import os, sqlite3, pytest

    IMPORTED = sqlite3.connect(__name__ + "_imported.db")
    IMPORTED.execute("create table if not exists t(x)"); IMPORTED.commit()

    def rows(connection): return connection.execute("select count(*) from t").fetchone()[0]

    @pytest.fixture(scope="session", params=["delete", "wal"])
    def database(request, tmp_path_factory):
        connection = sqlite3.connect(tmp_path_factory.mktemp("data") / "app.db")
        connection.execute("pragma journal_mode = " + request.param)
        connection.execute("create table t(x)"); connection.commit()
        yield connection
        assert rows(connection) == 0
        connection.execute("insert into t values(1)"); connection.commit()
        print("down", rows(connection))
        connection.close()

    @pytest.fixture(scope="session")
    def in_project():
        with sqlite3.connect(__name__ + "_project.db") as connection:
            connection.execute("create table t(x)")
            yield connection

    @pytest.fixture(scope="module")
    def idle(): return 1

    @pytest.fixture(scope="module")
    def filled(database, in_project):
        for each in (IMPORTED, database, in_project):
            each.execute("insert into t values(1)"); each.commit()
        yield
        for each in (IMPORTED, database, in_project):
            assert rows(each) == 1
            each.execute("delete from t"); each.commit()

    @pytest.fixture(scope="class")
    def closer(): return 1

    def insert(expected, *connections):
        for each in connections:
            each.execute("insert into t values(1)"); each.commit()
            assert rows(each) == expected
            path = each.execute("pragma database_list").fetchone()[2]
            with sqlite3.connect(path) as other: assert rows(other) == expected
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:randomly", "--isolation", *arguments)


def test_a_database_can_be_written_to_at_every_level(pytester: pytest.Pytester) -> None:
    path = pytester.path / "test_one_imported.db"
    pytester.makepyfile(
        test_one=DATABASES
        + """
    @pytest.mark.parametrize("time", [1, 2])
    def test_alone(database, in_project, time): insert(1, IMPORTED, database, in_project)

    def test_below_a_module(database, in_project, idle): insert(1, IMPORTED, database, in_project)

    class TestClass:
        @pytest.mark.parametrize("time", [1, 2])
        def test_below_a_class(self, database, in_project, idle, closer, time): insert(1, IMPORTED, database, in_project)
    """,
        test_two=DATABASES
        + """
    def test_filled(database, in_project, filled): insert(2, IMPORTED, database, in_project)

    class TestClass:
        def test_filled(self, database, in_project, filled, closer): insert(2, IMPORTED, database, in_project)
    """,
    )
    run(pytester).assert_outcomes(passed=14)
    with sqlite3.connect(path) as connection:
        assert connection.execute("select count(*) from t").fetchone() == (0,)


def test_the_number_of_a_file_stays_the_same(pytester: pytest.Pytester) -> None:
    """Of every way to open it for writing, and whatever was written by whom."""
    Path("project").write_text("p\n")
    pytester.makepyfile("""
        import mmap, os, pytest

        def number(file):
            assert os.fstat(file.fileno()).st_ino == os.stat(file.name).st_ino
            return os.fstat(file.fileno()).st_ino

        @pytest.fixture(scope="session")
        def files(tmp_path_factory):
            there = tmp_path_factory.mktemp("there") / "deep" / "er"
            there.mkdir(parents=True)
            for name in ("map", "sparse", "mode"): (there / name).write_bytes(b"1" * 4096)
            found = [open(there / "append", "a"), open(there / "write", "w"), open(there / "map", "r+b", buffering=0)]
            found += [open("project", "r+"), open("project", "a"), open(there / "sparse", "r+b"), open(there / "mode", "r+b")]
            yield [(file, number(file)) for file in found]
            assert os.listdir(there.parent) == ["er"] and len(os.listdir(there)) == 5
            assert open("project").read() == "p\\n"
            for file in found: number(file)

        @pytest.fixture(scope="module")
        def written(files):
            append, write, mapped, project, again, sparse, mode = [file for file, _number in files]
            times = os.stat(mapped.name), os.stat(os.path.dirname(mapped.name)).st_mtime_ns
            print("module", file=append, flush=True)
            print("module", file=write, flush=True)
            with mmap.mmap(mapped.fileno(), 0) as memory: memory[:6] = b"module"
            os.utime(mapped.name, ns=(times[0].st_atime_ns, times[0].st_mtime_ns))
            print("module", file=again, flush=True)
            sparse.truncate(8 << 20); sparse.truncate(1 << 30)
            os.chmod(mode.name, 0o640)
            yield times[1]
            assert os.stat(os.path.dirname(mapped.name)).st_mtime_ns == times[1]
            assert open(write.name).read() == "module\\n"
            again.truncate(2)

        @pytest.fixture(scope="class")
        def more(files, written): print("class", file=files[0][0], flush=True)

        def check(files, written, appended):
            for file, before in files: assert number(file) == before
            append, write, mapped, project, again, sparse, mode = [file for file, _number in files]
            assert open(append.name).read() == appended
            assert open(write.name).read() == "module\\n"
            assert mapped.read(7) == b"module1"
            assert project.read() == "p\\nmodule\\n"
            assert os.stat(sparse.name).st_size == 1 << 30 and os.stat(sparse.name).st_blocks < 1 << 14
            assert os.stat(mode.name).st_mode & 0o777 == 0o640
            assert os.stat(os.path.dirname(mapped.name)).st_mtime_ns == written
            print("test", file=append, flush=True); print("test", file=write, flush=True)
            assert open(append.name).read() == appended + "test\\n"
            assert open(write.name).read() == "module\\ntest\\n"
            os.unlink(append.name)

        @pytest.mark.parametrize("time", [1, 2])
        def test_it(files, written, time): check(files, written, "module\\n")

        class TestClass:
            @pytest.mark.parametrize("time", [1, 2])
            def test_it(self, files, written, more, time): check(files, written, "module\\nclass\\n")

        def test_again(files, written): check(files, written, "module\\n")
    """)
    run(pytester).assert_outcomes(passed=5)
    assert Path("project").read_text() == "p\n"


def test_what_a_fixture_has_removed_or_put_elsewhere(pytester: pytest.Pytester) -> None:
    Path("old").write_text("old\n")
    pytester.makepyfile("""
        import os, pytest

        @pytest.fixture(scope="session")
        def file():
            with open("old", "r+") as file: yield file

        @pytest.fixture(scope="module")
        def moved(file):
            os.rename("old", "new")
            with open("old", "w+") as other:
                print("other", file=other, flush=True)
                yield other

        @pytest.fixture(scope="class")
        def removed(moved): os.unlink("old")

        def test_moved(file, moved):
            assert file.read() == "old\\n" and open("new").read() == "old\\n" and open("old").read() == "other\\n"
            moved.write("more\\n"); moved.flush()
            assert open("old").read() == "other\\nmore\\n"

        class TestClass:
            def test_removed(self, file, moved, removed):
                assert file.read() == "old\\n" and not os.path.exists("old")
                moved.seek(0); assert moved.read() == "other\\n"
    """)
    run(pytester).assert_outcomes(passed=2)


def test_places_and_files_of_the_kernel(pytester: pytest.Pytester) -> None:
    """Opened for no reading (O_PATH), and in /proc: those of this process are of the test's."""
    pytester.makepyfile("""
        import os, pytest
        FILE, DIRECTORY = os.open(__file__, os.O_PATH), os.open(".", os.O_PATH)
        os.symlink("to", "link"); LINK = os.open("link", os.O_PATH | os.O_NOFOLLOW)
        os.mkfifo("fifo"); FIFO = os.open("fifo", os.O_RDWR | os.O_NONBLOCK)
        STATUS, STAT = open("/proc/self/status"), os.open("/proc/stat", os.O_RDONLY)

        @pytest.fixture(scope="module")
        def wide(): return 1

        def check():
            assert os.path.samestat(os.fstat(FILE), os.stat(__file__))
            with pytest.raises(OSError, match="Bad file descriptor"): os.read(FILE, 1)
            assert os.stat(os.path.basename(__file__), dir_fd=DIRECTORY).st_size == os.fstat(FILE).st_size
            assert os.readlink("", dir_fd=LINK) == "to"
            if (pid := os.fork()) == 0:
                with open("fifo", "wb") as file: file.write(b"x")
                os._exit(0)
            os.waitpid(pid, 0)
            assert os.read(FIFO, 100) == b"x"
            assert f"\\nPid:\\t{os.getpid()}\\n" in STATUS.read()
            assert os.read(STAT, 3) == b"cpu"

        @pytest.mark.parametrize("time", [1, 2])
        def test_alone(time): check()

        @pytest.mark.parametrize("time", [1, 2])
        def test_below_a_module(wide, time): check()
    """)
    run(pytester).assert_outcomes(passed=4)


def test_a_file_that_tests_do_not_see_is_named(pytester: pytest.Pytester, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It is /dev/null to them. What lies in the project, in /tmp or in the system is there."""
    elsewhere = Path("/var/lib") if os.geteuid() == 0 else Path(pwd.getpwuid(os.getuid()).pw_dir)  # $HOME is pytester's
    path = elsewhere / f"isolation-test-{os.getpid()}"
    path.mkdir()
    try:
        (path / "data.txt").write_text("content")
        pytester.makefile(".txt", seen="content")
        pytester.makepyfile(
            f"import tempfile\nHERE = open('seen.txt'); THERE = open({str(path / 'data.txt')!r}); PASSWD = open('/etc/passwd')\n"
            "BESIDE = tempfile.NamedTemporaryFile('w+')\n"
            "def test_here(): assert HERE.read() == 'content' and PASSWD.read()\n"
            "def test_there(): assert THERE.read() == 'content'\n"
        )
        result = pytester.runpytest_subprocess("--isolation", "-p", "no:cacheprovider")
        result.assert_outcomes(passed=1, failed=1)
        named = [line for line in result.outlines if "was opened while tests were collected" in line]
        assert len(named) == 1
        assert f"{path}/data.txt" in named[0]
        result = pytester.runpytest_subprocess("--isolation", f"--isolation-mount={path}", "-p", "no:cacheprovider")
        result.assert_outcomes(passed=2)
        assert "was opened while" not in result.stdout.str()
    finally:
        shutil.rmtree(path)
