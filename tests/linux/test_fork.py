"""Supervisors are forked off processes with threads, at-fork hooks, and whatever else a user's program has."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

from isolation.linux import fork

HOOKS = """
import os
from isolation.linux import fork
said = []
os.register_at_fork(before=lambda: said.append("before"), after_in_parent=lambda: said.append("parent"),
                    after_in_child=lambda: said.append("child"))
pid = fork.fork()
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else 0
print(said, flush=True)
if pid == 0:
    os._exit(7)
print(status)
"""


def test_a_failure_is_named() -> None:
    code = (
        "import resource; from isolation.linux import fork; import os\n"
        "os.setgroups([]) if os.getuid() == 0 else None\n"
        "os.setresuid(54321, 54321, 54321) if os.getuid() == 0 else None  # root has no such limit\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))\n"
        "try: fork.fork()\n"
        "except BlockingIOError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fork: Resource temporarily unavailable" in done.stdout


def test_hooks_run_as_with_os_fork() -> None:
    done = subprocess.run([sys.executable, "-c", HOOKS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['before', 'child']", "['before', 'parent']", "7"]


def test_a_thread_that_wants_the_interpreter_does_not_hang_the_child() -> None:
    """It asks at any moment, also at that of the fork, which is why these are many, and come at different times."""
    over = threading.Event()

    def want() -> None:
        while not over.is_set():
            pass

    threads = [threading.Thread(target=want) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(100):
            until = time.perf_counter() + number % 50 * 0.0001
            while time.perf_counter() < until:
                pass
            pid = fork.fork()
            if pid == 0:
                os._exit(sum(range(1000)) % 100)  # some bytecode
            deadline = time.monotonic() + 300
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.001)
            if ended[0] == 0:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
            assert ended[0] == pid
    finally:
        over.set()
        for thread in threads:
            thread.join()
