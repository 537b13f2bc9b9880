"""The fork primitive, host side: a warm sandbox, and fresh ones made from it."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from isolation.errors import FeatureMissing
from isolation.plain import os
from isolation.result import Account, Change, Usage, Verdict
from isolation.wire import Message


class Fork(abc.ABC):
    """A fresh sandbox made from a template. Its messages come from the guest: believe nothing in them.

    stdout, stderr  descriptors to read what its streams carry, non-blocking
    """

    stdout: int
    stderr: int

    @abc.abstractmethod
    def send(self, message: Message, data: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Send the guest a message. Raises WireError when it is gone."""

    @abc.abstractmethod
    def receive(self, timeout: float | None = None) -> Message | None:
        """The guest's next message; None when there will be none. Raises TimeoutError, WireError."""

    @abc.abstractmethod
    def filenos(self) -> tuple[int, ...]:
        """Descriptors to poll(2): when one is readable, `receive(0)` may have news."""

    @abc.abstractmethod
    def wait(self, timeout: float | None = None) -> Verdict | None:
        """Why the payload ended, from the sandbox's own PID 1, not from the payload; None if it has not in time."""

    @abc.abstractmethod
    def end(self, verdict: Verdict) -> None:
        """End it now, for the reason given. The stacks of its threads are written first, if it was running."""

    @abc.abstractmethod
    def usage(self) -> Usage:
        """What it used. Waits for its end."""

    def take_stream(self) -> int:
        """The non-blocking stream socket that messages travel on, for a protocol of the caller's own; in the guest, that is
        `guest.wire.sock`. From then on `send` and `receive` are of no use. Raises FeatureMissing."""
        raise FeatureMissing("this backend has messages only between a fork and its host")

    def changes(self) -> list[Change]:
        """Every path that it added, changed or deleted so far, sorted by path. Raises FeatureMissing, SandboxClosed."""
        raise FeatureMissing("this backend does not tell what a fork has changed")

    def account(self) -> Account:
        """What it left behind, if its template was asked for that. Waits for its end."""
        return Account()

    @abc.abstractmethod
    def stacks(self) -> str:
        """What faulthandler wrote at a crash, a time-out or near the memory limit; "" if nothing."""

    @abc.abstractmethod
    def scratch_index(self, inode: int) -> int | None:
        """Which private copy of an unlinked file the guest means by an inode number; the same in every fork."""

    @abc.abstractmethod
    def scratch(self, index: int) -> bytes:
        """Content of a private copy, as it is now; bounded."""

    @abc.abstractmethod
    def close(self) -> None:
        """End it, without waiting until it is gone. May be called again."""

    def __iter__(self) -> Iterator[Message]:
        """The guest's messages, to its end."""
        while (message := self.receive()) is not None:
            yield message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Branch(Fork):
    """A fork on its way to be a template one level deeper."""

    @abc.abstractmethod
    def template(self, timeout: float | None = None) -> Template | None:
        """The template, once its payload has asked for forks; None when it has not in time.

        Raises LaunchError when it has ended instead; `wait` says how. `filenos` tell of this, too. Whoever waits without
        end reads its output meanwhile, or it waits as well.
        """


class Template(abc.ABC):
    """A warm sandbox that waits to be forked."""

    @abc.abstractmethod
    def fork(self, job: Any = None, *, reseed: bool = True, account: bool = False) -> Fork:
        """A fresh, sealed sandbox with the template's memory and files; `job` (JSON) is what it gets to do.

        Random numbers differ in every fork, as far as kernel, interpreter and numpy make them, unless `reseed` is False.
        With `account` its files are looked through at its end (feature "fork-account").
        Raises LaunchError when it cannot be made, FeatureMissing.
        """

    @property
    def held(self) -> int:
        """Bytes of the host's memory that it keeps beside what its limits count."""
        return 0

    @property
    def memory(self) -> int:
        """Bytes of memory that each of its forks has, if that is a machine; 0 otherwise."""
        return 0

    def branch(self, job: Any = None) -> Branch:
        """A fork that becomes a template one level deeper: its payload gets `job`, and asks for forks again.

        Raises LaunchError. Closing the branch, or its template, ends both, and all forks of it.
        """
        raise FeatureMissing("this backend cannot make a template of a fork")

    def advance(self, job: Any = None) -> Branch:
        """Let the template of a branch go on itself: its payload gets `job`, as a fork would, and asks for forks again.

        Forks of it that still live see undefined files: close them first. This object is of no use from here on, but for the
        branch's `template`, which may be it.
        """
        raise FeatureMissing("this template cannot go on: it is a copy of what goes on elsewhere")

    def watch_for_deadlock(self, *, loops: bool = False) -> None:
        """End forks made from here on, branches and theirs, within 15 s of when every thread in them waits for a lock that
        nobody is left to release: `Ended.DEADLOCKED`. With `loops`, also where for a minute such waits have a time-out
        and are begun again and again. Not while a timer may send a signal that is handled. Feature "fork-deadlock";
        raises FeatureMissing."""
        raise FeatureMissing("this backend does not tell what its forks wait for")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Keep it in a new directory, for `Sandbox.load`. Feature "snapshot"."""
        raise FeatureMissing("this backend cannot keep a template on disk")

    @abc.abstractmethod
    def close(self) -> None:
        """End the template and every fork of it; returns when they are gone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
