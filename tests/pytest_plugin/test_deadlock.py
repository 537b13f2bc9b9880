"""What was started before the fork is named, and a test that waits for it fails with that reason: nothing hangs silently."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.once("user"), pytest.mark.usefixtures("nothing_left")]

LOST = """
    import os, queue, threading
    from concurrent.futures import ThreadPoolExecutor
    import pytest

    POOL = ThreadPoolExecutor(1, "of-the-module")
    POOL.submit(int).result()
    QUEUE = queue.Queue()

    def test_pool(): POOL.submit(int).result()

    def test_waits_again_and_again():
        while True:
            try: QUEUE.get(timeout=0.05)
            except queue.Empty: continue

    def test_threads_of_its_own_wait_as_well():
        lock = threading.Lock()
        lock.acquire()
        threading.Thread(target=lock.acquire, daemon=True).start()
        lock.acquire()

    def test_its_child_waits():
        if (pid := os.fork()) == 0: POOL.submit(int).result()
        POOL.submit(int).result()

    @pytest.fixture(scope="module")
    def wide(): return POOL.submit(int).result()
    def test_wide_fixture(wide): pass
"""


def test_a_test_that_waits_for_what_it_has_not(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(LOST)
    result = pytester.runpytest_subprocess("--isolation", "--isolation-jobs=5", "-p", "no:cacheprovider", timeout=300)
    result.assert_outcomes(failed=5)
    text = result.stdout.str()
    result.stdout.fnmatch_lines(
        ["isolation: started while tests were collected: a thread (of-the-module_0). Tests run in forks*"]
    )
    assert text.count("the test waits for ever: each of its threads waits for another") >= 5
    assert text.count("no threads or processes of it: a thread (of-the-module_0).") >= 5
    assert "in test_pool" in text  # its stack


WAITS = """
    import os, signal, subprocess, sys, threading, time
    import pytest

    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()  # lost, but nobody waits for it
    LONG = 14  # s: longer than a deadlock takes to be told

    def test_sleeps(): time.sleep(LONG)
    def test_reads():
        reader, writer = os.pipe()
        threading.Timer(LONG, os.write, (writer, b"x")).start()
        assert os.read(reader, 1) == b"x"
    def test_waits_for_its_thread():
        done = threading.Event()
        threading.Timer(LONG, done.set).start()
        assert done.wait()
    def test_one_long_wait(): assert not threading.Event().wait(LONG)
    def test_asks_again_and_again():
        end = time.monotonic() + LONG
        while time.monotonic() < end: assert not threading.Event().wait(0.2)
    def test_alarm():
        lock = threading.Lock()
        lock.acquire()
        signal.signal(signal.SIGALRM, lambda *_: lock.release())
        signal.alarm(LONG)
        lock.acquire()
    def test_timer_of_posix():
        import ctypes
        lock = threading.Lock()
        lock.acquire()
        signal.signal(signal.SIGUSR1, lambda *_: lock.release())
        libc, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
        class Event(ctypes.Structure):  # struct sigevent
            _fields_ = [("value", ctypes.c_void_p), ("signo", ctypes.c_int), ("notify", ctypes.c_int), ("rest", ctypes.c_byte * 48)]
        assert libc.timer_create(1, ctypes.byref(Event(None, signal.SIGUSR1, 0)), ctypes.byref(timer)) == 0
        assert libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, LONG, 0), None) == 0
        lock.acquire()
    def test_waits_for_its_child(): subprocess.run(["sleep", str(LONG)], check=True)
    def test_works():
        end = time.monotonic() + LONG
        while time.monotonic() < end: pass
    def test_lock_of_a_process_that_works():
        import multiprocessing
        lock = multiprocessing.Lock()
        lock.acquire()
        if os.fork() == 0:
            time.sleep(LONG)
            lock.release()
            os._exit(0)
        lock.acquire()
"""


def test_long_waits_that_come_to_an_end(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(WAITS)
    result = pytester.runpytest_subprocess("--isolation", "--isolation-jobs=10", "-p", "no:cacheprovider", timeout=300)
    result.assert_outcomes(passed=10)


def test_nothing_is_said_of_what_plugins_start(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        plugin="""
        import socket, threading, time
        def pytest_configure(config):
            config.server = socket.create_server(("127.0.0.1", 0))
            threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    """
    )
    pytester.makepyfile("def test_one(): pass")
    result = pytester.runpytest_subprocess("--isolation", "-p", "plugin", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    assert "started while" not in result.stdout.str()


def test_what_a_conftest_starts_is_named(pytester: pytest.Pytester) -> None:
    """All kinds; a pipe of pytest's own output, and what its capture makes of it, is none of them."""
    pytester.makeconftest("""
        import ctypes, multiprocessing, os, socket, subprocess, threading, time
        SERVER = socket.create_server(("127.0.0.1", 0))
        CHILD = subprocess.Popen(["sleep", "100"])
        PIPE = os.pipe(); os.close(PIPE[1])
        WATCH = ctypes.CDLL(None).inotify_init()
        for number in range(7):
            threading.Thread(target=time.sleep, args=(100,), daemon=True, name=f"t{number}").start()

        def pytest_unconfigure():
            SERVER.close(), CHILD.kill(), CHILD.wait()
    """)
    pytester.makepyfile("def test_one(): pass")
    result = pytester.runpytest_subprocess("--isolation", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    line = next(line for line in result.outlines if "started while" in line)
    for what in ("7 threads (t0, t1, t2, t3, t4, …)", "a process", "a socket", "a pipe", "an event descriptor"):
        assert what in line
