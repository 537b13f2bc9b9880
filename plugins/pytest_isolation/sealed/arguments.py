"""The command line of `isolation pytest`: its own options, and the files that pytest's options ask for.

pytest's words are only looked at, and reach it as they were given. Nothing else (an ini file, `addopts`, an `@file`, the
environment) can ask for a file.
"""

from __future__ import annotations

import argparse
import enum
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from isolation.errors import SpecError

_DESCRIPTION: Final = """\
Run pytest on a suite that is not trusted at all: pytest itself, its configuration, plug-ins and conftest files run in a
sandbox, and every test in a sandbox within it. The current directory is there, copy-on-write; nothing else of yours.
All other arguments are pytest's; those after '--' are, whatever they look like.
"""
_EPILOG: Final = """\
What comes out: the terminal; .pytest_cache (not with -p no:cacheprovider); the files that --junitxml, --log-file,
--report-log, --isolation-report, --cov (.coverage) and --cov-report ask for on this command line, in no other place than is
named here; and what --export names. Regular files only, never executable, never through a symbolic link, of limited size.
What a project's ini file asks for stays inside. In a directory that comes out, what a later run would execute (*.py, *.pyc,
*.pth, *.so, ini files, …) stays inside, too. What comes out is data by somebody you do not trust: an HTML report may hold a
script, a coverage database any lines.

The limits are of the whole run; --isolation-memory, --isolation-pids and --isolation-timeout, which are pytest's, of one
test. With --pdb and --trace all tests share one sandbox.

What is not covered: the code that Python runs before this program starts. Start it from an environment that is yours (pipx
install isolation-kit), or as 'python -I -m isolation pytest'; without -I, 'python -m' imports from the current directory
first. An environment that belongs to the project is for --python: it is looked at, and never executed, on the host.

Exit code: pytest's. 125 when the sandbox could not be made, or when something that was asked for could not be brought out
though pytest was content; 124 after --timeout; 137 out of memory; 128+signal. SIZE is e.g. 512M, 1.5G; TIME e.g. 2s, 5min.
"""

_ONE_FILE: Final = ("--junitxml", "--junit-xml", "--log-file", "--report-log", "--isolation-report")
_COVERAGE_REPORTS: Final = {  # type: what it is called where nobody names a place
    "html": "htmlcov",
    "xml": "coverage.xml",
    "json": "coverage.json",
    "lcov": "coverage.lcov",
    "markdown": "",
    "markdown-append": "",
    "annotate": "",
}
_TREES: Final = ("html", "annotate")
_DEBUGGERS: Final = ("--pdb", "--trace")


class Kind(enum.Enum):
    """What an artefact may be."""

    FILE = enum.auto()
    TREE = enum.auto()
    EITHER = enum.auto()
    CACHE = enum.auto()


@dataclass(frozen=True)
class Artefact:
    """A file or directory that is to come out: the same path inside and on the host, absolute.

    option    what asked for it, for messages
    required  it is a failure when there is none
    """

    path: str
    kind: Kind
    option: str
    required: bool = False


@dataclass(frozen=True)
class Request:
    """What the user wants. `words` are pytest's."""

    options: argparse.Namespace
    words: tuple[str, ...]
    artefacts: tuple[Artefact, ...]
    debugs: bool
    clears_cache: bool

    def mentions(self, option: str) -> bool:
        """Whether pytest's words have `option`, with or without a value."""
        return any(word == option or word.startswith(option + "=") for word in self.words)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{message} (see 'isolation pytest --help')")


def _parser() -> _Parser:
    parser = _Parser(
        prog="isolation pytest",
        usage="isolation pytest [OPTION]… [--] [ARGUMENT OF PYTEST]…",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--python", metavar="PATH", help="the interpreter inside (default: of $VIRTUAL_ENV, or else this one)")
    add("--export", metavar="PATH", action="append", default=[], help="bring this file or directory out, to its own place")
    add("--export-limit", metavar="SIZE", default="1G", help="of all that comes out (default: 1G)")
    add("--backend", metavar="NAME", default="auto", help="of the sandbox around it all (default: what works here)")
    add("--network", metavar="MODE", default="none", help="what the suite reaches: none (default) or what 'run' knows")
    add("--memory", metavar="SIZE", help="of all processes together")
    add("--pids", metavar="N", default="4096", help="how many processes and threads (default: 4096)")
    add("--cpus", metavar="N", help="cores, e.g. 0.5")
    add("--disk", metavar="SIZE", help="how much it may write")
    add("--timeout", metavar="TIME", help="end it after this time, and bring nothing out")
    add("--env", metavar="NAME[=VALUE]", action="append", default=[], help="set a variable, or pass on your own")
    add("--mount", metavar="SRC:DST[:MODE]", action="append", default=[], help="show SRC as DST (ro, rw or overlay)")
    add("--explain", action="store_true", help="print what would be made, and make nothing")
    return parser


def parse(argv: Sequence[str], cwd: str) -> Request:
    """From the words of the user, who is in `cwd`. Raises SpecError; SystemExit for --help."""
    parser = _parser()
    flags = {name: action.nargs != 0 for action in parser._actions for name in action.option_strings}
    own, words = _divide(argv, flags)
    options = parser.parse_args(own)
    words, artefacts = _artefacts(words, cwd)
    artefacts += [_exported(path, cwd) for path in options.export]
    # The last one to ask for a place decides: --export=.coverage says more than --cov does.
    return Request(
        options,
        tuple(words),
        tuple({artefact.path: artefact for artefact in artefacts}.values()),
        debugs=any(word in _DEBUGGERS for word in words),
        clears_cache="--cache-clear" in words,
    )


def _divide(argv: Sequence[str], flags: dict[str, bool]) -> tuple[list[str], list[str]]:
    """Ours and pytest's. `flags` tells of each of our options whether it has a value."""
    own: list[str] = []
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--":
            words += rest
        elif word.partition("=")[0] in flags and word.startswith("-"):
            own.append(word)
            if flags[word.partition("=")[0]] and "=" not in word:
                value = next(rest, None)
                own += [] if value is None else [value]
        else:
            words.append(word)
    return own, words


def _artefacts(words: Sequence[str], cwd: str) -> tuple[list[str], list[Artefact]]:
    """Pytest's words, and what they ask for."""
    kept: list[str] = []
    found: list[Artefact] = []
    for option, value, given in _pairs(words):
        kept += given
        if option in _ONE_FILE and value:
            if option.startswith("--junit"):
                # pytest would do this inside, where these variables are not known.
                value = os.path.expanduser(os.path.expandvars(value))
                kept[-1] = f"{option}={value}" if len(given) == 1 else value
            found.append(Artefact(_absolute(value, cwd), Kind.FILE, option, required=True))
        elif option == "--cov-report":
            kind, _, place = value.partition(":")
            place = place or _COVERAGE_REPORTS.get(kind, "")
            if kind in _COVERAGE_REPORTS and place:
                what = Kind.TREE if kind in _TREES else Kind.FILE
                found.append(Artefact(_absolute(place, cwd), what, f"{option}={kind}"))
    if any(word == "--cov" or word.startswith("--cov=") for word in words) and "--no-cov" not in words:
        found.append(Artefact(_absolute(".coverage", cwd), Kind.FILE, "--cov"))
    if "no:cacheprovider" not in words and "-pno:cacheprovider" not in words:
        found += [Artefact(os.path.join(root, ".pytest_cache"), Kind.CACHE, "the cache") for root in _roots(words, cwd)]
    return kept, found


def _roots(words: Sequence[str], cwd: str) -> list[str]:
    """What pytest may take for its rootdir: the directory that holds all that is named, and those above it up to `cwd`."""
    named = [_absolute(word.split("::")[0], cwd) for word in words if not word.startswith("-")]
    named = [path for path in named if os.path.exists(path) and path.startswith(os.path.join(cwd, ""))]
    root = os.path.commonpath(named) if named else cwd
    found = [] if os.path.isfile(root) else [root]
    while found[-1:] != [cwd]:
        root = os.path.dirname(root)
        found.append(root)
    return found[::-1]


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(option, value, the words of both); positional words are options without a value here."""
    rest = iter(words)
    for word in rest:
        option, given, value = word.partition("=")
        if word == "--":
            yield word, "", [word, *rest]
        elif option not in (*_ONE_FILE, "--cov-report") or given:
            yield option, value, [word]
        else:
            following = list(_first(rest))
            yield option, "".join(following), [word, *following]


def _first(words: Iterator[str]) -> Iterator[str]:
    for word in words:
        yield word
        return


def _exported(path: str, cwd: str) -> Artefact:
    absolute = _absolute(path, cwd)
    if not path or absolute == cwd or cwd.startswith(os.path.join(absolute, "")):
        raise SpecError(f"--export {path!r}: name what is to come out, not all of the current directory")
    return Artefact(absolute, Kind.EITHER, "--export", required=True)


def _absolute(path: str, cwd: str) -> str:
    if "\0" in path:
        raise SpecError(f"a path cannot hold a NUL character: {path!r}")
    return os.path.normpath(os.path.join(cwd, path))
