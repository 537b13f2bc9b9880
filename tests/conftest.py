"""Shared by all tests: a project directory, the backends, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import pytest

from isolation import SandboxSpec, registry
from isolation.backends import showing
from isolation.backends.microvm.artifacts import setup
from isolation.backends.microvm.artifacts.cache import Cache
from isolation.backends.microvm.artifacts.layers import Layer
from isolation.backends.microvm.artifacts.progress import SILENT
from isolation.backends.namespace.host import supervisor_pool
from isolation.paths import is_within

pytest_plugins = ["pytester"]
CI = "CI" in os.environ


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A missing tool skips a test where someone works on other things; where all is to be checked, it is a failure."""
    report = yield
    if CI and report.skipped and isinstance(report.longrepr, tuple) and report.longrepr[2].startswith("Skipped: needs "):
        report.outcome, report.longrepr = "failed", report.longrepr[2]
    return report


def pytest_configure(config: pytest.Config) -> None:
    text = "once(who='root'): does not depend on who runs it: where both do, one of 'root' and 'user' is enough"
    config.addinivalue_line("markers", text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if who := os.environ.get("ISOLATION_TESTS"):
        chosen: list[pytest.Item] = []
        others: list[pytest.Item] = []
        for item in items:
            once = item.get_closest_marker("once")
            (others if once and who not in (once.args or ("root",)) else chosen).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = chosen


def leftovers(mark: bytes) -> set[str]:
    """Processes whose command line holds `mark`; not what another run of the tests has."""
    found = set()
    mine = Path("/proc/self/cmdline").read_bytes()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                command = Path(f"/proc/{name}/comm").read_text().strip()
                line = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if command == "isolation-init" and not line.strip(b"\0"):  # it has made its own unreadable
                line = b"".join(_command_lines(_above(int(name))))
            if command.startswith("isolation") and mark in line and not _belongs_to_another_run(int(name), mine):
                found.add(f"process {name} {command}")
    return found


def abandoned_cgroups() -> set[str]:
    """Those whose supervisor is gone."""
    found = set()
    for directory, names, _files in os.walk("/sys/fs/cgroup"):
        for name in names:
            if name.startswith("isolation-") and not os.path.exists(f"/proc/{name.split('-')[1]}"):
                found.add(f"cgroup {directory}/{name}")
    return found


def machines(host: int) -> set[int]:
    """Every QEMU process below `host`; its sandbox and its supervisor are between the two."""
    return {pid for pid in _qemu_processes() if host in _above(pid)}


def alive(pids: set[int]) -> set[int]:
    """Those of them that are QEMU processes still."""
    return pids & _qemu_processes()


def _qemu_processes() -> set[int]:
    found = set()
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and Path(f"/proc/{name}/comm").read_text().startswith("qemu-system"):
                found.add(int(name))
        except OSError:
            continue
    return found


def _belongs_to_another_run(pid: int, command: bytes) -> bool:
    """Whether it is below a process that was started by the same command, but is not this one, nor of a sandbox."""
    for above in _above(pid) - {os.getpid()}:
        try:
            name, line = (Path(f"/proc/{above}/{file}").read_bytes() for file in ("comm", "cmdline"))
        except OSError:
            continue
        if line == command and not name.startswith(b"isolation"):
            return True
    return False


def _command_lines(pids: set[int]) -> Iterator[bytes]:
    for pid in pids:
        with contextlib.suppress(OSError):
            yield Path(f"/proc/{pid}/cmdline").read_bytes()


def _above(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.add(pid)
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a process of this one, or a cgroup, behind."""
    mine = Path("/proc/self/cmdline").read_bytes()
    before, running, abandoned = leftovers(mine), machines(os.getpid()), abandoned_cgroups()
    yield
    supervisor_pool.release()
    assert leftovers(mine) - before == set()
    assert machines(os.getpid()) - running == set()
    deadline = time.monotonic() + 60
    while (left := abandoned_cgroups() - abandoned) and time.monotonic() < deadline:
        time.sleep(0.1)  # of a host that another file's test has killed: the next supervisor there removes it
    assert left == set()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory to be somebody's project."""
    path = tmp_path / "project"
    path.mkdir()
    (path / "data.txt").write_text("original")
    return path


@pytest.fixture(scope="session")
def real_cache() -> str:
    """Of the user who runs the tests."""
    return str(Cache.default().root.parent.parent)


@pytest.fixture(scope="session")
def microvm_ready() -> Iterator[None]:
    """What `isolation microvm setup` does; nothing but a look where it was done before.

    Where Python lies is looked through for each machine that is started, to see whether it has changed: some 90,000 files, which
    takes longer than the machine does. No test that asks for this changes any of it (test_layers.py does): here it is done once.
    """
    setup.make(Cache.default(), SILENT)
    found: dict[tuple[object, ...], tuple[Layer, ...]] = {}
    look = setup.Images.environment

    def environment(images: setup.Images, *, without: Iterable[str] = ()) -> tuple[Layer, ...]:
        places = showing.python_environment()
        real = [os.path.realpath(place) for place in places]
        hidden = [os.path.realpath(path) for path in without]
        hidden = [path for path in hidden if is_within(path, real) or any(is_within(place, [path]) for place in real)]
        asked = (images.cache.root, images.exclude, tuple(places), tuple(hidden))
        if asked not in found:
            found[asked] = look(images, without=without)
        return found[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.Images, "environment", environment)
        yield


@pytest.fixture(params=["namespace", pytest.param("microvm", marks=pytest.mark.once)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend in turn is what "auto" chooses."""
    name: str = request.param
    if name == "microvm":
        request.getfixturevalue("microvm_ready")
    others = [other for other in registry.PREFERRED if other != name]
    monkeypatch.setattr(registry, "PREFERRED", (name, *others))
    assert registry.choose(SandboxSpec()).name == name
    return name
