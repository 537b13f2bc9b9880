"""Kernels that were started before they were asked for."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from isolation_kernel.pool import client, commands
from kernel.frontend import PATIENCE, Kernel
from kernel.test_frontends import descendants, zombie

pytestmark = pytest.mark.once("user")

Kernels = Callable[..., Kernel]


class Pool:
    """A daemon, for notebooks in `directory`."""

    def __init__(self, directory: Path, *names: str, count: int = 1) -> None:
        self.directory = directory
        words = [sys.executable, "-m", "isolation", "kernel", "warm", "--foreground", "--count", str(count), *names]
        self.process = subprocess.Popen(words, cwd=directory, stderr=subprocess.PIPE)

    def wait(self, ready: int = 1) -> None:
        """Until so many are ready."""
        deadline = time.monotonic() + PATIENCE
        while f"{ready} ready in {self.directory}" not in self.status():
            assert time.monotonic() < deadline, self.status()
            assert self.process.poll() is None
            time.sleep(0.2)

    def status(self) -> str:
        """What `--status` prints. Not by a process of its own: kernels that warm up have better use for the processor."""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            commands.status()
        return said.getvalue()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def pool(jupyter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def make(*names: str, count: int = 1) -> Pool:
        directory = tmp_path / "notebook"
        directory.mkdir(exist_ok=True)
        made.append(Pool(directory, *names, count=count))
        made[-1].wait(count)
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert not os.path.exists(f"{client.place()}/daemon")


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


@pytest.mark.parametrize("route", ["argv", "provisioner"])
def test_a_warm_kernel(pool: Callable[..., Pool], kernels: Kernels, route: str) -> None:
    waiting = pool(route)
    ready = descendants(waiting.process.pid)
    env = {**os.environ, "TZ": "Asia/Tokyo", "JPY_SESSION_NAME": "n.ipynb", "SECRET": "x"}
    kernel = kernels(route, env=env)
    info = kernel.manager.get_connection_info()
    names = kernel.value("dir()")
    assert names == kernels("argv", cwd=waiting.directory / "other", env=env).value("dir()")
    if route == "provisioner":
        assert kernel.pid in ready  # no process was started at all
    assert kernel.value("'numpy' in __import__('sys').modules") == "True"
    assert kernel.value("__import__('time').tzname[0]") == "JST"
    assert kernel.value("__session__") == "n.ipynb"
    assert kernel.value("'SECRET' in __import__('os').environ") == "False"
    assert kernel.value("__import__('os').getcwd()") == str(waiting.directory)
    assert kernel.value("get_ipython().kernel.session.key") == repr(info["key"])
    assert kernel.interrupt_a_cell().content["ename"] == "KeyboardInterrupt"
    assert kernel.value("6*7") == "42"
    kernel.restart()
    assert kernel.value("6*7") == "42"
    kernel.manager.shutdown_kernel()


def test_a_warm_kernel_goes_back(pool: Callable[..., Pool], kernels: Kernels) -> None:
    pool("provisioner")
    kernel = kernels("provisioner")
    kernel.run("x = 1; open('file', 'w').write('1')\n%isolation checkpoint a")
    kernel.run("x = 2; open('file', 'w').write('2')")
    assert kernel.run("%isolation rollback a").text == "back at checkpoint a\n"
    assert kernel.value("(x, open('file').read())") == "(1, '1')"
    assert "image/png" in kernel.run("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()").data


def test_each_is_handed_out_once(pool: Callable[..., Pool], kernels: Kernels) -> None:
    waiting = pool("provisioner", count=2)
    numbers = set()
    for _ in range(2):
        kernel = kernels("provisioner")
        assert kernel.value("'left' in globals()") == "False"
        kernel.run("left = 1")
        numbers.add(kernel.value("(__import__('random').random(), __import__('numpy').random.random(), hash('a'))"))
        kernel.manager.shutdown_kernel()
    assert len(numbers) == 2
    waiting.wait(2)  # others have taken their place


def test_plots_are_inline(pool: Callable[..., Pool], kernels: Kernels) -> None:
    pool("provisioner")
    reply = kernels("provisioner").run("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")
    assert "image/png" in reply.data
    assert "<Figure size 640x480 with 1 Axes>" in reply.data["text/plain"]


@pytest.mark.parametrize(("code", "status"), [("import os; os._exit(3)", 3), ("import os; os.kill(2, 9)", 137)])
def test_its_end_is_noticed(pool: Callable[..., Pool], kernels: Kernels, code: str, status: int) -> None:
    pool("argv", "provisioner")
    for route in ("argv", "provisioner"):
        kernel = kernels(route)
        process = kernel.manager.provisioner.process
        kernel.send(code)
        assert process.wait(60) == status


def test_what_it_cannot_be_told_later_is_started_anew(pool: Callable[..., Pool], kernels: Kernels) -> None:
    waiting = pool("provisioner")
    for given in ({"encryption": "required"}, {"extra": ("--IPKernelApp.exec_lines=x=5",)}, {"isolation": {"memory": "1G"}}):
        kernel = kernels("provisioner", **given)
        assert kernel.pid not in descendants(waiting.process.pid)
        assert kernel.value("6*7") == "42"


def test_it_ends_with_its_frontend_and_the_rest_with_the_daemon(pool: Callable[..., Pool], kernels: Kernels) -> None:
    waiting = pool("argv", count=2)
    code = (
        "import sys, time\nsys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\nfrom kernel.frontend import Kernel\n"
        "k = Kernel('argv', Path(sys.argv[2]))\nk.run('1')\nprint('ready', flush=True)\ntime.sleep(100)"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parent.parent), str(waiting.directory)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as frontend:
        assert frontend.stdout is not None
        assert frontend.stdout.readline() == b"ready\n"
        below = [*descendants(frontend.pid), *descendants(waiting.process.pid)]
        frontend.kill()
    waiting.process.send_signal(signal.SIGKILL)
    waiting.process.wait()
    deadline = time.monotonic() + 300
    while alive := [pid for pid in below if os.path.exists(f"/proc/{pid}") and not zombie(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
    again = Pool(waiting.directory, "argv")  # and takes over what the killed one has left
    again.wait()
    again.close()


def test_something_that_was_installed_meanwhile_is_seen(pool: Callable[..., Pool], kernels: Kernels) -> None:
    waiting = pool("provisioner")
    ready = descendants(waiting.process.pid)
    waiting.directory.rename(waiting.directory.with_name("old"))
    waiting.directory.mkdir()
    (waiting.directory / "new.txt").touch()
    kernel = kernels("provisioner")
    assert kernel.pid not in ready
    assert kernel.value("__import__('os').listdir()") == "['new.txt']"


def test_only_one_daemon(pool: Callable[..., Pool]) -> None:
    waiting = pool("argv")
    words = [sys.executable, "-m", "isolation", "kernel", "warm", "argv"]
    done = subprocess.run(words, cwd=waiting.directory, capture_output=True, text=True)
    assert done.returncode == 125
    assert "already" in done.stderr


def test_a_foreign_directory_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    monkeypatch.setattr(client, "place", lambda: str(directory))
    assert client.connect() is None


def test_background_and_stop(jupyter: Path, tmp_path: Path) -> None:
    def warm(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "isolation", "kernel", "warm", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)

    assert warm("argv").returncode == 0
    assert warm("--status").returncode == 0
    assert warm("--stop").returncode == 0
    assert warm("--status").returncode == 1
    assert warm("nothing").returncode == 125


def test_ends_when_nobody_asks(jupyter: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "isolation", "kernel", "warm", "--foreground", "--idle", "2s", "argv"]
    assert subprocess.run(words, cwd=tmp_path, timeout=600).returncode == 0
