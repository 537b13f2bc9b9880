"""Kernelspecs for the tests, in a directory of their own: by argv, and by provisioner."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kernel.frontend import Kernel

from isolation import cli

ROUTES = ("argv", "provisioner")


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of Jupyter's with our kernelspecs `argv` and `provisioner`, in the environment of the whole session."""
    prefix = tmp_path_factory.mktemp("jupyter")
    names = ("runtime", "data", "config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", f"{prefix}/share/jupyter")
        for name in names:
            (prefix / name).mkdir(mode=0o700)
            patch.setenv(f"JUPYTER_{name.upper()}_DIR", str(prefix / name))
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        install(prefix, "argv")
        install(prefix, "provisioner", "--provisioner")
        yield prefix


def install(prefix: Path, name: str, *options: str) -> None:
    assert cli.main(["kernel", "install", "--prefix", str(prefix), "--name", name, *options]) == 0


@pytest.fixture
def kernels(jupyter: Path, tmp_path: Path) -> Iterator[Callable[..., Kernel]]:
    """Starts kernels, in a notebook's directory of their own; all have ended afterwards."""
    started: list[Kernel] = []

    def start(name: str, *options: str, cwd: Path | None = None, **kwargs: object) -> Kernel:
        if options:
            spec = f"{name}-{len(os.listdir(jupyter / 'share/jupyter/kernels'))}"
            install(jupyter, spec, *options, *(["--provisioner"] if name == "provisioner" else []))
            name = spec
        directory = cwd or tmp_path / "notebook"
        directory.mkdir(exist_ok=True)
        started.append(Kernel(name, directory, **kwargs))
        return started[-1]

    yield start
    for kernel in started:
        kernel.close()


USERS = pytest.mark.once("user")


@pytest.fixture(params=["argv", pytest.param("provisioner", marks=USERS), pytest.param("rolled back", marks=USERS)])
def kernel(request: pytest.FixtureRequest, kernels: Callable[..., Kernel]) -> Kernel:
    """A kernel, by either route; and one that has come back to a checkpoint, and is another process now."""
    if request.param != "rolled back":
        return kernels(request.param)
    kernel = kernels("argv")
    for line in ("checkpoint start", "rollback start"):
        reply = kernel.run(f"%isolation {line}")
        assert reply.status == "ok", reply.error
    return kernel
