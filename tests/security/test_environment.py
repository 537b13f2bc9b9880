"""Real root's view of Python installations: what only root may read is not readable, but for what Python imports."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolation import SandboxSpec
from isolation.backends.namespace.host.sandbox import NamespaceMachine
from isolation.backends.namespace.plan import ALL_DEFENCES
from isolation.backends.namespace.planner import make_plan
from isolation.backends.showing import python_environment
from isolation.sandbox import Sandbox

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user reads inside what the user reads outside"),
]
SECRET = "index-url = https://user:password@example.org"
READ = """
import sys
for path in sys.argv[1:]:
    try:
        print("BREACH", open(path).read())
    except PermissionError:
        print("refused")
    except FileNotFoundError:
        print("missing")
"""


def read(paths: list[Path], environment: list[str], without: str = "") -> list[str]:
    """What comes of opening them in a sandbox that shows this Python, and `environment`, too."""
    plan = make_plan(
        SandboxSpec(), python=[*python_environment(), *environment], defences=ALL_DEFENCES - set(without.split())
    )
    with Sandbox.borrowed(NamespaceMachine(plan)) as box:
        done = box.run([sys.executable, "-c", READ, *map(str, paths)], timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().splitlines()


@pytest.fixture
def key() -> Iterator[Path]:
    path = Path(f"/usr/local/etc/isolation-test-{os.getpid()}.key")
    path.parent.mkdir(exist_ok=True)
    path.write_text(SECRET)
    path.chmod(0o600)
    yield path
    path.unlink()


@pytest.mark.parametrize("prefix", ["/usr", "/usr/local", "/usr/local/etc"])
def test_a_python_of_the_systems_does_not_open_the_system(key: Path, prefix: str) -> None:
    """As the distribution's is one of /usr, and that of many an image of /usr/local."""
    assert read([key], [prefix]) == ["refused"]


def test_and_does_without_a_view(key: Path) -> None:
    assert read([key], ["/usr"], "view") == [f"BREACH {SECRET}"]


@pytest.mark.parametrize("closed", [False, True])
def test_what_an_installation_holds_besides_is_not_opened(tmp_path: Path, closed: bool) -> None:
    """One whose files are root's alone (umask 077) goes on to work, and its passwords stay where they are."""
    prefix = tmp_path / "venv"
    module = prefix / "lib" / "python3.11" / "site-packages" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text("fine")
    (prefix / "bin").mkdir()
    (prefix / "bin" / "tool").write_text("fine")
    (prefix / "etc").mkdir()
    for path in (prefix / "pip.conf", prefix / "etc" / "a.key"):
        path.write_text(SECRET)
    (prefix / "pyvenv.cfg").write_text("home = /usr/bin")
    for path in prefix.rglob("*"):
        path.chmod(0o600 if path.is_file() else 0o755)
    if closed:
        for path in (prefix, *prefix.rglob("*")):
            path.chmod(0o700 if path.is_dir() else 0o600)
    else:
        (prefix / "bin" / "tool").chmod(0o644)
    wanted = [module, prefix / "bin" / "tool", prefix / "pyvenv.cfg", prefix / "pip.conf", prefix / "etc" / "a.key"]
    hidden = "missing" if closed else "refused"
    assert read(wanted, [str(prefix)]) == ["BREACH fine", "BREACH fine", "BREACH home = /usr/bin", hidden, hidden]
