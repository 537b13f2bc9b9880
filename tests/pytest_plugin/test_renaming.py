"""Directories can be renamed: of the project, and those that a wide fixture has made."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("nothing_left")

SUITE = """
    import os, pathlib, pytest, shutil, stat, tempfile
    HERE = pathlib.Path(__file__).parent

    @pytest.fixture(scope="session")
    def shared(tmp_path_factory):
        tree = tmp_path_factory.mktemp("shared") / "tree"
        (tree / "inner").mkdir(parents=True); (tree / "inner" / "f").write_text("1")
        return tree

    @pytest.fixture(scope="module")
    def moved(shared): return shared.rename(shared.parent / "moved")

    def test_rename():
        (HERE / "data").rename(HERE / "data2")
        assert (HERE / "data2/g.txt").read_text() == "g" and (HERE / "data2/sub/f.txt").read_text() == "f"
        assert not (HERE / "data").exists() and sorted(os.listdir(HERE / "data2")) == ["g.txt", "link", "sub"]
        assert os.readlink(HERE / "data2/link") == "g.txt"
        (HERE / "data2").rename(HERE / "data")

    def test_what_it_was():
        os.chmod(HERE / "data", 0o750)
        before, file = os.stat(HERE / "data"), os.stat(HERE / "data/g.txt")
        with open(HERE / "data/g.txt", "r+") as opened:
            os.rename("data", "other")
            after = os.stat("other")
            assert (before.st_mode, before.st_mtime_ns, before.st_uid) == (after.st_mode, after.st_mtime_ns, after.st_uid)
            opened.write("new"); opened.flush()
            assert open("other/g.txt").read() == "new" and os.stat("other/g.txt").st_ino == file.st_ino

    def test_into_another(tmp_path):
        os.rename(HERE / "data/sub", HERE / "sub")
        os.mkdir("empty"); os.replace("data", "empty")
        assert sorted(os.listdir("empty")) == ["g.txt", "link"]
        with pytest.raises(OSError, match="not empty") as caught: os.rename("empty", "sub")
        assert (caught.value.filename, caught.value.filename2) == ("empty", "sub")

    def test_refused():
        with pytest.raises(OSError, match="Invalid argument"): os.rename("data", "data/sub/data")
        with pytest.raises(NotADirectoryError): os.rename("data", "test_it.py")
        with pytest.raises(FileNotFoundError): os.rename("data", "nowhere/data")
        with pytest.raises(FileNotFoundError): os.rename("nothing", "data2")
        assert sorted(os.listdir("data")) == ["g.txt", "link", "sub"]
        with pytest.raises(OSError, match="cross-device"): os.rename("data", "/dev/shm/data")

    def test_undone(monkeypatch):
        import pytest_isolation.inside.renaming as renaming
        original = renaming._rename
        def fails(source, target):
            if source.endswith("f.txt"): raise PermissionError(13, "Permission denied")
            return original(source, target)
        monkeypatch.setattr(renaming, "_rename", fails)
        with pytest.raises(PermissionError): os.rename("data", "data2")
        monkeypatch.undo()
        assert not os.path.exists("data2") and sorted(os.listdir("data")) == ["g.txt", "link", "sub"]
        assert open("data/sub/f.txt").read() == "f"

    def test_ways_to_say_it(monkeypatch):
        directory = os.open(HERE, os.O_RDONLY)
        os.rename(b"data/", b"one", src_dir_fd=directory, dst_dir_fd=directory)
        monkeypatch.chdir("one/sub")
        os.rename("../../one", "../../two")
        assert os.getcwd() == str(HERE / "two/sub") and open("f.txt").read() == "f"
        monkeypatch.chdir(HERE)
        shutil.move("two", "three"); os.renames("three", "four/five")
        assert (HERE / "four/five/g.txt").exists()

    def test_from_and_to_another_mount():
        tmp_path = pathlib.Path(tempfile.mkdtemp())  # where the project lies, too, on the host
        assert os.stat(tmp_path).st_dev != os.stat(HERE).st_dev
        (tmp_path / "new").write_text("new"); (tmp_path / "link").symlink_to("new")
        os.replace(tmp_path / "new", "data/g.txt"); os.rename(tmp_path / "link", "link")
        assert open("data/g.txt").read() == "new" and os.readlink("link") == "new" and os.listdir(tmp_path) == []
        os.rename("data", tmp_path / "data")
        assert sorted(os.listdir(tmp_path / "data")) == ["g.txt", "link", "sub"] and not os.path.exists("data")
        (tmp_path / "data/sub").rename("sub"); assert os.listdir("sub") == ["f.txt"]
        with pytest.raises(IsADirectoryError): os.rename("test_it.py", tmp_path)
        with pytest.raises(OSError, match="not empty"): os.rename("sub", tmp_path / "data")
        assert os.listdir("sub") == ["f.txt"] and "test_it.py" in os.listdir() and os.listdir(tmp_path) == ["data"]

    def test_of_a_wide_fixture(shared):
        (shared / "inner").rename(shared / "inner2")
        shared.rename(shared.parent / "other")
        assert (shared.parent / "other/inner2/f").read_text() == "1"

    class TestBelow:
        def test_moved_by_a_fixture(self, moved):
            assert (moved / "inner/f").read_text() == "1"
            moved.rename(moved.parent / "again")
            assert (moved.parent / "again/inner/f").read_text() == "1"
"""


def test_directories(pytester: pytest.Pytester) -> None:
    pytester.mkdir("data").joinpath("sub").mkdir()
    (pytester.path / "data" / "g.txt").write_text("g")
    (pytester.path / "data" / "sub" / "f.txt").write_text("f")
    (pytester.path / "data" / "link").symlink_to("g.txt")
    pytester.makepyfile(test_it=SUITE)
    arguments = ("-p", "no:cacheprovider", "-p", "no:randomly")
    pytester.runpytest_subprocess(*arguments, "--isolation").assert_outcomes(passed=9)
    assert sorted(path.name for path in (pytester.path / "data").iterdir()) == ["g.txt", "link", "sub"]
