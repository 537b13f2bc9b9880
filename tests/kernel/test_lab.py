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
from kernel.test_frontends import Server, notebook, server

pytestmark = pytest.mark.once

__all__ = ["server"]

CELLS = (
    "import os, socket\nprint('process', os.getpid(), [name for _, name in socket.if_nameindex()])",
    "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 3, 2]); plt.show()",
    "import ipywidgets\nipywidgets.IntSlider(value=7)",
    "import time\nwhile True: time.sleep(0.05)",
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
        wait(lambda: port.exists() and port.read_text().strip(), 60)
        address = f"127.0.0.1:{port.read_text().split()[0]}"
        with urllib.request.urlopen(f"http://{address}/json/list", timeout=20) as answer:
            page = next(page for page in json.loads(answer.read()) if page["type"] == "page")
        self._socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=60, suppress_origin=True)
        self._numbers = itertools.count(1)

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


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    found = Browser(tmp_path / "browser")
    yield found
    found.close()


def test_a_notebook_in_jupyterlab(server: Server, browser: Browser, tmp_path: Path) -> None:
    notebook(tmp_path / "n.ipynb", "argv", CELLS)
    browser.call(
        "Page.navigate", url=f"http://{server.address}/lab/tree/n.ipynb?token={server.token}&reset"
    )
    wait(lambda: browser.evaluate("!!window.jupyterapp && !!document.querySelector('.jp-Notebook .jp-CodeCell')"), 90)
    app = "window.jupyterapp"
    kernel = wait(lambda: kernels_of(server), 40)[0]
    assert kernel["name"] == "argv"
    wait(lambda: kernels_of(server)[0]["execution_state"] == "idle")
    browser.evaluate(f"void {app}.commands.execute('notebook:run-all-cells')")

    def outputs(number: int, selector: str) -> str:
        cell = f"document.querySelectorAll('.jp-Notebook .jp-CodeCell')[{number}]"
        return f"({cell} && {cell}.querySelector('.jp-OutputArea-output {selector}'))"

    text = "(document.querySelectorAll('.jp-Notebook .jp-CodeCell')[0].innerText)"
    wait(lambda: "process 2 ['lo']" in browser.evaluate(text))
    wait(lambda: browser.evaluate(f"{outputs(1, 'img')}?.naturalWidth > 100"))
    wait(lambda: browser.evaluate(f"{outputs(2, '.widget-slider')} !== null"))
    assert browser.evaluate(f"{outputs(2, '.widget-readout')}.innerText.trim()") == "7"
    prompt = "document.querySelectorAll('.jp-Notebook .jp-CodeCell')[3].querySelector('.jp-InputPrompt').innerText"
    wait(lambda: "*" in browser.evaluate(prompt))
    time.sleep(0.5)

    picture = tmp_path / "lab.png"
    browser.screenshot(picture)
    assert colours(picture.read_bytes()) > 50
    if os.environ.get("KEEP_SCREENSHOT"):
        shutil.copy(picture, os.environ["KEEP_SCREENSHOT"])

    browser.evaluate(f"{app}.commands.execute('notebook:interrupt-kernel')")
    last = "document.querySelectorAll('.jp-Notebook .jp-CodeCell')[3].innerText"
    wait(lambda: "KeyboardInterrupt" in browser.evaluate(last))
    wait(lambda: browser.evaluate(prompt) == "[4]:")

    manager = f"{app}.serviceManager.kernels"
    browser.evaluate(f"{manager}.connectTo({{model: {{id: '{kernel['id']}', name: 'argv'}}}}).restart()")
    wait(lambda: kernels_of(server)[0]["execution_state"] == "idle")
    assert server.execute(kernel["id"], "print('plt' in globals())") == "False\n"


def test_all_cells_of_a_notebook_that_goes_back(server: Server, browser: Browser, tmp_path: Path) -> None:
    """JupyterLab sends them all at once: those behind the rollback are for a kernel that is not there yet."""
    codes = ("x = 1", "%isolation checkpoint a", "x = 2", "%isolation rollback a", "print('x is', x)")
    notebook(tmp_path / "n.ipynb", "argv", codes)
    browser.call("Page.navigate", url=f"http://{server.address}/lab/tree/n.ipynb?token={server.token}&reset")
    wait(lambda: browser.evaluate("!!window.jupyterapp && !!document.querySelector('.jp-Notebook .jp-CodeCell')"), 90)
    wait(lambda: kernels_of(server), 40)
    wait(lambda: kernels_of(server)[0]["execution_state"] == "idle")
    cells = "[...document.querySelectorAll('.jp-Notebook .jp-CodeCell')]"
    for _ in range(2):
        browser.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        wait(lambda: browser.evaluate(f"{cells}[4].innerText").rstrip().endswith("x is 1"))
        wait(lambda: "*" not in browser.evaluate(f"{cells}.map(c => c.querySelector('.jp-InputPrompt').innerText).join()"))
        wait(lambda: kernels_of(server)[0]["execution_state"] == "idle")
        assert "back at checkpoint a" in browser.evaluate(f"{cells}[3].innerText")
        assert browser.evaluate("document.querySelectorAll('.jp-Dialog').length") == 0
        browser.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")


def kernels_of(server: Server) -> Any:
    """What runs. While one starts, jupyter_server may answer with an internal error (500)."""
    try:
        return server.ask("GET", "kernels")
    except urllib.error.HTTPError:
        return []


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
