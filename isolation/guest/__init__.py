"""What a payload in a sandbox talks to its host with, whatever the backend. Standard library only."""

from isolation.guest.guest import Guest

__all__ = ["Guest"]
