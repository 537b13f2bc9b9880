"""A launcher that waits for a machine to be made hears of its frontend meanwhile."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once("user")
LAUNCHER = """
import signal, time
from isolation.signals import Signals
from isolation_kernel.launcher import Parent
from isolation_kernel.machine.starting import Starting
signals = Signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), obedient=False)
with Starting(signals, Parent()):
    print("waiting", flush=True)
    while True: time.sleep(1)
"""
FRONTEND = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LAUNCHER!r}])"


@pytest.mark.parametrize("what", ["the frontend is killed", "SIGTERM", "SIGINT"])
def test_it_ends_with_its_frontend(what: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", FRONTEND], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        (launcher,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        ended = os.pidfd_open(launcher)
        poller = select.poll()
        poller.register(ended, select.POLLIN)
        if what == "the frontend is killed":
            process.kill()
        elif what == "SIGTERM":
            os.kill(launcher, signal.SIGTERM)
        else:
            os.kill(launcher, signal.SIGINT)  # before every restart, a manager interrupts
            assert not poller.poll(500)
            os.kill(launcher, signal.SIGTERM)
        assert poller.poll(60_000)
        os.close(ended)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_it_says_what_takes_so_long() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert "making the virtual machine" in process.stderr.readline()
        process.kill()
