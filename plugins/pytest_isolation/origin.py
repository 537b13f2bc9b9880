"""Whose a plug-in is: pytest's, the project's, or somebody else's."""

from __future__ import annotations

import types


def is_pytests_own(plugin: object) -> bool:
    """Part of pytest itself."""
    module = plugin.__name__ if isinstance(plugin, types.ModuleType) else type(plugin).__module__
    return module.startswith("_pytest.")


def is_conftest(plugin: object) -> bool:
    """One of the project's conftest files."""
    return isinstance(plugin, types.ModuleType) and (plugin.__file__ or "").endswith("/conftest.py")
