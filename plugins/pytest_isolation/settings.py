"""From options, ini and markers to the spec of one test's sandbox."""

from __future__ import annotations

import pwd
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from isolation.errors import SpecError
from isolation.paths import is_within
from isolation.plain import os
from isolation.spec import Limits, Mount, SandboxSpec
from pytest_isolation.host import repository
from pytest_isolation.report import page
from pytest_isolation.wire.tmp_paths import TmpPaths

GRAINS = ("function", "class", "module")
_JOBS_AT_MOST = 256
_DEFAULT_PIDS = "1024"
_KEYS = ("enabled", "backend", "network", "memory", "pids", "timeout")


@dataclass(frozen=True)
class RunSettings:
    """What holds for the whole run.

    jobs    sandboxes at a time
    grain   what gets one: "function", "class" or "module"
    share   names of fixtures that are set up once, whatever they leave behind
    strict  whether a test that leaves changes or processes behind fails
    report  file to write a report of all tests into
    wants_details, names_details  whether to find out what tests do, and to say it in `user_properties`
    """

    jobs: int
    grain: str
    share: frozenset[str]
    strict: bool
    report: str | None
    wants_details: bool
    names_details: bool

    @classmethod
    def of(cls, config: pytest.Config) -> RunSettings:
        """From options and ini. Raises SpecError."""
        grain = config.getoption("isolation_per") or config.getini("isolation_per") or "function"
        if grain not in GRAINS:
            raise SpecError(f"isolation_per is one of {', '.join(GRAINS)}, not {grain!r}")
        report = config.getoption("isolation_report")
        if report is not None:
            try:
                page.check(report)
            except ValueError as error:
                raise SpecError(f"--isolation-report: {error}") from None
        strict = bool(config.getoption("isolation_strict")) or config.getini("isolation_strict") is True
        junit = bool(getattr(config.option, "xmlpath", None))
        # A test case has no properties in that family's schema: who validates would refuse the file.
        names = not junit or config.getini("junit_family") != "xunit2"
        wants = strict or report is not None or (junit and names)
        jobs = _jobs(config.getoption("isolation_jobs") or config.getini("isolation_jobs") or "1")
        return cls(jobs, grain, frozenset(config.getini("isolation_share")), strict, report, wants, names)


def _jobs(text: str) -> int:
    if text == "auto":
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or not 1 <= int(text) <= _JOBS_AT_MOST:
        raise SpecError(f"isolation_jobs is a number from 1 to {_JOBS_AT_MOST}, or 'auto', not {text!r}")
    return int(text)


@dataclass(frozen=True)
class Settings:
    """How one test is isolated; equal settings share a template."""

    enabled: bool
    spec: SandboxSpec


class Reader:
    """Reads the run's settings once, and each test's marker."""

    def __init__(self, config: pytest.Config, backend: str) -> None:
        self.run = RunSettings.of(config)
        self._run: dict[str, Any] = {"enabled": True, "backend": backend}
        for key in ("network", "memory", "pids", "timeout"):
            self._run[key] = config.getoption(f"isolation_{key}") or config.getini(f"isolation_{key}") or None
        mounts = [*config.getini("isolation_mount"), *config.getoption("isolation_mount")]
        project = _project_mounts(config)
        self._project = [mount.source for mount in project]
        self._mounts = tuple(project) + tuple(Mount.parse(text) for text in mounts)
        self._more: tuple[Mount, ...] = ()
        self._env: dict[str, str] = {}
        self._workdir = os.getcwd()
        self._known: dict[tuple[Any, ...], Settings] = {}
        self.default = self._settings(self._run)

    def show_repository(self) -> None:
        """What git needs of the project, where it lies elsewhere."""
        found = [path for project in self._project for path in repository.beside(project)]
        found = [path for path in dict.fromkeys(found) if not is_within(os.path.realpath(path), self.shown)]
        if any(is_within(os.path.realpath(project), [os.path.dirname(path)]) for project in self._project for path in found):
            # Git looks for one above a directory in the same file system only; inside, each that is shown is another.
            self._env = {"GIT_DISCOVERY_ACROSS_FILESYSTEM": "1"}
        self.show(Mount.overlay(path) for path in found)

    @property
    def shown(self) -> list[str]:
        """Directories of the host that tests see at the same path, and can write to."""
        mounts = (*self._mounts, *self._more)
        return [mount.source for mount in mounts if mount.mode != "ro" and mount.source == mount.target]

    @property
    def places(self) -> list[str]:
        """All directories and files of the host that tests see at the same path."""
        return [mount.source for mount in (*self._mounts, *self._more) if mount.source == mount.target]

    def show(self, mounts: Iterable[Mount]) -> None:
        """Let every test see these, too; but not those that run in a machine, to which all would have to be copied."""
        targets = {mount.target for mount in (*self._mounts, *self._more)}
        self._more += tuple(mount for mount in mounts if mount.target not in targets)
        self._known.clear()
        self.default = self._settings(self._run)

    def of_item(self, item: pytest.Item) -> Settings:
        """The settings of one test. Raises SpecError, naming the test."""
        values = dict(self._run)
        markers = list(item.iter_markers("isolation"))
        if not markers:
            return self.default
        for marker in reversed(markers):  # the closest one last, so that it wins
            unknown = set(marker.kwargs) - set(_KEYS)
            if marker.args or unknown:
                what = ", ".join(sorted(unknown)) or "arguments without a name"
                raise SpecError(f"{item.nodeid}: the isolation marker does not take {what}; it takes {', '.join(_KEYS)}")
            values.update(marker.kwargs)
        try:
            return self._settings(values)
        except SpecError as error:
            raise SpecError(f"{item.nodeid}: isolation marker: {error}") from None

    def _settings(self, values: dict[str, Any]) -> Settings:
        key = tuple(values[name] for name in _KEYS)
        if key not in self._known:
            limits = Limits(memory=values["memory"], pids=values["pids"] or _DEFAULT_PIDS, wall=values["timeout"])
            spec = SandboxSpec(
                backend=values["backend"] or "auto",
                mounts=self._mounts + (self._more if values["backend"] == self._run["backend"] else ()),
                workdir=self._workdir,
                env=self._env,
                inherit_env=True,  # tests are written against the environment of whoever runs them
                network=values["network"] or "none",
                limits=limits,
            )
            self._known[key] = Settings(bool(values["enabled"]), spec)
        return self._known[key]


def _directory_of_homes() -> str:
    """Where the user's own is, by the system's word: $HOME may be anywhere, in the project, too."""
    try:
        home: str = pwd.getpwuid(os.getuid()).pw_dir
        return os.path.dirname(home)
    except KeyError:
        return "/home"  # a user without an entry, as containers have


def _project_mounts(config: pytest.Config) -> list[Mount]:
    """The project, copy-on-write: rootdir, the current directory, and what was named on the command line."""
    wanted = [str(config.rootpath), os.getcwd()]
    given = config.getoption("basetemp", None)
    if given is not None:
        TmpPaths(config, ()).make_base()  # it is there then, and empty, as it is in plain pytest
        wanted.append(os.path.abspath(given))
    for argument in config.args:
        path = os.path.abspath(argument.split("::")[0])
        if os.path.exists(path):
            wanted.append(path if os.path.isdir(path) else os.path.dirname(path))
    homes = _directory_of_homes()
    chosen: list[str] = []
    for path in sorted(dict.fromkeys(map(os.path.realpath, wanted)), key=len):
        # `/` or the directory of all homes is nobody's project; a rootdir there means that none was found.
        if not is_within(path, chosen) and path not in ("/", "/home", "/tmp", homes):
            chosen.append(path)
    return [Mount.overlay(path) for path in chosen]
