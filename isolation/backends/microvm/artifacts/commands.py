"""`isolation microvm …`: setup, status, clean."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from isolation.errors import BackendUnavailable, IsolationError

_FAILED = 125  # as `isolation run`: 2 could be a command's own
_CTRL_C = 130


class _Parser(argparse.ArgumentParser):
    """Usage errors end with 125; an option is never guessed from its beginning."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**(kwargs | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(_FAILED, f"isolation: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str]) -> int:
    """The entry point; `argv` is what follows `isolation microvm`. Returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        code: int = options.action(options)
        return code
    except KeyboardInterrupt:
        return _CTRL_C
    except IsolationError as error:
        _say(str(error))
        return _FAILED
    except OSError as error:
        _say(str(error))
        return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="isolation microvm", description="Fetch and build what the microvm backend starts machines with.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    setup = commands.add_parser(
        "setup",
        help="fetch a kernel, and make images of this system and of Python",
        description="Fetch a kernel, and make images of this system and of the running Python, in the user's cache. What is "
        "there already is kept. Needs no root.",
    )
    add = setup.add_argument
    add("--kernel", metavar="PATH", help="this kernel, instead of one fetched: a file, or 'host'; 'fetch' to go back")
    add("--modules", metavar="DIR", help="its /lib/modules/RELEASE (default: everything needed is built in)")
    add("--exclude", metavar="PATH", action="append", help="leave this out of the system's image; '' to forget earlier ones")
    add("--refresh", action="store_true", help="fetch and make everything again")
    add("--quiet", action="store_true", help="say nothing but errors")
    setup.set_defaults(action=_setup)
    status = commands.add_parser("status", help="tell what is there, how large, and whether it is of today")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(action=_status)
    clean = commands.add_parser("clean", help="remove images that the last setup does not need")
    clean.add_argument("--all", action="store_true", help="remove everything, settings included")
    clean.set_defaults(action=_clean)
    return parser


def _setup(options: argparse.Namespace) -> int:
    import os
    import time

    from isolation.backends.microvm.artifacts import setup
    from isolation.backends.microvm.artifacts.cache import Cache
    from isolation.backends.microvm.artifacts.progress import SILENT, Progress

    image: str | None = options.kernel
    modules: str | None = options.modules
    if image == "fetch":
        image, modules = "", ""
    elif image not in (None, "host"):
        image = os.path.abspath(image)
    if modules:
        if image is None:
            raise BackendUnavailable("--modules belongs to a --kernel: give both")
        modules = os.path.abspath(modules)
    exclude = None
    if options.exclude is not None:
        exclude = [os.path.abspath(path) for path in options.exclude if path]
    progress = SILENT if options.quiet else Progress.stderr()
    began = time.monotonic()
    try:
        images = setup.make(
            Cache.default(), progress, image=image, modules=modules, exclude=exclude, refresh=options.refresh
        )
    finally:
        progress.close()
    progress.note(f"microvm is set up ({time.monotonic() - began:.1f} s): kernel {images.kernel.release}")
    return 0


def _status(options: argparse.Namespace) -> int:
    from isolation.backends.microvm.artifacts import status
    from isolation.backends.microvm.artifacts.cache import Cache

    found = status.collect(Cache.default())
    if options.json:
        import json

        print(json.dumps(found, indent=2))
    else:
        print(status.as_text(found))
    return 0 if found["ready"] else 1


def _clean(options: argparse.Namespace) -> int:
    from isolation.backends.microvm.artifacts import status
    from isolation.backends.microvm.artifacts.cache import Cache
    from isolation.backends.microvm.artifacts.progress import megabytes

    freed, kept = status.clean(Cache.default(), everything=options.all)
    print(f"removed {megabytes(freed)}" + (f"; {kept} in use and kept" if kept else ""))
    return 0


def _say(message: str) -> None:
    """One line on stderr. Control characters, which a path may hold, are not for the terminal."""
    line = " ".join(part.strip() for part in message.splitlines())
    sys.stderr.write("isolation: " + "".join(c if c.isprintable() else "?" for c in line) + "\n")
