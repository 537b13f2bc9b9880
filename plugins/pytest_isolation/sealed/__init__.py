"""`isolation pytest …`: a suite that is not trusted at all.

pytest runs a project's code long before any plug-in of its own could object: conftest.py, what ini options name, the
environment's .pth files and entry points. So no pytest is started here. All of it runs in a sandbox, and makes each test's
sandbox in there; out of it come the terminal and a few files.

    on the host                                 in the sandbox
    launch.py     makes it, relays the streams  inside.py    becomes pytest
      arguments.py    what is wanted
      interpreter.py  which Python, what to show of it
      screen.py       what may reach a terminal
    artefacts.py  checks and keeps files   <──  collect.py   reads and sends them
      places.py       where they are written

The two on the right are not believed: whoever runs in the sandbox may have taken their place. Nothing of the project is
imported, executed or parsed for orders on the left; no path is written that the command line did not name, but for
.pytest_cache and the default names of what it asked for.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """run pytest, all of it in a sandbox: for suites that are not trusted at all

    Returns the exit code. Raises what `isolation.cli.main` tells the user.
    """
    from pytest_isolation.sealed import launch  # a list of commands is to come at once

    return launch.main(argv)
