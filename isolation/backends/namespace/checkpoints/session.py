"""A supervisor's part in keeping the files of its sandboxes: it has a process do it (remount.py), and waits for no one.

Before that process touches the sandbox's own mounts it may fail, or take too long, and be ended, and nothing has happened.
If it ends between two of them and says nothing, the sandbox is neither here nor there, and has to end, too.
"""

from __future__ import annotations

import contextlib
import errno
import signal
from dataclasses import dataclass

from isolation.backends.namespace.checkpoints import refresh, remount
from isolation.backends.namespace.checkpoints.remount import MountPair, Request
from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.rootfs.layer_tree import Change, Layers
from isolation.linux import syscalls
from isolation.plain import os, socket, time
from isolation.wire import Message, wait_readable

PATIENCE = 30.0  # s; a guest can fill its store with more than can be removed in that time
_PATIENCE_TO_LOOK = 5.0  # s; with the host's files a guest has less to do
_DEATH = 2.0  # s, from SIGKILL
_FDS_AT_MOST = 250


class Inconsistent(Exception):
    """Some of a sandbox's mounts may be of its old files, and some of the new ones."""


@dataclass
class _Work:
    """What is being done, and by whom.

    begun    the sandbox's own mounts are being changed
    stands   they are all new
    error    why nothing was done; or, where they are new, why what nobody needs is still there
    done     nothing is left to be done
    late     it has taken too long
    """

    about: Message
    change: Change
    pid: int
    pidfd: int
    control_socket: socket.socket
    patience: float
    deadline: float
    begun: bool = False
    stands: bool = False
    error: OSError | None = None
    done: bool = False
    late: bool = False


class KeptFiles:
    """Those of one sandbox."""

    def __init__(self, plan: Plan, mounts: int) -> None:
        self._plan = plan
        self._mounts = mounts
        self._layers = Layers()
        self._held: tuple[MountPair, ...] = ()
        self._work: _Work | None = None

    def fileno(self) -> int:
        """Readable when there is something to `hear`; -1 while nothing is being done."""
        return -1 if self._work is None else self._work.control_socket.fileno()

    @property
    def deadline(self) -> float | None:
        """When `give_up` is due."""
        return None if self._work is None else self._work.deadline

    def begin(self, message: Message) -> None:
        """What the host wishes ("do", "kept"). Raises OSError when it cannot be."""
        if self._work is not None:
            raise OSError(errno.EBUSY, "the files are being kept, restored or removed at this moment")
        if message["do"] == "keep":
            change = self._layers.keep()
        elif message["do"] == "restore":
            change = self._layers.restore(message["kept"])
        elif message["do"] == "forget":
            change = self._layers.forget(message["kept"])
        else:
            change = Change()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid, pidfd = syscalls.clone(0)
        if pid == 0:
            if message["do"] == "refresh":
                refresh.live(self._plan, self._mounts, theirs)
            remount.live(self._plan, Request(self._mounts, change, self._held), theirs)
        theirs.close()
        patience = _PATIENCE_TO_LOOK if message["do"] == "refresh" else PATIENCE
        self._work = _Work(message, change, pid, pidfd, ours, patience, time.monotonic() + patience)

    def hear(self) -> Message | None:
        """What that process says; the answer to the host, when there is one. Raises Inconsistent."""
        return None if self._listen() else self._end()

    def give_up(self) -> Message:
        """It takes too long. Raises Inconsistent."""
        assert self._work is not None
        self._work.late = True
        signal.pidfd_send_signal(self._work.pidfd, signal.SIGKILL)
        if not wait_readable(self._work.pidfd, _DEATH):
            # the guest holds it up in the kernel, by making more than it can drop, say: it ends with that
            raise Inconsistent
        return self._end()

    def close(self) -> None:
        """The sandbox is gone."""
        if self._work is not None:
            with contextlib.suppress(Inconsistent):
                self.give_up()
        self._close_held()

    def _listen(self) -> bool:
        """One message; False when there will be no more."""
        assert self._work is not None
        work = self._work
        said, given, _flags, _ = socket.recv_fds(work.control_socket, 8192, _FDS_AT_MOST)
        if given:
            self._close_held()
            self._held = tuple(MountPair(*pair) for pair in zip(given[::2], given[1::2], strict=False))
        if said == remount.BEGINS:
            work.begun = True
        elif said == remount.STANDS:
            work.stands = len(given) == 2 * len(remount.places(self._plan.fresh))  # or there was no room for them
            if work.stands:
                self._layers.succeeded(work.change)
        elif said == remount.DONE:
            work.done = True
            self._layers.removed(work.change)
        elif said:
            number, _, what = said[1:].decode("utf-8", "replace").partition(" ")
            work.error = OSError(int(number), what)
        return bool(said)

    def _end(self) -> Message:
        """That process has ended, or is about to. Returns the answer to the host. Raises Inconsistent."""
        assert self._work is not None
        work = self._work
        os.waitpid(work.pid, 0)
        while self._listen():  # what it had said before it was ended
            pass
        self._work = None
        os.close(work.pidfd)
        work.control_socket.close()
        if not work.stands:
            self._layers.failed(work.change)
            if work.begun and work.error is None:
                raise Inconsistent
        answer: Message = {"event": "files", "id": work.about["id"], "ask": work.about["ask"]}
        if work.done or work.stands:  # what is still there will be removed the next time
            return answer | {"kept": work.change.keeps, "chain": self._layers.chain()}
        late = OSError(errno.ETIME, f"not done after {work.patience:.0f} seconds; is the guest busy with the same files?")
        error = work.error or (late if work.late else OSError(errno.ECHILD, "the process that should do it died"))
        return answer | {"errno": error.errno, "what": error.strerror}

    def _close_held(self) -> None:
        for held in self._held:
            os.close(held.ground)
            os.close(held.top)
        self._held = ()
