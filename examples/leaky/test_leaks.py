"""Pairs of tests: the first leaves something behind, the second trips over it. In plain pytest, that is."""

import os
import socket
import sys
import threading
from pathlib import Path

import settings

PORT = 20_000 + os.getpid() % 10_000  # of this run of pytest, and no other


def test_file_left():
    Path("results.txt").write_text("from the first test")


def test_file_found():
    assert not Path("results.txt").exists()


def test_environment_left():
    os.environ["APP_MODE"] = "broken"


def test_environment_found():
    assert "APP_MODE" not in os.environ


def test_cwd_left():
    os.chdir("/tmp")


def test_cwd_found():
    assert Path("settings.py").exists()


def test_thread_left():
    threading.Thread(target=threading.Event().wait, daemon=True, name="forgotten").start()


def test_thread_found():
    assert "forgotten" not in [thread.name for thread in threading.enumerate()]


_listener = None


def test_port_left():
    global _listener
    _listener = socket.create_server(("127.0.0.1", PORT))


def test_port_found():
    socket.create_server(("127.0.0.1", PORT)).close()


def test_module_state_left():
    settings.debug = True


def test_module_state_found():
    assert settings.debug is False


def test_sys_modules_left():
    sys.modules["json"] = None


def test_sys_modules_found():
    import json

    assert json.dumps([1]) == "[1]"
