"""Kernels in virtual machines: the same features, checkpoints, and a guest that is not believed."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jupyter_kernel_test
import pytest
from conftest import alive, machines
from isolation_kernel.export import Room
from isolation_kernel.machine import kernel as box
from isolation_kernel.machine import notebook_archive, snapshot_cache
from isolation_kernel.options import Options
from isolation_kernel.protocol.stream import Lines, line
from jupyter_client import BlockingKernelClient
from kernel import frontend
from kernel.conftest import install
from kernel.frontend import Kernel
from kernel.test_protocol import Samples
from kernel.test_proxy import GET, Index, index

import isolation
from isolation.backends.microvm.artifacts import setup
from isolation.errors import LaunchError
from isolation.mux import MuxError

pytestmark = pytest.mark.once

__all__ = ["index"]  # a fixture

Kernels = Callable[..., Kernel]
FIRST_START = 1200.0  # s, for a machine to be made, and a kernel to be started in it, emulated


@pytest.fixture(scope="session")
def machine_kernel(jupyter: Path, microvm_ready: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A kernelspec whose warm machine is there."""
    install(jupyter, "machine", "--backend", "microvm")
    patience, frontend.PATIENCE = frontend.PATIENCE, FIRST_START
    try:
        Kernel("machine", tmp_path_factory.mktemp("first")).close()
    finally:
        frontend.PATIENCE = patience
    return "machine"


@pytest.fixture
def kernel(kernels: Kernels, machine_kernel: str) -> Kernel:
    return kernels(machine_kernel)


@pytest.mark.usefixtures("machine_kernel")
class TestInAMachine(Samples, jupyter_kernel_test.KernelTests):
    kernel_name = "machine"

    @classmethod
    def setUpClass(cls) -> None:
        """Not in the project's directory, parts of which a machine has already, as something to import from."""
        start = functools.partial(jupyter_kernel_test.start_new_kernel, startup_timeout=FIRST_START)
        with (
            tempfile.TemporaryDirectory() as directory,
            contextlib.chdir(directory),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(jupyter_kernel_test, "start_new_kernel", start)
            super().setUpClass()
        # It was asked many times whether it is there: all answers have come when that to the last question has.
        asked = cls.kc.kernel_info()
        while True:
            said = cls.kc.get_iopub_msg(timeout=frontend.PATIENCE)
            if said["parent_header"].get("msg_id") == asked and said["content"].get("execution_state") == "idle":
                break


def test_it_is_a_machine_with_the_notebook_s_directory(kernels: Kernels, machine_kernel: str, tmp_path: Path) -> None:
    directory = tmp_path / "work"
    (directory / "below").mkdir(parents=True)
    (directory / "below" / "data.txt").write_text("from the host")
    kernel = kernels(machine_kernel, cwd=directory)
    assert kernel.value("open('below/data.txt').read()") == "from the host"
    assert kernel.value("__import__('os').getcwd()") == str(directory)
    assert kernel.value("__import__('os').uname().release") != os.uname().release
    assert kernel.value("__import__('socket').if_nameindex()") == "[(1, 'lo')]"
    kernel.run("open('below/data.txt', 'w').write('changed')")
    assert (directory / "below" / "data.txt").read_text() == "from the host"
    changes = kernel.run("%isolation changes").text
    assert "data.txt" in changes
    assert "microvm" in kernel.run("%isolation").text


UNDONE = """
import os, subprocess, threading, time
state, ticks = 'before', [0]
open('file', 'w').write('before')
def tick():
    while True:
        ticks[0] += 1
        time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
child = subprocess.Popen(['sleep', '1000'])
"""
STATE = "repr((state, open('file').read(), child.poll(), sorted(os.listdir())))"


@pytest.mark.parametrize("route", ["argv", "provisioner"])
def test_checkpoint_and_rollback(kernels: Kernels, machine_kernel: str, route: str) -> None:
    """Memory, files, threads and child processes go back; the frontend stays connected."""
    kernel = kernels(
        machine_kernel if route == "argv" else "provisioner", *([] if route == "argv" else ["--backend", "microvm"])
    )
    assert kernel.run(UNDONE).status == "ok"
    assert "checkpoint one in" in kernel.run("%isolation checkpoint one").text
    kernel.run("state = 'after'; open('file', 'w').write('after'); child.kill(); child.wait(); open('new', 'w')")
    for _ in range(2):
        assert kernel.value(STATE) == "('after', 'after', -9, ['file', 'new'])"
        reply = kernel.run("%isolation rollback one")
        assert (reply.status, reply.text) == ("ok", "back at checkpoint one\n")
        assert kernel.value(STATE) == "('before', 'before', None, ['file'])"
        then, now = map(int, kernel.value("f'{ticks[0]} {time.sleep(0.5) or ticks[0]}'").split())
        assert now > then
        kernel.run("state = 'after'; open('file', 'w').write('after'); child.kill(); child.wait(); open('new', 'w')")
    missing = kernel.run("%isolation rollback two")
    assert "there is no checkpoint 'two'; there is: one" in missing.error
    assert kernel.value("state") == "after"
    assert kernel.interrupt_a_cell().content["ename"] == "KeyboardInterrupt"
    assert kernel.value("6*7") == "42"
    assert kernel.control("usage_request", {})["pid"] > 0


def test_encryption_is_neither_promised_nor_pretended(jupyter: Path, machine_kernel: str, tmp_path: Path) -> None:
    spec = json.loads((jupyter / f"share/jupyter/kernels/{machine_kernel}/kernel.json").read_text())
    assert "supported_encryption" not in spec["metadata"]
    ports = {f"{name}_port": 0 for name in ("shell", "iopub", "stdin", "control", "hb")}
    path = tmp_path / "connection.json"
    path.write_text(json.dumps({"transport": "tcp", "ip": "127.0.0.1", "key": "k", "curve_secretkey": "s", **ports}))
    done = subprocess.run(
        [*spec["argv"][:-1], str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 125
    assert "no transport encryption" in done.stderr


def test_checkpoints_have_names_and_an_end(kernel: Kernel) -> None:
    kernel.run("n = 0")
    for number in range(4):
        assert kernel.run(f"n = {number}\n%isolation checkpoint c{number}").status == "ok"
    assert "is all that one kernel may have" in kernel.run("%isolation checkpoint more").error
    assert kernel.run("n = 77\n%isolation checkpoint c0").status == "ok"
    assert kernel.run("%isolation forget c2").status == "ok"
    assert "kept      c1, c3, c0\n" in kernel.run("%isolation").text
    for name, value in (("c1", "1"), ("c0", "77"), ("c3", "3")):
        kernel.run(f"%isolation rollback {name}")
        assert kernel.value("n") == value
    assert "%isolation checkpoint NAME" in kernel.run("%isolation checkpoint").error


def test_checkpoints_take_no_more_than_the_machine_has(kernel: Kernel) -> None:
    """They are copies of its memory in the host's: with four of them, all that a machine is limited to, five times."""
    kernel.run("kept = bytearray()")
    told = ""
    for name in "abcd":
        kernel.run("import os; kept += os.urandom(1 << 20) * 160")
        told = kernel.run(f"%isolation checkpoint {name}").error
        if told != "None: None":
            break
    assert "its checkpoints take" in told
    assert "%isolation forget" in told
    assert kernel.value("len(kept) >> 20") in ("320", "480", "640")
    assert kernel.run("%isolation forget a").status == "ok"


def test_cells_in_the_queue_behind_a_rollback_are_run(kernel: Kernel) -> None:
    kernel.run("x = 1")
    kernel.run("%isolation checkpoint a")
    sent = [kernel.send(code) for code in ("x = 2", "%isolation rollback a", "x += 10", "print(x)")]
    assert [kernel.collect(identity).status for identity in sent[:-1]] == ["ok"] * 3
    assert kernel.collect(sent[-1]).text == "11\n"


def test_many_frontends_come_back(kernel: Kernel) -> None:
    other = BlockingKernelClient()  # with a session, and so an identity, of its own
    other.load_connection_file(kernel.manager.connection_file)
    other.start_channels()
    try:
        other.wait_for_ready(timeout=frontend.PATIENCE)
        kernel.run("%isolation checkpoint a")
        kernel.run("x = 5")
        kernel.run("%isolation rollback a")
        identity = other.execute("print('to all')")
        seen = ""
        while "to all" not in seen:
            message = other.get_iopub_msg(timeout=frontend.PATIENCE)
            if message["parent_header"].get("msg_id") == identity:
                seen += message["content"].get("text", "")
        frontend.wait_for_heartbeat(other)
    finally:
        other.stop_channels()


def test_stdin_interrupt_and_large_messages(kernel: Kernel) -> None:
    asked = kernel.send("print(input('name? ') * 2)", allow_stdin=True)
    assert kernel.collect(asked, on_input=lambda _message: "ab").text == "abab\n"
    sleeping = kernel.send("print('on', flush=True)\nwhile True: pass")
    while kernel.client.get_iopub_msg(timeout=frontend.PATIENCE)["msg_type"] != "stream":
        pass
    kernel.manager.interrupt_kernel()
    assert kernel.control("kernel_info_request", {})["status"] == "ok"  # on a channel of its own
    assert kernel.collect(sleeping).content["ename"] == "KeyboardInterrupt"
    shown = kernel.run("from IPython.display import display; display({'text/plain': 'x' * 20_000_000}, raw=True)", 120)
    assert len(shown.data["text/plain"]) == 20_000_000


def test_restart_crash_and_end(kernel: Kernel) -> None:
    before = machines(kernel.pid)
    assert before
    kernel.run("x = 1")
    kernel.restart(now=True)
    assert "NameError" in kernel.run("x").error
    kernel.send("import os; os._exit(3)")
    deadline = time.monotonic() + frontend.PATIENCE
    while kernel.manager.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert kernel.manager.provisioner.process.returncode == 3
    kernel.close()
    assert not alive(before)


def test_nothing_is_left_of_a_launcher_that_was_killed(kernel: Kernel) -> None:
    running = machines(kernel.pid)
    kernel.run("%isolation checkpoint a")
    running |= machines(kernel.pid)
    os.kill(kernel.pid, signal.SIGKILL)
    deadline = time.monotonic() + 300
    while alive(running):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_only_the_allowed_hosts_are_reached(kernels: Kernels, machine_kernel: str, index: Index) -> None:
    kernel = kernels("argv", "--backend", "microvm", "--network", "allow:localhost")
    get = GET.format(f"http://localhost:{index.port}/page")
    for _ in range(2):
        assert "hello_sandbox" in kernel.run(get).text
        assert "HTTP Error 403" in kernel.run(GET.format("http://example.org/")).error
        assert kernel.run("%isolation checkpoint a").status == "ok"
        assert kernel.run("%isolation rollback a").status == "ok"
    assert index.asked == ["/page", "/page"]
    assert kernel.run(f"import socket\nsocket.create_connection(('127.0.0.1', {index.port}), 5)").status == "error"
    assert kernel.run("socket.getaddrinfo('example.org', 80)").content["ename"] == "gaierror"


def test_the_notebook_is_told_why_its_kernel_ended(kernel: Kernel) -> None:
    kernel.run("import os, signal")
    identity = kernel.send("os.kill(os.getpid(), signal.SIGSEGV)")
    told = ""
    while "isolation: the kernel killed by signal 11 (SIGSEGV)" not in told:
        message = kernel.client.get_iopub_msg(timeout=frontend.PATIENCE)
        if message["parent_header"].get("msg_id") == identity:
            told += message["content"].get("text", "")


def test_export(kernels: Kernels, machine_kernel: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").write_text("still here")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "victim")
    kernel = kernels("argv", "--backend", "microvm", "--export", str(tmp_path / "out"))
    kernel.run("import os; open('made', 'w').write('x' * 3_000_000); open('link', 'w').write('evil'); os.mkfifo('fifo')")
    assert "exported to" in kernel.run("%isolation export made").text
    assert (tmp_path / "out" / "made").read_text() == "x" * 3_000_000
    assert "exported to" in kernel.run("%isolation export link").text  # replaces the link
    assert (tmp_path / "victim").read_text() == "still here"
    for name in ("fifo", "missing", "/", "/dev/zero", "/proc/kmsg"):
        assert kernel.run(f"%isolation export {name}").status == "error"
    assert sorted(os.listdir(tmp_path / "out")) == ["link", "made"]
    assert kernel.value("6*7") == "42"


# The directory on its way in.


def test_what_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.ipynb").write_text("{}")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "fifo")
    archive = io.BytesIO()
    notebook_archive.pack(str(tmp_path), archive, writable=False)
    archive.seek(0)
    with tarfile.open(fileobj=archive) as found:
        entries = {entry.name: entry for entry in found}
    assert sorted(entries) == ["a.ipynb", "sub", "sub/link"]
    assert entries["sub/link"].issym()
    assert not entries["a.ipynb"].mode & 0o222
    monkeypatch.setattr(notebook_archive, "AT_MOST", 1)
    with pytest.raises(LaunchError, match="--notebook none"):
        notebook_archive.pack(str(tmp_path), io.BytesIO(), writable=True)


def test_a_saved_machine_does_not_depend_on_a_directory_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = Options(backend="microvm")
    here = {
        snapshot_cache.spec_for(options.spec(directory, {}), directory)
        for directory in (os.path.expanduser("~/one"), os.path.expanduser("~/two"), "/tmp/three")
    }
    assert len(here) == 1
    assert here.pop()[1]
    elsewhere, copied = snapshot_cache.spec_for(options.spec("/srv/four", {}), "/srv/four")
    assert copied
    assert [mount.target for mount in elsewhere.mounts] == ["/srv/four"]
    assert not os.listdir(elsewhere.mounts[0].source)
    package = os.path.dirname(isolation.__file__)  # shown already, as something to import from
    assert snapshot_cache.spec_for(options.spec(package, {}), package) == (options.spec(package, {}), False)


class FakeMachine:
    """A sandbox whose template is a directory with one file. Loading fails unless `fits`."""

    system, fits, made = "new", True, 0

    def __init__(self, _spec: object) -> None:
        self.text = ""

    def template(self, *_payload: object) -> FakeMachine:
        FakeMachine.made += 1
        self.text = FakeMachine.system
        return self

    def load_template(self, place: Path, *_payload: object) -> FakeMachine:
        self.text = (place / "memory").read_text()
        before = setup._before.get()
        assert before is not None
        before.used = self.text != FakeMachine.system
        if not FakeMachine.fits:
            raise LaunchError("the snapshot has another kernel")
        return self

    def save(self, path: str) -> None:
        os.mkdir(path)
        Path(path, "memory").write_text(self.text)

    def __enter__(self) -> FakeMachine:
        return self

    def __exit__(self, *_details: object) -> None:
        pass


def test_the_old_machine_serves_while_a_new_one_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A change of the system is no reason for a notebook to wait; any other is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(snapshot_cache, "Sandbox", FakeMachine)
    begun: list[Any] = []
    monkeypatch.setattr(snapshot_cache.renewing, "start", lambda *given: begun.append(given))
    spec, words = isolation.SandboxSpec(backend="microvm"), ["--a"]
    monkeypatch.setattr(FakeMachine, "system", "first")
    assert [snapshot_cache.template(spec, words).text for _ in range(2)] == ["first", "first"]  # type: ignore[attr-defined]
    assert (FakeMachine.made, begun) == (1, [])
    monkeypatch.setattr(FakeMachine, "system", "second")
    assert snapshot_cache.template(spec, words).text == "first"  # type: ignore[attr-defined]
    assert begun == [(spec, words)]
    assert "the system has changed" in capfd.readouterr().err
    snapshot_cache.renew(*begun.pop())
    assert snapshot_cache.template(spec, words).text == "second"  # type: ignore[attr-defined]
    with snapshot_cache._lock(snapshot_cache.fcntl.LOCK_EX, ".renewing"):
        snapshot_cache.renew(spec, words)  # another process does it already
    assert (FakeMachine.made, begun) == (2, [])
    monkeypatch.setattr(FakeMachine, "fits", False)
    assert snapshot_cache.template(spec, words).text == "second"  # type: ignore[attr-defined]
    assert FakeMachine.made == 3
    assert sorted(path.name for path in snapshot_cache.root().iterdir() if not path.name.startswith(".")) == [
        snapshot_cache._place(spec, words).name
    ]


# A guest that lies.


class FakeBranch:
    """A machine whose agent is this test."""

    def __init__(self) -> None:
        self.ours, self.guest = socket.socketpair()
        self.ours.setblocking(False)
        self.stdout = self.stderr = -1

    def take_stream(self) -> int:
        return self.ours.fileno()

    def wait(self, timeout: float | None = None) -> None:
        return None

    def close(self) -> None:
        self.ours.close()
        self.guest.close()


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[box.MachineBox, FakeBranch]]:
    branch = FakeBranch()
    template: Any = SimpleNamespace(branch=lambda: branch, close=lambda: None)
    monkeypatch.setattr(box, "_About", lambda spec: SimpleNamespace(spec=spec))
    made = box.MachineBox(Options().spec(None, {}), template)
    yield made, branch
    made.close()


def frame(number: int, data: bytes) -> bytes:
    return b"\0" + number.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data


@pytest.mark.parametrize(
    "sent",
    [
        frame(box.CONTROL, b"no json\n"),
        frame(box.CONTROL, b"[1]\n"),
        frame(box.CONTROL, b'{"exit": "soon"}\n'),
        frame(box.CONTROL, b'{"exit": Infinity}\n'),
        frame(box.CONTROL, b'{"size": 3, "of": 99}\n'),
        frame(box.CONTROL, b'{"gone": [1]}\n'),
        frame(box.CONTROL, b"[" * 30_000 + b"\n"),
        frame(77, b"nobody has opened this"),
        b"\xff" * 64,
    ],
)
def test_nonsense_ends_the_machine(faked: tuple[box.MachineBox, FakeBranch], sent: bytes) -> None:
    made, branch = faked
    branch.guest.sendall(sent)
    with pytest.raises(MuxError):
        steps(made, 5)


def test_a_machine_that_does_not_listen_is_ended(faked: tuple[box.MachineBox, FakeBranch]) -> None:
    """What the host has to tell it, an interrupt say, is for nobody then."""
    made, branch = faked
    branch.guest.sendall(b"".join(bytes([kind]) + box.CONTROL.to_bytes(4, "big") + bytes(4) for kind in (3, 1)))
    steps(made, 5)
    with pytest.raises(MuxError):
        made.signal(2)


def steps(made: box.MachineBox, count: int) -> None:
    for _ in range(count):
        made.mux.step(0.05)


def test_a_line_without_an_end_is_bounded() -> None:
    lines = Lines(lambda message: None)
    for _ in range(31):
        lines.feed(b"x" * 32_768)
    with pytest.raises(MuxError):
        lines.feed(b"x" * 65_536)


def test_lines_arrive_in_any_pieces() -> None:
    heard: list[dict[str, Any]] = []
    lines = Lines(heard.append)
    for byte in line({"a": 1}) + line({"b": "\n"}):
        lines.feed(bytes([byte]))
    assert heard == [{"a": 1}, {"b": "\n"}]


def test_nothing_is_left_of_a_file_that_was_on_its_way(faked: tuple[box.MachineBox, FakeBranch], tmp_path: Path) -> None:
    made, branch = faked
    made.fetch("/x", str(tmp_path / "x"), Room(each=1000), lambda told: None)
    branch.guest.sendall(frame(box.CONTROL, line({"size": 10, "of": box.FIRST})) + frame(box.FIRST, b"half"))
    steps(made, 5)
    assert len(os.listdir(tmp_path)) == 1
    made.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", ["more than was said", "more than is allowed", "less than was said"])
def test_a_file_that_is_not_what_was_said_is_not_kept(
    faked: tuple[box.MachineBox, FakeBranch], tmp_path: Path, size: str
) -> None:
    made, branch = faked
    told: list[int | str] = []
    made.fetch("/x", str(tmp_path / "x"), Room(each=1000), told.append)
    said, data = {"more": (10, b"x" * 20), "less": (10, b"x")}.get(size.split()[0], (0, b""))
    if "allowed" in size:
        said, data = 5000, b"x" * 5000
    branch.guest.sendall(frame(box.CONTROL, line({"size": said, "of": box.FIRST})) + frame(box.FIRST, data))
    branch.guest.sendall(b"\1" + box.FIRST.to_bytes(4, "big") + bytes(4))
    steps(made, 5)
    assert len(told) == 1
    assert isinstance(told[0], str)
    assert os.listdir(tmp_path) == []
