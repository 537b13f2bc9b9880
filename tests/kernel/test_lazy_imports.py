"""Modules whose code has not run yet: whatever is done with one first, it is like any other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from kernel.frontend import Kernel

pytestmark = pytest.mark.once("user")

BEFORE = """
import sys
from isolation_kernel.inside import lazy_imports
lazy_imports.when_imported("psutil", lambda module: module.__dict__.update(changed="yes"))
with lazy_imports.client_side():
    import jupyter_client as client, jupyter_client.session, platformdirs as dirs
    debugger = lazy_imports._defer("ipykernel.debugger", known=6 * 7)
assert not {"jupyter_client", "jupyter_client.manager", "platformdirs", "platformdirs.unix", "psutil", "debugpy"} & sys.modules.keys()
"""


def said(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}  # it chooses
    done = subprocess.run(
        [sys.executable, "-I", "-c", BEFORE + code], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("code", "out"),
    [
        ("print(client.__version__[0].isdigit(), 'KernelManager' in dir(client))", "True True"),
        ("print(hasattr(client, 'nothing'), hasattr(client, '__nothing__'), hasattr(dirs, '__file__'))", "False False True"),
        ("client.KernelManager = 1; client.run_kernel; print(client.KernelManager)", "1"),
        ("import types; client.KernelManager; print(type(client) is types.ModuleType)", "True"),
        (
            "import jupyter_client; print(jupyter_client is client, jupyter_client.session.__name__)",
            "True jupyter_client.session",
        ),
        ("import jupyter_client.session; print(callable(jupyter_client.session.Session))", "True"),
        ("from jupyter_client.manager import KernelManager; print(KernelManager is client.KernelManager)", "True"),
        ("from jupyter_client.ioloop import IOLoopKernelManager as M; print(issubclass(M, client.KernelManager))", "True"),
        ("import platformdirs.unix; print(platformdirs.unix.Unix('x').appname, platformdirs is dirs)", "x True"),
        ("from jupyter_client import *; print(callable(run_kernel))", "True"),
        (
            "import importlib, jupyter_client; print(importlib.reload(client) is client, callable(client.run_kernel))",
            "True True",
        ),
        (
            "from unittest import mock\nwith mock.patch('platformdirs.user_data_dir', lambda: -1): print(dirs.user_data_dir())",
            "-1",
        ),
        (
            "import inspect; print(inspect.getsource(client)[0] != '', inspect.getmodule(dirs.user_data_dir) is dirs)",
            "True True",
        ),
        ("sys.modules['jupyter_client'] = sys; print(client.version == sys.version)", "True"),
        (
            "import importlib.util as u; print(type(u.find_spec('jupyter_client').loader.get_data(client.__file__)).__name__)",
            "bytes",
        ),
        (
            "print(debugger.known); import ipykernel.debugger; print(ipykernel.debugger.Debugger is debugger.Debugger)",
            "42\nTrue",
        ),
        ("import importlib; print(importlib.reload(debugger) is debugger, callable(debugger.Debugger))", "True True"),
        ("import psutil; print(psutil.changed, psutil.cpu_count() > 0)", "yes True"),
        ("from psutil._common import usage_percent; import psutil; print(psutil.changed)", "yes"),
        ("import psutil; del sys.modules['psutil']; import psutil as other; print(other is psutil)", "False"),
    ],
)
def test_like_any_other(code: str, out: str) -> None:
    assert said(code) == out


def test_code_that_fails_fails_each_time() -> None:
    code = """
import pathlib, tempfile
with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / "fragile.py"
    path.write_text("early = 1\\nraise ImportError('not now')")
    sys.path.insert(0, directory)
    fragile = lazy_imports._defer("fragile")
    for _ in range(2):
        try:
            fragile.late
        except ImportError as error:
            print(error)
    try:
        import fragile
    except ImportError as error:
        print(error)
    path.write_text("early = late = 2")
    print(fragile.late, fragile.early)
"""
    assert said(code).splitlines() == ["not now", "not now", "not now", "2 2"]


@pytest.mark.parametrize("look", ["client.KernelManager", "__import__('jupyter_client.manager').KernelManager", "changed()"])
def test_threads_wait_for_whoever_is_first(look: str) -> None:
    code = f"""
import concurrent.futures
def changed():
    import psutil
    return psutil.changed
def other():
    from jupyter_client.manager import KernelManager
    return KernelManager
sys.setswitchinterval(1e-5)
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    others = [pool.submit(other) for _ in range(4)]
    print(len({{future.result() for future in [pool.submit(lambda: {look}) for _ in range(8)]}}))
    assert {{future.result() for future in others}} == {{client.KernelManager}}
"""
    assert said(code) == "1"


def test_a_cell_that_begins_with_a_module_inside(kernels: Callable[..., Kernel]) -> None:
    kernel = kernels("argv")
    assert kernel.value("'jupyter_client' in __import__('sys').modules") == "False"
    reply = kernel.run("from jupyter_client.manager import KernelManager; import jupyter_client, ipykernel.debugger")
    assert reply.status == "ok", reply.error
    assert kernel.value("jupyter_client.KernelManager is KernelManager") == "True"
    assert kernel.value("ipykernel.debugger.Debugger.__module__") == "ipykernel.debugger"
