"""What a provisioner is asked besides starting a kernel."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager
from kernel.frontend import Kernel
from traitlets.config import Config

Kernels = Callable[..., Kernel]


def test_no_port_is_open_and_the_directory_is_private(kernels: Kernels) -> None:
    kernel = kernels("provisioner")
    info = kernel.manager.get_connection_info()
    assert info["transport"] == "ipc"
    directory = Path(info["ip"]).parent
    assert directory.stat().st_mode & 0o777 == 0o700
    assert len(list(directory.iterdir())) == 5
    assert all(path.is_socket() for path in directory.iterdir())
    kernel.manager.shutdown_kernel()
    assert not directory.exists()


def test_endpoints_stay_over_a_restart(kernels: Kernels) -> None:
    kernel = kernels("provisioner")
    before = kernel.manager.get_connection_info()
    kernel.restart()
    assert kernel.manager.get_connection_info() == before
    assert kernel.value("6*7") == "42"


def test_what_a_kernel_plants_at_its_endpoints_is_not_there(kernels: Kernels) -> None:
    kernel = kernels("provisioner")
    directory = str(Path(kernel.manager.get_connection_info()["ip"]).parent)
    assert kernel.run(f"import os; os.listdir({directory!r})").content["ename"] == "FileNotFoundError"
    kernel.run(f"os.makedirs({directory!r}); os.symlink('/run/docker.sock', {directory + '/k-1'!r})")
    assert not os.path.islink(f"{directory}/k-1")
    kernel.restart()
    assert kernel.value("6*7") == "42"


def test_paths(kernels: Kernels, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.csv").touch()
    kernel = kernels("provisioner", "--mount", f"{data}:/data")
    (tmp_path / "notebook/n.py").touch()
    resolve = kernel.manager.provisioner.resolve_path
    assert resolve("n.py") == str(tmp_path / "notebook/n.py")
    assert resolve(str(tmp_path / "notebook/n.py")) == str(tmp_path / "notebook/n.py")
    assert resolve("/data/a.csv") == str(data / "a.csv")
    for elsewhere in ("missing.py", "/etc/hostname", "../data/a.csv", "/data/../etc/hostname", str(data / "a.csv"), "~"):
        assert resolve(elsewhere) is None, elsewhere


def test_signals_for_a_kernel_that_is_gone(kernels: Kernels) -> None:
    kernel = kernels("provisioner")
    kernel.send("import os; os._exit(1)")
    assert kernel.manager.provisioner.process.wait(60) == 1
    kernel.manager.signal_kernel(signal.SIGINT)
    kernel.manager.interrupt_kernel()
    kernel.manager.shutdown_kernel()


@pytest.mark.parametrize("by", ["configuration", "call"])
def test_options_over_those_of_the_kernelspec(jupyter: Path, tmp_path: Path, by: str) -> None:
    wanted = {"memory": "700M", "env": ["FROM=here"]}
    config = Config({"Provisioner": {"options": wanted}}) if by == "configuration" else None
    manager = KernelManager(kernel_name="provisioner", config=config)
    manager.start_kernel(cwd=str(tmp_path), **({"isolation": wanted} if by == "call" else {}))
    kernel = Kernel.of(manager)
    try:
        assert "memory 700M" in kernel.run("%isolation").text
        assert kernel.value("__import__('os').environ['FROM']") == "here"
        kernel.restart()
        assert "memory 700M" in kernel.run("%isolation").text
    finally:
        kernel.close()
