"""What this process has not yet written."""

from __future__ import annotations

import sys

import pytest


def flush(config: pytest.Config) -> None:
    """Before a fork, or every fork writes it again; and before a message, which it belongs before."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    writer = [] if reporter is None else [config.get_terminal_writer()]
    for stream in (*writer, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()  # type: ignore[union-attr]
        except (OSError, ValueError, AttributeError):
            continue
