"""What pytest loads in every run: options, the marker, and nothing more unless isolation is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from isolation import Sandbox

_MARKER = (
    "isolation(enabled=True, backend=None, network=None, memory=None, pids=None, timeout=None): how this test is "
    "isolated; enabled=False runs it in pytest's own process."
)


class Hooks:
    """For other plug-ins."""

    @staticmethod
    def pytest_isolation_keeps(config: pytest.Config) -> str | list[str] | None:
        """What a plug-in keeps in the process of a test, and so loses where that is a sandbox; said before the first test:

        "my-plugin keeps its figures in the test's process"
        """


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("isolation", "isolation: every test in its own fresh, sealed sandbox")
    group.addoption(
        "--isolation",
        nargs="?",
        const="auto",
        metavar="BACKEND",
        help="run every test in its own sandbox; the backend (auto, namespace, …) goes behind '='; 'no' turns it off",
    )
    settings = {
        "network": ("none|host", "what a test's network reaches: 'none' (own loopback, the default) or 'host'"),
        "memory": ("SIZE", "memory limit of a test and its processes, such as 512M"),
        "pids": ("N", "how many processes and threads a test may have at once (default: 1024)"),
        "timeout": ("TIME", "wall-clock limit of a test, such as 30s; the stacks of its threads are shown"),
    }
    parser.addini("isolation", "the backend to run every test in its own sandbox with, or 'auto', or 'no'", default="")
    for name, (metavar, text) in settings.items():
        group.addoption(f"--isolation-{name}", metavar=metavar, help=text)
        parser.addini(f"isolation_{name}", text, default="")
    text = "how many sandboxes run at a time: a number, or 'auto' for one per processor (default: 1)"
    group.addoption("--isolation-jobs", metavar="N", help=text)
    parser.addini("isolation_jobs", text, default="")
    text = "what gets a sandbox of its own: each function (default), class or module"
    group.addoption("--isolation-per", metavar="function|class|module", help=text)
    parser.addini("isolation_per", text, default="")
    text = "fail a test that leaves changed files (outside of tmp_path) or running processes behind"
    group.addoption("--isolation-strict", action="store_true", default=False, help=text)
    parser.addini("isolation_strict", text, type="bool", default=False)
    text = "write a page (.html) or data (.json) on what every test did"
    group.addoption("--isolation-report", metavar="FILE", help=text)
    text = "fixtures that are set up once although they leave threads, processes or sockets behind, which forks do not have"
    parser.addini("isolation_share", text, type="args", default=[])
    text = "show a path of the host inside: SRC[:DST][:ro|rw|overlay]; may be given several times"
    group.addoption("--isolation-mount", metavar="SRC:DST[:rw]", action="append", default=[], help=text)
    parser.addini("isolation_mount", text, type="linelist", default=[])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, None, None]:
    """`pytest --isolation tests/`: the value is optional, and argparse would take the path for it."""
    if "--isolation" in args:
        args[:] = ["--isolation=auto" if word == "--isolation" else word for word in args]
        before = early_config.known_args_namespace
        known = parser.parse_known_args(args, namespace=copy.copy(early_config.option))
        if getattr(known, "confcutdir", None) is None:  # pytest has found out: else conftest files above would be loaded
            known.confcutdir = getattr(before, "confcutdir", None)
        early_config.known_args_namespace = known
    if not _is_wanted(_backend(early_config, early_config.known_args_namespace.isolation)):
        return (yield)
    import isolation.plain  # noqa: F401 before the project, whose imports may replace it
    from pytest_isolation.host.temporaries import Temporaries, temporaries
    from pytest_isolation.inside.unforkable import Held, initially

    early_config.stash[temporaries] = made = Temporaries()
    early_config.add_cleanup(made.stop)
    held = Held.now(own=True)
    try:
        return (yield)
    finally:
        early_config.stash[initially] = held, Held.now(held, own=True)


def _backend(config: pytest.Config, option: str | None) -> str:
    """What the command line says, or the configuration file."""
    return str(config.getini("isolation") if option is None else option)


def _is_wanted(backend: str) -> bool:
    return backend not in ("", "no", "off", "false", "0")


def wanted_backend(config: pytest.Config) -> str:
    """What tests are to be isolated with; "" for not at all."""
    named = _backend(config, config.getoption("isolation"))
    return named if _is_wanted(named) else ""


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)
    wanted = wanted_backend(config)
    worker = config.pluginmanager.hasplugin("isolation-controller")  # this is the pytest in the sandbox
    if wanted and not worker and not config.getoption("collectonly", False):
        from pytest_isolation.host.controller import Controller

        config.pluginmanager.register(Controller(config, wanted), "isolation-controller")


@pytest.fixture(scope="session")
def record_testsuite_property(
    record_testsuite_property: Callable[[str, object], None], request: pytest.FixtureRequest
) -> Callable[[str, object], None]:
    """pytest's own, which inside of a sandbox would write into a junit file that nobody reads."""
    worker = request.config.pluginmanager.getplugin("isolation-worker")
    if worker is None:
        return record_testsuite_property

    def record(name: str, value: object) -> None:
        record_testsuite_property(name, value)
        worker.record_suite_property(name, value)

    return record


@pytest.fixture
def record_xml_attribute(
    record_xml_attribute: Callable[[str, object], None], request: pytest.FixtureRequest
) -> Callable[[str, object], None]:
    """pytest's own, likewise."""
    worker = request.config.pluginmanager.getplugin("isolation-worker")
    return record_xml_attribute if worker is None else worker.record_xml_attribute


@pytest.fixture
def sandbox(request: pytest.FixtureRequest) -> Generator[Sandbox, None, None]:
    """A fresh `isolation.Sandbox` for the test to run commands in, with the project copy-on-write at its place."""
    from pytest_isolation.fixture import make_sandbox

    box: Any
    with make_sandbox(request) as box:
        yield box
