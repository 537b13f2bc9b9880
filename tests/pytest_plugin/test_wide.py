"""Fixtures wider than a function: set up once, seen as they were set up, torn down once, where plain pytest does it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.once("user"), pytest.mark.usefixtures("nothing_left")]

# Every set-up and teardown writes a line that reaches the terminal, whatever captures: what happened, and how often, shows.
CONFTEST = """
    import os, sys
    import pytest

    def tell(text):
        os.write(3 if False else sys.__stderr__.fileno(), b"")
        print(text)

    @pytest.fixture(scope="session")
    def database(tmp_path_factory):
        path = tmp_path_factory.mktemp("data") / "rows.txt"
        path.write_text("one\\n")
        tell("up session")
        yield path
        tell(f"down session {len(path.read_text().split())}")

    @pytest.fixture(scope="session", autouse=True)
    def always():
        tell("up always")
        yield
        tell("down always")

    @pytest.fixture(scope="module")
    def rows(database):
        tell("up module")
        yield ["x"]
        tell("down module")

    @pytest.fixture(scope="class")
    def record(rows):
        tell("up class")
        yield {"n": 0}
        tell("down class")

    @pytest.fixture(scope="session", params=["p", "q"])
    def kind(request):
        tell("up " + request.param)
        yield request.param
        tell("down " + request.param)
"""
CLEAN = """
    import unittest
    import pytest

    def setup_module(module): print("up xunit module"); module.seen = []
    def teardown_module(module): print("down xunit module", len(seen))

    def test_first(database, rows):
        seen.append(1)
        assert len(seen) == 1
        with database.open("a") as file: file.write("two\\n")
        rows.append("y")
        assert rows == ["x", "y"]

    def test_second(database, rows):
        seen.append(1)
        assert len(seen) == 1
        assert database.read_text() == "one\\n"
        assert rows == ["x"]
        database.unlink()

    class TestMethods:
        @classmethod
        def setup_class(cls): print("up xunit class"); cls.items = []
        @classmethod
        def teardown_class(cls): print("down xunit class", len(cls.items))
        def test_a(self, record):
            record["n"] += 1; self.items.append(1)
            assert (record, self.items) == ({"n": 1}, [1])
        def test_b(self, record):
            record["n"] += 1; self.items.append(1)
            assert (record, self.items) == ({"n": 1}, [1])

    class TestUnit(unittest.TestCase):
        @classmethod
        def setUpClass(cls): print("up setUpClass"); cls.items = []
        @classmethod
        def tearDownClass(cls): print("down setUpClass", len(cls.items))
        def test_a(self): self.items.append(1); assert self.items == [1]
        def test_b(self): self.items.append(1); assert self.items == [1]
"""
KINDS = """
    import pytest

    @pytest.mark.parametrize("n", [1, 2])
    def test_kinds(kind, n): assert kind in "pq"
"""


def steps(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if re.match(r"(up|down) ", line)]


def outcomes(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if re.match(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) ", line)]


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-rA", "-p", "no:cacheprovider", "-p", "no:randomly", *arguments)


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        test_one=CLEAN, test_kinds=KINDS, test_two="def test_other(database, rows): rows.append(1); assert rows == ['x', 1]"
    )
    return pytester


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_each_is_set_up_once_and_seen_as_it_was_then(suite: pytest.Pytester, jobs: str) -> None:
    result = run(suite, "--isolation", f"--isolation-jobs={jobs}")
    result.assert_outcomes(passed=11)
    happened = steps(result)
    for step in (
        "up session",
        "up always",
        "up xunit module",
        "up class",
        "up xunit class",
        "up setUpClass",
        "up p",
        "up q",
    ):
        assert happened.count(step) == 1, (step, happened)
    assert happened.count("up module") == 2  # one for each module
    # What tests did is not there at the end.
    for step in ("down session 1", "down xunit module 0", "down xunit class 0", "down setUpClass 0", "down always"):
        assert happened.count(step) == 1, (step, happened)


def test_the_order_is_that_of_plain_pytest(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_one="""
        def setup_module(): print("up xunit one")
        def teardown_module(): print("down xunit one")
        def test_a(database, rows): pass
        def test_b(database, rows): pass
        class TestC:
            def test_c(self, record): pass
            def test_d(self, record): pass
        """,
        test_two="def test_other(database, rows): pass",
    )
    plain, isolated = run(suite, "-s"), run(suite, "--isolation", "-s")
    assert steps(isolated) == steps(plain)
    assert outcomes(isolated) == outcomes(plain)


@pytest.mark.parametrize("grain", ["class", "module"])
def test_a_coarser_grain(suite: pytest.Pytester, grain: str) -> None:
    """What tests of a class, or a module, do to each other is then theirs, as in plain pytest."""
    plain, isolated = run(suite), run(suite, "--isolation", f"--isolation-per={grain}")
    wanted = [line for line in outcomes(plain) if grain == "module" or "::Test" in line]
    got = [line for line in outcomes(isolated) if grain == "module" or "::Test" in line]
    if grain == "module":  # the session's file is fresh for each module, and so there in the next
        wanted = [line for line in wanted if "test_two" not in line]
        got = [line for line in got if "test_two" not in line]
    assert got == wanted
    assert len([line for line in steps(isolated) if line == "up session"]) == 1


ERRORS = """
    import pytest

    @pytest.fixture(scope="module")
    def broken(): raise ValueError("no set-up")

    @pytest.fixture(scope="module")
    def skipping(): pytest.skip("not here")

    @pytest.fixture(scope="class")
    def bad_end():
        yield
        raise ValueError("bad end of class")

    @pytest.fixture(scope="module")
    def worse_end():
        print("captured at set-up")
        yield
        print("captured at teardown")
        raise ValueError("bad end of module")

    def test_broken(broken): pass
    def test_broken_too(broken): pass
    def test_skipped(skipping): pass
    class TestEnd:
        def test_one(self, bad_end): pass
        def test_two(self, bad_end, worse_end): assert False
    def test_last(worse_end): pass
"""


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_errors_are_reported_where_plain_pytest_does(pytester: pytest.Pytester, jobs: str) -> None:
    pytester.makepyfile(ERRORS)
    plain, isolated = run(pytester), run(pytester, "--isolation", f"--isolation-jobs={jobs}")
    assert isolated.ret == plain.ret == 1
    assert outcomes(isolated) == outcomes(plain)
    assert isolated.parseoutcomes() == plain.parseoutcomes()
    isolated.stdout.fnmatch_lines(["*ERROR at teardown of test_last*", "*bad end of module*", "*captured at teardown*"])


LEFT = """
    import os, socket, subprocess, sys, threading, time
    import pytest

    @pytest.fixture(scope="session")
    def thread():
        stop = threading.Event()
        made = threading.Thread(target=stop.wait)
        made.start()
        yield made
        stop.set()
        made.join()

    @pytest.fixture(scope="module")
    def uses_thread(thread): return [thread]

    @pytest.fixture(scope="session")
    def child():
        made = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        yield made
        made.kill()
        made.wait()

    @pytest.fixture(scope="session")
    def listener():
        with socket.create_server(("127.0.0.1", 0)) as made:
            yield made

    @pytest.fixture(scope="session")
    def shared():
        import mmap
        return mmap.mmap(-1, 4096)

    @pytest.fixture(scope="session")
    def daemon():
        return int(subprocess.check_output(["sh", "-c", "sleep 100 >/dev/null 2>&1 & echo $!"]))

    @pytest.fixture(scope="session")
    def plain():
        print("set up plain")
        return [0]

    def test_thread(plain, thread): assert thread.is_alive()
    def test_thread_again(uses_thread, plain): assert uses_thread[0].is_alive()
    def test_child(child, plain): assert child.poll() is None; child.kill(); child.wait()
    def test_child_again(child): assert child.poll() is None
    def test_listener(listener):
        with socket.create_connection(listener.getsockname()): listener.accept()[0].close()
    def test_listener_again(listener):
        with socket.create_connection(listener.getsockname()): listener.accept()[0].close()
    def test_daemon(daemon): os.kill(daemon, 9)
    def test_daemon_again(daemon): os.kill(daemon, 0); time.sleep(0.2); assert os.path.exists(f"/proc/{daemon}/stat")
    def test_shared(shared): shared[0] += 1; assert shared[0] == 1
    def test_shared_again(shared): shared[0] += 1; assert shared[0] == 1
"""


def test_what_a_fork_cannot_carry_is_set_up_in_each_and_said_so_once(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(LEFT)
    result = run(pytester, "--isolation")
    result.assert_outcomes(passed=10)
    text = result.stdout.str()
    for name, what in (("thread", "a thread"), ("child", "a process"), ("daemon", "a process"), ("listener", "a socket")):
        assert len(re.findall(f"fixture '{name}' leaves {what}", text)) == 1, text
    assert "--isolation=microvm" in text
    assert not re.findall("fixture '(plain|shared)'", text)
    # Once for each template that tests were forked of: what 'thread' and 'child' had left in the first two, is in none of them.
    assert text.count("set up plain") == 2


def test_what_such_a_fixture_leaves_in_modules_is_in_no_fork(pytester: pytest.Pytester) -> None:
    """A pool is made when it is first asked for; a fork that had it, but not its threads, would wait for ever."""
    pytester.makepyfile(
        pool="""
            from concurrent.futures import ThreadPoolExecutor
            made = None
            def ask():
                global made
                made = made or ThreadPoolExecutor(1)
                return made.submit(lambda: 42).result()
        """,
        conftest="""
            import pytest, pool
            @pytest.fixture(scope="session")
            def cheap(): return [1]
            @pytest.fixture(scope="session")
            def answer(): return pool.ask()
            @pytest.fixture(scope="module")
            def answer_of_module(): return pool.ask()
        """,
        test_session="""
            import pool
            def test_before(cheap): cheap.append(2); assert pool.made is None
            def test_one(cheap, answer): assert answer == 42 and pool.ask() == 42 and cheap == [1]
            def test_two(cheap, answer): assert answer == 42
            def test_neither(cheap): assert pool.made is None and pool.ask() == 42 and cheap == [1]
        """,
        test_with_module="""
            import pool
            def test_one(cheap, answer_of_module): assert answer_of_module == 42 and pool.ask() == 42
            def test_two(cheap): assert pool.made is None and pool.ask() == 42
        """,
    )
    result = run(pytester, "--isolation", "--isolation-timeout=60s")
    result.assert_outcomes(passed=6)
    text = result.stdout.str()
    for name in ("answer", "answer_of_module"):
        assert f"fixture '{name}' leaves a thread (ThreadPoolExecutor-" in text


def test_threads_of_libraries_count_like_pythons(pytester: pytest.Pytester) -> None:
    """This one is none of Python's: a thread of libc that calls nothing but pause(2)."""
    pytester.makepyfile("""
        import ctypes, os
        import pytest

        @pytest.fixture(scope="session")
        def native():
            libc = ctypes.CDLL(None)
            thread = ctypes.c_ulong()
            assert libc.pthread_create(ctypes.byref(thread), None, libc.pause, None) == 0
            return thread

        def threads(): return len(os.listdir("/proc/self/task"))
        def test_one(native): assert threads() == 2
        def test_two(native): assert threads() == 2
    """)
    result = run(pytester, "--isolation")
    result.assert_outcomes(passed=2)
    assert "fixture 'native' leaves a thread of a library" in result.stdout.str()


def test_threads_that_a_library_ends_and_starts_again_by_itself_do_not(pytester: pytest.Pytester) -> None:
    """OpenBLAS's, which numpy brings along."""
    pytester.makepyfile("""
        import pytest

        @pytest.fixture(scope="session")
        def product():
            import numpy
            print("made")
            made = numpy.ones((500, 500))
            return made @ made

        def test_one(product): assert (product @ product).shape == (500, 500)
        def test_two(product): assert (product @ product).shape == (500, 500)
    """)
    result = run(pytester, "--isolation")
    result.assert_outcomes(passed=2)
    text = result.stdout.str()
    assert "leaves" not in text
    assert text.count("made\n") == 1


def test_what_a_fixture_leaves_in_garbage_is_closed_before_forks_are_made(pytester: pytest.Pytester) -> None:
    """A file in a cycle is closed by the collector, and its number was some other descriptor's in every fork."""
    pytester.makepyfile("""
        import pytest

        class Holder: pass

        def garbage():
            for _ in range(5):
                held = Holder()
                held.itself, held.file = held, open(__file__)

        garbage()

        @pytest.fixture(scope="session")
        def wide(): garbage(); return 1

        @pytest.fixture(scope="module")
        def narrower(wide): garbage(); return 2

        @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
        def test_one(wide): assert wide == 1
        def test_two(narrower, tmp_path): assert open(__file__).read()
    """)
    result = run(pytester, "--isolation", "-W", "ignore::ResourceWarning")
    result.assert_outcomes(passed=2)


def test_a_fixture_can_be_said_to_be_shared(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import threading, time
        import pytest

        @pytest.fixture(scope="session")
        def helper():
            print("set up helper")
            threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
            return 5

        def test_one(helper): assert helper == 5
        def test_two(helper): assert helper == 5
    """)
    pytester.makeini("[pytest]\nisolation_share = helper")
    result = run(pytester, "--isolation")
    result.assert_outcomes(passed=2)
    assert result.stdout.str().count("set up helper") == 1
    assert "leaves" not in result.stdout.str()


@pytest.mark.parametrize("how", ["os._exit(3)", "os.kill(os.getpid(), 9)", "time.sleep(60)", "hoard()"])
def test_a_set_up_that_ends_its_process(pytester: pytest.Pytester, how: str) -> None:
    """Then each test sets it up for itself, and shows what is wrong with it."""
    pytester.makepyfile(f"""
        import os, time
        import pytest

        def hoard():
            held = []
            while True: held.append(bytearray(1 << 20))

        @pytest.fixture(scope="session")
        def fine():
            yield [1]

        @pytest.fixture(scope="session")
        def deadly(fine): {how}

        def test_before(fine): pass
        def test_deadly(deadly): pass
        def test_between(fine): fine.append(2); assert fine == [1, 2]
        def test_deadly_too(deadly): pass
        def test_after(fine): fine.append(2); assert fine == [1, 2]
    """)
    result = run(pytester, "--isolation", "--isolation-timeout=8s", "--isolation-memory=200M")
    result.assert_outcomes(passed=3, failed=2)


def test_teardown_that_hangs_or_dies(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os, time
        import pytest

        @pytest.fixture(scope="module")
        def hangs():
            yield
            time.sleep(60)

        def test_hangs(hangs): pass
    """,
        test_dies="""
        import os
        import pytest

        @pytest.fixture(scope="module")
        def dies():
            yield
            os._exit(0)

        def test_dies(dies): pass
    """,
    )
    result = run(pytester, "--isolation", "--isolation-timeout=8s")
    result.assert_outcomes(passed=2, errors=2)
    result.stdout.fnmatch_lines(["*timed out after 8s*", "*ended with status 0*"])


def test_stopping_early_still_tears_down(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest

        @pytest.fixture(scope="session")
        def held():
            yield
            print("let go")

        def test_one(held): assert False
        def test_two(held): pass
    """)
    result = run(pytester, "--isolation", "-x", "-s")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*let go*"])


def test_packages_and_their_own_set_up(pytester: pytest.Pytester) -> None:
    files = {
        "outer/__init__.py": "def setup_module(module): print('up outer')\ndef teardown_module(module): print('down outer')",
        "outer/conftest.py": "import pytest\n@pytest.fixture(scope='package')\ndef of_outer():\n    print('up package')\n    yield [0]\n    print('down package')",
        "outer/test_a.py": "def test_a(of_outer): of_outer.append(1); assert of_outer == [0, 1]\ndef test_b(of_outer): of_outer.append(1); assert of_outer == [0, 1]",
        "outer/inner/__init__.py": "",
        "outer/inner/test_c.py": "def test_c(of_outer): of_outer.append(1); assert of_outer == [0, 1]",
        "test_z.py": "def test_z(): pass",
    }
    for name, text in files.items():
        path = Path(pytester.path / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    result = run(pytester, "--isolation")
    result.assert_outcomes(passed=4)
    for step in ("up outer", "up package", "down package", "down outer"):
        assert steps(result).count(step) == 1, steps(result)


def test_wide_fixtures_of_doctests_and_dynamic_requests(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        lib='''
        def f():
            """
            >>> f()
            5
            """
            return 5
        ''',
        test_dynamic="""
        def test_dynamic(request): assert request.getfixturevalue("database").read_text() == "one\\n"
        def test_dynamic_too(request): request.getfixturevalue("rows").append(1)
        """,
    )
    result = run(pytester, "--isolation", "--doctest-modules")
    result.assert_outcomes(passed=3)


def test_a_warning_and_an_assertion_of_a_wide_fixture(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import warnings
        import pytest

        @pytest.fixture(scope="session")
        def warns(): warnings.warn("of the session"); return 1

        @pytest.fixture(scope="session")
        def fails(warns): assert warns == 2

        def test_one(warns): pass
        def test_two(fails): pass
    """)
    plain, isolated = run(pytester), run(pytester, "--isolation")
    assert isolated.parseoutcomes() == plain.parseoutcomes() == {"passed": 1, "errors": 1, "warnings": 1}
    isolated.stdout.fnmatch_lines(["*assert 1 == 2*", "*UserWarning: of the session*"])


@pytest.mark.parametrize("arguments", [[], ["--isolation-jobs=2"], ["--isolation-per=class"]], ids=" ".join)
def test_warnings_are_told_at_the_test_that_plain_pytest_tells_them_at(
    pytester: pytest.Pytester, arguments: list[str]
) -> None:
    """Those of a set-up at the first test, those of a teardown at the last, in their order: none is another test's, none lost,
    none told twice where a template is made anew (`threaded`)."""
    pytester.makeconftest("""
        import threading, warnings
        import pytest

        @pytest.fixture(scope="session", autouse=True)
        def of_session():
            for number in range(150): warnings.warn(f"session up {number}")
            yield
            warnings.warn("session down")
        @pytest.fixture(scope="module")
        def wide(request):
            warnings.warn(f"up in {request.module.__name__}")
            yield
            warnings.warn(f"down in {request.module.__name__}")
        @pytest.fixture(scope="class")
        def per_class():
            yield
            warnings.warn("class down")
        @pytest.fixture(scope="module")
        def threaded(request):
            done = threading.Event()
            thread = threading.Thread(target=done.wait)
            thread.start()
            yield
            done.set()
            thread.join()
    """)
    pytester.makepyfile(
        test_1="def test_a(wide): pass\ndef test_b(wide, threaded): pass\n",
        test_2="def test_c(wide): pass\nclass TestD:\n    def test_d(self, per_class): pass\n    def test_e(self, per_class): pass\n",
        test_2b="def test_wide(wide): pass\nclass TestE:\n    def test_class(self, per_class): pass\n",
        test_3="import warnings\ndef test_f(): warnings.warn('own')\ndef test_fails(wide): assert 0\n",
    )
    code = """
import json, sys, pytest
class Told:
    def pytest_warning_recorded(self, warning_message, when, nodeid): told.append([str(warning_message.message), when, nodeid])
told = []
status = pytest.main(sys.argv[1:], plugins=[Told()])
json.dump([int(status), told], open("told.json", "w"))
"""
    seen = []
    for more in ([], ["--isolation", *arguments]):
        pytester.run(sys.executable, "-c", code, "-p", "no:cacheprovider", "-W", "always", "-W", "ignore:.*fork.*", *more)
        seen.append(json.loads((pytester.path / "told.json").read_text()))
    assert len(seen[0][1]) > 150
    assert seen[1] == seen[0]


def test_a_fixture_is_not_set_up_before_a_test_asks_for_it(pytester: pytest.Pytester) -> None:
    """What it changes in the process must not be seen by the tests before. Nor is a fixture of class scope that a function
    outside of classes uses, which is that function's, set up for another."""
    pytester.makepyfile("""
        import os
        import pytest

        @pytest.fixture(scope="session")
        def first(): return 1
        @pytest.fixture(scope="session")
        def patches(): os.environ["PATCHED"] = "1"
        @pytest.fixture(scope="module")
        def own(first): os.environ["OWN"] = os.environ.get("OWN", "") + "x"
        @pytest.fixture(scope="class")
        def counted(): os.environ["COUNTED"] = os.environ.get("COUNTED", "") + "x"; return os.environ["COUNTED"]

        def test_before(first): assert "PATCHED" not in os.environ
        def test_counted(counted): assert counted == "x"
        def test_counted_too(counted): assert counted == "x"
        def test_patched(patches): assert os.environ["PATCHED"] and "OWN" not in os.environ
        def test_own(own): assert os.environ["OWN"] == "x" and os.environ["PATCHED"]
        class TestIt:
            def test_one(self, counted): assert counted == "x"
            def test_two(self, counted): assert counted == "x"
    """)
    run(pytester, "--isolation").assert_outcomes(passed=7)


def test_a_wide_fixture_may_ask_for_others_by_name(pytester: pytest.Pytester) -> None:
    """That are the module's, though it is the session's."""
    pytester.makepyfile("""
        import pytest

        @pytest.fixture(scope="session")
        def resource():
            print("up resource")
            yield ["value"]
        @pytest.fixture(scope="session")
        def asks(request):
            return request.getfixturevalue("resource")
        @pytest.fixture(scope="session")
        def asks_in_vain(request):
            return request.getfixturevalue("nothing")

        def test_one(asks): asks.append(1); assert asks == ["value", 1]
        def test_two(asks): asks.append(1); assert asks == ["value", 1]
        def test_three(asks_in_vain): pass
    """)
    result = run(pytester, "--isolation")
    result.assert_outcomes(passed=2, errors=1)
    assert steps(result).count("up resource") == 1
    result.stdout.fnmatch_lines(["*def test_three(asks_in_vain)*", "*fixture 'nothing' not found*"])


def test_a_set_up_that_ends_its_process_later_than_another(pytester: pytest.Pytester) -> None:
    """The template has been one for the first module, and for it has gone on."""
    pytester.makeconftest("""
        import os
        import pytest

        @pytest.fixture(scope="session")
        def fine():
            print("up fine")
            yield [1]
        @pytest.fixture(scope="session")
        def deadly(fine): os._exit(3)
    """)
    pytester.makepyfile(
        test_a="def test_a(fine): pass\n",
        test_b="def test_b(deadly): pass\ndef test_c(fine): fine.append(2); assert fine == [1, 2]\ndef test_d(deadly): pass\n",
        test_e="def test_e(fine): fine.append(2); assert fine == [1, 2]\n",
    )
    result = run(pytester, "--isolation")
    result.assert_outcomes(passed=3, failed=2)
    assert steps(result).count("up fine") <= 4


def test_a_template_that_dies_while_it_waits_is_made_again(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import signal, time
        import pytest

        @pytest.fixture(scope="session")
        def watched():
            signal.alarm(1)
            return [1]

        def test_one(watched): time.sleep(1.3)  # is in the template's PID namespace
        def test_two(watched): watched.append(2); assert watched == [1, 2]
    """)
    run(pytester, "--isolation").assert_outcomes(passed=1, failed=1)


def test_what_is_set_up_in_a_fork_ends_in_it(pytester: pytest.Pytester) -> None:
    """Though it is the session's: asked for by name, or not to be carried. What goes wrong then is an error."""
    pytester.makepyfile("""
        import threading
        import pytest

        @pytest.fixture(scope="session")
        def shared(): print("up shared"); yield 1; print("down shared")
        @pytest.fixture(scope="session")
        def by_name(shared): print("up by_name"); yield 2; print("down by_name"); raise ValueError("bad end")
        @pytest.fixture(scope="module")
        def thread(shared):
            stop = threading.Event()
            made = threading.Thread(target=stop.wait)
            made.start()
            yield made
            stop.set(); made.join(); print("down thread")

        def test_one(shared): pass
        def test_by_name(shared, request): assert request.getfixturevalue("by_name") == 2
        def test_thread(shared, thread): assert thread.is_alive()
        def test_thread_too(shared, thread): assert thread.is_alive()
        def test_last(shared): pass
    """)
    result = run(pytester, "--isolation")
    result.assert_outcomes(passed=5, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_by_name*", "*ValueError: bad end*"])
    for step, times in (("up shared", 1), ("down shared", 1), ("down by_name", 1), ("down thread", 2)):
        assert steps(result).count(step) == times, (step, steps(result))


def test_another_parameter_ends_what_depends_on_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest

        @pytest.fixture(scope="session", params=[1, 2])
        def kind(request): return request.param
        @pytest.fixture(scope="session")
        def depends(kind): print("up depends", kind); yield kind; print("down depends", kind)

        def test_one(depends): pass
        def test_two(kind): pass
        def test_three(kind, depends): assert kind == depends
    """)
    plain, isolated = run(pytester, "-s"), run(pytester, "--isolation", "-s")
    isolated.assert_outcomes(passed=6)
    assert sorted(steps(isolated)) == sorted(steps(plain))


@pytest.mark.parametrize("how", ["pytest.exit('enough')", "raise KeyboardInterrupt", "assert False"])
def test_what_is_set_up_is_torn_down_however_the_run_ends(pytester: pytest.Pytester, how: str) -> None:
    """What a fixture has done outside, where it may write, it undoes."""
    (pytester.path / "out").mkdir()
    pytester.makepyfile(f"""
        import pathlib, pytest
        @pytest.fixture(scope="session")
        def lock():
            path = pathlib.Path("out/lock")
            path.write_text("x")
            yield
            print("torn down")
            path.unlink()
        def test_1(lock): assert pathlib.Path("out/lock").exists()
        def test_2(lock): {how}
        def test_3(lock): pass
    """)
    mount = f"--isolation-mount={pytester.path}/out:{pytester.path}/out:rw"
    result = pytester.runpytest_subprocess("--isolation", mount, "-p", "no:cacheprovider", "-x", "-s")
    assert "torn down" in result.stdout.str()
    assert not (pytester.path / "out/lock").exists()
    assert result.parseoutcomes()["passed"] == 1
