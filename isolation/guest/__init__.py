"""Everything that runs inside a sandbox. Standard library only; imports nothing of the host side."""

from isolation.guest.guest import Guest

__all__ = ["Guest"]
