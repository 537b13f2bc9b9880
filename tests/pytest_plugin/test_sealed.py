"""`isolation pytest`: what a user gets is what plain pytest gives, and nothing of the suite happens on the host."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import pytest_isolation
from pytest_isolation.sealed import arguments, artefacts, interpreter
from pytest_isolation.sealed.arguments import Artefact, Kind
from pytest_isolation.sealed.places import BadPlace, Places
from pytest_isolation.wire.screen import Screen
from pytest_plugin.test_outcomes import SUITE, shape, without_noise

import isolation
from isolation.errors import SpecError

PROGRAM = [sys.executable, "-I", "-m", "isolation", "pytest"]
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "untrusted"
PATIENCE = 600.0
# What a suite's own words or pytest's options mean, whoever runs it; what comes out of the sandbox, and how, is for both.
USERS = pytest.mark.once("user")

Run = subprocess.CompletedProcess[str]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a shell, whatever this pytest was started with."""
    for name in ("VIRTUAL_ENV", "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONPATH", "CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, which is the current directory."""
    path = tmp_path / "suite"
    path.mkdir()
    (path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.chdir(path)
    return path


def run(command: list[str], *words: str, **options: Any) -> Run:
    return subprocess.run(
        [*command, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        **options,
    )


def sealed(*words: str, **options: Any) -> Run:
    return run(PROGRAM, *words, **options)


def plain(*words: str, **options: Any) -> Run:
    return run([sys.executable, "-P", "-m", "pytest", "-p", "isolation"], *words, **options)


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything beneath a directory, with the content of files."""
    found = sorted(path.rglob("*"))
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() and not p.is_symlink() else None for p in found}


# Nothing of it happens on the host


def make_environment(path: Path, marks: Path) -> Path:
    """A virtual environment of the project's own, and as evil; returns its interpreter."""
    venv.create(path, with_pip=False, symlinks=True)
    (packages,) = path.glob("lib/python3.*/site-packages")
    leave = f"import os; os.makedirs({str(marks)!r}, exist_ok=True); open({str(marks)!r} + '/NAME', 'w').close()\n"
    for name, file in (("pth", "evil_pth.py"), ("sitecustomize", "sitecustomize.py"), ("entry", "evil_entry.py")):
        (packages / file).write_text(leave.replace("NAME", name))
    (packages / "evil.pth").write_text("import evil_pth\n")
    (packages / "evil-1.0.dist-info").mkdir()
    (packages / "evil-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (packages / "evil-1.0.dist-info" / "entry_points.txt").write_text("[pytest11]\nevil = evil_entry\n")
    rest = [
        sysconfig.get_path("purelib"),
        *(os.path.dirname(module.__path__[0]) for module in (isolation, pytest_isolation)),
    ]
    (packages / "rest.pth").write_text("\n".join(rest) + "\n")
    return path / "bin" / "python"


def test_hostile_suite_leaves_no_mark_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks, project = tmp_path / "marks", tmp_path / "project"
    (tmp_path / "home").mkdir()
    monkeypatch.setenv(
        "HOME", str(tmp_path / "home")
    )  # the control runs on the host, and what a person has there is his own
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("__pycache__"))
    for path in project.rglob("*"):
        if path.is_file():
            path.write_text(path.read_text().replace("/tmp/isolation-untrusted", str(marks)))
    python = make_environment(project / "venv", marks)
    (marks / "victim").mkdir(parents=True)
    (marks / "victim" / "precious").write_text("still here")
    monkeypatch.chdir(project)
    before, project_before = tree(marks), tree(project)
    runs = [
        sealed("--python", str(python), "--junitxml=out.xml", "-rA"),
        sealed("--python", str(python), "--collect-only", "-q"),
        sealed("--python", str(python), "--no-such-option"),
    ]
    assert [done.returncode for done in runs] == [0, 0, 4], runs
    assert "6 passed" in runs[0].stdout
    assert tree(marks) == before
    after = tree(project)
    assert "<testsuite" in (project / "out.xml").read_text()
    assert {name for name in after if name not in project_before} == {"out.xml"}
    assert all(after[name] == project_before[name] for name in project_before)

    control = run([str(python), "-m", "pytest"])
    assert control.returncode == 0, control.stdout + control.stderr
    left = set(os.listdir(marks))
    left.add("sitecustomize")  # Debian's Python finds its own first
    assert left >= {
        "cache",
        "conftest",
        "entry",
        "junit.xml",
        "plugin",
        "pth",
        "pygments",
        "sitecustomize",
        "test",
        "unconfigure",
    }
    assert not (marks / "victim" / "precious").exists()


def test_caller_s_secrets_are_not_inside(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    monkeypatch.setenv("GIVEN", "given")
    (tmp_path / "beside").write_text("private")
    (suite / "test_it.py").write_text(
        "import os\n"
        "def test_it():\n"
        "    assert 'API_TOKEN' not in os.environ and os.environ['GIVEN'] == 'given' and os.environ['SET'] == '1'\n"
        "    assert not os.path.exists('../beside') and os.listdir(os.path.expanduser('~')) == []\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    (home / "private").write_text("private")
    monkeypatch.setenv("HOME", str(home))
    done = sealed("--env", "GIVEN", "--env=SET=1", "-q")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_start_that_runs_the_project_s_code_is_refused(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "isolation", "pytest"]
    done = run(command)
    assert done.returncode == 125
    assert "python -I -m isolation pytest" in done.stderr
    monkeypatch.setenv("PYTHONPATH", ".")
    assert run([sys.executable, "-P", "-m", "isolation", "pytest"]).returncode == 125
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv("HOME", str(suite))
    done = sealed()
    assert done.returncode == 125
    assert "would see all of" in done.stderr


# What a user sees is what plain pytest shows


@USERS
@pytest.mark.parametrize("arguments", [["-rA"], ["-v"], ["-q", "-x"], ["-k", "test_pass or test_warns", "-rA"]])
def test_output_is_that_of_plain_pytest(suite: Path, arguments: list[str]) -> None:
    (suite / "test_suite.py").write_text(dedented(SUITE))
    arguments = [*arguments, "-p", "no:cacheprovider", "--junitxml=out.xml"]
    expected, plain_shape = plain(*arguments), shape(suite / "out.xml")
    done = sealed(*arguments)
    assert done.returncode == expected.returncode
    assert without_noise(done.stdout.splitlines()) == without_noise(expected.stdout.splitlines())
    assert done.stderr == expected.stderr
    assert shape(suite / "out.xml") == plain_shape


@USERS
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--co", "-q"], 0),
        (["-k", "nothing_has_this_name"], 5),
        (["test_no_such_file.py"], 4),
        (["--no-such-option"], 4),
        (["--", "--maxfail=2", "--co"], 0),
        (["--maxfail=2", "-q"], 1),
        (["--fixtures"], 0),
        (["--version"], 0),
    ],
)
def test_exit_codes_and_text(suite: Path, arguments: list[str], code: int) -> None:
    (suite / "test_suite.py").write_text(dedented(SUITE))
    given = [word for word in arguments if word != "--"]
    expected, done = plain(*given, "-p", "no:cacheprovider"), sealed(*arguments, "-p", "no:cacheprovider")
    assert done.returncode == expected.returncode == code
    if "--no-such-option" not in arguments:
        assert without_noise(done.stdout.splitlines()) == without_noise(expected.stdout.splitlines())
    else:
        assert "unrecognized arguments: --no-such-option" in done.stderr


def dedented(text: str) -> str:
    import textwrap

    return textwrap.dedent(text)


def test_last_failed_over_two_runs(suite: Path) -> None:
    (suite / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pass\n")
    assert "1 failed, 2 passed" in sealed("-q").stdout
    found = sorted(str(path.relative_to(suite)) for path in (suite / ".pytest_cache").rglob("*") if path.is_file())
    assert [name for name in found if "/v/" in name] == [".pytest_cache/v/cache/lastfailed", ".pytest_cache/v/cache/nodeids"]
    assert not (suite / "__pycache__").exists()
    assert "1 failed in" in sealed("-q", "--lf").stdout
    assert "1 failed in" in plain("-q", "--lf", "-p", "no:isolation").stdout
    (suite / "test_it.py").write_text("def test_a(): pass\n")
    assert sealed("-q", "--cache-clear").returncode == 0
    assert not (suite / ".pytest_cache" / "v" / "cache" / "lastfailed").exists()


@USERS
def test_cache_of_a_part_with_an_ini_file_of_its_own(suite: Path) -> None:
    (suite / "part").mkdir()
    (suite / "part" / "pytest.ini").write_text("[pytest]\n")
    (suite / "part" / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    assert sealed("-q", "part/test_it.py").returncode == 1
    assert not (suite / ".pytest_cache").exists()
    assert "1 failed in" in sealed("-q", "--lf", "part").stdout


COVERAGE = """
import os, sqlite3
def pytest_addoption(parser):
    parser.addoption("--cov", action="append", nargs="?", const=True)
    parser.addoption("--cov-report", action="append", default=[])
def pytest_unconfigure(config):
    if config.option.cov:
        with sqlite3.connect(".coverage") as data:
            data.execute("create table line (n)"); data.execute("insert into line values (42)")
        open("coverage.xml", "w").write("<coverage/>")
        os.makedirs("htmlcov"); open("htmlcov/index.html", "w").write("<html>")
        open("htmlcov/.gitignore", "w").write("*"); open("htmlcov/setup.py", "w").write("evil")
        os.makedirs("other"); open("other/c.json", "w").write("{}")
        open("unasked.xml", "w").write("")
"""


def test_coverage_comes_out_where_it_was_asked_for(suite: Path) -> None:
    import sqlite3

    (suite / "conftest.py").write_text(COVERAGE)
    (suite / "test_it.py").write_text("def test_it(): pass\n")
    before = set(tree(suite))
    done = sealed(
        "--cov",
        "--cov-report=xml",
        "--cov-report",
        "html",
        "--cov-report=json:other/c.json",
        "-q",
        "-p",
        "no:cacheprovider",
        "-pno:pytest_cov",
    )
    assert done.returncode == 0, done.stderr
    assert "1 file in" in done.stderr  # setup.py
    assert set(tree(suite)) - before == {
        ".coverage", "coverage.xml", "htmlcov", "htmlcov/.gitignore", "htmlcov/index.html", "other", "other/c.json"
    }  # fmt: skip
    with sqlite3.connect(suite / ".coverage") as data:
        assert data.execute("select n from line").fetchall() == [(42,)]
    data.close()


@USERS
def test_coverage_is_that_of_a_plain_run(suite: Path) -> None:
    """As far as lines run where pytest does: what runs in a test's fork is the plug-in's to report."""
    (suite / "product.py").write_text("def at_import():\n    return 1\ndef unused():\n    return 3\nVALUE = at_import()\n")
    (suite / "test_it.py").write_text("import product\ndef test_it(): assert product.VALUE == 1\n")
    found = []
    for start in (plain, sealed):
        done = start(
            "-p", "pytest_cov", "--cov=product", "--cov-report=term-missing", "--cov-report=xml", "--cov-report=json", "-q"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (suite / ".coverage").read_bytes().startswith(b"SQLite format 3")
        assert "line-rate" in (suite / "coverage.xml").read_text()
        totals = json.loads((suite / "coverage.json").read_text())["totals"]
        found.append((totals, [line for line in done.stdout.splitlines() if "product" in line]))
        for name in (".coverage", "coverage.xml", "coverage.json"):
            (suite / name).unlink()
    assert found[0] == found[1]


@USERS
def test_report_on_the_sandboxes(suite: Path) -> None:
    (suite / "test_it.py").write_text("def test_it(): pass\n")
    assert sealed("-q", "--isolation-report=out/run.json").returncode == 0
    (test,) = json.loads((suite / "out" / "run.json").read_text())["tests"]
    assert test["nodeid"] == "test_it.py::test_it"


def test_places_outside_of_the_project(suite: Path, tmp_path: Path) -> None:
    (suite / "test_it.py").write_text("def test_it(): pass\n")
    assert sealed("-q", "--junitxml", str(tmp_path / "new" / "a.xml"), "--log-file=../b.log").returncode == 0
    assert "<testsuite" in (tmp_path / "new" / "a.xml").read_text()
    assert (tmp_path / "b.log").exists()
    done = sealed("-q", "--junitxml=/etc/isolation-test.xml")
    assert done.returncode == 125
    assert "name a place in a directory of yours" in done.stderr
    assert not os.path.exists("/etc/isolation-test.xml")


@USERS
def test_user_s_variables_in_a_place(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (suite / "test_it.py").write_text("def test_it(): pass\n")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert sealed("-q", "--junitxml=$OUT/a.xml").returncode == 0
    assert (tmp_path / "out" / "a.xml").exists()


@pytest.mark.once
def test_in_a_machine(suite: Path, microvm_ready: None) -> None:
    (suite / "test_it.py").write_text(
        "import os\ndef test_a(): open('left', 'w').close()\ndef test_b(): assert not os.path.exists('left')\ndef test_c(): assert 0\n"
    )
    done = sealed("--backend=microvm", "--junitxml=out.xml", "--export", "absent", "-q")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 2 passed" in done.stdout
    assert "--export" in done.stderr
    assert "was not written" in done.stderr
    assert "<testsuite" in (suite / "out.xml").read_text()
    assert "test_c" in (suite / ".pytest_cache" / "v" / "cache" / "lastfailed").read_text()


# On a terminal


def on_terminal(words: list[str], talk: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Run it on a terminal, answering as soon as each text has appeared."""
    pid, master = pty.fork()
    if pid == 0:
        os.execv(PROGRAM[0], [*PROGRAM, *words])
    seen, at = b"", 0
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if select.select([master], [], [], 1.0)[0]:
            try:
                data = os.read(master, 1 << 16)
            except OSError:
                break
            if not data:
                break
            seen += data
        if talk and talk[0][0] in seen[at:]:
            at = len(seen)
            os.write(master, talk.pop(0)[1])
    os.close(master)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen


def test_colours_and_interrupt(suite: Path) -> None:
    (suite / "test_it.py").write_text(
        "import time\ndef test_a(): pass\ndef test_b(): print('here', flush=True); time.sleep(60)\n"
    )
    code, seen = on_terminal(["-s", "--junitxml=out.xml"], [(b"here", b"\x03")])
    assert code == 2, seen
    assert b"KeyboardInterrupt" in seen
    assert b"\x1b[32m" in seen
    assert "<testsuite" in (suite / "out.xml").read_text()


def test_a_suite_that_does_not_listen_and_floods(suite: Path) -> None:
    """The second Ctrl-C ends it; what it has written meanwhile waits in no memory of the host's."""
    (suite / "conftest.py").write_text(
        "import os, signal\n"
        "def pytest_sessionstart():\n"
        "    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)\n"
        "    while True: os.write(1, b'flood' * 1000)\n"
    )
    with subprocess.Popen(PROGRAM, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for _ in range(2):
            seen = b""
            while b"flood" not in seen[-100_000:]:
                seen += os.read(process.stdout.fileno(), 1 << 16)
            process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline and os.read(process.stdout.fileno(), 1 << 16):
                pass
        while os.read(process.stdout.fileno(), 1 << 16):
            pass
        assert process.wait(PATIENCE) == 130


@USERS
def test_debugger(suite: Path) -> None:
    (suite / "test_it.py").write_text("def test_a():\n    answer = 6 * 7\n    assert answer == 0\n")
    code, seen = on_terminal(["--pdb"], [(b"(Pdb)", b"p answer + 1\n"), (b"43", b"c\n")])
    assert code == 1, seen
    assert b"all tests share one sandbox" in seen


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("plain ünï\t\r\n", "plain ünï\t\r\n"),
        ("\x1b[1;31mred\x1b[0m\x1b[2K\x1b[3A\x1b[?25l", "\x1b[1;31mred\x1b[0m\x1b[2K\x1b[3A\x1b[?25l"),
        ("\x1b[?2004hprompt", "prompt"),
        ("\x1b]52;c;ZXZpbA==\x07", "\\x1b]52;c;ZXZpbA==\x07"),
        ("\x1b]0;title\x1b\\", "\\x1b]0;title\\x1b\\"),
        ("\x1b[21t\x1b[6n\x1b[c", "\\x1b[21t\\x1b[6n\\x1b[c"),
        ("\x1b[?1000h\x1b[?1049h\x1bc\x1bP+q\x9b21t", "\\x1b[?1000h\\x1b[?1049h\\x1bc\\x1bP+q\\x9b21t"),
        ("\x1b[8mhidden\x1b[0;8mtoo", "\\x1b[8mhidden\\x1b[0;8mtoo"),
        ("\x1b" + "[" + "1;" * 40 + "m end", None),
    ],
)
def test_control_sequences_do_not_reach_a_terminal(written: str, shown: str | None) -> None:
    whole = Screen()(written.encode())
    screen = Screen()
    assert b"".join(screen(bytes([byte])) for byte in written.encode()) == whole or shown is None
    assert shown is None or whole == shown.encode()


def test_clipboard_is_not_written(suite: Path) -> None:
    (suite / "conftest.py").write_text("import os\nos.write(2, b'\\x1b]52;c;ZXZpbA==\\x07')\n")
    (suite / "test_it.py").write_text("def test_it(): print('\\x1b[21t')\n")
    code, seen = on_terminal(["-s", "-p", "no:cacheprovider"], [])
    assert code == 0
    assert b"1 passed" in seen
    assert b"\x1b]" not in seen
    assert b"\x1b[21t" not in seen


# What is refused


PLANTS = {
    "symbolic link": "os.symlink('/etc/hostname', place)",
    "FIFO": "os.mkfifo(place)",
    "socket": "socket.socket(socket.AF_UNIX).bind(place)",
    "directory": "os.mkdir(place); open(place + '/a', 'w').close()",
    "larger than": "open(place, 'wb').truncate(600 << 20)",
    "was not written": "pass",
    "symbolic link in the way": "os.rmdir('reports'); os.symlink('/etc', 'reports'); place = 'reports/hostname'",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_no_file_stays_inside(suite: Path, plant: str) -> None:
    (suite / "conftest.py").write_text(
        "import os, shutil, socket\n"
        "def pytest_unconfigure():\n"
        "    place = 'reports/hostname'\n    os.makedirs('reports', exist_ok=True)\n"
        "    if os.path.exists(place): os.unlink(place)\n"
        f"    {PLANTS[plant]}\n"
    )
    (suite / "test_it.py").write_text("def test_it(): pass\n")
    (suite / "reports").mkdir()
    (suite / "reports" / "hostname").write_text("of the last run")
    done = sealed("-q", "--junitxml=reports/hostname")
    assert done.returncode == 125, done.stderr
    assert plant.removesuffix(" in the way") in done.stderr
    assert (suite / "reports" / "hostname").read_text() == "of the last run"
    assert "1 passed" in done.stdout


def test_exported_tree(suite: Path) -> None:
    (suite / "conftest.py").write_text(
        "import os\n"
        "def pytest_unconfigure():\n"
        "    os.makedirs('out/deep/er'); os.makedirs('out/.git/hooks'); os.makedirs('out/__pycache__')\n"
        "    for name in ('a.txt', 'deep/er/b.txt', 'evil.py', 'evil.pth', 'conftest.py', '.git/hooks/pre-commit', '__pycache__/a.txt',"
        " 'Makefile', 'x.so'):\n"
        "        open('out/' + name, 'w').write(name); os.chmod('out/' + name, 0o6777)\n"
        "    os.symlink('/etc', 'out/etc'); os.symlink('a.txt', 'out/link'); os.mkfifo('out/fifo')\n"
        "    open('tool.py', 'w').write('asked for')\n"
    )
    (suite / "test_it.py").write_text("def test_it(): pass\n")
    done = sealed("-q", "--export", "out", "--export=tool.py", "-p", "no:cacheprovider")
    assert done.returncode == 125
    assert sorted(name for name, content in tree(suite / "out").items() if content is not None) == ["a.txt", "deep/er/b.txt"]
    assert (suite / "out" / "a.txt").stat().st_mode & 0o7777 & ~0o644 == 0
    assert (suite / "tool.py").read_text() == "asked for"
    assert "out/etc stays inside: it is a symbolic link" in done.stderr
    assert "out/fifo stays inside: it is a FIFO" in done.stderr
    assert "7 files in" in done.stderr


@pytest.mark.parametrize(
    ("words", "links"),
    [
        (["--junitxml=out.xml"], {"out.xml": "victim"}),
        (["--junitxml=a/b/out.xml"], {"a": "victims"}),
        (["--cov", "--cov-report=html"], {"htmlcov": "victims"}),
        (["--cov"], {".coverage": "victim"}),
        ([], {".pytest_cache": "victims"}),
        (["--export", "a/b"], {"a": "victims"}),
    ],
)
def test_links_of_the_checkout_are_not_followed(
    suite: Path, tmp_path: Path, words: list[str], links: dict[str, str]
) -> None:
    (tmp_path / "victim").write_text("victim")
    (tmp_path / "victims").mkdir()
    for name, to in links.items():
        (suite / name).symlink_to(tmp_path / to)
    (suite / "conftest.py").write_text(COVERAGE)
    (suite / "test_it.py").write_text("def test_it(): pass\n")
    done = sealed(*words)
    assert done.returncode == 125
    assert "is a symbolic link" in done.stderr
    assert done.stdout == ""
    assert (tmp_path / "victim").read_text() == "victim"
    assert os.listdir(tmp_path / "victims") == []


def test_links_are_not_followed_when_writing(tmp_path: Path) -> None:
    """Nor would they be, had they come later."""
    (tmp_path / "project" / "real").mkdir(parents=True)
    (tmp_path / "victims").mkdir()
    (tmp_path / "project" / "link").symlink_to(tmp_path / "victims")
    with Places(str(tmp_path / "project")) as places:
        for name in ("link/a", "link/new/a", "link", "real"):
            with pytest.raises(BadPlace), places.file(str(tmp_path / "project" / name)):
                pytest.fail("opened")
        with pytest.raises(TypeError), places.file(str(tmp_path / "project" / "real" / "a")) as fd:
            os.write(fd, None)  # type: ignore[arg-type]
        with places.file(str(tmp_path / "project" / "new" / "er" / "a")) as fd:
            os.write(fd, b"all")
    assert os.listdir(tmp_path / "victims") == os.listdir(tmp_path / "project" / "real") == []
    assert (tmp_path / "project" / "new" / "er" / "a").read_text() == "all"


# A sender that lies


Message = dict[str, Any]


def take_all(receiver: Any, messages: Iterable[Message]) -> None:
    for message in messages:
        receiver.take(dict(message))


@pytest.fixture
def receiver(tmp_path: Path) -> Any:
    wanted = [
        Artefact(str(tmp_path / "file"), Kind.FILE, "--junitxml", required=True),
        Artefact(str(tmp_path / "tree"), Kind.TREE, "--cov-report=html"),
        Artefact(str(tmp_path / "cache"), Kind.CACHE, "the cache"),
    ]
    with Places(str(tmp_path)) as places:
        yield artefacts._Receiver(wanted, places, 1 << 20)


@pytest.mark.parametrize(
    "messages",
    [
        [{"file": 3, "path": []}],
        [{"file": -1, "path": []}],
        [{"file": True, "path": []}],
        [{"file": 1, "path": ["..", "evil"]}],
        [{"file": 1, "path": ["a/b"]}],
        [{"file": 1, "path": ["/etc/passwd"]}],
        [{"file": 1, "path": [""]}],
        [{"file": 1, "path": ["\x1b[2J"]}],
        [{"file": 1, "path": ["\ud800"]}],
        [{"file": 1, "path": ["a\0b"]}],
        [{"file": 1, "path": "ab"}],
        [{"file": 1, "path": ["a"] * 40}],
        [{"file": 1, "path": ["a" * 300]}],
        [{"more": True, "data": b"x"}],
        [{"close": True}],
        [{"file": 0, "path": []}, {"file": 1, "path": ["a"]}],
        [{"file": 0, "path": []}, {"end": True}],
        [{"file": 0, "path": []}, {"more": True, "data": b"x" * (2 << 20)}],
        [{"file": 1, "path": ["a"]}, {"close": True}] * 2,
        [{"unknown": 1}],
        [{}],
        [{"refused": 1, "path": ["\x1b]0;title\x07"], "why": "link"}],
    ],
    ids=str,
)
def test_malformed_stream_ends_it(receiver: Any, tmp_path: Path, messages: list[Message]) -> None:
    with pytest.raises(artefacts.Stopped):
        take_all(receiver, messages)
    receiver.abandon()
    assert not receiver.ended
    assert set(os.listdir(tmp_path)) <= {"tree"}
    assert all(path.name == "a" for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"file": 0, "path": ["x"]}, "directory"),
        ({"file": 1, "path": []}, "file, where a directory"),
        ({"file": 2, "path": []}, "file, where a directory"),
        ({"refused": 1, "path": ["x"], "why": "\x1b[31m"}, "no regular file"),
        ({"refused": 1, "path": ["x"], "why": ["a"]}, "no regular file"),
    ],
)
def test_what_does_not_belong_there_is_refused(receiver: Any, tmp_path: Path, message: Message, said: str) -> None:
    receiver.take(message)
    if "file" in message:
        receiver.take({"more": True, "data": b"x"})
        receiver.take({"close": True})
    receiver.take({"end": True})
    receiver.summarize()
    assert said in receiver.failures[0]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "data", "kept"),
    [
        (["v", "cache", "lastfailed"], b'{"a": true}', True),
        (["v", "cache", "lastfailed"], b'{"a": tru', False),
        (["v", "cache", "lastfailed"], b"[" * 200_000, False),
        (["v", "cache", "lastfailed"], b"\x80\x04K*.", False),
        (["v", "x.py"], b"1", False),
        (["d", "plugin", "state.json"], b"1", False),
        (["README.md"], b"text", True),
        (["conftest.py"], b"1", False),
    ],
)
def test_cache_is_json(receiver: Any, tmp_path: Path, name: list[str], data: bytes, kept: bool) -> None:
    receiver.take({"file": 2, "path": name})
    receiver.take({"more": True, "data": data})
    receiver.take({"close": True})
    assert (tmp_path / "cache").joinpath(*name).exists() == kept


def test_cache_that_cannot_be_written_is_only_noted(receiver: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    for name in ("a", "b"):
        take_all(receiver, [{"file": 2, "path": ["v", name]}, {"more": True, "data": b"1"}, {"close": True}])
    take_all(receiver, [{"file": 0, "path": []}, {"close": True}, {"end": True}])
    receiver.summarize()
    assert receiver.failures == []
    assert len(receiver.notes) == 1


def test_flood_of_refusals_is_bounded(receiver: Any) -> None:
    with pytest.raises(artefacts.Stopped):
        take_all(receiver, ({"refused": 1, "path": [str(n)], "why": str(n)} for n in range(1_000_000)))
    receiver.summarize()
    assert len(receiver.failures) < 20


# Arguments


@pytest.mark.parametrize(
    ("argv", "words", "found"),
    [
        ([], [], [".pytest_cache"]),
        (["-p", "no:cacheprovider"], ["-p", "no:cacheprovider"], []),
        (["--", "--memory", "--export=x"], ["--memory", "--export=x"], [".pytest_cache"]),
        (["a", "--memory", "1G", "-k", "b", "--pids=3", "c"], ["a", "-k", "b", "c"], [".pytest_cache"]),
        (
            ["--junitxml", "x.xml", "--", "--junitxml=y"],
            ["--junitxml", "x.xml", "--junitxml=y"],
            ["x.xml", "y", ".pytest_cache"],
        ),
        (["--cov", "src"], ["--cov", "src"], [".coverage", ".pytest_cache"]),
        (["--cov=src", "--no-cov"], ["--cov=src", "--no-cov"], [".pytest_cache"]),
        (
            ["--cov-report=term-missing", "--cov-report=html:d/e", "--cov-report=xml"],
            None,
            ["d/e", "coverage.xml", ".pytest_cache"],
        ),
        (
            ["--export", "out/", "--isolation-report=r.html"],
            ["--isolation-report=r.html"],
            ["r.html", ".pytest_cache", "out"],
        ),
        (["--cov", "--export=.coverage"], ["--cov"], [".coverage", ".pytest_cache"]),
    ],
)
def test_arguments(argv: list[str], words: list[str] | None, found: list[str]) -> None:
    request = arguments.parse(argv, "/project")
    assert list(request.words) == (argv if words is None else words)
    assert [os.path.relpath(artefact.path, "/project") for artefact in request.artefacts] == found


@USERS
@pytest.mark.parametrize(
    "argv", [["--export", "."], ["--export=.."], ["--export", "/"], ["--export="], ["--memory"], ["--pids="]]
)
def test_bad_arguments(suite: Path, argv: list[str]) -> None:
    done = sealed(*argv)
    assert done.returncode == 125
    assert done.stderr.startswith("isolation: ")
    assert "Traceback" not in done.stderr


# The interpreter inside


def bare_environment(path: Path, *packages: str) -> Path:
    """A virtual environment with these packages of this one, and no others; returns its interpreter."""
    venv.create(path, with_pip=False, symlinks=True)
    (into,) = path.glob("lib/python3.*/site-packages")
    for name in os.listdir(sysconfig.get_path("purelib")):
        if name.split("-")[0].lower() in packages:
            copy(Path(sysconfig.get_path("purelib")) / name, into / name)
    return path / "bin" / "python"


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def test_environment_without_pytest(suite: Path, tmp_path: Path) -> None:
    python = bare_environment(tmp_path / "env")
    done = sealed("--python", str(python))
    assert done.returncode == 125
    assert f"{python} -m pip install pytest" in done.stderr


def test_environment_without_this_package(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare_environment(tmp_path / "env", "pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py")
    (suite / "test_it.py").write_text(
        "import sys, os, pytest\n"
        f"def test_prefix(): assert sys.prefix == {str(tmp_path / 'env')!r}\n"
        "def test_fork(): open('left', 'w').close()\n"
        "def test_fresh(): assert not os.path.exists('left')\n"
        "def test_environment_is_read_only():\n"
        "    with pytest.raises(OSError): open(sys.prefix + '/lib/x', 'w')\n"
    )
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "env"))
    for words in ([], ["--disable-plugin-autoload"]):
        done = sealed(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "4 passed" in done.stdout
        assert "a fresh sandbox for every test" in done.stdout


def test_environment_cannot_name_what_is_shown(tmp_path: Path) -> None:
    """An environment of the project's: its configuration and its links are not orders."""
    private = tmp_path / "private"
    (private / "bin").mkdir(parents=True)
    (private / "bin" / "python").write_text("secret")
    (private / "bin" / "python").chmod(0o755)
    python = bare_environment(tmp_path / "env")
    found = interpreter.find(str(python), None, str(tmp_path))
    (tmp_path / "env" / "pyvenv.cfg").write_text(f"home = {private / 'bin'}\n")
    named = interpreter.find(str(python), None, str(tmp_path))
    assert str(private) not in str(named.shown)
    assert set(named.shown) <= set(found.shown)
    python.unlink()
    python.symlink_to(private / "bin" / "python")
    with pytest.raises(SpecError, match="does not belong to a Python installation"):
        interpreter.find(str(python), None, str(tmp_path))
    with pytest.raises(SpecError, match="no interpreter"):
        interpreter.find("nowhere/python", None, str(tmp_path))


def test_environment_does_not_lead_to_another_project(suite: Path, tmp_path: Path) -> None:
    """One that was made in the root of a project is an environment, and all the rest of that project."""
    python = bare_environment(
        tmp_path / "other", "pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py"
    )
    (tmp_path / "other" / ".env").write_text("TOKEN=secret")
    (suite / "test_it.py").write_text(f"import os\ndef test_it(): print(sorted(os.listdir({str(tmp_path / 'other')!r})))\n")
    done = sealed("--python", str(python), "-rP")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pyvenv.cfg" in done.stdout
    assert ".env" not in done.stdout
    (suite / ".venv").mkdir()
    (suite / ".venv" / "bin").symlink_to(python.parent)
    refused = sealed("--python", ".venv")
    assert refused.returncode == 125
    assert f"a symbolic link to {python.parent}" in refused.stderr


# The command


def test_project_s_own_environment_is_noted(suite: Path) -> None:
    """As `.venv/bin/isolation`: it works, and says what it cannot keep from running."""
    python = bare_environment(suite / ".venv", "pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py")
    (packages,) = suite.glob(".venv/lib/python3.*/site-packages")
    for module in (isolation, pytest_isolation):
        copy(Path(module.__path__[0]), packages / module.__name__)
    found = importlib.metadata.distribution("isolation-kit")
    (packages / "isolation_kit-1.dist-info").mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (packages / "isolation_kit-1.dist-info" / name).write_text(found.read_text(name) or "")
    (suite / "test_it.py").write_text("def test_it(): pass\n")
    done = run([str(python), "-I", "-m", "isolation", "pytest"], "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is in the project" in done.stderr


def test_entry_points_of_the_project_are_not_loaded(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an import path that ends in the project, a backend or a command could be its own."""
    (suite / "evil.egg-info").mkdir()
    (suite / "evil.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (suite / "evil.egg-info" / "entry_points.txt").write_text(
        "[isolation]\nevil = evil\n[isolation.commands]\npytest = evil:main\n"
    )
    (suite / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\ndef main(argv): return 0\n")
    start = "import sys; sys.path.append(sys.argv.pop(1)); from isolation.cli import main; sys.exit(main())"
    done = run([sys.executable, "-I", "-c", start, str(suite), "pytest"], "-q")
    assert done.returncode == 125
    assert "which is the project's" in done.stderr
    assert not (tmp_path / "mark").exists()


def test_command_is_listed_and_helps() -> None:
    program = [sys.executable, "-I", "-m", "isolation"]
    listed = run(program, "--help")
    assert listed.returncode == 0
    assert "all of it in a sandbox" in listed.stdout
    own = run(program, "pytest", "--help")
    assert own.returncode == 0
    for word in ("--python", "--export", "python -I -m isolation pytest", "What comes out"):
        assert word in own.stdout
    loaded = run(
        [sys.executable, "-I", "-c"],
        "import sys; from isolation import cli; cli.main(['run', '--explain']); print('pytest_isolation' in sys.modules)",
        cwd="/usr",
    )
    assert loaded.stdout.splitlines()[-1] == "False"


def test_explain_makes_nothing(suite: Path) -> None:
    done = sealed("--explain", "--memory=1G")
    assert done.returncode == 0
    assert f"overlay  {suite} (copy-on-write)" in done.stdout
