"""Each run of pytest in these tests loads the plug-ins that it names, and no others that are installed here; none is told that
it is one of a CI, where pytest and Hypothesis do other things."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_isolation.plugin")
    for name in ("CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)
