"""Start of a Jupyter kernel, throughput and memory: plain ipykernel, and the same in a sandbox.

    python benchmarks/kernel.py [--rounds N]

Rounds are interleaved, and what counts is each variant's median against plain ipykernel's of the same rounds. "First reply"
is from `start_kernel()` to the reply of a first cell, without jupyter_client's `wait_for_ready`, which adds 0.2 s.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _common import median, table
from jupyter_client.manager import KernelManager

from isolation import cli

PLOT = "import numpy, matplotlib.pyplot as plt\nplt.plot(numpy.arange(9))\nplt.show()"
BIG = 200_000_000
_PATIENCE = 60.0


class Started:
    """A kernel, from the call that starts it."""

    def __init__(self, spec: str, cwd: str) -> None:
        self.manager = KernelManager(kernel_name=spec)
        self.began = time.perf_counter()
        self.manager.start_kernel(cwd=cwd)
        self.client = self.manager.client()
        self.client.start_channels(hb=False)

    def run(self, code: str) -> float:
        """Seconds from the start to the reply."""
        identity = self.client.execute(code)
        while True:
            message = self.client.get_shell_msg(timeout=_PATIENCE)
            if message["parent_header"].get("msg_id") == identity:
                assert message["content"]["status"] == "ok", message
                return time.perf_counter() - self.began

    def run_and_listen(self, code: str) -> float:
        """As `run`, to the "idle" that follows; as a frontend does, which reads what is published."""
        identity = self.client.execute(code)
        while True:
            message = self.client.get_iopub_msg(timeout=_PATIENCE)
            mine = message["parent_header"].get("msg_id") == identity
            if mine and message["content"].get("execution_state") == "idle":
                return time.perf_counter() - self.began

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.client.context.destroy(linger=0)
        self.manager.context.destroy(linger=0)


def first_reply(spec: str, cwd: str, code: str = "1+1") -> float:
    kernel = Started(spec, cwd)
    try:
        return kernel.run(code)
    finally:
        kernel.close()


def big_message(spec: str, cwd: str) -> float:
    """Seconds for a message of 200 MB."""
    kernel = Started(spec, cwd)
    try:
        kernel.run(f"from IPython.display import display\ndata = {{'x/y': 'a' * {BIG}}}")
        time.sleep(0.3)  # iopub has connected
        began = time.perf_counter()
        kernel.client.execute("display(data, raw=True)")
        while True:
            message = kernel.client.get_iopub_msg(timeout=_PATIENCE)
            if message["msg_type"] == "display_data":
                return time.perf_counter() - began
    finally:
        kernel.close()


def memory(spec: str, cwd: str) -> tuple[float, ...]:
    """MiB (proportional set size) of all processes of an idle kernel."""
    before = set(os.listdir("/proc"))
    kernel = Started(spec, cwd)
    try:
        kernel.run("1+1")
        time.sleep(0.5)
        mine = [name for name in os.listdir("/proc") if name.isdigit() and name not in before]
        return tuple(sorted((pss(name) for name in mine if os.getpid() in ancestors(name)), reverse=True))
    finally:
        kernel.close()


def pss(pid: str) -> float:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def ancestors(pid: str) -> list[int]:
    found: list[int] = []
    try:
        while pid not in ("0", "1"):
            pid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            found.append(int(pid))
    except OSError:
        pass
    return found


@contextmanager
def pool(cwd: str) -> Iterator[Callable[[], None]]:
    """Warm kernels in `cwd`; the function waits until one is ready."""
    words = [sys.executable, "-m", "isolation", "kernel", "warm", "--directory", cwd]
    process = subprocess.Popen([*words, "--foreground", "provisioner"])

    def wait() -> None:
        while "1 ready" not in subprocess.run([*words, "--status"], capture_output=True, text=True).stdout:
            time.sleep(0.2)
        time.sleep(0.3)

    try:
        yield wait
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as root:
        os.environ["JUPYTER_PATH"] = f"{root}/share/jupyter"
        os.environ["JUPYTER_RUNTIME_DIR"] = f"{root}/runtime"
        for name, words in (("argv", []), ("provisioner", ["--provisioner"])):
            cli.main(["kernel", "install", "--prefix", root, "--name", name, *words])
        cold, warm = f"{root}/cold", f"{root}/warm"
        os.mkdir(cold)
        os.mkdir(warm)
        starts(rounds, cold, warm)
        figures(max(3, rounds // 3), cold)
        undo(max(3, rounds // 3), cold)
    return 0


def starts(rounds: int, cold: str, warm: str) -> None:
    rows = interleaved(rounds, {
        "plain ipykernel": ("python3", cold, "1+1"),
        "sandbox, by argv": ("argv", cold, "1+1"),
        "sandbox, by provisioner": ("provisioner", cold, "1+1"),
    })  # fmt: skip
    # ScriptProcess from those: with a pool, the second start in any directory is a warm one.
    with pool(warm) as ready:
        rows += interleaved(rounds, {
            "plain ipykernel, again": ("python3", warm, "1+1"),
            "sandbox, warm, by argv": ("argv", warm, "1+1"),
            "sandbox, warm, by provisioner": ("provisioner", warm, "1+1"),
        }, ready)  # fmt: skip
        rows += interleaved(rounds, {
            "plain ipykernel, first plot": ("python3", warm, PLOT),
            "sandbox, warm, first plot": ("provisioner", warm, PLOT),
        }, ready)  # fmt: skip
    print(table(["first reply", "median", "least", "of plain"], rows))


def interleaved(
    rounds: int, variants: dict[str, tuple[str, str, str]], ready: Callable[[], None] = lambda: None
) -> list[list[str]]:
    """Rows of the table; the first variant is what the others are compared with."""
    took: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (spec, cwd, code) in variants.items():
            ready()
            took[name].append(first_reply(spec, cwd, code))
    plain = median(next(iter(took.values())))
    return [
        [name, f"{1000 * median(seconds):.0f} ms", f"{1000 * min(seconds):.0f} ms", f"{median(seconds) / plain:.2f}"]
        for name, seconds in took.items()
    ]


def figures(rounds: int, cold: str) -> None:
    specs = {"plain ipykernel": "python3", "sandbox, by argv": "argv", "sandbox, by provisioner": "provisioner"}
    took: dict[str, list[float]] = {name: [] for name in specs}
    used: dict[str, list[Any]] = {name: [] for name in specs}
    for _ in range(rounds):
        for name, spec in specs.items():
            took[name].append(big_message(spec, cold))
            used[name].append(memory(spec, cold))
    rows = []
    for name in specs:
        speed = BIG / 1e6 / median(took[name])
        plain = BIG / 1e6 / median(took["plain ipykernel"])
        each = sorted(used[name], key=sum)[rounds // 2]
        parts = " + ".join(f"{one:.0f}" for one in each)
        rows.append([name, f"{speed:.0f} MB/s", f"{speed / plain:.2f}", f"{sum(each):.0f} MiB", parts])
    print(table(["", "200 MB message", "of plain", "memory, idle", "of which"], rows))


def undo(rounds: int, cold: str) -> None:
    """Back to the state behind some imports: by a rollback; and, in a plain kernel, by a restart and the same imports."""
    took: dict[str, list[float]] = {name: [] for name in ("restart, and run again", "checkpoint", "rollback")}
    for _ in range(rounds):
        plain = Started("python3", cold)
        try:
            plain.run_and_listen(PLOT)
            plain.began = time.perf_counter()
            plain.manager.restart_kernel(now=True)
            took["restart, and run again"].append(plain.run_and_listen(PLOT))
        finally:
            plain.close()
        kernel = Started("argv", cold)
        try:
            kernel.run_and_listen(PLOT)
            for name in ("checkpoint", "rollback"):
                kernel.began = time.perf_counter()
                took[name].append(kernel.run_and_listen(f"%isolation {name} a"))
        finally:
            kernel.close()
    whole = median(took["restart, and run again"])
    rows = [[name, f"{1000 * median(all_):.0f} ms", f"{median(all_) / whole:.2f}"] for name, all_ in took.items()]
    print(table(["back to a plot", "median", "of a restart"], rows))


if __name__ == "__main__":
    raise SystemExit(main())
