"""JupyterLab in a browser: a cell, a plot, a slider, an interrupt, a restart."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import struct
import subprocess
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket
from kernel.test_frontends import Server, notebook

pytestmark = pytest.mark.once("user")

CELLS = (
    "import os, socket\nprint('process', os.getpid(), [name for _, name in socket.if_nameindex()])",
    "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 3, 2]); plt.show()",
    "import ipywidgets\nipywidgets.IntSlider(value=7)",
    "import time\nprint(6 * 7 * 1000)\nwhile True: time.sleep(0.05)",
)


class Browser:
    """Chromium without a window, by its DevTools protocol."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("chromium")
        assert program, "this test needs chromium (apt-get install chromium)"
        self.process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
             "--disable-dev-shm-usage", "--window-size=1200,1400", f"--user-data-dir={directory}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        port = directory / "DevToolsActivePort"
        wait(lambda: port.exists() and port.read_text().strip(), 300)
        address = f"127.0.0.1:{port.read_text().split()[0]}"
        with urllib.request.urlopen(f"http://{address}/json/list", timeout=20) as answer:
            page = next(page for page in json.loads(answer.read()) if page["type"] == "page")
        self._socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=600, suppress_origin=True)
        self._numbers = itertools.count(1)
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # as a window has that somebody works in

    def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of some JavaScript; a promise is waited for."""
        said = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._socket.close()
        os.killpg(self.process.pid, 15)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()


def wait(ready: Any, seconds: float = 40) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.1)
    return found


class Lab:
    """A JupyterLab, and a page that looks at it: for all tests here, one notebook after the other."""

    def __init__(self, root: Path, profile: Path) -> None:
        self.root = root
        self.browser = Browser(profile)
        try:
            self.server = Server(root)
        except BaseException:
            self.browser.close()
            raise

    def open(self, name: str, codes: tuple[str, ...]) -> str:
        """A new notebook, until its kernel is idle. Returns the kernel's id."""
        notebook(self.root / name, "argv", codes)
        url = f"http://{self.server.address}/lab/tree/{name}?token={self.server.token}&reset"
        self.browser.call("Page.navigate", url=url)
        there = f"window.jupyterapp?.shell.currentWidget?.context?.path === '{name}' && !!document.querySelector('{CELL}')"
        wait(lambda: self.browser.evaluate(there), 300)
        kernel = wait(lambda: self.kernel(name), 300)
        assert kernel["name"] == "argv"
        self.wait_until_idle(name)
        return str(kernel["id"])

    def kernel(self, name: str) -> Any:
        """Of a notebook. While one starts, jupyter_server may answer with an internal error (500)."""
        try:
            return next((each["kernel"] for each in self.server.ask("GET", "sessions") if each["path"] == name), None)
        except urllib.error.HTTPError:
            return None

    def wait_until_idle(self, name: str) -> None:
        wait(lambda: (self.kernel(name) or {}).get("execution_state") == "idle", 300)

    def command(self, name: str) -> None:
        self.browser.evaluate(f"void window.jupyterapp.commands.execute('{name}')")

    def text(self, number: int, of: str = "") -> str:
        """What is to be read of a cell."""
        return str(self.browser.evaluate(f"document.querySelectorAll('{CELL}')[{number}]{of}.innerText"))

    def close(self) -> None:
        self.browser.close()
        self.server.close()


CELL = ".jp-Notebook .jp-CodeCell"


@pytest.fixture(scope="module")
def shared_lab(jupyter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    found = Lab(tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture
def lab(shared_lab: Lab) -> Iterator[Lab]:
    """Without kernels of another test."""
    yield shared_lab
    shared_lab.browser.call("Page.navigate", url="about:blank")
    for session in shared_lab.server.ask("GET", "sessions"):
        shared_lab.server.ask("DELETE", f"sessions/{session['id']}")


def test_a_notebook_in_jupyterlab(lab: Lab, tmp_path: Path) -> None:
    kernel = lab.open("cells.ipynb", CELLS)
    browser = lab.browser
    lab.command("notebook:run-all-cells")

    def outputs(number: int, selector: str) -> str:
        cell = f"document.querySelectorAll('{CELL}')[{number}]"
        return f"({cell} && {cell}.querySelector('.jp-OutputArea-output {selector}'))"

    wait(lambda: "process 2 ['lo']" in lab.text(0))
    wait(lambda: browser.evaluate(f"{outputs(1, 'img')}?.naturalWidth > 100"))
    wait(lambda: browser.evaluate(f"{outputs(2, '.widget-slider')} !== null"))
    assert browser.evaluate(f"{outputs(2, '.widget-readout')}.innerText.trim()") == "7"
    prompt = ".querySelector('.jp-InputPrompt')"
    wait(lambda: "*" in lab.text(3, prompt))
    wait(lambda: "42000" in lab.text(3))

    picture = tmp_path / "lab.png"
    browser.screenshot(picture)
    assert colours(picture.read_bytes()) > 50
    if os.environ.get("KEEP_SCREENSHOT"):
        shutil.copy(picture, os.environ["KEEP_SCREENSHOT"])

    lab.command("notebook:interrupt-kernel")
    wait(lambda: "KeyboardInterrupt" in lab.text(3))
    wait(lambda: lab.text(3, prompt) == "[4]:")

    manager = "window.jupyterapp.serviceManager.kernels"
    browser.evaluate(f"{manager}.connectTo({{model: {{id: '{kernel}', name: 'argv'}}}}).restart()")
    lab.wait_until_idle("cells.ipynb")
    assert lab.server.execute(kernel, "print('plt' in globals())") == "False\n"


def test_all_cells_of_a_notebook_that_goes_back(lab: Lab) -> None:
    """JupyterLab sends them all at once: those behind the rollback are for a kernel that is not there yet. Before, it asks
    the debugger of each notebook for its state."""
    codes = ("x = 1", "%isolation checkpoint a", "x = 2", "%isolation rollback a", "print('x is', x)")
    kernel = lab.open("back.ipynb", codes)
    asked = "print(vars(get_ipython().kernel.debugger).get('_debugger') is not None)"
    wait(lambda: lab.server.execute(kernel, asked) == "True\n")
    for _ in range(2):
        lab.command("notebook:run-all-cells")
        wait(lambda: lab.text(4).rstrip().endswith("x is 1"))
        wait(
            lambda: "*" not in "".join(lab.text(number, ".querySelector('.jp-InputPrompt')") for number in range(len(codes)))
        )
        lab.wait_until_idle("back.ipynb")
        assert "checkpoint a in" in lab.text(1)
        assert "back at checkpoint a" in lab.text(3)
        assert lab.browser.evaluate("document.querySelectorAll('.jp-Dialog').length") == 0
        lab.browser.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")


def colours(png: bytes) -> int:
    """How many different rows of pixels a picture has; a blank page has few."""
    position, data = 8, b""
    while position < len(png):
        length, kind = struct.unpack_from(">I4s", png, position)
        if kind == b"IDAT":
            data += png[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, _height, _depth, mode = struct.unpack_from(">IIBB", png, position + 8)
        position += 12 + length
    row = 1 + width * {2: 3, 6: 4}[mode]
    pixels = zlib.decompress(data)
    return len({pixels[start : start + row] for start in range(0, len(pixels), row)})
