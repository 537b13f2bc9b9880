"""The host's side of the conversation, with an agent that is not one: only that machine is lost, and soon."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolation import Ended, GuestError, SandboxClosed
from isolation.backends.microvm import machine as machines
from isolation.backends.microvm import template as templates
from isolation.backends.microvm.machine import MicrovmMachine
from isolation.backends.microvm.template import MicrovmFork
from isolation.backends.microvm.vm.link import Link, clean, text_of
from isolation.mux import Mux, MuxError
from isolation.wire import Decoder, Message, encode

pytestmark = pytest.mark.once

DATA, END, CREDIT = range(3)


def frame(kind: int, number: int, data: bytes = b"") -> bytes:
    return struct.pack(">BII", kind, number, len(data)) + data


def control(message: Message, data: bytes = b"") -> bytes:
    """A message in as many frames as it takes."""
    whole = encode(message, data)
    return b"".join(frame(DATA, 0, whole[place : place + 32768]) for place in range(0, len(whole), 32768))


class Agent:
    """A link, and what is behind it: nothing but sockets."""

    def __init__(self, *, ping_after: float = 30.0, lost_after: float = 30.0) -> None:
        ours, self.agent = socket.socketpair()
        self.agent.settimeout(60)  # a duplicate of it does not block, and they share that
        console, self.console = socket.socketpair()
        stderr, self.stderr = os.pipe()
        self.reasons: list[str] = []
        self.threads: list[threading.Thread] = []
        self.link = Link(ours, console, stderr, self.reasons.append, ping_after=ping_after, lost_after=lost_after)

    def say(self, data: bytes) -> None:
        """As far as anybody takes it."""
        try:
            self.agent.sendall(data)
        except OSError:
            pass

    def in_thread(self, action: Callable[[], None]) -> None:
        thread = threading.Thread(target=action, daemon=True)
        thread.start()
        self.threads.append(thread)

    def over(self) -> str:
        self.link.join(30.0)
        assert self.link.over is not None
        assert self.reasons == [self.link.over]
        return self.link.over

    def close(self) -> None:
        try:
            self.agent.shutdown(socket.SHUT_RDWR)  # a thread may hold a duplicate
        except OSError:
            pass
        self.agent.close()
        self.console.close()
        os.close(self.stderr)
        for thread in self.threads:
            thread.join(30.0)
            assert not thread.is_alive()
        self.link.join(30.0)
        self.link.close_news()


@pytest.fixture
def agent() -> Iterator[Agent]:
    before = len(os.listdir("/proc/self/fd"))
    made = Agent()
    yield made
    made.close()
    assert made.link.over is not None
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"\xff" * 1000, "no frame"),
        (frame(DATA, 7, b"x"), "nobody opened"),
        (frame(DATA, 0, b"\xff" * 8), "too large"),
        (frame(DATA, 0, struct.pack(">II", 3, 0) + b"{]}"), "not JSON"),
        (frame(DATA, 0, struct.pack(">II", 30000, 0) + b"[" * 30000), "protocol"),
        (frame(DATA, 0, struct.pack(">II", 2, 0) + b"[]"), "not an object"),
        (control({"event": 5}), "no known kind"),
        (control({"event": ["exit"]}), "no known kind"),
        (control({}), "no known kind"),
        (frame(DATA, 0, struct.pack(">II", 22, 0) + b'{"event":"x","data":5}'), "raw bytes"),
        (frame(DATA, 0, struct.pack(">II", 9000, 0) + b'{"event":"x","id":' + b"9" * 8981 + b"}"), "protocol"),
    ],
)
def test_what_is_no_message_ends_the_machine(agent: Agent, said: bytes, reason: str) -> None:
    agent.say(said)
    assert agent.link.receive(30) is None
    assert reason in agent.over()
    with pytest.raises(SandboxClosed):
        agent.link.say({"op": "anything"})


@pytest.mark.parametrize(
    "message",
    [
        {"event": "exit", "id": [1]},
        {"event": "exit", "id": {"a": 1}},
        {"event": "exit", "id": None},
        {"event": "exit", "id": 10**300},
        {"event": "exit"},
        {"event": "unspawned", "id": []},
        {"event": "\x1b[2J" * 100},
    ],
)
def test_odd_messages_pass(agent: Agent, message: Message) -> None:
    agent.say(control(message))
    assert agent.link.receive(30) == message


@pytest.mark.parametrize(
    "message",
    [{"event": "x"}, {"event": "x", "what": ["y" * 100] * 10_000}, {"event": "x", "what": [[]] * 100_000}],
    ids=["many", "large", "costly"],
)
def test_a_flood_of_messages_that_nobody_asked_for(agent: Agent, message: Message) -> None:
    said = control(message)

    def flood() -> None:
        for _ in range(100_000):
            try:
                agent.agent.sendall(said)
            except OSError:
                return

    agent.in_thread(flood)
    assert "more messages" in agent.over()
    assert agent.link._inbox_bytes < 300 << 20
    while agent.link.receive(0) is not None:
        pass


def test_a_flood_on_a_stream_ends_the_machine(agent: Agent) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    agent.link.say({"op": "begin"}, [(1, -1, writer)])
    agent.agent.recv(100)
    agent.in_thread(lambda: [agent.say(frame(DATA, 1, bytes(32768))) for _ in range(100)])  # type: ignore[func-returns-value]
    assert "more on stream 1 than it may" in agent.over()
    os.close(reader)


def test_an_agent_that_reads_nothing(agent: Agent) -> None:
    for _ in range(40):
        try:
            agent.link.say({"op": "x" * (1 << 20)})
        except SandboxClosed:
            break
    assert "does not read" in agent.over()


def test_silence_is_death() -> None:
    agent = Agent(ping_after=0.1, lost_after=0.3)
    time.sleep(0.5)
    assert agent.link.over is None  # nobody watches yet
    agent.link.watch()
    assert agent.link.receive(30) is None
    assert "has not answered for 0.3 s" in agent.over()
    agent.close()


def test_who_answers_pings_lives() -> None:
    agent = Agent(ping_after=0.05, lost_after=10)
    agent.link.watch()
    decoder, mux = Decoder(), Mux(agent.agent.fileno())
    agent.agent.setblocking(False)
    mux.open(0, deliver=decoder.feed)
    pings = 0
    while pings < 5:
        mux.step(20)
        while (message := decoder.next_message()) is not None:
            assert message == {"op": "ping"}
            pings += 1
            mux.write(0, encode({"event": "pong"}))
    assert agent.link.over is None
    with pytest.raises(TimeoutError):
        agent.link.receive(0)
    mux.close()
    agent.close()


def test_a_host_that_was_stopped_asks_first() -> None:
    """Ctrl-Z for longer than the patience, and back: the machine must have its chance to answer."""
    agent = Agent(ping_after=0.2, lost_after=3)
    agent.link.watch()
    agent.link.do(lambda: time.sleep(4))
    agent.agent.settimeout(30)
    assert b"ping" in agent.agent.recv(1000)
    agent.say(control({"event": "pong"}) + control({"event": "here"}))
    assert agent.link.receive(30) == {"event": "here"}
    assert agent.link.over is None
    agent.close()


def test_a_deadline() -> None:
    agent = Agent()
    agent.link.deadline = time.monotonic() + 0.2
    agent.link.watch()
    assert agent.link.receive(30) is None
    assert agent.link.timed_out
    assert "wall-clock limit" in agent.over()
    agent.close()


def test_console_and_errors_are_bounded_and_harmless(agent: Agent) -> None:
    agent.console.sendall((b"\x1b[31m boom \x07\n" + b"x" * 98 + b"\n") * 20_000)
    os.write(agent.stderr, b"qemu: \x1b]0;owned\x07\n")
    agent.agent.close()
    agent.over()
    assert len(agent.link.console) <= 64 << 10
    words = text_of(agent.link.console) + text_of(agent.link.errors)
    assert words.isprintable()
    assert "boom" in words
    assert clean("\x1b[2J\n\u202e" + "x" * 1000) == "?[2J??" + "x" * 494
    assert clean(10) == "10"


def test_an_exit_waits_for_the_output_before_it(agent: Agent) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    agent.link.say({"op": "spawn", "id": 3}, [(1, -1, writer)], outputs=(1,))
    agent.agent.recv(100)
    for _ in range(6):
        agent.say(frame(DATA, 1, bytes(32768)))
    agent.say(control({"event": "exit", "id": 3, "status": 0}) + control({"event": "exit", "id": 3, "status": 9}))
    assert agent.link.receive(30) == {"event": "exit", "id": 3, "status": 9}  # a lie, which nobody waits for any more
    with pytest.raises(TimeoutError):
        agent.link.receive(0.2)
    count = 0
    while count < 6 * 32768:
        try:
            count += len(os.read(reader, 1 << 16))
        except BlockingIOError:
            time.sleep(0.01)
    assert agent.link.receive(30) == {"event": "exit", "id": 3, "status": 0}
    os.close(reader)


def test_an_exit_is_told_though_its_output_was_lost(agent: Agent) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    agent.link.say({"op": "spawn", "id": 3}, [(1, -1, writer)], outputs=(1,))
    agent.agent.recv(100)
    for _ in range(6):
        agent.say(frame(DATA, 1, bytes(32768)))
    agent.say(control({"event": "exit", "id": 3, "status": 0}))
    agent.agent.close()
    assert agent.link.receive(30) == {"event": "exit", "id": 3, "status": 0}
    assert agent.link.receive(30) is None
    os.close(reader)


def test_what_came_with_the_end_is_heard(agent: Agent) -> None:
    agent.say(control({"event": "last", "what": "x" * 20_000}))
    agent.agent.close()
    message = agent.link.receive(30)
    assert message is not None
    assert message["event"] == "last"
    assert agent.link.receive(30) is None


@pytest.mark.parametrize("cut", [0, 1, 8, 9, 10, 17, 18, 30, -1])
def test_an_end_at_every_point(cut: int) -> None:
    agent = Agent()
    agent.say(control({"event": "hello", "what": "x" * 50})[: cut if cut >= 0 else None])
    agent.agent.close()
    if cut < 0:
        assert agent.link.receive(30) is not None
    assert agent.link.receive(30) is None
    assert "virtual machine is gone" in agent.over()
    agent.close()


def test_what_was_to_be_done_at_the_end_leaves_no_descriptor(agent: Agent) -> None:
    """Queued as the machine died: the other ends must notice, or their readers wait for ever."""
    held = threading.Event()
    agent.link.do(lambda: held.wait(30) and None)  # type: ignore[arg-type, return-value]
    agent.link.give_up("enough")
    pipes = [os.pipe() for _ in range(3)]
    for number, (_reader, writer) in enumerate(pipes, 1):
        agent.link.say({"op": "begin"}, [(number, -1, writer)])
    held.set()
    assert agent.over() == "enough"
    for reader, _writer in pipes:
        assert os.read(reader, 1) == b""
        os.close(reader)
    reader, writer = os.pipe()
    with pytest.raises(SandboxClosed):
        agent.link.say({"op": "begin"}, [(9, -1, writer)])
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_stop_and_hang_up_after_the_end(agent: Agent) -> None:
    agent.agent.close()
    agent.over()
    spare = [os.eventfd(0) for _ in range(8)]  # takes the numbers that the link had
    agent.link.stop()
    agent.link.hang_up()
    agent.link.hang_up()
    agent.link.give_up("again")
    for fd in spare:
        os.set_blocking(fd, False)
        with pytest.raises(BlockingIOError):  # nobody has written to it
            os.eventfd_read(fd)
        os.close(fd)


# What is above the link: calls of a sandbox, answered by an agent that keeps to the frames and to nothing else.


class Puppet:
    """Answers each message as it is told to."""

    def __init__(self, agent: Agent, answer: Callable[[Message], Sequence[bytes] | bytes]) -> None:
        self._answer = answer
        self._sock = agent.agent.dup()
        self._sock.setblocking(False)
        self._mux = Mux(self._sock.fileno())
        self._decoder = Decoder()
        self._mux.open(0, deliver=self._decoder.feed, urgent=True)
        self._mux.expect(1000)
        agent.in_thread(self._run)

    def _run(self) -> None:
        try:
            while True:
                self._mux.step(0.05)
                while (message := self._decoder.next_message()) is not None:
                    if message["op"] == "ping":
                        self._mux.write(0, encode({"event": "pong"}))
                        continue
                    answer = self._answer(message)
                    for part in [answer] if isinstance(answer, bytes) else answer:
                        self._mux.raw(part)
        except MuxError:
            self._sock.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_ANSWER_PATIENCE", 0.5)


@pytest.fixture
def held(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> MicrovmMachine:
    """A machine with that agent."""
    vm = SimpleNamespace(
        link=agent.link, last_words=lambda: "", close=lambda: agent.link.give_up("closed"), kill=lambda: agent.link.give_up("closed"),
        wait_until_running=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(machines, "prepare", lambda _plan: vm)
    plan = SimpleNamespace(workdir="/", limits=SimpleNamespace(wall=None))
    return MicrovmMachine(cast("Any", plan))


def start(held: MicrovmMachine) -> int:
    null = os.open(os.devnull, os.O_RDWR)
    try:
        return held.start(["x"], env={}, cwd="/", stdio=[null, null, null])[0]
    finally:
        os.close(null)


def to(op: str, *answers: Message) -> Callable[[Message], list[bytes]]:
    """Answers to this message, and to spawn as it should be."""

    def answer(message: Message) -> list[bytes]:
        if message["op"] == op:
            return [control(part) for part in answers]
        return [control({"event": "spawned", "id": message["id"]})] if message["op"] == "spawn" else []

    return answer


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("call", ["start", "read", "write", "changes"])
def test_an_agent_that_answers_nothing_but_pings(agent: Agent, held: MicrovmMachine, call: str) -> None:
    Puppet(agent, to("spawn"))
    calls: dict[str, Callable[[], object]] = {
        "start": lambda: start(held), "read": lambda: held.open("/x", "rb"), "write": lambda: held.open("/x", "wb"),
        "changes": held.changes,
    }  # fmt: skip
    with pytest.raises(SandboxClosed, match="asked to"):
        calls[call]()
    assert "asked to" in agent.over()


@pytest.mark.usefixtures("impatient")
def test_an_agent_that_speaks_of_other_things(agent: Agent, held: MicrovmMachine) -> None:
    stop = threading.Event()

    def chatter() -> None:
        while not stop.is_set():
            agent.say(control({"event": "spawned", "id": 77}))
            time.sleep(0.01)

    agent.in_thread(chatter)
    with pytest.raises(SandboxClosed):
        start(held)
    stop.set()
    assert "its agent" in agent.over()


def test_changes_without_end(agent: Agent, held: MicrovmMachine) -> None:
    Puppet(agent, to("changes", *[{"event": "changes", "changes": [], "more": True}] * 3))
    with pytest.raises(SandboxClosed, match="without end"):
        held.changes()


def test_changes_that_are_none(agent: Agent, held: MicrovmMachine) -> None:
    rows: list[object] = [
        ["/a", "added", "file", None], ["/a", "added", "file", 3], ["/a", "added", "file", -1], ["/a", "added", "file", True],
        ["/b", "added", "file", 10**400], ["/c", "eaten", "file", 1], ["/d", "added", "fifo", 1], [1, "added", "file", 1],
        "text", 5, None, [], ["/e", "deleted", "other", "x"],
    ]  # fmt: skip
    Puppet(agent, to("changes", {"event": "changes", "changes": rows, "more": 1}, {"event": "changes", "changes": 7}))
    assert [(change.path, change.size) for change in held.changes()] == [("/a", None), ("/b", None), ("/e", None)]


@pytest.mark.parametrize(
    "said",
    [
        {"usage": [10**400, 0, 0]}, {"usage": [float("nan"), float("inf"), -1]}, {"usage": "x"}, {"usage": [True, 0, 0]},
        {"usage": [1, 2, 3, 4]}, {"usage": {}}, {},
    ],
)  # fmt: skip
def test_usage_that_is_none(agent: Agent, held: MicrovmMachine, said: Message) -> None:
    Puppet(agent, to("none"))
    number = start(held)
    agent.say(control({"event": "exit", "id": number, "status": 0} | said))
    found = held.wait(number, 30)
    assert found is not None
    assert found[0].ok
    assert (found[1].cpu, found[1].memory_peak) == (0, None)


@pytest.mark.parametrize("status", [None, "0", [0], -1, 1 << 40, {}])
def test_a_status_that_is_none(agent: Agent, held: MicrovmMachine, status: object) -> None:
    Puppet(agent, to("none"))
    number = start(held)
    agent.say(control({"event": "exit", "id": number, "status": status}))
    found = held.wait(number, 30)
    assert found is not None
    assert found[0].ended is Ended.LOST


def test_exits_of_what_was_never_started_are_not_kept(agent: Agent, held: MicrovmMachine) -> None:
    Puppet(agent, to("none"))
    number = start(held)
    for other in range(5000):
        agent.say(control({"event": "exit", "id": number + 1 + other, "status": 0, "more": "x" * 100}))
        if other % 500 == 0:
            held.wait(number, 0)
    agent.say(control({"event": "exit", "id": number, "status": 0}))
    assert held.wait(number, 30) is not None
    assert list(held._exits) == [number]


def test_errors_that_are_not_for_a_terminal(agent: Agent, held: MicrovmMachine) -> None:
    Puppet(agent, to("open", {"event": "opened", "stream": 1, "errno": [], "what": "\x1b[2J\x1b]0;x\x07" * 1000}))
    with pytest.raises(GuestError) as caught:
        held.open("/x", "rb")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.usefixtures("impatient")
def test_files_that_do_not_go_on(agent: Agent, held: MicrovmMachine) -> None:
    Puppet(agent, lambda message: control({"event": "opened", "stream": message["stream"], "size": 100}))
    with held.open("/x", "rb") as file, pytest.raises(GuestError, match="did not go on"):
        file.read()
    assert "does not go on" in agent.over()


@pytest.mark.usefixtures("impatient")
def test_a_file_that_is_not_taken(agent: Agent, held: MicrovmMachine) -> None:
    Puppet(agent, lambda message: control({"event": "opened", "stream": message["stream"]}))
    file = held.open("/x", "wb")

    def write() -> None:
        for _ in range(10_000):
            file.write(bytes(4096))

    with pytest.raises(GuestError):
        write()
    assert "does not go on" in agent.over()
    with pytest.raises(SandboxClosed):
        file.close()


def test_one_thread_waits_and_another_kills(agent: Agent, held: MicrovmMachine) -> None:
    told: list[Message] = []

    def answer(message: Message) -> list[bytes]:
        if message["op"] == "signal":
            told.append(message)
            return [control({"event": "exit", "id": message["id"], "status": 9})]
        return [control({"event": "spawned", "id": message["id"]})]

    Puppet(agent, answer)
    number = start(held)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(held.wait(number, None)), daemon=True)
    thread.start()
    time.sleep(0.3)
    killer = threading.Thread(target=lambda: held.signal(number, 9, group=True), daemon=True)
    killer.start()
    killer.join(30)
    thread.join(30)
    assert not killer.is_alive()
    assert found
    assert told[0]["signal"] == 9


def test_a_fork_that_speaks_of_other_things(agent: Agent, held: MicrovmMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks and captured output are waited for, for a while; an exit of something else is not its own."""
    monkeypatch.setattr(templates, "_STACKS_WAIT", 0.5)
    fork = MicrovmFork(held.vm, b"")
    stop = threading.Event()

    def chatter() -> None:
        while not stop.is_set():
            agent.say(control({"event": "exit", "id": 9, "status": 0}))
            time.sleep(0.001)

    agent.in_thread(chatter)
    assert fork.wait(0.2) is None
    assert fork.stacks() == ""
    assert fork.scratch(3) == b""
    stop.set()
    agent.say(
        control({"event": "stacks"}, b"\0\nThread 1\n" + b"x" * (1 << 20)) + control({"event": "deleted"}, bytes(20 << 20))
    )
    fork._stacks = None
    assert len(fork.stacks()) <= 256 << 10
    assert len(fork.scratch(3)) == 16 << 20
    fork.close()


def test_json_of_the_agents_words_is_what_it_takes() -> None:
    """`first_order` and the agent's reader agree."""
    from isolation.backends.microvm.vm.link import first_order

    order = first_order({"op": "renew", "job": "ü"})
    assert json.loads(order[4:]) == {"op": "renew", "job": "ü"}
    assert int.from_bytes(order[:4], "big") == len(order) - 4
