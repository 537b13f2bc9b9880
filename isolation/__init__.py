"""Isolated execution: sandboxes that can be forked while they are warm.

PYTEST_DONT_REWRITE: in a virtual machine this package is imported before pytest is, which would warn that it comes too
late to rewrite assertions, of which there are none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isolation.errors import (
        BackendUnavailable,
        CommandNotFound,
        FeatureMissing,
        GuestError,
        IsolationError,
        LaunchError,
        SandboxClosed,
        SpecError,
        UnknownBackend,
        WireError,
    )
    from isolation.hookspecs import Backend, Machine, Probe, hookimpl
    from isolation.result import Change, Completed, Ended, Usage, Verdict
    from isolation.sandbox import PIPE, Process, Sandbox
    from isolation.spec import Limits, Mount, Network, SandboxSpec
    from isolation.template import Fork, Template

_HOME = {
    "errors": "BackendUnavailable CommandNotFound FeatureMissing GuestError IsolationError LaunchError SandboxClosed "
    "SpecError UnknownBackend WireError",
    "hookspecs": "Backend Machine Probe hookimpl",
    "result": "Change Completed Ended Usage Verdict",
    "sandbox": "PIPE Process Sandbox",
    "spec": "Limits Mount Network SandboxSpec",
    "template": "Fork Template",
}
_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "PIPE", "Backend", "BackendUnavailable", "Change", "CommandNotFound", "Completed", "Ended", "FeatureMissing", "Fork",
    "GuestError", "IsolationError", "LaunchError", "Limits", "Machine", "Mount", "Network", "Probe", "Process",
    "Sandbox", "SandboxClosed", "SandboxSpec", "SpecError", "Template", "UnknownBackend", "Usage", "Verdict",
    "WireError", "hookimpl",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Names are imported when first used (PEP 562): pytest loads this package in every run, isolated or not."""
    if name in _MODULE:
        import importlib

        return getattr(importlib.import_module(f"isolation.{_MODULE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
