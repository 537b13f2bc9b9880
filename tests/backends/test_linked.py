"""Packages that are links: what they lead to is shown, as closely as can be, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isolation import Mount, Sandbox, SandboxSpec
from isolation.backends import linked, showing


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    (home / "secret.txt").write_text("secret")
    monkeypatch.setenv("HOME", str(home))
    for name in ("UV_CACHE_DIR", "PDM_CACHE_DIR", "XDG_CACHE_HOME", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    return home


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def link_files(source: Path, target: Path) -> None:
    """As uv does it."""
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)


@pytest.fixture
def packages(home: Path, tmp_path: Path) -> Path:
    """Of every kind of link."""
    found = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
    write(found / "ordinary" / "__init__.py")
    archive = home / ".cache" / "uv" / "archive-v0"
    write(archive / "one" / "by_uv" / "__init__.py", "from by_uv.deep.er import VALUE")
    write(archive / "one" / "by_uv" / "deep" / "er.py", "VALUE = 'uv'")
    write(archive / "one" / "by_uv-1.0.dist-info" / "METADATA", "Name: by_uv\nVersion: 1.0\n")
    write(archive / "other" / "unlinked" / "__init__.py")
    link_files(archive / "one", found)
    cache = home / ".cache" / "pdm" / "packages"
    write(cache / "by-pdm-1.0" / "lib" / "by_pdm" / "__init__.py", "VALUE = 'pdm'")
    write(cache / "by-pdm-1.0" / "lib" / "more" / "__init__.py")
    (cache / "current").symlink_to("by-pdm-1.0")
    (found / "by_pdm").symlink_to(cache / "current" / "lib" / "by_pdm")
    write(home / "module.py", "VALUE = 'module'")
    (found / "module.py").symlink_to(os.path.relpath(home / "module.py", found))
    write(home / "dev" / "mine" / "__init__.py", "VALUE = 'mine'")
    (found / "mine").symlink_to(home / "dev" / "mine")
    (found / "everything").symlink_to(home)
    (found / "gone").symlink_to(home / "nowhere")
    (found / "inner").symlink_to("ordinary")
    return found


def test_what_links_lead_to(packages: Path, home: Path) -> None:
    archive = home / ".cache" / "uv" / "archive-v0" / "one"  # the whole of it is linked
    assert sorted(linked.places([str(packages)])) == sorted(map(str, [
        archive, home / ".cache/pdm/packages/current/lib/by_pdm", home / "module.py", home / "dev" / "mine",
    ]))  # fmt: skip
    assert linked.places([str(packages.parent), str(home)]) == []  # which hold no installed packages
    within = linked.places([str(packages)], within=linked.caches())
    assert sorted(within) == sorted(map(str, [archive, home / ".cache/pdm/packages/current/lib/by_pdm"]))


def test_a_strict_editable_install(home: Path, tmp_path: Path) -> None:
    source = home / "work" / "project" / "src"
    for name in ("pkg/__init__.py", "pkg/inner/__init__.py", "single.py"):
        write(source / name)
    write(source / "unrelated.txt")
    built = write(home / "work" / "project" / "build" / "lib" / "native.so")
    tree = tmp_path / "build" / "__editable__.project-1.0-cp311"
    for name in ("pkg/__init__.py", "pkg/inner/__init__.py", "single.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).symlink_to(source / name)
    (tree / "pkg" / "native.so").symlink_to(built)
    assert sorted(linked.places([str(tree)])) == sorted(map(str, [source / "pkg", source / "single.py", built]))


def test_a_home_is_never_shown(home: Path, tmp_path: Path) -> None:
    packages = tmp_path / "site-packages"
    write(home / "pkg.py")
    for number, target in enumerate((home, home.parent, Path("/"), Path("/tmp"))):
        packages.mkdir(exist_ok=True)
        (packages / f"link{number}").symlink_to(target)
    (packages / "home").mkdir()
    (packages / "home" / "pkg.py").symlink_to(home / "pkg.py")  # the package that it seems to be of is the home directory
    assert linked.places([str(packages)]) == [str(home / "pkg.py")]


def test_places_are_bounded(home: Path, tmp_path: Path) -> None:
    packages = tmp_path / "site-packages"
    packages.mkdir()
    for number in range(500):
        write(home / "cache" / f"at{number}" / f"p{number}" / "__init__.py")
        write(home / "cache" / f"at{number}" / "more")
        (packages / f"p{number}").symlink_to(home / "cache" / f"at{number}" / f"p{number}")
    assert 100 < len(linked.places([str(packages)])) < 500


@pytest.mark.usefixtures("nothing_left")
def test_they_can_be_imported(packages: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    program = """
        import importlib.metadata, os, sys
        sys.path.append(sys.argv[1])
        import by_uv, by_pdm, module, mine
        assert (by_uv.VALUE, by_pdm.VALUE, module.VALUE, mine.VALUE) == ("uv", "pdm", "module", "mine")
        assert importlib.metadata.version("by_uv") == "1.0"
        home = sys.argv[2]
        assert sorted(os.listdir(home)) == [".cache", "dev", "module.py"], os.listdir(home)
        assert os.listdir(home + "/.cache/uv/archive-v0") == ["one"]
        assert os.listdir(home + "/.cache/pdm/packages/by-pdm-1.0/lib") == ["by_pdm"]
        try: open(mine.__file__, "a")
        except OSError: print("read-only")
    """
    program = "\n".join(line[8:] for line in program.splitlines())
    with Sandbox(SandboxSpec("namespace")) as box:
        done = box.run([sys.executable, "-c", program, str(packages), str(home)])
    assert done.stdout == b"read-only\n", done


@pytest.mark.usefixtures("nothing_left")
def test_pytest_finds_them(packages: Path, tmp_path: Path) -> None:
    """Modules that are imported late, too, and in the processes that a test starts."""
    write(
        tmp_path / "project" / "test_it.py",
        """
import subprocess, sys
def test_late():
    import by_uv, by_pdm, mine
def test_child(): subprocess.run([sys.executable, "-c", "import by_uv, by_pdm, mine, module"], check=True)
""",
    )
    python_path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": python_path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "pytest_isolation.plugin",
        "-p",
        "no:cacheprovider",
        "--isolation",
    ]
    done = subprocess.run(command, cwd=tmp_path / "project", env=environment, capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout, done


def test_an_active_environment_is_looked_into_as_well(packages: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But need not be the user's own, and so shows caches only."""
    monkeypatch.setenv("VIRTUAL_ENV", str(packages.parents[2]))
    shown = showing.python_environment()
    assert str(home / ".cache" / "uv" / "archive-v0" / "one") in shown
    assert str(home / "dev" / "mine") not in shown
    assert Mount(shown[0])


def test_import_hooks_of_editable_installs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    finder = types.ModuleType("__editable___project_1_0_finder")
    write(home / "work" / "late" / "__init__.py")
    finder.MAPPING = {"late": str(home / "work" / "late")}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, finder.__name__, finder)
    assert str(home / "work" / "late") in showing.python_environment()
