"""The configuration is trusted (SECURITY.md): it refuses to let these tests run anywhere but in a sandbox."""

import pytest


def pytest_sessionstart(session):
    config = session.config
    if not config.pluginmanager.hasplugin("isolation-controller") and not config.getoption("collectonly"):
        raise pytest.UsageError("this suite harms the machine it runs on: run it with --isolation")
