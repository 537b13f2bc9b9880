"""What git needs of a project is there when it lies elsewhere, copy-on-write."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_isolation.host import repository

pytestmark = pytest.mark.usefixtures("nothing_left")


def make(git: Path) -> Path:
    """As much of a repository as is looked at."""
    (git / "objects").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    return git


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    return home


def test_a_part_of_a_repository(home: Path) -> None:
    git = make(home / "work" / "whole" / ".git")
    part = home / "work" / "whole" / "packages" / "part"
    part.mkdir(parents=True)
    assert repository.beside(str(part)) == [str(git)]
    assert repository.beside(str(home / "work" / "whole")) == []  # it is in it


@pytest.mark.parametrize("relative", [False, True])
def test_a_worktree(home: Path, relative: bool) -> None:
    git = make(home / "work" / "main" / ".git")
    own = git / "worktrees" / "tree"
    own.mkdir(parents=True)
    (own / "commondir").write_text("../..\n")
    tree = home / "work" / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / ".git").write_text(f"gitdir: {'../main/.git/worktrees/tree' if relative else own}\n")
    assert repository.beside(str(tree)) == [str(git)]
    assert repository.beside(str(tree / "inner")) == [str(tree / ".git"), str(git)]


def test_a_submodule(home: Path) -> None:
    module = make(make(home / "work" / "super" / ".git") / "modules" / "sub")
    sub = home / "work" / "super" / "sub"
    sub.mkdir()
    (sub / ".git").write_text("gitdir: ../.git/modules/sub\n")
    assert repository.beside(str(sub)) == [str(module)]


def test_none(home: Path) -> None:
    make(home / ".git")  # of somebody's settings
    project = home / "work" / "project"
    project.mkdir()
    assert repository.beside(str(project)) == repository.beside(str(home)) == repository.beside("/") == []
    secrets = home / ".secrets"
    secrets.mkdir()
    for text in ("", "gitdir:", f"gitdir: {secrets}", "gitdir: /nowhere", f"somewhere: {home}/.git", "\0"):
        (project / ".git").write_text(text)
        assert repository.beside(str(project)) == []
    (project / ".git").unlink()
    (project / ".git").mkdir()
    (project / "part").mkdir()
    assert repository.beside(str(project / "part")) == []  # that is none


def test_it_is_there_in_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    main = make(pytester.path / "main" / ".git")
    (main / "worktrees" / "tree").mkdir(parents=True)
    (main / "worktrees" / "tree" / "commondir").write_text("../..\n")
    (pytester.path / "main" / "code.py").touch()
    part = pytester.path / "tree" / "part"
    part.mkdir(parents=True)
    (pytester.path / "tree" / ".git").write_text(f"gitdir: {main}/worktrees/tree\n")
    (pytester.path / "tree" / "other").touch()
    (part / "pytest.ini").touch()
    (part / "test_it.py").write_text(f"""
import os, pathlib
def test_it():
    main = pathlib.Path({str(main)!r})
    assert pathlib.Path("../.git").read_text() == f"gitdir: {{main}}/worktrees/tree\\n"
    assert (main / "HEAD").read_text() and (main / "worktrees/tree/commondir").exists()
    (main / "HEAD").write_text("other")
    assert os.listdir(main.parent) == [".git"]
    assert sorted(os.listdir("..")) == [".git", "part"]
    assert os.environ["GIT_DISCOVERY_ACROSS_FILESYSTEM"] == "1"
""")
    monkeypatch.chdir(part)
    pytester.runpytest_subprocess("-p", "no:cacheprovider", "--isolation").assert_outcomes(passed=1)
    assert (main / "HEAD").read_text() == "ref: refs/heads/main\n"
