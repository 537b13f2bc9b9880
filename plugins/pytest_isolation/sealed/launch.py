"""On the host: makes the sandbox, starts pytest in it, relays its streams, and takes in what it leaves."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

import isolation
import pytest_isolation
from isolation import command_line
from isolation.cli import is_home, say, say_why, variables
from isolation.errors import SandboxClosed, SpecError
from isolation.paths import is_within
from isolation.sandbox import Sandbox
from isolation.spec import Limits, Mount, SandboxSpec
from isolation.terminal.relay import Interrupted, Relay
from isolation.units import parse_size
from pytest_isolation.sealed import arguments, artefacts, interpreter
from pytest_isolation.sealed.arguments import Kind, Request
from pytest_isolation.sealed.interpreter import Interpreter
from pytest_isolation.sealed.places import BadPlace, Places
from pytest_isolation.wire.screen import Screen

_FAILED: Final = 125
_SESSION_RAN: Final = (0, 1, 2, 5)  # of pytest's exit codes
_KIT: Final = "/run/isolation-kit"  # where the inside finds the packages of this distribution
_DISTRIBUTION: Final = "isolation-kit"
# How the user wants pytest to behave, and to look. Nothing among it names a place on the host that would be believed.
_PYTEST_READS: Final = (
    "BUILD_NUMBER", "CI", "PYTEST_ADDOPTS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTEST_PLUGINS", "PYTEST_THEME",
    "PYTEST_THEME_MODE", "PYTHONHASHSEED", "PYTHONWARNINGS", "PY_COLORS",
)  # fmt: skip
_INI_FILES: Final = ("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg")


def main(argv: Sequence[str]) -> int:
    """`isolation pytest`. Returns the exit code. Raises what `isolation.cli.main` tells the user."""
    try:
        cwd = os.getcwd()
    except FileNotFoundError:
        raise SpecError("the current directory does not exist any more; cd to one that does") from None
    request = arguments.parse(argv, cwd)
    command_line.hide_values(request.options.env)
    _look_around(request, cwd)
    virtual_env = os.environ.pop("VIRTUAL_ENV", None)  # what it names would be shown unseen
    python = interpreter.find(request.options.python, virtual_env, cwd)
    _check_places(request, cwd)
    with ExitStack() as stack:
        spec = _spec(request, python, cwd, virtual_env, stack)
        box = Sandbox(spec)
        if request.options.explain:
            print(box.backend.explain(spec))
            return 0
        for note in box.backend.notes(spec):
            say(note)
        # First of all the sandbox: what makes it is a fork of this process, and would keep whatever is open now.
        stack.enter_context(box)
        code = _run_pytest(box, request, python)
        places = stack.enter_context(Places(cwd))
        return _bring_out(box, request, python, places, code)


def _check_places(request: Request, cwd: str) -> None:
    """Better now than after the run."""
    with Places(cwd) as places:
        for artefact in request.artefacts:
            try:
                places.check(artefact.path)
            except (BadPlace, OSError) as error:
                raise SpecError(f"{artefact.option}: {error}") from None


def _run_pytest(box: Sandbox, request: Request, python: Interpreter) -> int:
    with Relay(screen=Screen()) as relay:
        relay.watch_signals()
        stdin, stdout, stderr = relay.given
        process = box.popen(_command(request, python), stdin=stdin, stdout=stdout, stderr=stderr, tty=relay.tty)
        try:
            verdict = relay.run(process, box.machine.fileno())
        except Interrupted as interrupted:
            raise SystemExit(128 + interrupted.signum) from None
    code = verdict.shell_code
    for error in relay.errors():
        say(f"cannot pass on {error}")
        code = code or _FAILED
    say_why(verdict, box.spec)
    return code


def _command(request: Request, python: Interpreter) -> list[str]:
    own = ["-p", "isolation"]  # even where plug-ins are not loaded by themselves
    if not request.mentions("--isolation"):
        own.append("--isolation=no" if request.debugs else "--isolation=namespace")
        if request.options.network != "none" and not request.mentions("--isolation-network"):
            own.append("--isolation-network=host")  # whose host is the sandbox, and its network what was allowed
    order = {"python": python.path, "kit": _KIT, "metadata": _metadata()}
    program = f"{_KIT}/pytest_isolation/sealed/inside.py"
    return [python.path, program, json.dumps(order), *own, *request.words]


def _metadata() -> dict[str, str]:
    found = importlib.metadata.distribution(_DISTRIBUTION)
    return {
        "METADATA": f"Metadata-Version: 2.1\nName: {_DISTRIBUTION}\nVersion: {found.version}\n",
        "entry_points.txt": found.read_text("entry_points.txt") or "",
    }


def _bring_out(box: Sandbox, request: Request, python: Interpreter, places: Places, code: int) -> int:
    limit = parse_size(request.options.export_limit, "export limit")
    wanted = sorted(request.artefacts, key=lambda artefact: artefact.kind is not Kind.FILE)  # the small ones first
    if code not in _SESSION_RAN:
        wanted = [replace(artefact, required=False) for artefact in wanted]  # that nothing was written goes without saying
    if not wanted:
        return code
    try:
        outcome = artefacts.bring_out(box, python.path, _KIT, wanted, places, limit, mirror_cache=request.clears_cache)
    except SandboxClosed:
        if code == 0:
            raise
        return code  # its end has been told already
    for message in (*outcome.failures, *outcome.notes):
        say(message)
    return code or (_FAILED if outcome.failures else 0)


def _spec(request: Request, python: Interpreter, cwd: str, virtual_env: str | None, stack: ExitStack) -> SandboxSpec:
    options = request.options
    mounts = [Mount.parse(text) for text in options.mount]
    taken = {mount.target for mount in mounts}
    for mount in _mounts(python, cwd):
        if mount.target not in taken:
            taken.add(mount.target)
            mounts.append(mount)
    env = {name: os.environ[name] for name in _PYTEST_READS if name in os.environ}
    if virtual_env is not None:
        env["VIRTUAL_ENV"] = virtual_env
    env.update(variables(options.env))
    for directory in dict.fromkeys(_unseen(request, cwd, taken)):
        # Where pytest is to write a file, there must be a directory. The host's own is nobody's business inside.
        mounts.append(Mount.overlay(stack.enter_context(tempfile.TemporaryDirectory(prefix="isolation-")), directory))
    return SandboxSpec(
        backend=options.backend,
        mounts=mounts,
        workdir=cwd,
        env=env,
        network=options.network,
        limits=Limits(options.memory, options.pids, options.cpus, options.disk, options.timeout),
        nesting=True,
    )


def _mounts(python: Interpreter, cwd: str) -> Iterator[Mount]:
    yield Mount.overlay(cwd)
    for module in (isolation, pytest_isolation):
        (directory,) = module.__path__
        yield Mount(directory, f"{_KIT}/{module.__name__}")
    for source, target in python.shown:
        yield Mount(source, target)


def _unseen(request: Request, cwd: str, taken: set[str]) -> Iterator[str]:
    """Directories of what is to come out that are not there inside, and cannot be made there."""
    there = [*taken, "/tmp", "/var/tmp", os.path.normpath(os.environ.get("HOME", "/tmp"))]
    for artefact in request.artefacts:
        directory = os.path.dirname(artefact.path)
        if not is_within(directory, there):
            if any(is_within(place, [directory]) for place in there) or not _is_own(directory):
                raise SpecError(
                    f"{artefact.option}: {artefact.path} cannot be written inside, where {directory} is the system's; "
                    "name a place in a directory of yours"
                )
            yield directory


def _is_own(directory: str) -> bool:
    from isolation.backends.showing import SYSTEM

    return directory.split("/")[1] not in (*SYSTEM, "", "dev", "proc", "sys", "run", "boot")


def _look_around(request: Request, cwd: str) -> None:
    """Refuses what defeats the purpose, and tells what a user may not expect."""
    if cwd == "/" or is_home(cwd) or os.path.expanduser("~").startswith(os.path.join(cwd, "")):
        raise SpecError(f"the suite would see all of {cwd}; cd to the directory of the project")
    _look_at_import_path(cwd)
    if request.debugs:
        say("note: with a debugger, all tests share one sandbox")
    for word in request.words:
        path = os.path.normpath(os.path.join(cwd, word.split("::")[0]))
        is_path = not word.startswith("-") and ("/" in word or word == "..") and os.path.exists(path)
        if is_path and not is_within(path, [cwd]):
            say(f"note: {word} is not seen inside; start in a directory above it, or say --mount {path}:overlay")
    above = cwd
    while above != "/" and not is_home(above):
        found = [name for name in _INI_FILES if os.path.exists(os.path.join(above, name))]
        if found and above != cwd:
            say(f"note: {os.path.join(above, found[0])} is not seen inside; start there if it is this suite's")
        if found:
            return
        above = os.path.dirname(above)


def _look_at_import_path(cwd: str) -> None:
    for entry in sys.path:
        if not is_within(os.path.realpath(entry or cwd), [cwd]):
            continue
        if not is_within(os.path.realpath(entry or cwd), [os.path.realpath(sys.prefix)]):
            # Not only modules: an entry point in a `*.egg-info` there would have been one of a backend.
            raise SpecError(
                f"this Python imports from {entry or cwd}, which is the project's, and may have run its code already; start "
                "it as 'python -I -m isolation pytest', from an environment in which the project is not installed"
            )
        say(
            f"note: {sys.prefix} is in the project, and this program runs from it, outside of any sandbox; run it from an "
            "environment of its own (pipx install isolation-kit), and name the project's by --python"
        )
        return
