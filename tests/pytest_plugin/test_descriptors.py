"""Pipes, sockets, event loops and devices that modules have open: every test has its own, as it was; or they are named."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.once("user"), pytest.mark.usefixtures("nothing_left")]

LEVELS = """
    @pytest.fixture(scope="session")
    def above(): return 1
    @pytest.fixture(scope="module")
    def below(): return 1
    WAYS = pytest.mark.parametrize("way", ["first", "again"])
    def alone(test):
        @WAYS
        def test_alone(way): test()
        return test_alone
    def beneath(test):
        @WAYS
        def test_beneath(above, below, way): test()
        return test_beneath
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:randomly", "--isolation", *arguments)


def passes(pytester: pytest.Pytester, made: str, tests: str, *arguments: str) -> pytest.RunResult:
    """At each level, and again there."""
    names = [line.split("(")[0].split()[1] for line in tests.splitlines() if line.strip().startswith("def test_")]
    found = "\n".join(f"    {name}_alone, {name}_beneath = alone({name}), beneath({name}); del {name}" for name in names)
    pytester.makepyfile("    import pytest\n" + made + LEVELS + tests + "\n" + found)
    result = run(pytester, *arguments)
    result.assert_outcomes(passed=4 * len(names))
    result.stdout.no_fnmatch_line("*started while tests were collected*")
    return result


def test_pipes_and_queues(pytester: pytest.Pytester) -> None:
    passes(
        pytester,
        """
    import fcntl, multiprocessing, os
    READER, WRITER = os.pipe()
    ANOTHER = os.dup(WRITER)
    os.write(WRITER, b"waits")
    os.set_blocking(READER, False)
    FULL = os.pipe()
    os.set_blocking(FULL[1], False)
    try:
        while True: os.write(FULL[1], b"x" * 4096)
    except BlockingIOError: pass
    LARGE = os.pipe()
    fcntl.fcntl(LARGE[0], fcntl.F_SETPIPE_SZ, 1 << 18)
    os.write(LARGE[1], b"y" * 200_000)
    QUEUE = multiprocessing.get_context("fork").Queue()
    SIMPLE = multiprocessing.SimpleQueue(); SIMPLE.put("before")
    ENDS = multiprocessing.Pipe(); ENDS[0].send("before")
    ONE_WAY = multiprocessing.Pipe(duplex=False); ONE_WAY[1].send([1])
    """,
        """
    def test_pipe():
        os.write(WRITER, b" here"); os.write(ANOTHER, b"!")
        assert os.read(READER, 100) == b"waits here!"
        with pytest.raises(BlockingIOError): os.read(READER, 1)
        assert os.get_blocking(WRITER)
    def test_full():
        with pytest.raises(BlockingIOError): os.write(FULL[1], b"x")
        assert set(os.read(FULL[0], 1 << 16)) == {ord("x")}
        os.write(FULL[1], b"x")
    def test_large(): assert os.read(LARGE[0], 1 << 18) == b"y" * 200_000
    def test_queue():
        child = multiprocessing.get_context("fork").Process(target=QUEUE.put, args=("from a child",))
        child.start()
        assert QUEUE.get(timeout=60) == "from a child"
        child.join()
    def test_simple():
        SIMPLE.put("here")
        assert (SIMPLE.get(), SIMPLE.get()) == ("before", "here")
    def test_connections():
        ENDS[0].send("here")
        assert (ENDS[1].recv(), ENDS[1].recv()) == ("before", "here")
        ENDS[1].send("back")
        assert ENDS[0].recv() == "back"
        assert ONE_WAY[0].recv() == [1] and not ONE_WAY[0].poll()
    def test_ends():
        os.close(WRITER); os.close(ANOTHER)
        assert os.read(READER, 100) == b"waits" and os.read(READER, 100) == b""
    """,
    )


def test_sockets(pytester: pytest.Pytester) -> None:
    passes(
        pytester,
        """
    import os, socket, threading
    STREAM, DATAGRAM, PACKET = [socket.socketpair(socket.AF_UNIX, kind) for kind in
                                (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)]
    for ours, theirs in (STREAM, DATAGRAM, PACKET): ours.send(b"one"); ours.send(b"two")
    STREAM[1].settimeout(50); STREAM[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000)
    SIZE = STREAM[0].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    FRESH = socket.socket(); FRESH.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    SIX = socket.socket(socket.AF_INET6); UNIX = socket.socket(socket.AF_UNIX)
    UDP = socket.socket(type=socket.SOCK_DGRAM)
    NONBLOCKING = socket.socket(); NONBLOCKING.setblocking(False)

    def echo(listening):
        peer, _address = listening.accept()
        peer.sendall(peer.recv(100)); peer.close()

    def talk(listening, sock):
        thread = threading.Thread(target=echo, args=(listening,)); thread.start()
        sock.connect(listening.getsockname()); sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"
        thread.join()
    """,
        """
    def test_pairs():
        assert STREAM[1].recv(3) == b"one"
        STREAM[0].sendall(b"here")
        assert STREAM[1].recv(100) == b"twohere" and STREAM[1].gettimeout() == 50
        assert STREAM[0].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == SIZE
        for ours, theirs in (DATAGRAM, PACKET):
            assert (theirs.recv(100), theirs.recv(100)) == (b"one", b"two")
            theirs.send(b"back")
            assert ours.recv(100) == b"back"
        STREAM[0].close()
        assert STREAM[1].recv(100) == b""
    def test_fresh():
        assert FRESH.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        FRESH.bind(("127.0.0.1", 0)); FRESH.listen()
        talk(FRESH, socket.socket())
    def test_datagrams():
        UDP.bind(("127.0.0.1", 0))
        UDP.sendto(b"me", UDP.getsockname())
        assert UDP.recv(100) == b"me"
    def test_families():
        UNIX.bind("\\0here"); UNIX.listen()
        talk(UNIX, socket.socket(socket.AF_UNIX))
        SIX.bind(("::1", 0)); SIX.listen()
        talk(SIX, socket.socket(socket.AF_INET6))
    def test_flags():
        NONBLOCKING.bind(("127.0.0.1", 0)); NONBLOCKING.listen()
        with pytest.raises(BlockingIOError): NONBLOCKING.accept()
    """,
    )


def test_event_loops(pytester: pytest.Pytester) -> None:
    passes(
        pytester,
        """
    import asyncio, concurrent.futures, os, select, selectors, signal, socket
    LOOP = asyncio.new_event_loop()
    POLL = select.epoll()
    PIPE = os.pipe(); os.write(PIPE[1], b"x")
    POLL.register(PIPE[0], select.EPOLLIN | select.EPOLLET)
    CLOSED = os.pipe(); POLL.register(CLOSED[0]); os.close(CLOSED[0]); os.close(CLOSED[1])
    NESTED = select.epoll(); NESTED.register(POLL, select.EPOLLIN)
    SELECTOR = selectors.DefaultSelector()
    PAIR = socket.socketpair(); SELECTOR.register(PAIR[0], selectors.EVENT_READ, "mine")
    DEVNULL = open("/dev/null"); EVENTS = selectors.SelectSelector()
    async def work():
        await asyncio.sleep(0.01)
        child = await asyncio.create_subprocess_exec("echo", "said", stdout=asyncio.subprocess.PIPE)
        said, _none = await child.communicate()
        return said, await asyncio.get_running_loop().run_in_executor(None, int, "3")
    """,
        """
    def test_loop():
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(LOOP.call_soon_threadsafe, lambda: None).result()
        assert LOOP.run_until_complete(asyncio.wait_for(work(), 60)) == (b"said\\n", 3)
        LOOP.close()
    def test_signal():
        got = []
        LOOP.add_signal_handler(signal.SIGUSR1, got.append, 1)
        os.kill(os.getpid(), signal.SIGUSR1)
        LOOP.run_until_complete(asyncio.sleep(0.01))
        assert got == [1]
    def test_poll():
        assert NESTED.poll(10) == [(POLL.fileno(), select.EPOLLIN)]
        assert POLL.poll(10) == [(PIPE[0], select.EPOLLIN)]
        POLL.unregister(PIPE[0]); POLL.register(PIPE[0], select.EPOLLOUT)
    def test_selector():
        assert SELECTOR.select(0) == []
        PAIR[1].send(b"x")
        assert [key.data for key, _events in SELECTOR.select(10)] == ["mine"]
    """,
    )


def test_devices_events_and_timers(pytester: pytest.Pytester) -> None:
    passes(
        pytester,
        """
    import ctypes, os, select, signal, struct, time
    RANDOM, ZERO, NULL = (open("/dev/" + name, "r+b", buffering=0) for name in ("urandom", "zero", "null"))
    FULL = open("/dev/full", "w")
    EVENT = os.eventfd(5, os.EFD_NONBLOCK); SAME = os.dup(EVENT)
    SEMAPHORE = os.eventfd(2, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    libc = ctypes.CDLL(None)
    def timer(first, interval):
        fd = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        values = (ctypes.c_long * 4)(0, interval, 0, first)
        assert libc.timerfd_settime(fd, 0, ctypes.byref(values), None) == 0
        return fd
    IDLE = timer(0, 0); PERIODIC = timer(1, 1000); EXPIRED = timer(1, 0); LATER = timer(10**9 - 1, 0)
    select.select([EXPIRED], [], [])
    MASK = ctypes.create_string_buffer(128); libc.sigaddset(MASK, signal.SIGUSR2)
    SIGNALS = libc.signalfd(-1, MASK, os.O_NONBLOCK)
    def wait(fd): return bool(select.select([fd], [], [], 60)[0])
    """,
        """
    def test_devices():
        assert len(RANDOM.read(16)) == 16 and RANDOM.read(16) != RANDOM.read(16)
        assert ZERO.read(3) == b"\\0\\0\\0" and NULL.read(3) == b"" and NULL.write(b"x") == 1
        with pytest.raises(OSError, match="No space"): print("x", file=FULL, flush=True)
    def test_events():
        os.eventfd_write(SAME, 2)
        assert os.eventfd_read(EVENT) == 7
        assert (os.eventfd_read(SEMAPHORE), os.eventfd_read(SEMAPHORE)) == (1, 1)
        for fd in (EVENT, SEMAPHORE):
            with pytest.raises(BlockingIOError): os.eventfd_read(fd)
    def test_timers():
        assert wait(EXPIRED) and struct.unpack("Q", os.read(EXPIRED, 8)) == (1,)
        assert wait(PERIODIC) and os.read(PERIODIC, 8) and wait(PERIODIC)
        assert wait(LATER)
        with pytest.raises(BlockingIOError): os.read(IDLE, 8)
    def test_signals():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        os.kill(os.getpid(), signal.SIGUSR2)
        assert struct.unpack_from("I", os.read(SIGNALS, 128)) == (signal.SIGUSR2,)
    """,
    )


def test_the_host_keeps_what_it_had(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import asyncio, os, socket
        LOOP = asyncio.new_event_loop()
        PIPE = os.pipe(); os.write(PIPE[1], b"waits")
        socket.setdefaulttimeout(5)
        PAIR = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        PAIR[0].send(b"one"); PAIR[0].send(b"two")
        socket.setdefaulttimeout(None)
        BLOCKING = socket.socketpair()
        SERVER = socket.create_server(("127.0.0.1", 0))
        def test_uses_all():
            assert os.read(PIPE[0], 100) == b"waits"
            assert PAIR[1].recv(100) == b"one"
            SERVER.close()
    """)
    pytester.makeconftest("""
        import asyncio, os, socket, sys
        def pytest_sessionfinish():
            there = sys.modules.get("test_the_host_keeps_what_it_had")
            assert os.read(there.PIPE[0], 100) == b"waits"
            assert (there.PAIR[1].recv(100), there.PAIR[1].recv(100)) == (b"one", b"two")
            assert os.get_blocking(there.BLOCKING[0].fileno()) and not os.get_blocking(there.PAIR[0].fileno())
            there.LOOP.run_until_complete(asyncio.sleep(0))
            socket.create_connection(there.SERVER.getsockname()).close()
            print("all there")
    """)
    result = run(pytester, "-s")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*all there*"])


def test_what_is_lost_is_named(pytester: pytest.Pytester) -> None:
    """Before the first test, and with each that fails."""
    pytester.makepyfile("""
        import os, pty, pytest, select, socket, subprocess
        CHILD = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        SERVER = socket.create_server(("127.0.0.1", 0))
        ADDRESS = SERVER.getsockname()
        PEER = socket.create_connection(SERVER.getsockname()); ACCEPTED = SERVER.accept()[0]
        MASTER, SLAVE = pty.openpty()
        EPOLL = select.epoll(); EPOLL.register(CHILD.stdout); NESTED = select.epoll(); NESTED.register(EPOLL)
        LONELY = socket.socketpair()[0]
        BOUND = socket.socket(type=socket.SOCK_DGRAM); BOUND.bind(("127.0.0.1", 0))

        def test_talks():
            CHILD.stdin.write("x\\n"); CHILD.stdin.flush()
            assert CHILD.stdout.readline() == "x\\n"

        def test_is_refused():
            with pytest.raises(ConnectionRefusedError): socket.create_connection(ADDRESS, timeout=50)

        def teardown_module(): CHILD.kill(); CHILD.wait()
    """)
    pytester.makeconftest("""
        import sys
        def pytest_unconfigure():
            child = sys.modules["test_what_is_lost_is_named"].CHILD
            child.kill(); child.wait()
    """)
    result = run(pytester)
    result.assert_outcomes(passed=1, failed=1)
    text = result.stdout.str()
    for name in ("a process", "5 sockets", "2 pipes", "2 event descriptors", "a pseudoterminal"):
        assert text.count(name) == 2, text
    result.stdout.fnmatch_lines([
        "isolation: started while tests were collected: *. Tests run in forks of this process*",
        "not here, as it was started while tests were collected: *",
    ])  # fmt: skip
