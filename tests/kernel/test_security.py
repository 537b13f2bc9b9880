"""Attacks from a cell. Each is also shown to succeed where what stops it is left out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import leftovers
from isolation_kernel.protocol.connection import runtime_root, sweep
from kernel.frontend import Kernel
from kernel.test_frontends import descendants, zombie

Kernels = Callable[..., Kernel]
SECRET = "correct-horse-battery-staple"


@pytest.fixture
def loopback() -> Iterator[int]:
    """A service of the host's, on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def tcp(port: int) -> str:
    return f"import socket\nprint(socket.create_connection(('127.0.0.1', {port}), 3).getpeername()[1])"


def test_network(kernels: Kernels, loopback: int) -> None:
    assert kernels("argv").run(tcp(loopback)).content["ename"] == "ConnectionRefusedError"
    assert kernels("provisioner").run(tcp(loopback)).content["ename"] == "ConnectionRefusedError"
    assert kernels("argv", "--network", "host").run(tcp(loopback)).text == f"{loopback}\n"


def test_abstract_socket(kernels: Kernels) -> None:
    name = f"isolation-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen()
        code = f"import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{name}')"
        assert kernels("argv").run(code).content["ename"] == "ConnectionRefusedError"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"\0{name}")  # from outside it can be reached


def test_files(kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "elsewhere" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text(SECRET)
    code = f"print(open('{secret}').read())"
    for route in ("argv", "provisioner"):
        assert kernels(route).run(code).content["ename"] == "FileNotFoundError"
    assert kernels("argv", "--mount", str(secret.parent)).run(code).text == f"{SECRET}\n"


def test_home_and_keys_of_other_kernels(kernels: Kernels, jupyter: Path) -> None:
    other = kernels("argv")
    path = other.manager.connection_file
    assert os.path.exists(path)
    kernel = kernels("argv")
    assert kernel.run(f"open('{path}')").content["ename"] == "FileNotFoundError"
    home = kernel.value("' '.join(__import__('os').listdir(__import__('os').path.expanduser('~')))").split()
    python = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)}
    assert all(any((Path.home() / name) in {path, *path.parents} for path in python) for name in home), home
    assert "other" not in kernel.value("__import__('glob').glob('/run/**', recursive=True)")


def test_environment(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    code = "import os, glob\nprint(os.environ, [open(p, 'rb').read() for p in glob.glob('/proc/[0-9]*/environ') if os.access(p, os.R_OK)])"
    for route in ("argv", "provisioner"):
        assert SECRET not in kernels(route).run(code).text
    assert SECRET in kernels("argv", "--env", "TOKEN").run(code).text


def test_processes(kernels: Kernels) -> None:
    kernel = kernels("argv")
    assert kernel.value("[p for p in __import__('os').listdir('/proc') if p.isdigit()]") == "['1', '2']"
    assert kernel.run(f"import os; os.kill({os.getpid()}, 9)").content["ename"] == "ProcessLookupError"
    assert kernel.run("import os; os.kill(1, 9); print('sent')").text == "sent\n"
    assert kernel.value("6*7") == "42"


DESCRIPTORS = """
import os, socket, stat
for name in os.listdir('/proc/self/fd'):
    try:
        status = os.fstat(int(name))
    except OSError:
        continue
    if stat.S_ISSOCK(status.st_mode):
        end = socket.socket(fileno=os.dup(int(name)))
        own = end.family == socket.AF_INET and str(status.st_ino) in open('/proc/self/net/tcp').read()
        print('family', 'made inside' if own else end.family.name)
        if int(name) in range(64, 70):
            for how in (lambda: end.shutdown(2), lambda: end.connect('\\0' + NAME), lambda: end.bind('\\0x')):
                try:
                    how()
                except OSError as error:
                    print('refused', error.errno)
                else:
                    print('done')
    elif stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode):
        print('file', os.readlink('/proc/self/fd/' + name))
"""


def test_descriptors(kernels: Kernels) -> None:
    """Only unix sockets come in, and what listens cannot be made to connect, not even to where it was made."""
    name = f"isolation-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen()
        server.setblocking(False)
        kernel = kernels("argv")
        text = kernel.run(f"NAME = {name!r}" + DESCRIPTORS).text
        families = {line.split(" ", 1)[1] for line in text.splitlines() if line.startswith("family")}
        assert families <= {"AF_UNIX", "made inside"}
        assert "refused" in text
        files = [line.split()[1] for line in text.splitlines() if line.startswith("file")]
        assert all(path.startswith(("/tmp/.isolation-kernel", "/proc/", "/dev/")) for path in files), files
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("mode", "reads", "writes", "kept"),
    [("overlay", True, True, False), ("ro", True, False, False), ("rw", True, True, True), ("none", False, False, False)],
)
def test_the_notebooks_directory(kernels: Kernels, tmp_path: Path, mode: str, reads: bool, writes: bool, kept: bool) -> None:
    directory = tmp_path / "notebook"
    directory.mkdir()
    (directory / "data.csv").write_text("1,2")
    if os.geteuid() == 0:
        directory.chmod(0o755)
    kernel = kernels("argv", "--notebook", mode)
    assert (kernel.run(f"print(open('{directory}/data.csv').read())").text == "1,2\n") is reads
    assert (kernel.run(f"open('{directory}/new.txt', 'w').write('x')").status == "ok") is writes
    kernel.close()
    assert (directory / "new.txt").exists() is kept


@pytest.mark.parametrize("above", [False, True])
def test_a_home_directory_is_not_shown_because_a_notebook_lies_in_it(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home" / "somebody"
    home.mkdir(parents=True)
    (home / "id_ed25519").write_text(SECRET)
    monkeypatch.setenv("HOME", str(home))
    kernel = kernels("argv", cwd=home.parent if above else home)
    assert kernel.value("__import__('os').getcwd()") == ("/" if above else str(home))
    assert kernel.run(f"open('{home}/id_ed25519')").content["ename"] == "FileNotFoundError"
    assert "not shown" in kernel.run("%isolation").text
    assert "is not shown to the kernel" in capfd.readouterr().err
    (home / "project").mkdir()
    (home / "project/data.csv").write_text("1")
    assert kernels("argv", cwd=home / "project").value("open('data.csv').read()") == "1"


def test_magic(kernels: Kernels, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    kernel = kernels("argv", "--export", str(out), "--memory", "900M", "--cell-timeout", "1h")
    status = kernel.run("%isolation").text
    assert "limits    memory 900M, pids 4096, cell 1h" in status
    assert "network   own loopback only" in status
    assert "in the sandbox" in kernel.run("%connect_info").text
    assert "nothing was changed" in kernel.run("%isolation changes").text
    kernel.run("open('result.csv', 'w').write('1,2')")
    assert "added    " in kernel.run("%isolation changes").text
    assert kernel.run("%isolation export result.csv").status == "ok"
    assert (out / "result.csv").read_text() == "1,2"
    assert kernel.run("%isolation export missing.csv").status == "error"
    assert kernel.run("%isolation frobnicate").status == "error"
    assert "without --export" in kernels("argv").run("open('x', 'w')\n%isolation export x").error


ESCAPES = [
    "os.symlink('/etc/hostname', 'link'); path = os.path.abspath('link')",
    "path = '/proc/self/environ'",
    "os.mkfifo('fifo'); path = os.path.abspath('fifo')",
    "path = '/dev/zero'",
    "path = '/etc/../..'",
    "path = ['x']",
    "path = '/tmp/a\\nb'; open(path, 'w')",
    "path = '/etc/passwd\\0.csv'",
    "path = '/tmp/\\ud800/x.csv'",
    "path = '/' + 5000 * 'x/' + 'x.csv'",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_export_leads_nowhere_else(kernels: Kernels, tmp_path: Path, escape: str) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious"
    out.mkdir()
    precious.write_text("precious")
    (out / "link").symlink_to(precious)
    kernel = kernels("argv", "--export", str(out))
    code = (
        f"import os\n{escape}\n"
        "host = get_ipython().magics_manager.magics['line']['isolation'].__self__._host\n"
        "try:\n    print(host.ask('export', path=path))\nexcept Exception as error:\n    print(type(error).__name__, error)"
    )
    assert kernel.run(code, timeout=20).status == "ok"
    assert kernel.value("6*7") == "42"
    assert precious.read_text() == "precious"
    left = {path.name for path in out.iterdir()}
    assert left <= {"link", "environ"}, left
    assert all(SECRET not in path.read_text() for path in out.iterdir())
    assert {path.name for path in tmp_path.iterdir()} >= {"out", "precious"}


@pytest.mark.parametrize(
    "flood",
    [
        "b'x' * 1000",
        "struct.pack('>II', 1 << 30, 0)",
        "struct.pack('>II', 2, 1 << 30) + b'{}'",
        "struct.pack('>II', 2, 0) + b'[]'",
        "struct.pack('>II', 60000, 0) + b'[' * 60000",
        "b''.join(struct.pack('>II', 15, 0) + b'{\"op\":\"status\"}' for _ in range(100000))",
        'struct.pack(\'>II\', 36, 0) + b\'{"op":"cell","parent":{"msg_id":[]}}\'',
        "struct.pack('>II', 13, 0) + b'{\"op\":[1,{}]}'",
    ],
)
def test_a_broken_wire_harms_only_its_kernel(kernels: Kernels, flood: str) -> None:
    kernel = kernels("argv")
    other = kernels("argv")
    code = (
        "import os, struct, threading\nos.set_blocking(69, True)\n"
        f"threading.Thread(target=lambda: os.write(69, {flood}), daemon=True).start()"
    )
    assert kernel.run(code).status == "ok"
    time.sleep(0.3)
    assert other.value("6*7") == "42"
    assert kernel.manager.is_alive()
    assert kernel.client.is_alive()
    kernel.manager.interrupt_kernel()
    kernel.manager.shutdown_kernel()
    assert not kernel.manager.is_alive()


def test_output_past_the_channels_is_bounded_and_harmless(kernels: Kernels, capfd: pytest.CaptureFixture[str]) -> None:
    kernel = kernels("argv")
    kernel.run(
        "import sys, os\nfd = sys.stdout._original_stdstream_copy\nos.write(fd, b'\\x1b]0;title\\x07')\n"
        "for _ in range(200): os.write(fd, b'y' * 65536)"
    )
    assert kernel.value("6*7") == "42"
    text = capfd.readouterr().err
    assert "]0;title" in text
    assert "\x1b" not in text
    assert "\x07" not in text
    assert text.count("y") < 1 << 20


def test_connections_that_are_not_read_hold_up_nobody(kernels: Kernels) -> None:
    kernel = kernels("argv")
    info = kernel.manager.get_connection_info()
    before = rss(kernel.pid)
    ends = [socket.create_connection((info["ip"], info["iopub_port"]), 5) for _ in range(50)]
    for end in ends:
        # A subscriber by ZMTP 3.0, NULL, who then never reads.
        end.sendall(b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + bytes(16) + b"\0" + bytes(31))
        end.sendall(b"\4\x19\5READY\x0bSocket-Type\0\0\0\3SUB" + b"\0\1\1")
    reply = kernel.run("for _ in range(300): print('z' * 100_000)", timeout=600)
    assert reply.status == "ok"
    assert kernel.value("6*7") == "42"
    assert rss(kernel.pid) - before < 64 << 20
    for end in ends:
        end.close()


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("route", ["argv", "provisioner"])
@pytest.mark.parametrize("victim", ["launcher", "frontend"])
def test_nothing_is_left_after_sigkill(jupyter: Path, tmp_path: Path, route: str, victim: str) -> None:
    code = (
        "import sys, time\nsys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\nfrom kernel.frontend import Kernel\n"
        "k = Kernel(sys.argv[3], Path(sys.argv[2]))\n"
        'k.run(\'import subprocess; subprocess.Popen(["sleep", "1000"], start_new_session=True)\')\n'
        "print(k.pid, flush=True)\ntime.sleep(100)"
    )
    before = set(os.listdir(runtime_root()))
    words = [sys.executable, "-c", code, str(Path(__file__).parent.parent), str(tmp_path), route]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as frontend:
        assert frontend.stdout is not None
        launcher = int(frontend.stdout.readline())
        below = descendants(frontend.pid)
        assert len(below) >= 5
        os.kill(launcher if victim == "launcher" else frontend.pid, signal.SIGKILL)
        deadline = time.monotonic() + 300
        below = below if victim == "frontend" else [pid for pid in below if pid != launcher]
        while alive := [pid for pid in below if os.path.exists(f"/proc/{pid}") and not zombie(pid)]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.05)
        frontend.kill()
    assert not leftovers(os.fsencode(sys.executable) + b"\0-I\0-m\0isolation_kernel")
    # A frontend that was killed leaves a provisioner's directory, without anything alive in it: the next one sweeps.
    ours = tuple(f"isk-{pid}-" for pid in (frontend.pid, launcher, *below))
    left = {name for name in set(os.listdir(runtime_root())) - before if name.startswith(ours)}
    assert len(left) == (1 if route == "provisioner" else 0)
    sweep()
    assert not left & set(os.listdir(runtime_root()))
