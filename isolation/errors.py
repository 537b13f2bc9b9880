"""One tree of exceptions. Every message says what happened and what to do about it."""

from __future__ import annotations


class IsolationError(Exception):
    """Base of everything that this package raises on purpose."""


class SpecError(IsolationError, ValueError):
    """A spec asks for something that makes no sense; the message says what is allowed."""


class UnknownBackend(IsolationError, LookupError):
    """No backend of that name is installed; the message lists those that are."""


class BackendUnavailable(IsolationError):
    """A backend cannot work on this machine; the message names the setting or package that mends it."""


class FeatureMissing(IsolationError):
    """A backend cannot do, or cannot enforce here, what the spec asks for. Nothing is silently ignored."""


class LaunchError(IsolationError):
    """A sandbox could not be made. Nothing of it is left behind."""


class CommandNotFound(LaunchError):
    """The command to run does not exist inside the sandbox, or (`missing` is False) cannot be executed there."""

    missing = True


class SandboxClosed(IsolationError):
    """The sandbox has ended (closed, killed, out of memory, …), and can do nothing more."""


class GuestError(IsolationError):
    """An operation inside the sandbox failed, as the guest's kernel reported it."""


class WireError(IsolationError):
    """The other end sent something malformed or too large, or went away in the middle of a message."""
