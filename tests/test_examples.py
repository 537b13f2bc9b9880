"""The examples do what their READMEs say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(example: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    shutil.copytree(EXAMPLES / example, directory, dirs_exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "isolation", "-q", *arguments]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # one shuffles the tests
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_leaky(tmp_path: Path) -> None:
    plain = run("leaky", tmp_path / "plain")
    assert "7 failed, 7 passed" in plain.stdout
    isolated = run("leaky", tmp_path / "isolated", "--isolation")
    assert "14 passed" in isolated.stdout
    assert not (tmp_path / "isolated" / "results.txt").exists()


def test_hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").write_text("still here")
    monkeypatch.setenv("HOME", str(home))
    refused = run("hostile", tmp_path / "hostile", "--isolation=no")
    assert refused.returncode == 4
    done = run("hostile", tmp_path / "hostile")
    assert "7 failed, 7 passed" in done.stdout, done.stdout
    for expected in (
        "test_eats_memory - the test ran out of memory",
        "test_hangs - the test timed out after 5s",
        "test_ignores_signals_and_hangs - the test timed out",
        "test_exits_as_if_all_were_well - the test's process ended with status 0",
        "test_crashes - the test's process was killed by signal 11",
        "test_forges_a_result - the test's process sent",
    ):
        assert expected[:60] in done.stdout, (expected, done.stdout)
    assert (home / "precious").read_text() == "still here"
    assert (tmp_path / "hostile" / "test_hostile.py").exists()


def needs_servers() -> None:
    """Debian's packages."""
    initdb = shutil.which("initdb") or next(Path("/usr/lib/postgresql").glob("*/bin/initdb"), None)
    if not (initdb and shutil.which("redis-server")):
        pytest.skip("needs postgresql and redis-server")


@pytest.mark.usefixtures("nothing_left")
def test_databases_in_processes(tmp_path: Path) -> None:
    """Each test has its own, which is said."""
    needs_servers()
    done = run("databases", tmp_path, "--isolation", "--isolation-jobs=2")
    root = os.geteuid() == 0  # whom PostgreSQL refuses to serve
    assert ("2 passed, 3 skipped" if root else "5 passed") in done.stdout, done.stdout
    for name in ("redis",) if root else ("redis", "postgres"):
        assert f"fixture '{name}' leaves" in done.stdout


@pytest.mark.once
@pytest.mark.usefixtures("microvm_ready")
def test_databases_in_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_cache: str) -> None:
    """Both servers start once, and every test has a running copy."""
    needs_servers()
    monkeypatch.setenv("XDG_CACHE_HOME", real_cache)
    done = run("databases", tmp_path, "--isolation=microvm")
    assert "5 passed" in done.stdout, done.stdout
    assert "leaves" not in done.stdout
