"""The guest's view of its host: a wire for messages, and jobs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from isolation.errors import WireError
from isolation.guest import streams
from isolation.wire import Message, Wire


class Guest:
    """What a template's function, or a fork of it, talks to its host with.

    config  what the host gave with the template (JSON)
    wire    the messages of this fork; the host sends the job first
    """

    def __init__(
        self, wire: Wire, config: Any = None, fork: Callable[[Guest], Iterator[Guest]] | None = None
    ) -> None:
        self.wire = wire
        self.config = config
        self._fork = fork
        self._jobs: list[Any] = []

    def send(self, message: Message, data: bytes = b"") -> None:
        """Send one message to the host. Raises WireError when it is too large, or the host is gone."""
        self.wire.send(message, data)

    def receive(self) -> Message | None:
        """The host's next message; None when it has nothing more to say."""
        return self.wire.receive()

    def hand(self, job: Any) -> None:
        """For a backend: the job came in another way than by the wire."""
        self._jobs = [job]

    def job(self) -> Any:
        """Wait for this fork's job. Ends the process quietly when the host has none after all."""
        if self._jobs:
            return self._jobs.pop()
        try:
            message = self.receive()
        except WireError:
            message = None
        if message is None or "job" not in message:
            os._exit(0)
        return message["job"]

    def forks(self) -> Iterator[Any]:
        """Become a template: yields, in a fresh sandbox each time, that fork's job.

        In the template itself it returns once the host needs no more forks. A fork may call it again, and is then
        a template one level deeper. What a fork cannot carry (threads, child processes, sockets) is gone inside.
        """
        if self._fork is None:
            raise RuntimeError("this backend cannot fork from inside a sandbox")
        for guest in self._fork(self):
            self.wire, self._fork = guest.wire, guest._fork
            yield self.job()
            self.finish()  # whatever the loop's body left: the next job is another fork's

    def finish(self, status: int = 0) -> NoReturn:
        """End this fork: what Python buffered is written, exit handlers of the template do not run."""
        streams.flush()
        os._exit(status)
