"""What is held: a live sandbox, and the processes that run in it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, BinaryIO, Final, Protocol, Self

from isolation import registry
from isolation.errors import FeatureMissing, GuestError, SandboxClosed, SpecError
from isolation.hookspecs import FORK, SNAPSHOT, Machine
from isolation.plain import os, select, subprocess, time
from isolation.result import Change, Completed, Ended, Usage, Verdict
from isolation.spec import SandboxSpec, is_path
from isolation.template import Template
from isolation.units import parse_seconds, parse_size

PIPE: Final = subprocess.PIPE
DEVNULL: Final = subprocess.DEVNULL
STDOUT: Final = subprocess.STDOUT
_CHUNK = 1 << 16
_LOOK_AGAIN = 0.1  # s; another thread may have read the news of this process from the machine
_FORCE_AFTER = 5.0  # s, between ending a command and giving its sandbox up


class HasFileno(Protocol):
    """What a stream can be: an open file, say."""

    def fileno(self) -> int:
        """Its descriptor."""


class Process:
    """A command that runs in a sandbox. stdin, stdout and stderr are binary files where PIPE was asked for."""

    def __init__(
        self,
        machine: Machine,
        number: int,
        args: Sequence[str],
        stdin: BinaryIO | None,
        stdout: BinaryIO | None,
        stderr: BinaryIO | None,
        tty: int | None,
    ) -> None:
        self.args = tuple(args)
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.tty = tty  # the master of its terminal, where it has one
        self._machine = machine
        self._number = number
        self._ended: tuple[Verdict, Usage] | None = None

    def poll(self) -> Verdict | None:
        """Why it ended; None while it runs."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> Verdict | None:
        """Wait until it has ended; None when it has not after `timeout` seconds."""
        if self._ended is None:
            self._ended = self._machine.wait(self._number, timeout)
        return self._ended[0] if self._ended else None

    @property
    def usage(self) -> Usage:
        """What it used; waits for its end."""
        self.wait()
        assert self._ended is not None
        return self._ended[1]

    def send_signal(self, signum: int, *, group: bool = False) -> None:
        """Send it a signal; with `group`, to every process of its process group."""
        if self._ended is None:
            self._machine.signal(self._number, signum, group=group)

    def resize(self, rows: int, columns: int) -> None:
        """Its terminal, where it has one, is of this size from now on."""
        if self.tty is not None and self._ended is None:
            self._machine.resize(self._number, self.tty, (rows, columns))

    def kill(self) -> None:
        """SIGKILL, to its process group."""
        self.send_signal(9, group=True)

    def close(self) -> None:
        """Close this end of its streams and of its terminal. It may go on running."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self.tty is not None:
            os.close(self.tty)
            self.tty = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Like `subprocess.Popen`: close the streams, and wait for the end."""
        self.close()
        self.wait()

    def communicate(
        self, input: bytes | None = None, timeout: float | None = None, output_limit: int | None = None
    ) -> Completed:
        """Feed `input`, collect what it writes, and wait for its end; it is killed after `timeout` seconds.

        Output is what the command and its children wrote until the command ended; at most `output_limit`
        bytes of each stream are kept.
        """
        try:
            return _Communication(self, input, timeout, output_limit).run()
        finally:
            self.close()


class _Communication:
    """One `communicate`: a poll(2) loop over the streams and the machine."""

    def __init__(self, process: Process, input: bytes | None, timeout: float | None, output_limit: int | None) -> None:
        self._process = process
        self._input = memoryview(input or b"")
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._limit = output_limit
        self._truncated = False
        self._timed_out = False
        self._output: dict[int, bytearray] = {}
        self._poller = select.poll()

    def run(self) -> Completed:
        process = self._process
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                self._output[stream.fileno()] = bytearray()
                os.set_blocking(stream.fileno(), False)
                self._poller.register(stream.fileno(), select.POLLIN)
        if process.stdin is not None:
            if self._input:
                os.set_blocking(process.stdin.fileno(), False)
                self._poller.register(process.stdin.fileno(), select.POLLOUT)
            else:
                process.stdin.close()
        machine = process._machine
        self._poller.register(machine.fileno(), select.POLLIN)
        while (verdict := process.poll()) is None:
            self._step(machine.fileno())
        for fd in self._output:
            while self._read(fd):
                pass
        if self._timed_out:
            verdict = Verdict(Ended.TIMED_OUT)
        streams = [bytes(self._output[s.fileno()]) if s is not None else b"" for s in (process.stdout, process.stderr)]
        return Completed(process.args, verdict, process.usage, streams[0], streams[1], self._truncated)

    def _step(self, machine_fd: int) -> None:
        left = _LOOK_AGAIN if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        ready = self._poller.poll(min(left, _LOOK_AGAIN) * 1000 + 1)
        if not ready and self._deadline is not None and time.monotonic() >= self._deadline:
            self._expire()
        for fd, _events in ready:
            if fd in self._output:
                if self._read(fd) == 0:
                    self._poller.unregister(fd)
            elif fd != machine_fd:
                self._write(fd)

    def _expire(self) -> None:
        if self._timed_out:
            self._process._machine.close()  # not even SIGKILL ended it in time
        self._timed_out = True
        self._deadline = time.monotonic() + _FORCE_AFTER
        self._process.kill()

    def _read(self, fd: int) -> int | None:
        """Bytes read; 0 at the end, None when there is nothing now."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return None
        kept = self._output[fd]
        room = len(data) if self._limit is None else max(0, self._limit - len(kept))
        kept += data[:room]
        self._truncated = self._truncated or room < len(data)
        return len(data)

    def _write(self, fd: int) -> None:
        assert self._process.stdin is not None
        try:
            self._input = self._input[os.write(fd, self._input[:_CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._input = self._input[:0]
        if not self._input:
            self._poller.unregister(fd)
            self._process.stdin.close()


class Sandbox:
    """A fresh, sealed sandbox; ends with the `with` block, and everything in it.

    Raises what `registry.choose` and the backend raise: every failure says what to do.
    """

    _lent = False

    def __init__(self, spec: SandboxSpec | None = None) -> None:
        self.spec = spec if spec is not None else SandboxSpec()
        self.backend = registry.choose(self.spec)
        self._machine: Machine | None = None

    @property
    def machine(self) -> Machine:
        """The backend's own handle; the sandbox is made when it is first needed."""
        if self._machine is None:
            self._machine = self.backend.launch(self.spec)
        return self._machine

    @classmethod
    def borrowed(cls, machine: Machine) -> Self:
        """In a guest: a sandbox that the host made and lent."""
        box = cls.__new__(cls)
        box.spec = SandboxSpec(workdir=machine.workdir)
        box._machine = machine
        box._lent = True
        return box

    def popen(
        self,
        args: Sequence[str],
        *,
        stdin: int | HasFileno | None = None,
        stdout: int | HasFileno | None = None,
        stderr: int | HasFileno | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        tty: bool | tuple[int, int] = False,
        pass_fds: Sequence[int] = (),
    ) -> Process:
        """Start a command. Streams are as those of subprocess.Popen (PIPE, DEVNULL, STDOUT, a file descriptor, a file), but
        for None, which is /dev/null; with `tty` (True, or its size in rows and columns), the streams that are None are a
        terminal of the sandbox's own, whose master is `Process.tty`.
        `pass_fds` are the command's descriptors from 64 up, in this order: each is a way out of the sandbox to what is
        behind it.

        Raises CommandNotFound when there is no such command inside, SpecError for what is no stream, LaunchError,
        SandboxClosed.
        """
        if isinstance(args, (str, bytes)) or not args or not all(isinstance(word, str) for word in args):
            raise SpecError(f"a command is a non-empty list of strings, not {args!r}")
        if any("\0" in word for word in args):
            raise SpecError("a command's arguments cannot hold NUL characters")
        ours: list[BinaryIO | None] = []
        given: list[int | None] = []
        opened: list[int] = []
        try:
            for number, wanted in enumerate((stdin, stdout, stderr)):
                end: BinaryIO | None = None
                fd: int | None
                if wanted == PIPE:
                    read, write = os.pipe2(os.O_CLOEXEC)
                    fd, kept = (read, write) if number == 0 else (write, read)
                    opened.append(fd)
                    end = os.fdopen(kept, "wb" if number == 0 else "rb", buffering=0)
                elif wanted == DEVNULL or (wanted is None and not tty):
                    fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                    opened.append(fd)
                elif wanted == STDOUT and number == 2:
                    fd = given[1]
                else:
                    fd = None if wanted is None else _descriptor(wanted, ("stdin", "stdout", "stderr")[number])
                ours.append(end)
                given.append(fd)
            for fd in pass_fds:
                _descriptor(fd, "pass_fds")
            window = tty if isinstance(tty, tuple) else None
            number, master = self.machine.start(
                args, env=env or {}, cwd=cwd or self.spec.workdir, stdio=given, window=window,
                pass_fds=pass_fds,
            )  # fmt: skip
        except BaseException:
            for stream in ours:
                if stream is not None:
                    stream.close()
            raise
        finally:
            for fd in opened:
                os.close(fd)
        return Process(self.machine, number, args, ours[0], ours[1], ours[2], master)

    def run(
        self,
        args: Sequence[str],
        *,
        input: bytes | str | None = None,
        timeout: float | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        output_limit: int | str | None = "64M",
    ) -> Completed:
        """Run a command to its end and collect its output. A command that fails is a result, not an exception.

        `input` is a string (UTF-8) or bytes; without it stdin is empty. After `timeout` (seconds, or "2s") it is
        killed, and the verdict says so. Raises what `popen` raises.
        """
        data = input.encode() if isinstance(input, str) else input
        limit = None if output_limit is None else parse_size(output_limit, "output limit")
        seconds = None if timeout is None else parse_seconds(timeout, "timeout")
        process = self.popen(args, stdin=None if data is None else PIPE, stdout=PIPE, stderr=PIPE, env=env, cwd=cwd)
        return process.communicate(data, seconds, limit)

    def copy_in(self, source: str | os.PathLike[str], target: str) -> None:
        """Copy a host file to `target` (an absolute path) inside. Raises OSError for the host's side, GuestError for the
        guest's."""
        import shutil  # late: with all that it can unpack it takes long

        with open(source, "rb") as file, self._open(target, "wb") as inside:
            shutil.copyfileobj(file, inside, 1 << 20)

    def copy_out(self, source: str, target: str | os.PathLike[str], *, limit: int | str | None = "1G") -> int:
        """Copy a regular file of the guest's to the host; returns its size in bytes.

        The target is written only when all of it has arrived, and never through a symlink. Raises GuestError when it is
        no regular file, or larger than `limit`.
        """
        most = None if limit is None else parse_size(limit, "copy limit")
        path = os.fspath(target)
        if os.path.isdir(path):
            path = os.path.join(path, os.path.basename(source))
        partial = f"{path}.{os.getpid()}.part"
        size = 0
        with self._open(source, "rb") as inside:
            try:
                with open(partial, "xb") as file:
                    while data := inside.read(1 << 20):
                        size += len(data)
                        if most is not None and size > most:
                            raise GuestError(f"{source} is larger than the copy limit of {most} bytes; raise limit=")
                        file.write(data)
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
                raise
        return size

    def _open(self, path: str, mode: str) -> BinaryIO:
        if not isinstance(path, str) or not path.startswith("/") or not is_path(path):
            raise SpecError(f"{path!r} must be an absolute path inside the sandbox")
        return self.machine.open(path, mode)

    def changes(self) -> list[Change]:
        """Every path that the guest added, changed or deleted, sorted by path; since the sandbox was made, whatever was
        kept and restored meanwhile."""
        if self._machine is None:
            return []
        return self.machine.changes()

    def keep_files(self) -> int:
        """Keep the files as they are now, to come back to: returns a number for `restore_files`. It takes no copy, and as
        good as no time: what is there is frozen, and what is written from now on lies in a layer of its own.

        Kept is all that the sandbox has to itself: copy-on-write mounts, the home directory, /tmp, /dev/shm, /run. What is
        mounted "rw" is the host's, and is not. Processes run on, but one that is in a directory, or has a file open, is with
        the old files: it has to go to the directory again by its path, and should have nothing open for writing. A unix
        socket that was bound to a path is not reached by it any more, hard links are separate files once they are written
        to, and rename(2) refuses a directory from before (EXDEV), which `mv` and shutil.move make up for.

        Raises FeatureMissing where the backend cannot, GuestError when it failed, and all is as it was, and SandboxClosed.
        """
        return self.machine.keep_files()

    def restore_files(self, kept: int) -> None:
        """The files are again as they were when `keep_files` returned this number. That can be done again and again, and to
        every state that is kept, earlier or later ones. Processes, and what they have open: as with `keep_files`.

        Raises FeatureMissing, GuestError (no such number, or it failed: then all is as it was), SandboxClosed.
        """
        self.machine.restore_files(kept)

    def forget_files(self, kept: int) -> None:
        """Nobody will come back to this state: free the space of what no other state, nor the files of now, are made of.

        Raises FeatureMissing, GuestError (no such number, or the space could not be freed yet), SandboxClosed.
        """
        self.machine.forget_files(kept)

    def refresh_files(self) -> None:
        """See what has changed on the host, where its directories are shown: files that were added, replaced (as editors
        save them) or removed since they were looked at. What was written inside stays above it. A file that is open, and
        a directory that somebody is in, stays as it was as long as it is.

        Raises GuestError when it failed, SandboxClosed.
        """
        self.machine.refresh_files()

    def template(self, payload: str, config: Any = None) -> Template:
        """Run `payload` ("package.module:function") in a sandbox of this spec, as a template to fork.

        The function gets a `isolation.guest.Guest`, warms up, and then loops over `guest.forks()`.
        """
        self._require(FORK, "fork a warm sandbox here")
        return self.backend.template(self.spec, payload, config)

    def load_template(self, directory: str | os.PathLike[str], payload: str, config: Any = None) -> Template:
        """A template of this spec that `Template.save` has kept. Raises LaunchError, saying what differs, if any."""
        self._require(SNAPSHOT, "keep a warm sandbox on disk")
        return self.backend.load(self.spec, payload, config, os.fspath(directory))

    def _require(self, feature: str, what: str) -> None:
        """Raises FeatureMissing where the backend cannot do that, or is the host's business."""
        if self._lent:
            raise FeatureMissing("the host has lent this sandbox for commands: it cannot be forked")
        if feature not in self.backend.features():
            raise FeatureMissing(f"the {self.backend.name} backend cannot {what}")

    def close(self) -> None:
        """End everything inside. May be called again; afterwards the sandbox is of no more use."""
        if self._machine is not None:
            self._machine.close()

    def __enter__(self) -> Self:
        _ = self.machine
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _descriptor(stream: int | HasFileno, name: str) -> int:
    """The number of an open one. Raises SpecError."""
    try:
        fd = stream if isinstance(stream, int) else stream.fileno()
        os.fstat(fd)
    except (OSError, ValueError, AttributeError, TypeError, OverflowError):
        raise SpecError(f"{name} must be an open file, its descriptor, PIPE or DEVNULL, not {stream!r}") from None
    return fd


__all__ = ["PIPE", "Process", "Sandbox", "SandboxClosed"]
