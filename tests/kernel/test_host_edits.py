"""What the host does in the notebook's directory is seen from cell to cell, below what the kernel has written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel.frontend import Kernel

Kernels = Callable[..., Kernel]


def put(path: Path, text: str) -> None:
    """As JupyterLab saves, and git."""
    beside = path.with_name("beside~")
    beside.write_text(text)
    beside.replace(path)


@pytest.mark.parametrize("mode", ["overlay", "ro"])
def test_files_and_modules(kernels: Kernels, tmp_path: Path, mode: str) -> None:
    there = tmp_path / "notebook"
    there.mkdir()
    put(there / "helper.py", "def f(): return 'one'\n")
    put(there / "data.csv", "old")
    kernel = kernels("argv", "--notebook", mode)
    assert kernel.run("%load_ext autoreload\n%autoreload 2\nimport helper, os").status == "ok"
    assert kernel.value("helper.f(), open('data.csv').read(), os.path.exists('later.csv')") == "one old False"
    assert kernel.run("import later_module").content["ename"] == "ModuleNotFoundError"
    put(there / "helper.py", "def f(): return 'number two'\n")
    put(there / "data.csv", "new")
    put(there / "later.csv", "uploaded")
    put(there / "later_module.py", "X = 1\n")
    assert kernel.value("helper.f(), open('data.csv').read(), open('later.csv').read()") == "number two new uploaded"
    assert kernel.value("__import__('later_module').X") == "1"
    put(there / "another_module.py", "X = 2\n")
    (there / "data.csv").unlink()
    assert (
        kernel.value("__import__('another_module').X, os.path.exists('data.csv'), 'data.csv' in os.listdir()")
        == "2 False False"
    )
    (there / "package").mkdir()
    put(there / "package" / "__init__.py", "")
    assert kernel.value("__import__('package').__name__") == "package"
    put(there / "package" / "below.py", "X = 3\n")
    assert kernel.value("__import__('package.below').below.X") == "3"
    (there / "folder" / "below").mkdir(parents=True)
    assert kernel.value("os.listdir('folder')") == "['below']"
    shutil.rmtree(there / "folder")
    assert kernel.value("os.path.exists('folder')") == "False"


def test_with_checkpoints(kernels: Kernels, tmp_path: Path) -> None:
    there = tmp_path / "notebook"
    there.mkdir()
    put(there / "data.csv", "old")
    kernel = kernels("argv")
    assert kernel.run("import os; x = 1; open('mine', 'w').write('1')\n%isolation checkpoint a").status == "ok"
    for turn in ("first", "second"):
        put(there / "data.csv", turn)
        assert kernel.value("open('data.csv').read(), os.getcwd()") == f"{turn} {there}"
        kernel.run("x = 2; open('mine', 'w').write('2')")
        assert kernel.run("%isolation rollback a").status == "ok"
        put(there / "data.csv", f"{turn} again")
        assert kernel.value("open('data.csv').read(), open('mine').read(), x") == f"{turn} again 1 1"
    kernel.run("open('data.csv', 'w').write('mine')")
    put(there / "data.csv", "the host's")
    assert kernel.value("open('data.csv').read()") == "mine"
    assert (there / "data.csv").read_text() == "the host's"


def test_a_flood_of_looks(kernels: Kernels) -> None:
    """More than one at a time is refused, or the kernel's host would do nothing else: it still ends the kernel in time."""
    kernel = kernels("argv")
    code = (
        "import json, struct\nhost = get_ipython().magics_manager.magics['line']['isolation'].__self__._host\n"
        "one = b'{\"op\":\"refresh\"}'\nhost._wire.sock.sendall(2000 * (struct.pack('>II', len(one), 0) + one))\n"
        "answers = [host._wire.receive(60) for _ in range(2000)]\n"
        "print(sum('error' in answer for answer in answers) > 1000, {str(answer.get('answer')) for answer in answers})"
    )
    reply = kernel.run(code)
    assert reply.text == "True {'None', 'True'}\n" or reply.text == "True {'True', 'None'}\n", reply.error
    assert kernel.value("6*7") == "42"
