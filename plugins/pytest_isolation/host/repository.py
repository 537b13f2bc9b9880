"""Where git keeps what belongs to a project, when that is not in it: a worktree's, a submodule's, or that of a repository of
which the project is a part."""

from __future__ import annotations

from isolation.paths import is_within
from isolation.plain import os

_FILE_AT_MOST = 4096


def beside(project: str) -> list[str]:
    """What `git` needs to find, besides the directory `project`; a home directory is nobody's repository."""
    home = os.path.realpath(os.path.expanduser("~"))
    directory = project
    while directory != "/" and not is_within(home, [directory]):
        git = os.path.join(directory, ".git")
        if os.path.isdir(git):
            return [git] if directory != project and _is_repository(git) else []
        if os.path.isfile(git):
            found = _common(git)
            if not found:
                return []
            return found if directory == project else [git, *found]
        directory = os.path.dirname(directory)
    return []


def _common(file: str) -> list[str]:
    """What a file `.git` leads to (gitrepository-layout(5))."""
    name, _, path = _read(file).partition(":")
    if name != "gitdir" or not path.strip():
        return []
    directory = os.path.normpath(os.path.join(os.path.dirname(file), path.strip()))
    common = _read(os.path.join(directory, "commondir")).strip()
    if common:  # of a worktree, which usually lies in it
        whole = os.path.normpath(os.path.join(directory, common))
        inside = is_within(os.path.realpath(directory), [os.path.realpath(whole)])
        return ([whole] if inside else [whole, directory]) if _is_repository(whole) else []
    return [directory] if _is_repository(directory) else []


def _is_repository(directory: str) -> bool:
    """And one's own: git itself believes no other."""
    try:
        if os.geteuid() not in (0, os.stat(directory).st_uid):
            return False
    except OSError:
        return False
    return os.path.isfile(os.path.join(directory, "HEAD")) and os.path.isdir(os.path.join(directory, "objects"))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(_FILE_AT_MOST)
    except OSError:
        return ""
