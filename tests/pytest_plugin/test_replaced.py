"""What a project or a test replaces of the standard library does not reach what supervises it, or carries its reports."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.once("user")
REPLACE = """
import json, select, socket, subprocess, threading, time


def replaced(*_arguments, **_more):
    raise RuntimeError("this is the project's, and not for others")


class Replaced:
    __init__ = replaced


def replace():
    for module, names in (
        (json, "dumps loads dump load JSONEncoder JSONDecoder"), (select, "poll select epoll"),
        (socket, "socket socketpair create_connection fromfd send_fds recv_fds"), (subprocess, "Popen run check_output"),
        (threading, "Thread Timer"), (time, "sleep"),
    ):
        for name in names.split():
            setattr(module, name, Replaced if name[0].isupper() or name == "socket" else replaced)
    for name in ("encode", "iterencode", "item_separator"):
        setattr(json.encoder.JSONEncoder, name, replaced)
"""
TESTS = """
import json, pytest, warnings

@pytest.fixture(scope="module")
def wide(): return 1

def test_passes(wide): print("said")
def test_fails(): assert [1] == [2]
def test_warns(): warnings.warn("something")
@pytest.mark.skip(reason="because")
def test_is_skipped(): pass
@pytest.mark.parametrize("name", ["dumps", "loads"])
def test_for_itself(monkeypatch, name): monkeypatch.setattr(json, name, None)
def test_dies(): import os; os._exit(3)
def test_with_a_command(sandbox): assert sandbox.run(["true"]).returncode == 0
"""


@pytest.mark.parametrize("where", ["conftest", "module", "test"])
def test_what_a_project_replaces(pytester: pytest.Pytester, where: str) -> None:
    pytester.makepyfile(replacing=REPLACE)
    code = "from replacing import replace\nreplace()\n"
    if where == "conftest":
        pytester.makeconftest(code)
    early = code if where == "module" else ""
    late = "import replacing\n\n@pytest.fixture(autouse=True)\ndef replaced(): replacing.replace()\n" if where == "test" else ""
    pytester.makepyfile(test_it=early + TESTS + late)
    result = pytester.runpytest_subprocess("--isolation", "-p", "no:cacheprovider", "-rA")
    result.stdout.fnmatch_lines(["*ended with status 3*"])
    result.assert_outcomes(passed=5, failed=2, skipped=1, warnings=1)
