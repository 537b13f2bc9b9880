"""`isolation kernel …`: kernelspecs, and the pool of warm kernels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from isolation.errors import IsolationError, SpecError

_FAILED = 125
_DEFAULT_NAME = "isolation"


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**(kwargs | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(_FAILED, f"isolation: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str]) -> int:
    """a Jupyter kernel whose cells run in a sandbox: install, list, remove

    Returns the exit code. Raises what `isolation.cli.main` tells the user.
    """
    try:
        import jupyter_client  # noqa: F401
    except ImportError:
        raise IsolationError("kernels need ipykernel and jupyter_client: pip install 'isolation-kit[jupyter]'") from None
    options = _parser().parse_args(list(argv))
    code: int = options.action(options)
    return code


def _parser() -> _Parser:
    parser = _Parser(prog="isolation kernel", description="A Jupyter kernel whose cells run in a sandbox.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    install = commands.add_parser(
        "install",
        help="offer it to Jupyter, VS Code and all that read kernelspecs",
        description="Write a kernelspec. Every kernel that is started from it gets a fresh sandbox like this.",
    )
    _add_install(install)
    listing = commands.add_parser("list", help="list the installed ones")
    listing.set_defaults(action=_list)
    warm = commands.add_parser(
        "warm",
        help="keep some started, so that the next one is there at once",
        description="Start a process in the background that keeps kernels ready, with numpy, pandas and matplotlib "
        "imported where they are installed: for the kernels named (or all) in this directory, and what is asked for later.",
    )
    _add_warm(warm)
    remove = commands.add_parser("remove", help="remove one")
    remove.add_argument("name", metavar="NAME")
    remove.set_defaults(action=_remove)
    return parser


def _add_install(install: argparse.ArgumentParser) -> None:
    add = install.add_argument
    add("--name", default=_DEFAULT_NAME, help=f"what Jupyter calls it ({_DEFAULT_NAME})")
    add("--display-name", metavar="TEXT", help="what its menus show (Python (isolation))")
    add("--provisioner", action="store_true", help="let Jupyter use unix sockets instead of TCP ports; Jupyter must be "
        "installed in this same environment then")  # fmt: skip
    place = install.add_mutually_exclusive_group()
    place.add_argument("--user", action="store_true", help="for this user (the default)")
    place.add_argument("--sys-prefix", action="store_true", help="for this Python environment")
    place.add_argument("--prefix", metavar="DIR", help="below DIR/share/jupyter/kernels")
    add_sandbox_options(install)
    install.set_defaults(action=_install)


def _add_warm(warm: argparse.ArgumentParser) -> None:
    add = warm.add_argument
    add("names", metavar="NAME", nargs="*", help="which kernels")
    add("--count", metavar="N", default="1", help="how many of each (1)")
    add("--directory", metavar="DIR", help="for notebooks in this directory (the current one)")
    add("--idle", metavar="TIME", default="1h", help="end when nobody has asked for this long (1h)")
    add("--foreground", action="store_true", help="stay, until ^C")
    add("--status", action="store_true", help="tell what is ready")
    add("--stop", action="store_true", help="end it")
    warm.set_defaults(action=_warm)


def add_sandbox_options(parser: argparse.ArgumentParser) -> None:
    """Those of options.py, which checks them."""
    add = parser.add_argument_group("the sandbox").add_argument
    add("--backend", metavar="NAME", help="which one (default: the first that works)")
    add("--network", metavar="MODE", help="none: own loopback only (default); allow:NAME,…: these hosts by HTTP(S); "
        "nat (microvm); host (namespace): no isolation at all")  # fmt: skip
    add("--memory", metavar="SIZE", help="of all processes, e.g. 2G (default: four fifths of the machine; none: no limit)")
    add("--cpus", metavar="N", help="cores, e.g. 0.5")
    add("--pids", metavar="N", help="how many processes and threads it may have (default: 4096; none: any number)")
    add("--disk", metavar="SIZE", help="how much it may write")
    add("--timeout", metavar="TIME", help="end the kernel after this time, e.g. 8h")
    add("--cell-timeout", metavar="TIME", help="interrupt a cell after this time, e.g. 5min")
    add("--mount", metavar="SRC:DST[:MODE]", action="append", help="show SRC as DST: ro (default), rw or overlay")
    add("--env", metavar="NAME[=VALUE]", action="append", help="set a variable, or pass on the frontend's")
    add("--notebook", metavar="MODE", help="the notebook's directory: overlay (writable, and discarded; the default), ro, "
        "rw, or none")  # fmt: skip
    add("--export", metavar="DIR", help="where '%%isolation export' may put files")


_SANDBOX = (
    "backend", "network", "memory", "cpus", "pids", "disk", "timeout", "cell_timeout", "mount", "env", "notebook", "export",
)  # fmt: skip


def sandbox_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    given = ((name, getattr(options, name)) for name in _SANDBOX)
    return {name: value for name, value in given if value is not None}


def _install(options: argparse.Namespace) -> int:
    import os
    from dataclasses import replace

    from isolation import registry
    from isolation.hookspecs import FORK, PASS_FDS, SNAPSHOT
    from isolation_kernel import kernelspec
    from isolation_kernel.options import Options

    given = sandbox_options(options)
    if "export" in given:
        given["export"] = os.path.abspath(given["export"])
    wanted = kernelspec.absolute(Options.of(given))
    # Says now what would not work; and a kernel that knows its backend need not try which one does.
    backend = registry.choose(wanted.spec(None, {}), [FORK, SNAPSHOT] if wanted.in_machine else [PASS_FDS])
    backend.explain(wanted.spec(None, {}))
    wanted = replace(wanted, backend=backend.name)
    name = options.name
    shown = options.display_name or ("Python (isolation)" if name == _DEFAULT_NAME else f"Python ({name})")
    prefix = sys.prefix if options.sys_prefix else options.prefix
    user = prefix is None
    place = kernelspec.install(wanted, name, shown, user=user, prefix=prefix, provisioner=options.provisioner)
    print(f"installed {name}: {place}")
    return 0


def _list(_options: argparse.Namespace) -> int:
    from isolation_kernel import kernelspec

    found = kernelspec.installed()
    width = max((len(item.name) for item in found), default=0)
    for item in found:
        print(f"{item.name:{width}}  {' '.join(item.line.options.words()) or 'defaults'}  ({item.directory})")
    if not found:
        print("none installed; 'isolation kernel install' installs one")
    return 0


def _remove(options: argparse.Namespace) -> int:
    from isolation_kernel import kernelspec

    try:
        print(f"removed {options.name}: {kernelspec.remove(options.name)}")
    except PermissionError as error:
        raise SpecError(f"{error.filename} cannot be removed: {error.strerror}; whose is it?") from error
    return 0


def _warm(options: argparse.Namespace) -> int:
    from isolation_kernel.pool import commands

    if options.stop:
        return commands.stop()
    if options.status:
        return commands.status()
    return commands.start(options.names, options.count, options.directory, options.idle, foreground=options.foreground)
