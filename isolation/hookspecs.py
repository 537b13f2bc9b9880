"""The contract between the core and a backend. A backend is an ordinary pluggy plug-in.

# pyproject.toml:  [project.entry-points.isolation]  mine = "my_package.plugin"
import isolation

@isolation.hookimpl
def isolation_backend():
    return MyBackend()
"""

from __future__ import annotations

import abc
import termios
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pluggy

from isolation.errors import FeatureMissing, SpecError
from isolation.result import Change, Usage, Verdict
from isolation.spec import SandboxSpec
from isolation.template import Template

hookspec = pluggy.HookspecMarker("isolation")
hookimpl = pluggy.HookimplMarker("isolation")

# Features: what a backend can do, asked before use. Third parties may add their own names.
CHANGES = "changes"  # tells what the guest wrote
CPU_LIMIT = "cpu-limit"
DISK_LIMIT = "disk-limit"
FILE_CHECKPOINTS = "file-checkpoints"  # the files of a live sandbox can be kept, and restored
FORK = "fork"  # a warm sandbox can be forked
FORK_ACCOUNT = "fork-account"  # tells what a fork left behind
FORK_DEADLOCK = "fork-deadlock"  # ends a fork in which every thread waits for another, if asked
FORK_HERE = "fork-here"  # the calling process itself can be the template
MEMORY_LIMIT = "memory-limit"
NESTING = "nesting"  # can make sandboxes inside
NETWORK_HOST = "network-host"
NETWORK_NAT = "network-nat"
NETWORK_NONE = "network-none"
PASS_FDS = "pass-fds"  # a command can be given open descriptors
PIDS_LIMIT = "pids-limit"
SNAPSHOT = "snapshot"  # a warm sandbox can be kept on disk
TTY = "tty"

FIRST_PASSED = 64  # number of the first descriptor that a command is given beside its streams


@dataclass(frozen=True)
class Check:
    """One thing that a backend needs (or, if `optional`, is better with): does it hold, what was found, what mends it."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Probe:
    """Whether a backend works on this machine, for this user. Found by trying, not by guessing."""

    works: bool
    reason: str
    checks: tuple[Check, ...] = ()
    features: frozenset[str] = field(default_factory=frozenset)


class Machine(abc.ABC):
    """One live sandbox, as its backend holds it. `isolation.Sandbox` is what users see of it.

    Methods raise SandboxClosed once it has ended.

    workdir  where commands start unless told otherwise
    """

    workdir: str

    @abc.abstractmethod
    def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        stdio: Sequence[int | None],
        window: tuple[int, int] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> tuple[int, int | None]:
        """Start a command with the given descriptors as its stdin, stdout and stderr; None stands for a terminal
        of the sandbox's own, whose master is the second value returned. The first is the command's number. `window` is the
        terminal's size in rows and columns. The command gets `pass_fds` as FIRST_PASSED and up (feature "pass-fds").

        Raises CommandNotFound, LaunchError or FeatureMissing.
        """

    @abc.abstractmethod
    def wait(self, number: int, timeout: float | None) -> tuple[Verdict, Usage] | None:
        """Wait for a command's end; None when it has not ended in `timeout` seconds."""

    @abc.abstractmethod
    def fileno(self) -> int:
        """Readable when `wait` might have news."""

    @abc.abstractmethod
    def signal(self, number: int, signum: int, *, group: bool) -> None:
        """Send a signal to a command, or to all of its process group."""

    def resize(self, number: int, terminal: int, window: tuple[int, int]) -> None:
        """The user's terminal has a new size; `terminal` is what `start` returned."""
        termios.tcsetwinsize(terminal, window)  # the kernel sends SIGWINCH inside

    @abc.abstractmethod
    def open(self, path: str, mode: str) -> BinaryIO:
        """A file inside, as the guest sees it: "rb" (regular files only) or "wb". Raises GuestError."""

    @abc.abstractmethod
    def changes(self) -> list[Change]:
        """What the guest wrote so far, sorted by path; works after the end, too."""

    def keep_files(self) -> int:
        """Freeze the files as they are; the guest goes on in a layer of its own above. Returns the number for the two below
        (feature "file-checkpoints", here and there). Raises GuestError when all is as it was."""
        raise FeatureMissing("this backend cannot keep the files of a sandbox that lives")

    def restore_files(self, kept: int) -> None:
        """The files are again as they were then, with a new layer above. May be repeated, and leaves all that is kept as it
        is, be it older or newer. Raises GuestError when all is as it was."""
        raise FeatureMissing("this backend cannot restore the files of a sandbox that lives")

    def forget_files(self, kept: int) -> None:
        """Free what nothing else needs. Raises GuestError."""
        raise FeatureMissing("this backend keeps no files of a sandbox that lives")

    def refresh_files(self) -> None:
        """What has changed on the host is seen, where its directories are shown. Nothing to do where it always is, or never
        is."""
        return

    @abc.abstractmethod
    def close(self) -> None:
        """End everything inside, and wait until it is gone. May be called again."""

    def lend(self) -> tuple[Any, list[int]]:
        """What another process (a guest) needs to use this machine by `Backend.borrow`: JSON, and descriptors."""
        raise NotImplementedError


class Backend(abc.ABC):
    """One way of making sandboxes."""

    name: str

    @abc.abstractmethod
    def probe(self) -> Probe:
        """Try the whole chain, in a child process. Never raises."""

    @abc.abstractmethod
    def features(self) -> frozenset[str]:
        """What this backend can do here. Cheap: reads settings, makes nothing."""

    @abc.abstractmethod
    def launch(self, spec: SandboxSpec) -> Machine:
        """A new sandbox. Raises LaunchError, FeatureMissing or SpecError; leaves nothing behind then."""

    def template(self, spec: SandboxSpec, payload: Callable[..., object] | str, config: Any) -> Template:
        """A warm sandbox to fork; a callable makes the calling process the template. Feature "fork"."""
        raise NotImplementedError

    def carries(self, descriptors: Collection[int]) -> frozenset[int]:
        """Of descriptors of the calling process that are of no file (sockets, pipes, …): those that its forks have, too.
        Feature "fork-here"."""
        return frozenset()

    def load(self, spec: SandboxSpec, payload: str, config: Any, directory: str) -> Template:
        """A template that `Template.save` has kept. Feature "snapshot". Raises LaunchError when anything differs."""
        raise NotImplementedError

    def describe(self) -> str:
        """In a few words, for a header: its name, and what one must know of it here."""
        return self.name

    def borrow(self, token: Any, fds: Sequence[int]) -> Machine:
        """In a guest: a machine that the host has lent. It ends when the host says."""
        raise NotImplementedError

    def main(self, argv: Sequence[str]) -> int:
        """`isolation NAME …`: this backend's own command line. Returns the exit code."""
        raise SpecError(f"the {self.name} backend has no commands of its own")

    def notes(self, spec: SandboxSpec) -> Sequence[str]:
        """What people are to hear before anything runs: what will not be as they may expect."""
        return ()

    def explain(self, spec: SandboxSpec) -> str:
        """What `launch` would do, for people."""
        return f"backend    {self.name}"


class Hooks:
    """The hooks themselves."""

    @hookspec
    def isolation_backend(self) -> Backend:  # type: ignore[empty-body]
        """Return one backend."""
