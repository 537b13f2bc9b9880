"""isolation run, as a user runs it: in a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolation import cli, registry

CLI = [sys.executable, "-m", "isolation"]
PATIENCE = 600.0

WORKS = registry.backends()["namespace"].probe()
real = pytest.mark.skipif(not WORKS.works, reason=WORKS.reason)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def isolation(*args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    options.setdefault("stdin", None if "input" in options else subprocess.DEVNULL)
    if "stdout" not in options and "stderr" not in options:
        options["capture_output"] = True
    done: subprocess.CompletedProcess[bytes] = subprocess.run([*CLI, *args], timeout=PATIENCE, **options)
    return done


def run(*args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return isolation("run", *args, **options)


def lines(output: bytes) -> list[str]:
    return output.decode().splitlines()


def processes_with(word: str) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{name}/cmdline").read_bytes()
                if word.encode() in command and int(name) != os.getpid():
                    found.append(int(name))
    return found


def eventually(condition: Any, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


# Exit codes


@real
@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["true"], 0),
        (["--", "sh", "-c", "exit 7"], 7),
        (["--", "sh", "-c", "kill -SEGV $$"], 128 + signal.SIGSEGV),
        (["--timeout", "500ms", "sleep", "30"], 124),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
        (["--workdir", "/nowhere", "true"], 125),
        (["--mount", "nowhere:/x", "true"], 125),
        (["--backend", "namespace", "--network", "nat", "true"], 125),
    ],
)
def test_exit_code(args: list[str], code: int) -> None:
    done = run(*args)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["run"],
        ["run", "--"],
        ["run", "--no-such-option", "true"],
        ["run", "--mem", "64M", "true"],  # an abbreviation
        ["run", "--memory", "3x", "true"],
        ["run", "--pids", "many", "true"],
        ["run", "--network", "some", "true"],
        ["run", "--mount", "a:b:c:d", "true"],
        ["run", "--backend", "no-such", "true"],
        ["frobnicate"],
        [],
    ],
)
def test_bad_request_is_125_and_one_line(args: list[str]) -> None:
    done = isolation(*args)
    assert done.returncode == 125
    assert lines(done.stderr)[-1].startswith("isolation: ")
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""


@real
def test_timeout_and_memory_are_told() -> None:
    assert lines(run("--timeout", "1s", "sleep", "30").stderr) == ["isolation: timed out after 1s"]
    done = run("--memory", "64M", "python3", "-c", "x = b'a' * (300 << 20)")
    assert done.returncode == 137
    assert lines(done.stderr) == ["isolation: out of memory (limit 64M; raise --memory)"]


@real
def test_options_after_the_command_are_its_own() -> None:
    assert run("echo", "--json", "--", "-x").stdout == b"--json -- -x\n"
    assert run("--pids", "50", "--", "echo", "--", "--help").stdout == b"-- --help\n"


# What the command sees


@real
def test_current_directory_is_copy_on_write(project: Path) -> None:
    (project / "kept").write_text("before")
    done = run("sh", "-c", "pwd; cat kept; echo after > kept; echo new > new; cat kept")
    assert done.stdout.decode() == f"{project}\nbeforeafter\n"
    assert (project / "kept").read_text() == "before"
    assert not (project / "new").exists()


@real
def test_root_is_not_mounted() -> None:
    done = run("pwd", cwd="/")
    assert (done.returncode, done.stdout) == (0, b"/\n")


@real
def test_home_is_warned_of(project: Path) -> None:
    done = run("pwd", env=os.environ | {"HOME": str(project)})
    assert done.stdout.decode() == f"{project}\n"
    assert "all of your home directory" in done.stderr.decode()
    assert len(lines(done.stderr)) == 1


def test_missing_current_directory(project: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$0" -P -m isolation run true', sys.executable],
        capture_output=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 125
    assert "does not exist any more" in done.stderr.decode()


@real
def test_environment() -> None:
    done = run(
        "--env", "GIVEN=a=b", "--env", "PASSED", "--env", "ABSENT", "env",
        env=os.environ | {"PASSED": "mine", "SECRET": "x"},
    )  # fmt: skip
    found = dict(line.split("=", 1) for line in lines(done.stdout))
    assert found["GIVEN"] == "a=b"
    assert found["PASSED"] == "mine"
    assert not {"SECRET", "ABSENT"} & set(found)


@real
def test_mounts(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shared = tmp_path_factory.mktemp("shared")
    if os.geteuid() == 0:
        shared.chmod(0o777)
    (shared / "in").write_text("in")
    done = run("--mount", f"{shared}:/data", "sh", "-c", "cat /data/in; echo x > /data/out")
    assert done.stdout == b"in"
    assert done.returncode != 0
    assert run("--mount", f"{shared}:/data:rw", "sh", "-c", "echo x > /data/out").returncode == 0
    assert (shared / "out").read_text() == "x\n"


@real
def test_explain_runs_nothing(project: Path) -> None:
    for args in (["--explain"], ["--explain", "--memory", "64M", "--", "no-such-command"]):
        done = run(*args)
        assert done.returncode == 0
        assert "root tree:" in done.stdout.decode()
        assert str(project) in done.stdout.decode()


@real
def test_json(project: Path) -> None:
    (project / "old").write_text("x")
    script = "cat; echo out; echo err >&2; echo abc > new; rm old; printf '\\377'; exit 3"
    done = run("--json", "--", "sh", "-c", script, input=b"i")
    assert done.returncode == 3
    assert done.stderr == b""
    report = json.loads(done.stdout)
    assert report["args"][:2] == ["sh", "-c"]
    assert (report["returncode"], report["verdict"], report["status"]) == (3, "exited", 3)
    assert (report["stdout"], report["stderr"], report["truncated"]) == ("iout\n\ufffd", "err\n", False)
    assert report["wall"] > 0
    assert report["backend"] == "namespace"
    changes = {change["path"]: change for change in report["changes"]}
    assert changes[f"{project}/new"] == {"path": f"{project}/new", "kind": "added", "type": "file", "size": 4}
    assert changes[f"{project}/old"]["kind"] == "deleted"


@real
def test_json_of_a_timeout() -> None:
    done = run("--json", "--timeout", "1s", "--", "sh", "-c", "echo begun; sleep 30")
    assert done.returncode == 124
    report = json.loads(done.stdout)
    assert (report["verdict"], report["stdout"]) == ("timed out", "begun\n")


# Streams


@real
def test_descriptors_of_the_caller_stay_outside(project: Path) -> None:
    """Files, sockets and directories are relayed through pipes; only pipes and /dev/null are passed."""
    (project / "in").write_bytes(b"")
    look = (
        "import os, stat\nfor fd in range(3): print(fd, stat.S_ISFIFO(os.fstat(fd).st_mode))\n"
        "print(len(os.listdir('/proc/self/fd')))"
    )
    with open("in", "rb") as stdin, open("out", "wb") as stdout:
        assert run("python3", "-c", look, stdin=stdin, stdout=stdout, stderr=stdout).returncode == 0
    assert lines((project / "out").read_bytes()) == ["0 True", "1 True", "2 True", "4"]


@real
def test_big_files_are_relayed_whole(project: Path) -> None:
    data = os.urandom(1 << 20) * 20
    (project / "in").write_bytes(data)
    with open("in", "rb") as stdin, open("out", "wb") as stdout:
        assert run("cat", stdin=stdin, stdout=stdout).returncode == 0
    assert hashlib.sha256((project / "out").read_bytes()).digest() == hashlib.sha256(data).digest()


@real
def test_big_pipes() -> None:
    data = os.urandom(1 << 20) * 20
    assert run("cat", input=data).stdout == data


@real
def test_one_file_for_both_keeps_the_order(project: Path) -> None:
    with open("log", "wb") as log:
        run("sh", "-c", "for i in 1 2 3; do echo o$i; echo e$i >&2; done", stdout=log, stderr=subprocess.STDOUT)
    assert (project / "log").read_text().split() == ["o1", "e1", "o2", "e2", "o3", "e3"]


@real
def test_append_appends(project: Path) -> None:
    (project / "log").write_text("first\n")
    with open("log", "ab") as log:
        run("echo", "second", stdout=log)
    assert (project / "log").read_text() == "first\nsecond\n"


@real
def test_sockets_are_relayed_with_half_close() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen([*CLI, "run", "sh", "-c", "cat; echo end"], stdin=theirs.fileno(), stdout=theirs.fileno())
        theirs.close()
        data = b"x" * 300_000
        ours.settimeout(PATIENCE)
        got = bytearray()
        sent = 0
        while sent < len(data):
            sent += ours.send(data[sent : sent + 10_000])
            got += ours.recv(1 << 16) if select.select([ours], [], [], 0)[0] else b""
        ours.shutdown(socket.SHUT_WR)
        while chunk := ours.recv(1 << 16):
            got += chunk
        assert child.wait(PATIENCE) == 0
    assert bytes(got) == data + b"end\n"


@real
def test_reader_that_goes_away_ends_it_quietly() -> None:
    script = f"{sys.executable} -m isolation run -- yes | head -1"
    done = subprocess.run(["sh", "-c", script], capture_output=True, timeout=PATIENCE, check=False)
    assert (done.stdout, done.stderr) == (b"y\n", b"")
    ours, theirs = socket.socketpair()
    with ours:
        child = subprocess.Popen([*CLI, "run", "yes"], stdout=theirs.fileno(), stderr=subprocess.PIPE)
        theirs.close()
        assert ours.recv(2) == b"y\n"
    _, said = child.communicate(timeout=PATIENCE)
    assert (child.returncode, said) == (128 + signal.SIGPIPE, b"")


@real
def test_background_processes_are_not_waited_for(project: Path) -> None:
    with open("out", "wb") as out:
        assert run("sh", "-c", "sleep 5000 & yes & echo done", stdout=out).returncode == 0
    assert b"done\n" in (project / "out").read_bytes()


@real
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk_is_told() -> None:
    with open("/dev/full", "wb") as full:
        done = run("echo", "x", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 125
    assert lines(done.stderr) == ["isolation: cannot pass on standard output: No space left on device"]


@real
def test_closed_streams() -> None:
    script = f"exec {sys.executable} -m isolation run sh -c 'cat; echo x; exit 4' <&- >&-"
    assert subprocess.run(["sh", "-c", script], timeout=PATIENCE, check=False).returncode == 4


# Signals


def started(*args: str) -> subprocess.Popen[bytes]:
    """A run whose command has said "ready"."""
    child = subprocess.Popen([*CLI, "run", *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


@real
@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT", "USR1", "USR2"])
def test_signals_reach_the_command(name: str) -> None:
    child = started("bash", "-c", f"trap 'echo got; exit 9' {name}; echo ready; while :; do sleep 0.05; done")
    child.send_signal(signal.Signals[f"SIG{name}"])
    out, _ = child.communicate(timeout=PATIENCE)
    assert (child.returncode, out) == (9, b"got\n")


@real
def test_default_action_is_the_exit_code() -> None:
    child = started("bash", "-c", "echo ready; exec sleep 50")
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=PATIENCE)
    assert child.returncode == 128 + signal.SIGTERM


@real
def test_second_signal_ends_a_command_that_ignores_it() -> None:
    child = started("bash", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
    child.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=PATIENCE)
    assert child.returncode == 128 + signal.SIGTERM


@real
def test_nothing_outlives_kill_9() -> None:
    seconds = f"{os.getpid()}.25"
    child = started("bash", "-c", f"echo ready; setsid sleep {seconds} & sleep {seconds}")
    assert eventually(lambda: len(processes_with(seconds)) >= 3)
    child.kill()
    child.communicate(timeout=PATIENCE)
    assert eventually(lambda: not processes_with(seconds))


def test_ctrl_c_before_the_command_is_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(_options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["run", "true"]) == 130
    assert capfd.readouterr() == ("", "")


# Terminals


class Terminal:
    """A run on a terminal of its own, and what it shows."""

    def __init__(self, *args: str) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (33, 77))
        self.before = termios.tcgetattr(self.slave)
        self.shown = b""
        self.child = subprocess.Popen(
            [sys.executable, "-c", "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
             "import os; os.execv(sys.executable, sys.orig_argv[:1] + ['-m', 'isolation'] + sys.argv[1:])", "run", *args],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
        )  # fmt: skip

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while text.encode() not in self.shown:
            assert select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0], self.shown
            self.shown += os.read(self.master, 4096)
        self.shown = self.shown.split(text.encode(), 1)[1]

    def end(self) -> int:
        code = self.child.wait(PATIENCE)
        assert termios.tcgetattr(self.slave) == self.before
        return code

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[Any]:
    made: list[Terminal] = []

    def make(*args: str) -> Terminal:
        made.append(Terminal(*args))
        return made[-1]

    yield make
    for each in made:
        each.close()


SHELL = ("--env", "PS1=ready> ", "bash", "--norc", "--noprofile", "-i")


@real
def test_terminal_is_the_sandboxs_own(terminal: Any) -> None:
    t = terminal(*SHELL)
    t.expect("ready> ")
    t.type("tty; stty size\r")
    t.expect("/dev/pts/0")
    t.expect("33 77")
    t.type("exit 5\r")
    assert t.end() == 5


@real
def test_job_control_and_resizing(terminal: Any) -> None:
    t = terminal(*SHELL)
    t.expect("ready> ")
    # Each key waits for what shows that it is awaited: a ^D before bash reads again would be lost.
    # One process that forks nothing: a shell that is stopped in vfork(2) waits for its child, and bash for it.
    program = (
        "import os, signal; signal.signal(signal.SIGCONT, lambda *_: os.write(1, b'back\\n')); print('now', flush=True); "
        "[signal.pause() for _ in iter(int, 1)]"
    )
    t.type(f'python3 -c "{program}"\r')
    t.expect("now\r\n")
    t.type("\x1a")
    t.expect("Stopped")
    t.expect("ready> ")
    t.type("fg\r")
    t.expect("back\r\n")
    t.type("\x03")
    t.expect("ready> ")
    t.type("echo st=$?\r")
    t.expect("st=130\r\n")
    t.expect("ready> ")
    termios.tcsetwinsize(t.slave, (20, 60))
    t.type("for i in 1 2 3 4 5 6 7 8 9; do stty size; sleep 0.3; done\r")
    t.expect("20 60\r\n")
    t.expect("ready> ")
    t.type("\x04")
    assert t.end() == 0


@real
def test_terminal_is_put_back_when_it_is_killed(terminal: Any) -> None:
    t = terminal("sh", "-c", "echo ready; trap '' TERM INT; while :; do sleep 1; done")
    t.expect("ready")
    assert termios.tcgetattr(t.slave) != t.before
    t.child.send_signal(signal.SIGTERM)
    t.child.send_signal(signal.SIGINT)
    assert t.end() in (128 + signal.SIGTERM, 128 + signal.SIGINT)


@real
def test_terminal_is_put_back_after_a_timeout(terminal: Any) -> None:
    t = terminal("--timeout", "1s", "cat")
    t.expect("isolation: timed out after 1s\r\n")
    assert t.end() == 124


@real
def test_last_words_on_a_terminal_arrive(terminal: Any) -> None:
    t = terminal("sh", "-c", "seq 1 30000; echo the-end")
    t.expect("29999\r\n30000\r\nthe-end\r\n")
    assert t.end() == 0


# The other commands


def test_version_and_help() -> None:
    assert isolation("--version").stdout.startswith(b"isolation-kit ")
    assert b"doctor" in isolation("--help").stdout
    assert b"--network" in isolation("run", "--help").stdout


def test_help_imports_little() -> None:
    script = (
        "import sys, isolation.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('isolation.sandbox', 'isolation.plain') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=PATIENCE, check=True)
    assert lines(done.stdout)[-1] == "[]"


def test_doctor_and_backends() -> None:
    done = isolation("doctor")
    assert done.returncode == (0 if WORKS.works else 1)
    assert b"namespace: " in done.stdout
    assert b"\033" not in done.stdout
    assert json.loads(isolation("doctor", "--json", "--backend", "namespace").stdout)["works"] is WORKS.works
    assert isolation("doctor", "--backend", "no-such").returncode == 125
    assert isolation("backends").stdout.startswith(b"namespace: ")


def test_values_of_variables_are_in_nobody_s_command_line() -> None:
    """Neither for other users of this machine, nor inside, where PID 1 was a fork of the host's process."""
    word = f"secret{os.getpid()}of{time.monotonic_ns()}"
    script = 'cat /proc/*/cmdline; echo; echo "$A$B"; read line'
    command = [*CLI, "run", "--env", f"A={word}", f"--env=B={word}", "--", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        inside = process.stdout.readline()
        assert process.stdout.readline() == f"{word}{word}\n"
        assert processes_with(word) == []
        process.stdin.write("\n")
        process.stdin.close()
    assert word not in inside
    assert "isolation" not in inside


STEAL = """
import os, sys
try:
    sys.stderr.write(repr(os.read(os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK), 100)))
except OSError as error:
    sys.stderr.write(repr(error))
"""


@pytest.mark.parametrize("sandboxed", [True, False])
def test_nobody_reads_what_others_have_written_to_a_pipe(sandboxed: bool) -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"for the consumer only")
        command = [*CLI, "run", "python3", "-c", STEAL] if sandboxed else [sys.executable, "-c", STEAL]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=True, timeout=PATIENCE)
        assert (b"consumer" in done.stderr) is not sandboxed
        if sandboxed:
            assert os.read(read, 100) == b"for the consumer only"
    finally:
        os.close(read)
        os.close(write)


@real
def test_what_a_terminal_answers_is_not_typed_into_the_shell(terminal: Any) -> None:
    """A command asks, in pieces, and is gone when the answer comes."""
    t = terminal("sh", "-c", r"printf '\033['; printf '6n'")
    t.expect("\x1b[6n")
    t.expect("\x1b[c")  # so that there is a last answer
    t.type("\x1b[24;80R")
    t.type("\x1b[?62;c")
    assert t.end() == 0
    waiting = fcntl.ioctl(t.slave, termios.FIONREAD, bytes(4))
    assert int.from_bytes(waiting, sys.byteorder) == 0


@real
def test_a_clipboard_is_not_filled(terminal: Any) -> None:
    t = terminal("sh", "-c", r"printf '\033]52;c;cm0gLXJmIH4=\007\033]0;title\007shown'")
    t.expect("\x1b]0;title\x07shown")
    assert t.end() == 0
    t = terminal("sh", "-c", r"printf 'begin\033]52;c;cm0gLXJmIH4=\007end'")
    t.expect("beginend")
    assert t.end() == 0


@real
def test_a_terminal_that_is_asked_nothing_is_left_alone(terminal: Any) -> None:
    t = terminal("sh", "-c", r"printf '\033[31mred\033[0m, and [6n is no question'")
    t.expect("no question")
    assert t.end() == 0
    assert b"\x1b[c" not in t.shown


def test_who_asks_for_batteries_is_told_that_there_are_none() -> None:
    done = run("python3", "-c", "import os; print(*map(os.listdir, ('/sys/class/power_supply', '/sys/class/hwmon')))")
    assert done.stdout == b"[] []\n", done.stderr
