"""The command line: `isolation run`, `doctor`, `backends`, and what others bring: front ends (`isolation pytest`) by the
entry-point group `isolation.commands`, and backends (`isolation microvm`).

A front end's entry point is a function: it takes the words behind the command's name and returns the exit code; the first
line of its docstring is its help. It is loaded when its command, or the list of all, is asked for.

Exit codes of `run` are those of timeout(1) and `docker run`: the command's own; 128+signal; 124 when it took too long, 137
when it ran out of memory; 125 when the sandbox could not be made, 126 and 127 when the command could not be executed
or found.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

# The rest is imported by the command that needs it, so that --help and usage errors come at once.
from isolation.errors import CommandNotFound, IsolationError, SpecError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from isolation.result import Usage, Verdict
    from isolation.sandbox import Process, Sandbox
    from isolation.spec import SandboxSpec
    from isolation.terminal.relay import Relay

_FAILED: Final = 125
_NOT_EXECUTABLE: Final = 126
_NOT_FOUND: Final = 127
_CTRL_C: Final = 130
_COMMANDS: Final = ("run", "doctor", "backends")
_CAPTURED_AT_MOST: Final = 64 << 20  # bytes of each stream, for --json


class _Parser(argparse.ArgumentParser):
    """Usage errors end with 125, since 2 could be the command's own; an option is never guessed from its beginning."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**(kwargs | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(_FAILED, f"isolation: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    _take_standard_descriptors()
    try:
        words = sys.argv[1:] if argv is None else list(argv)
        code = _brought_along(words)
        if code is None:
            parser = _parser(listing=not words or words[0] in ("-h", "--help"))
            options = parser.parse_args(words)
            code = options.action(options)
        if sys.stdout is not None:  # the caller had closed it
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _CTRL_C
    except CommandNotFound as error:
        say(str(error))
        return _NOT_FOUND if error.missing else _NOT_EXECUTABLE
    except IsolationError as error:
        say(str(error))
        return _FAILED
    except BrokenPipeError:
        # Who read our output has gone (`isolation doctor | head -1`), and the flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13
    except OSError as error:
        say(str(error))
        return _FAILED


def _brought_along(words: Sequence[str]) -> int | None:
    """`isolation NAME …`, where NAME is a front end's command, or a backend that has commands; None for everything else."""
    if not words or words[0].startswith("-") or words[0] in _COMMANDS:
        return None
    found = _front_ends().get(words[0])
    if found is not None:
        command: Callable[[Sequence[str]], int] = _load(found)
        return command(words[1:])
    from isolation import registry

    backend = registry.backends().get(words[0])
    return None if backend is None else backend.main(words[1:])


def _front_ends() -> dict[str, EntryPoint]:
    """Those that are installed, by the names of their commands; none is loaded. As with modules, the first one counts."""
    import importlib.metadata

    found = importlib.metadata.entry_points(group="isolation.commands")
    return {entry_point.name: entry_point for entry_point in reversed(list(found))}


def _load(found: EntryPoint) -> Any:
    try:
        return found.load()
    except (ImportError, AttributeError) as error:
        raise IsolationError(f"the command '{found.name}' ({found.value}) cannot be loaded: {error}") from error


def _summary(found: EntryPoint) -> str:
    try:
        return (_load(found).__doc__ or "").strip().partition("\n")[0]
    except IsolationError as error:
        return str(error)


def _take_standard_descriptors() -> None:
    """Where the caller has closed one, the next file to be opened would become it."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one


def say(message: str) -> None:
    """One line on stderr, for every command. Control characters, which a path may hold, are not for the terminal."""
    line = " ".join(part.strip() for part in message.splitlines())
    text = "isolation: " + "".join(c if c.isprintable() else "?" for c in line) + "\n"
    try:
        os.write(2, text.encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # nobody listens


def _parser(*, listing: bool) -> argparse.ArgumentParser:
    """With `listing`, front ends' commands are in the list of all."""
    parser = _Parser(
        prog="isolation",
        description="Run commands in a fresh, sealed sandbox.",
        epilog="A backend may have commands of its own: 'isolation microvm --help' (set-up, status, clean).",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version, and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    doctor = commands.add_parser("doctor", help="tell what works on this machine, and what mends the rest")
    doctor.add_argument("--backend", metavar="NAME", help="only this one")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(action=_doctor)
    backends = commands.add_parser("backends", help="list the installed backends")
    backends.set_defaults(action=_backends)
    for name, found in sorted(_front_ends().items()) if listing else ():
        if name not in _COMMANDS:
            commands.add_parser(name, help=_summary(found).replace("%", "%%"), add_help=False)
    return parser


class _Version(argparse.Action):
    """Looked up when asked for: importlib.metadata takes longer than everything else here."""

    def __call__(self, parser: argparse.ArgumentParser, *_rest: object) -> None:
        import importlib.metadata

        print(f"isolation-kit {importlib.metadata.version('isolation-kit')}")
        parser.exit()


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="run a command in a sandbox",
        usage="isolation run [OPTION]… [--] COMMAND [ARGUMENT]…",
        description="Run a command in a fresh sandbox, which shows the current directory copy-on-write: the command can "
        "write there, and nothing of it stays.",
        epilog="Exit code: the command's; 128+signal; 124 after --timeout; 137 out of memory; 125 when the sandbox could "
        "not be made; 126 when the command cannot be executed; 127 when there is none of that name. "
        "SIZE is e.g. 512M, 1.5G; TIME is e.g. 500ms, 2s, 5min.",
    )
    add = run.add_argument
    add("--backend", metavar="NAME", default="auto", help="which one (default: the first that works here)")
    modes = "none: own loopback only (default); nat (microvm): outgoing only; host (namespace): no isolation at all"
    add("--network", metavar="MODE", default="none", help=modes)
    add("--memory", metavar="SIZE", help="of all its processes together")
    add("--pids", metavar="N", help="how many processes and threads it may have (default: 4096; none: any number)")
    add("--cpus", metavar="N", help="cores, e.g. 0.5")
    add("--disk", metavar="SIZE", help="how much it may write")
    add("--timeout", metavar="TIME", help="end it after this time")
    add("--env", metavar="NAME[=VALUE]", action="append", default=[], help="set a variable, or pass on your own")
    add(
        "--mount",
        metavar="SRC:DST[:MODE]",
        action="append",
        default=[],
        help="show SRC as DST; MODE is ro (default), rw (writes reach the host) or overlay (writes are discarded)",
    )
    add("--workdir", metavar="DIR", help="where it starts, inside (default: the current directory)")
    add("--nesting", action="store_true", help="let it make sandboxes itself (more kernel for an attacker)")
    add("--explain", action="store_true", help="print what would be made, and make nothing")
    add("--json", action="store_true", help="capture the output, and print one JSON object about it all")
    add("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="what to run; options after it are its own")
    run.set_defaults(action=_run)


def _run(options: argparse.Namespace) -> int:
    from isolation import registry
    from isolation.sandbox import Sandbox

    command: list[str] = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command and not options.explain:
        raise SpecError("no command to run (isolation run [OPTION]… [--] COMMAND [ARGUMENT]…)")
    spec = _spec(options)
    box = Sandbox(spec)
    if options.explain:
        print(box.backend.explain(spec))
        return 0

    for note in box.backend.notes(spec):
        say(note)
    if spec.backend == "auto" and box.backend.name != registry.PREFERRED[0]:
        say(f"note: this runs in {box.backend.describe()}; not in others ({'; '.join(registry.passed_over(spec))})")

    from isolation.terminal.relay import Interrupted, Relay

    # The sandbox first: what makes it is a fork of this process, and a copy there of the relay's pipes would keep the
    # command from ever seeing the end of its input.
    with box, Relay(_CAPTURED_AT_MOST if options.json else None) as relay:
        relay.watch_signals()
        stdin, stdout, stderr = relay.given
        process = box.popen(command, stdin=stdin, stdout=stdout, stderr=stderr, tty=relay.tty)
        try:
            verdict = relay.run(process, box.machine.fileno())
        except Interrupted as interrupted:
            return 128 + interrupted.signum
        usage = process.usage
        report = _report(box, process, verdict, usage, relay) if options.json else None
    # After the terminal was put back, or the line would start where the last one ended.
    code = verdict.shell_code
    for error in relay.errors():
        say(f"cannot pass on {error}")
        code = code or _FAILED
    say_why(verdict, spec)
    if report is not None:
        import json

        print(json.dumps(report))
    return code


def _spec(options: argparse.Namespace) -> SandboxSpec:
    from isolation import command_line
    from isolation.spec import PIDS, Limits, Mount, SandboxSpec
    from isolation.units import unless_none

    command_line.hide_values(options.env)
    mounts = [Mount.parse(text) for text in options.mount]
    try:
        cwd = os.getcwd()
    except FileNotFoundError:
        raise SpecError("the current directory does not exist any more; cd to one that does") from None
    if cwd != "/" and cwd not in (mount.target for mount in mounts):
        mounts.append(Mount.overlay(cwd))
        if not options.explain and is_home(cwd):
            say(f"note: all of your home directory {cwd} can be read inside (what is written is discarded)")
    return SandboxSpec(
        backend=options.backend,
        mounts=mounts,
        workdir=os.path.normpath(os.path.join(cwd, options.workdir)) if options.workdir else cwd,
        env=dict(variables(options.env)),
        network=options.network,
        limits=Limits(options.memory, unless_none(options.pids, PIDS), options.cpus, options.disk, options.timeout),
        nesting=options.nesting,
    )


def variables(texts: Iterable[str]) -> Iterable[tuple[str, str]]:
    for text in texts:
        name, given, value = text.partition("=")
        if given:
            yield name, value
        elif name in os.environ:
            yield name, os.environ[name]


def is_home(path: str) -> bool:
    homes = {os.path.expanduser("~")}
    try:
        import pwd

        homes.add(pwd.getpwuid(os.getuid()).pw_dir)
    except (ImportError, KeyError):
        pass  # a user without an entry, as containers have
    return os.path.realpath(path) in {os.path.realpath(home) for home in homes}


def say_why(verdict: Verdict, spec: SandboxSpec) -> None:
    """Ends that the command's exit code alone does not explain."""
    from isolation.result import Ended
    from isolation.units import format_size

    if verdict.ended is Ended.TIMED_OUT:
        say(f"timed out after {spec.limits.wall:g}s" if spec.limits.wall is not None else "timed out")
    elif verdict.ended is Ended.OUT_OF_MEMORY:
        limit = spec.limits.memory
        say("out of memory" + (f" (limit {format_size(limit)}; raise --memory)" if limit is not None else ""))
    elif verdict.ended in (Ended.KILLED, Ended.LOST):
        say(f"the sandbox was ended from outside ({verdict})")


def _report(box: Sandbox, process: Process, verdict: Verdict, usage: Usage, relay: Relay) -> dict[str, Any]:
    from isolation.hookspecs import CHANGES

    stdout, stderr = relay.captured
    changes = box.changes() if CHANGES in box.backend.features() else None
    return {
        "args": list(process.args),
        "returncode": verdict.returncode,
        "verdict": verdict.ended.value,
        "status": verdict.status,
        "wall": round(usage.wall, 6),
        "cpu": round(usage.cpu, 6),
        "memory_peak": usage.memory_peak,
        "stdout": stdout.data.decode("utf-8", "replace"),
        "stderr": stderr.data.decode("utf-8", "replace"),
        "truncated": stdout.truncated or stderr.truncated,
        "changes": None
        if changes is None
        else [{"path": c.path, "kind": c.kind, "type": c.type, "size": c.size} for c in changes],
        "backend": box.backend.name,
    }


def _doctor(options: argparse.Namespace) -> int:
    from isolation import doctor, registry

    backends = registry.backends() if options.backend is None else {options.backend: registry.get(options.backend)}
    probes = {name: backend.probe() for name, backend in backends.items()}
    if options.json:
        import json

        print(json.dumps(doctor.as_data(probes), indent=2))
    else:
        import shutil

        width = min(shutil.get_terminal_size((100, 24)).columns, 110)
        print(doctor.as_text(probes, color=_color(), width=width))
    return 0 if any(probe.works for probe in probes.values()) else 1


def _backends(_options: argparse.Namespace) -> int:
    from isolation import doctor, registry

    for name, backend in registry.backends().items():
        print(doctor.line(name, backend.probe(), color=_color()))
    return 0


def _color() -> bool:
    """For people only (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


if __name__ == "__main__":
    raise SystemExit(main())
