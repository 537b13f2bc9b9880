"""Temporary files and directories that were made while pytest was configured or collected: in tests, copy-on-write."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("nothing_left")

CONFTEST = """
    import os, pathlib, pytest, shutil, tempfile
    DIRECTORY = tempfile.mkdtemp(prefix="conftest-")
    os.chmod(DIRECTORY, 0o750)
    NAMED = os.path.join("/var/tmp", "isolation-note-%d" % os.getpid())

    def pytest_configure(config):
        config.work = tempfile.mkdtemp(prefix="configured-")
        pathlib.Path(config.work, "seed").write_text("seed")

    def pytest_sessionstart(session):
        pathlib.Path(NAMED).write_text("note")
        session.config.factory = session.config._tmp_path_factory.mktemp("factory")
        (session.config.factory / "file").write_text("f")

    def pytest_unconfigure(config):
        assert os.listdir(DIRECTORY) == [] and os.listdir(config.work) == ["seed"]
        assert pathlib.Path(NAMED).read_text() == "note" and os.listdir(config.factory) == ["file"]
        shutil.rmtree(config.work); shutil.rmtree(DIRECTORY); os.unlink(NAMED)
        print("as it was")
"""
TESTS = """
    import os, pathlib, pytest, sqlite3, stat, tempfile
    from conftest import DIRECTORY, NAMED
    MADE = tempfile.TemporaryDirectory()
    DATABASE = sqlite3.connect(os.path.join(MADE.name, "db")); DATABASE.execute("create table t(x)"); DATABASE.commit()
    FILE = tempfile.NamedTemporaryFile("w+", suffix=".txt"); FILE.write("hello"); FILE.flush()
    UNLINKED = tempfile.TemporaryFile("w+"); UNLINKED.write("abc"); UNLINKED.flush()
    os.makedirs(os.path.join(MADE.name, "deep", "er"))
    INSIDE = tempfile.mkdtemp(dir=MADE.name)
    HERE = tempfile.mkdtemp(dir=".")

    REMOVED = tempfile.TemporaryDirectory(); os.makedirs(os.path.join(REMOVED.name, "a", "b"))
    os.symlink("a", os.path.join(REMOVED.name, "link")); os.chmod(os.path.join(REMOVED.name, "a"), 0o500)
    TIMES = os.stat(REMOVED.name).st_mtime_ns

    def teardown_module():
        assert os.listdir(os.path.join(REMOVED.name, "a")) == ["b"]
        os.chmod(os.path.join(REMOVED.name, "a"), 0o700)
        REMOVED.cleanup()
        assert not os.path.exists(REMOVED.name)

    @pytest.fixture(scope="module")
    def wide(): pathlib.Path(MADE.name, "of-the-fixture").write_text("1")

    def check(request, more=()):
        assert sorted(os.listdir(MADE.name)) == sorted(["db", "deep", os.path.basename(INSIDE), *more])
        assert stat.S_IMODE(os.stat(DIRECTORY).st_mode) == 0o750 and os.listdir(DIRECTORY) == []
        assert pathlib.Path(request.config.work, "seed").read_text() == "seed"
        assert (request.config.factory / "file").read_text() == "f"
        assert pathlib.Path(NAMED).read_text() == "note"
        assert os.path.isdir(INSIDE) and os.path.isdir(HERE)
        for directory in (MADE.name, DIRECTORY, request.config.work, request.config.factory, INSIDE, HERE):
            pathlib.Path(directory, "of-the-test").write_text("x")
        os.unlink(os.path.join(request.config.work, "seed"))
        pathlib.Path(NAMED).write_text("other"); os.unlink(NAMED)
        assert open(FILE.name).read() == "hello"
        FILE.seek(0); assert FILE.read() == "hello"
        FILE.write(" you"); FILE.flush(); assert open(FILE.name).read() == "hello you"
        UNLINKED.seek(0); assert UNLINKED.read() == "abc"
        DATABASE.execute("insert into t values(1)"); DATABASE.commit()
        assert DATABASE.execute("select count(*) from t").fetchall() == [(1,)]
        FILE.close(); assert not os.path.exists(FILE.name)
        assert os.stat(REMOVED.name).st_mtime_ns == TIMES and os.readlink(os.path.join(REMOVED.name, "link")) == "a"
        assert stat.S_IMODE(os.stat(os.path.join(REMOVED.name, "a")).st_mode) == 0o500
        os.chmod(os.path.join(REMOVED.name, "a"), 0o700)
        REMOVED.cleanup(); assert not os.path.exists(REMOVED.name)
        os.mkdir(REMOVED.name)
        os.rename(DIRECTORY, DIRECTORY + "-renamed"); assert os.listdir(DIRECTORY + "-renamed") == ["of-the-test"]

    @pytest.mark.parametrize("time", [1, 2])
    def test_alone(request, time): check(request)

    @pytest.mark.parametrize("time", [1, 2])
    def test_beneath(request, wide, time): check(request, ["of-the-fixture"])
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:randomly", "--isolation", *arguments)


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        (Path(name) / "before").write_text("somebody's")
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


def test_each_test_has_them_as_they_were(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    # Without --basetemp, which is shown in any case.
    result = pytester.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "-s", "--isolation")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*as it was*"])


def test_wherever_the_directory_is(pytester: pytest.Pytester, elsewhere: Path) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    result = run(pytester, "-s", "--isolation-strict", "-k", "alone")
    result.stdout.fnmatch_lines(["*as it was*"])
    # What a test does to them is told.
    assert "of-the-test" in result.stdout.str()
    assert "before" not in result.stdout.str()


def test_nothing_else_is_there(pytester: pytest.Pytester, elsewhere: Path) -> None:
    pytester.makepyfile("""
        import os, pathlib, subprocess, tempfile
        TMP = tempfile.gettempdir()
        MADE = tempfile.mkdtemp(); os.makedirs(os.path.join(TMP, "app"))
        subprocess.run(["mkdir", os.path.join(TMP, "of-another")], check=True)
        open(os.path.join(TMP, "before")).close()
        os.makedirs(os.path.join(TMP, "existing"), exist_ok=True)
        os.symlink("/etc", os.path.join(TMP, "link")); os.mkfifo(os.path.join(TMP, "fifo"))
        def test_listing():
            assert sorted(os.listdir(TMP)) == sorted([os.path.basename(MADE), "app"])
    """)
    (elsewhere / "existing").mkdir()
    run(pytester).assert_outcomes(passed=1)


def test_many_are_bounded(pytester: pytest.Pytester, elsewhere: Path) -> None:
    pytester.makepyfile("""
        import os, tempfile
        MADE = [tempfile.mkdtemp() for _ in range(300)]
        def test_some(): assert 1 < sum(map(os.path.isdir, MADE)) < 300
    """)
    run(pytester).assert_outcomes(passed=1)


def test_what_is_large_is_not_copied(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import os, pathlib, tempfile
        MANY, LARGE = tempfile.mkdtemp(), tempfile.mkdtemp()
        for number in range(3000): pathlib.Path(MANY, str(number)).touch()
        pathlib.Path(LARGE, "file").write_bytes(b"x" * (20 << 20))
        def test_it():
            assert len(os.listdir(MANY)) == 3000 and os.stat(os.path.join(LARGE, "file")).st_size == 20 << 20
            pathlib.Path(LARGE, "file").unlink(); pathlib.Path(MANY, "new").touch()
            assert os.path.ismount(MANY) and os.path.ismount(LARGE)
        def test_host(): assert len(os.listdir(MANY)) == 3000
    """)
    pytester.makeconftest("""
        import shutil, sys
        def pytest_unconfigure():
            module = sys.modules["test_what_is_large_is_not_copied"]
            shutil.rmtree(module.MANY); shutil.rmtree(module.LARGE)
    """)
    run(pytester).assert_outcomes(passed=2)


def test_the_fixture_for_sandboxes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import os, tempfile
        MADE = tempfile.TemporaryDirectory()
        def test_it(sandbox):
            assert sandbox.run(["ls", "-d", MADE.name]).returncode == 0
    """)
    run(pytester).assert_outcomes(passed=1)


def test_a_directory_that_is_mounted_at_another_place(pytester: pytest.Pytester, elsewhere: Path) -> None:
    """At its own path, tests do not see it for that."""
    pytester.makepyfile("""
        import os, tempfile
        MADE = tempfile.mkdtemp()
        def test_it(): assert os.path.isdir(MADE)
    """)
    run(pytester, f"--isolation-mount={elsewhere}:/data:overlay").assert_outcomes(passed=1)


def test_a_directory_for_temporary_files_may_be_a_link(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path(f"/var/tmp/isolation-test-{os.getpid()}")
    link = real.with_name(f"{real.name}-link")
    real.mkdir()
    link.symlink_to(real)
    try:
        monkeypatch.setenv("TMPDIR", str(link))
        pytester.makepyfile(
            "import tempfile\ndef test_it(tmp_path): assert tempfile.mkdtemp().startswith(tempfile.gettempdir())"
        )
        result = pytester.runpytest_subprocess("--isolation", "-p", "no:cacheprovider")
        result.assert_outcomes(passed=1)
        assert [path.name for path in real.iterdir() if not path.name.startswith("pytest-of-")] == []
    finally:
        link.unlink()
        shutil.rmtree(real)


def test_a_home_within_the_project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    (pytester.path / "home").mkdir()
    (pytester.path / "home/.rc").write_text("mine")
    monkeypatch.setenv("HOME", str(pytester.path / "home"))
    pytester.makepyfile("import pathlib\ndef test_it(): assert (pathlib.Path.home() / '.rc').read_text() == 'mine'")
    pytester.runpytest_subprocess("--isolation", "-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_what_a_test_has_made_unreadable_is_left_out(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import os
        def test_it(tmp_path):
            (tmp_path / "kept").write_text("x")
            (tmp_path / "secret").write_text("x")
            os.chmod(tmp_path / "secret", 0)
            (tmp_path / "closed").mkdir()
            os.chmod(tmp_path / "closed", 0)
            assert False
    """)
    result = pytester.runpytest_subprocess("--isolation", "-p", "no:cacheprovider", f"--basetemp={pytester.path}/base")
    result.assert_outcomes(failed=1)
    assert (pytester.path / "base/test_it0/kept").read_text() == "x"
