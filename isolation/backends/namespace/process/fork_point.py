"""A template's own part in its forks: a copy of its memory enters what its supervisor has made (prebuilt.py), and seals
itself.

The template is a sealed process like any other: it has no capabilities, and its system call filter lets it enter namespaces,
but make none, user namespaces aside. Only those of its forks let it in: they belong to a user namespace whose parent is its
own, and whose owner has its user id, and in such a one it has all capabilities (user_namespaces(7)). Two processes are born:

    the first   enters; a PID namespace, though, holds for children only
    the second  is the fork. The first ends at once, so that the kernel gives it to PID 1 of the template's namespace: its
                supervisor, whose word on how it ended is believed (nsenter.py)

It makes a user namespace of its own then, and loses all again that the supervisor's gave.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

from isolation.backends.namespace.plan import Plan
from isolation.backends.namespace.process import finish, messages, open_files, shared_memory
from isolation.backends.namespace.process import inherited as fds
from isolation.backends.namespace.process.steps import Seal
from isolation.guest import Guest, streams
from isolation.linux import syscalls
from isolation.linux.nsenter import NsEnter
from isolation.plain import json, os, socket
from isolation.wire import Wire

_FDS_AT_MOST = 253  # SCM_MAX_FD of the kernel


class ForkPoint:
    """In a template: makes it wait, and be forked.

    fork channel  socket to the supervisor of its forks
    stacks   descriptor that the stacks of its threads are written to
    """

    def __init__(self, plan: Plan, fork_channel: socket.socket, stacks: int) -> None:
        self._plan = plan
        self._fork_channel = fork_channel
        self._stacks = stacks
        self._shared: list[shared_memory.Object] = []
        self._seals: dict[bool, Seal] = {}
        self._entrances: dict[tuple[str, ...], NsEnter] = {}

    def introduce(self, mounts: int) -> None:
        """Once it is sealed, and before anything of the guest's runs: show the supervisor its namespaces. Closes
        `mounts`."""
        user = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        socket.send_fds(self._fork_channel, [messages.SEALED], [mounts, user])
        os.close(user)
        os.close(mounts)
        if self._fork_channel.recv(1) != messages.SEALED:
            os._exit(1)

    def forks(self, guest: Guest) -> Iterator[Guest]:
        """Yields in each fork, its guest; and in the template itself, when the host wants it to go on."""
        streams.flush()
        for template in (False, True):
            if template not in self._seals:
                self._seals[template] = Seal(self._plan, template=template)
        gc.collect()  # before stock is taken: a file in garbage is closed by this, and its number is another's then
        inherited = fds.inventory(exclude=[guest.wire.fileno(), self._fork_channel.fileno(), self._stacks])
        syscalls.malloc_trim()
        gc.freeze()
        if "sharing" in self._plan.defences:
            self._shared = shared_memory.look(inherited)
        held = open_files.held(inherited)
        self._fork_channel.send(
            b"%s%d%s" % (messages.WARM, sum(item.scratch for item in inherited), open_files.encode(held))
        )
        while True:
            request, given, _flags, _ = socket.recv_fds(self._fork_channel, 1 << 16, _FDS_AT_MOST)
            if not request:
                return  # nobody wants forks any more
            order = json.loads(request)
            if order == "advance":
                shared_memory.forget(self._shared)
                yield guest
                return
            made = self._fork_into(
                order, given, guest, open_files.mark(inherited, [held[number] for number in order["aside"]])
            )
            for fd in given:
                os.close(fd)
            if made is not None:
                yield made
                return

    def _fork_into(
        self, order: dict[str, Any], given: list[int], guest: Guest, inherited: Sequence[fds.Inherited]
    ) -> Guest | None:
        names = tuple(order["namespaces"])
        if names not in self._entrances:
            self._entrances[names] = NsEnter(names)
        count = len(names)
        control_socket = socket.socket(fileno=os.dup(given[count]))
        template = os.getpid()
        try:
            if not self._entrances[names].fork(given[:count]):
                control_socket.close()
                return None
            born = self._become(order, given[count + 1 :], control_socket, guest, inherited)
            given.clear()  # what is left of them was closed with the rest
            return born
        except BaseException as error:
            if os.getpid() == template:
                finish.send_error(control_socket, error)
                control_socket.close()
                return None
            finish.give_up(control_socket, error)

    def _become(
        self,
        order: dict[str, Any],
        given: list[int],
        control_socket: socket.socket,
        guest: Guest,
        inherited: Sequence[fds.Inherited],
    ) -> Guest:
        """The second process, in its namespaces."""
        template = order["template"]
        os.setsid()
        control_socket.send(messages.BORN)  # with its credentials, by which the supervisor knows it
        if control_socket.recv(1) != messages.BORN:
            os._exit(1)
        self._seals[template].run(control_socket.fileno())
        wire, stdin, stdout, stderr, crash, *given = given
        descent = None
        keep = [wire]
        if template:
            fork_channel = socket.socket(fileno=given.pop(0))
            descent = ForkPoint(self._plan, fork_channel, self._stacks)
            descent._seals, descent._entrances = self._seals, self._entrances
            descent.introduce(given.pop(0))
            keep.append(fork_channel.fileno())
        # The template's, not this fork's. Closed here, or they would close whatever has their numbers then.
        guest.wire.sock.close()
        self._fork_channel.close()
        finish.take_descriptors(
            self._plan, inherited, self._shared, (stdin, stdout, stderr), given, crash, self._stacks, control_socket, keep
        )
        finish.set_process_name()
        return Guest(Wire(socket.socket(fileno=wire), accept_fds=True), fork=None if descent is None else descent.forks)
