"""Which plug-ins there are, and whose each is: pytest's, the project's, or somebody else's."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest


def plugin_of(config: pytest.Config, module: str) -> Any:
    """A plug-in by its module, if it is in use, by whatever name; else None."""
    found = sys.modules.get(module)
    return found if found is not None and config.pluginmanager.is_registered(found) else None


def is_pytests_own(plugin: object) -> bool:
    """Part of pytest itself."""
    module = plugin.__name__ if isinstance(plugin, types.ModuleType) else type(plugin).__module__
    return module.startswith("_pytest.")


def is_conftest(plugin: object) -> bool:
    """One of the project's conftest files."""
    return isinstance(plugin, types.ModuleType) and (plugin.__file__ or "").endswith("/conftest.py")
