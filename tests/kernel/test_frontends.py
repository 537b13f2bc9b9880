"""Other people's frontends, with no change but the kernel's name."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import websocket
from kernel.conftest import ROUTES
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = pytest.mark.once("user")

BIN = Path(sys.executable).parent
CELLS = (
    "import os\nprint('process', os.getpid())",
    "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
    "open('left.txt', 'w').write('x')\n6 * 7",
)


def notebook(path: Path, route: str, cells: tuple[str, ...] = CELLS) -> Path:
    metadata = {"kernelspec": {"name": route, "display_name": route, "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata=metadata), path)
    return path


def check(path: Path) -> None:
    cells = nbformat.read(path, 4).cells
    assert cells[0].outputs[0].text == "process 2\n"
    assert "image/png" in cells[1].outputs[0].data
    assert cells[2].outputs[0].data["text/plain"] == "42"
    assert not (path.parent / "left.txt").exists()


def run(*words: str, cwd: Path) -> None:
    done = subprocess.run([str(BIN / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("route", ROUTES)
def test_nbclient(jupyter: Path, tmp_path: Path, route: str) -> None:
    path = notebook(tmp_path / "n.ipynb", route)
    code = "import nbformat, nbclient\nn = nbformat.read('n.ipynb', 4)\nnbclient.execute(n, cwd='.')\nnbformat.write(n, 'n.ipynb')"
    run("python", "-c", code, cwd=tmp_path)
    check(path)


@pytest.mark.parametrize("route", ROUTES)
def test_papermill(jupyter: Path, tmp_path: Path, route: str) -> None:
    notebook(tmp_path / "n.ipynb", route)
    run("papermill", "n.ipynb", "out.ipynb", "--no-progress-bar", cwd=tmp_path)
    check(tmp_path / "out.ipynb")


@pytest.mark.parametrize("route", ROUTES)
def test_nbconvert(jupyter: Path, tmp_path: Path, route: str) -> None:
    notebook(tmp_path / "n.ipynb", route)
    run("jupyter-nbconvert", "--execute", "--to", "notebook", "--output", "out.ipynb", "n.ipynb", cwd=tmp_path)
    check(tmp_path / "out.ipynb")


class Server:
    """A jupyter_server."""

    def __init__(self, root: Path) -> None:
        self.token = "0123456789abcdef"
        words = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--port=0", f"--ServerApp.root_dir={root}", "--allow-root",
            f"--IdentityProvider.token={self.token}", "--LabApp.expose_app_in_browser=True",
        ]  # fmt: skip
        self.log = root / "server.log"
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(words, cwd=root, stdout=file, stderr=file)
        deadline = time.monotonic() + 300
        while not (found := re.search(r"http://(?:localhost|127.0.0.1):(\d+)/", self.log.read_text())):
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        self.address = f"127.0.0.1:{found[1]}"
        while True:  # it says so before it listens
            try:
                socket.create_connection(("127.0.0.1", int(found[1])), 5).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.05)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"http://{self.address}/api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def execute(self, kernel: str, code: str, *, wait: bool = True) -> str:
        """What the code prints, by a websocket as browsers have one. Without `wait`, nothing is read."""
        channels = websocket.create_connection(
            f"ws://{self.address}/api/kernels/{kernel}/channels?token={self.token}", timeout=600, suppress_origin=True
        )
        try:
            header = {"msg_id": "m", "msg_type": "execute_request", "username": "", "session": "s", "version": "5.3"}
            content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False, "user_expressions": {}}
            message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
            channels.send(json.dumps(message))
            text = ""
            while wait:
                said = json.loads(channels.recv())
                if said["parent_header"].get("msg_id") != "m":
                    continue
                if said["msg_type"] == "stream":
                    text += said["content"]["text"]
                if said["msg_type"] == "error":
                    text += said["content"]["ename"]
                if said["msg_type"] == "status" and said["content"]["execution_state"] == "idle":
                    break
            return text
        finally:
            channels.close()

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server(jupyter: Path, tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize("route", ROUTES)
def test_jupyter_server(server: Server, route: str) -> None:
    kernel = server.ask("POST", "kernels", {"name": route})["id"]
    assert server.execute(kernel, "import os; print(os.getpid())") == "2\n"
    server.ask("POST", f"kernels/{kernel}/restart")
    assert server.execute(kernel, "print('x' in globals())") == "False\n"
    server.ask("POST", f"kernels/{kernel}/interrupt")
    assert server.execute(kernel, "print(6 * 7)") == "42\n"
    server.ask("DELETE", f"kernels/{kernel}")
    assert server.ask("GET", "kernels") == []


def test_jupyter_server_restarts_a_kernel_that_died(server: Server) -> None:
    kernel = server.ask("POST", "kernels", {"name": "argv"})["id"]
    assert server.execute(kernel, "print(1)") == "1\n"
    server.execute(kernel, "import os; os._exit(1)", wait=False)
    deadline = time.monotonic() + 300
    while "restarting kernel" not in server.log.read_text():
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.2)
    assert server.execute(kernel, "print(2)") == "2\n"


def test_nothing_of_a_server_that_was_killed_is_left(server: Server) -> None:
    for route in ROUTES:
        kernel = server.ask("POST", "kernels", {"name": route})["id"]
        server.execute(kernel, "import subprocess; subprocess.Popen(['sleep', '1000']); print(1)")
    below = descendants(server.process.pid)
    assert len(below) >= 2 * 4  # launcher, supervisor, PID 1, kernel
    server.process.kill()
    deadline = time.monotonic() + 300
    while alive := [pid for pid in below if os.path.exists(f"/proc/{pid}") and not zombie(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    found: list[int] = []
    todo = [pid]
    while todo:
        above = todo.pop()
        for task in os.listdir(f"/proc/{above}/task"):
            for child in Path(f"/proc/{above}/task/{task}/children").read_text().split():
                found.append(int(child))
                todo.append(int(child))
    return found


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
