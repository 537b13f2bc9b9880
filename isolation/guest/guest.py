"""The guest's view of its host: a wire for messages, and jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from isolation.errors import WireError
from isolation.guest import streams
from isolation.plain import os
from isolation.wire import Message, Wire

_getpid = os.getpid  # a test may replace it


class Guest:
    """What a template's function, or a fork of it, talks to its host with.

    config  what the host gave with the template (JSON)
    wire    the messages of this fork; the host sends the job first
    """

    def __init__(self, wire: Wire, config: Any = None, fork: Callable[[Guest], Iterator[Guest]] | None = None) -> None:
        self.wire = wire
        self.config = config
        self._fork = fork
        self._jobs: list[Any] = []
        self._pid = _getpid()

    @property
    def is_own_process(self) -> bool:
        """False in a process that the guest has forked: it has all of the guest's memory, but may not speak in its name."""
        return _getpid() == self._pid

    def send(self, message: Message, data: bytes = b"") -> None:
        """Send one message to the host. Raises WireError when it is too large, or the host is gone; RuntimeError in a
        process that the guest has forked."""
        self._check_process()
        self.wire.send(message, data)

    def receive(self) -> Message | None:
        """The host's next message; None when it has nothing more to say. Raises RuntimeError in a forked process."""
        self._check_process()
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
        self._check_process()
        for guest in self._fork(self):
            self.wire, self._fork, self._pid = guest.wire, guest._fork, guest._pid
            yield self.job()
            self.finish()  # whatever the loop's body left: the next job is another fork's

    def finish(self, status: int = 0) -> NoReturn:
        """End this fork: what Python buffered is written, exit handlers of the template do not run."""
        streams.flush()
        os._exit(status)

    def _check_process(self) -> None:
        """One word of a child that goes on as if it were the guest would be taken for the guest's own."""
        if not self.is_own_process:
            raise RuntimeError("only the process that a sandbox was made with speaks to its host; this one was forked by it")
