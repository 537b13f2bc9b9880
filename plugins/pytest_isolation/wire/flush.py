"""What this process has not yet written."""

from __future__ import annotations

import contextlib

import pytest

from isolation.guest import streams


def flush(config: pytest.Config) -> None:
    """Before a fork, or every fork writes it again; and before a message, which it belongs before."""
    if config.pluginmanager.hasplugin("terminalreporter"):
        with contextlib.suppress(OSError, ValueError):
            config.get_terminal_writer().flush()
    streams.flush()
