"""Modules whose code has not run yet: whatever is done with one first, it is like any other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BEFORE = """
import sys
from isolation_kernel.inside import deferred
deferred.client_side()
deferred.when_imported("psutil", lambda module: module.__dict__.update(changed="yes"))
import psutil, platformdirs, jupyter_client
assert not {"psutil._common", "platformdirs.unix", "jupyter_client.manager"} & sys.modules.keys()
"""


def said(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}  # it chooses
    done = subprocess.run([sys.executable, "-I", "-c", BEFORE + code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("code", "out"),
    [
        ("print(psutil.__version__[0].isdigit(), psutil.changed)", "True yes"),
        ("from psutil import changed, cpu_count; print(changed, cpu_count() > 0)", "yes True"),
        ("from psutil import *; print(callable(virtual_memory))", "True"),
        ("psutil.PROCFS_PATH = '/x'; psutil.cpu_count; print(psutil.PROCFS_PATH)", "/x"),
        ("print('cpu_count' in dir(psutil), psutil.__doc__.split()[0])", "True psutil"),
        ("import types; psutil.cpu_count; print(type(psutil) is types.ModuleType)", "True"),
        ("print(hasattr(psutil, 'nothing'), hasattr(psutil, '__nothing__'), hasattr(platformdirs, '__file__'))", "False False True"),
        ("import platformdirs.unix; print(platformdirs.unix.Unix('x').appname, platformdirs.__name__)", "x platformdirs"),
        ("print(jupyter_client.__version__[0].isdigit(), 'KernelManager' in dir(jupyter_client))", "True True"),
        ("import importlib; print(importlib.reload(psutil) is psutil, psutil.cpu_count() > 0)", "True True"),
        ("from unittest import mock\nwith mock.patch('psutil.cpu_count', lambda: -1): print(psutil.cpu_count())", "-1"),
        ("import inspect; print(inspect.getmodule(psutil.Process) is psutil, inspect.getsource(psutil)[0] != '')", "True True"),
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
    deferred.when_imported("fragile", lambda module: None)
    import fragile
    for _ in range(2):
        try:
            fragile.late
        except ImportError as error:
            print(error)
    path.write_text("early = late = 2")
    print(fragile.late, fragile.early)
"""
    assert said(code).splitlines() == ["not now", "not now", "2 2"]


def test_threads_wait_for_whoever_is_first() -> None:
    code = """
import concurrent.futures
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    print({future.result() for future in [pool.submit(lambda: psutil.changed) for _ in range(8)]})
"""
    assert said(code) == "{'yes'}"
