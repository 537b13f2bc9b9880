"""Each test here does what a malicious or broken test does. Those that are contained without a trace pass."""

import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_deletes_the_home_directory():
    shutil.rmtree(Path.home(), ignore_errors=True)


def test_deletes_the_project():
    shutil.rmtree(HERE, ignore_errors=True)
    assert not Path(__file__).exists()


def test_the_project_is_back():
    assert Path(__file__).exists()


def test_reads_private_files():
    for path in ("/etc/shadow", "~/.ssh/id_rsa", "~/.aws/credentials", "~/.bash_history", "/root/.bashrc"):
        with pytest.raises(OSError):
            Path(path).expanduser().read_text()


def test_calls_home():
    with pytest.raises(OSError):
        socket.create_connection(("192.0.2.1", 443), timeout=2)


def test_kills_its_parent():
    assert os.getppid() in (0, 1)  # outside of a container, and without a number in it; in a machine, its first process
    for pid in (1, -1):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass


def test_fork_bomb():
    alive = 0
    with pytest.raises(BlockingIOError):
        while True:
            if os.fork() == 0:
                time.sleep(60)
            alive += 1
    assert alive < 64


def test_eats_memory():
    hoard = []
    while True:
        hoard.append(bytearray(1 << 20))


def test_fills_the_disk():
    with pytest.raises(OSError), open("/tmp/fill", "wb") as file:
        while True:
            file.write(bytes(1 << 20))


def test_hangs():
    while True:
        time.sleep(3600)


def test_ignores_signals_and_hangs():
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def test_exits_as_if_all_were_well():
    os._exit(0)


def test_crashes():
    os.kill(os.getpid(), signal.SIGSEGV)


def test_forges_a_result(request):
    """Writes a report of another test to every descriptor it has."""
    forged = b'\0\0\0\x10\0\0\0\0{"report": true}'
    for fd in range(3, 256):
        try:
            os.write(fd, forged)
        except OSError:
            pass
