"""What was seen to go wrong in other runners of isolated tests: a green result that is none, and what got lost.

Each test names the fault. Those that other files of this folder look at already are not here.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

pytestmark = [pytest.mark.once("user"), pytest.mark.usefixtures("nothing_left")]


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


# Tests in sandboxes beside tests in pytest's own process.

MIXED = """
    import os
    import pytest

    here = pytest.mark.isolation(enabled=False)

    @pytest.fixture(scope="module")
    def rows():
        where = "inside" if os.getpid() < 50 else "here"
        print("up", where)
        yield [1]
        print("down", where)
"""


def test_a_module_may_begin_in_one_and_end_in_the_other(pytester: pytest.Pytester) -> None:
    """pytest-forked and pytest-isolate: a shared fixture was torn down in the fork, or not at all, and the next module's
    tests were errors ("previous item was not torn down properly")."""
    pytester.makepyfile(
        test_a=MIXED + "\n    @here\n    def test_1(rows): rows.append(2)\n    def test_2(rows): assert rows == [1]\n",
        test_b=MIXED + "\n    def test_3(rows): rows.append(2)\n    @here\n    def test_4(rows): assert rows == [1]\n",
        test_c=MIXED + "\n    @here\n    def test_5(): pass\n    def test_6(rows): assert rows == [1]\n",
    )
    result = run(pytester, "--isolation", "-s")
    result.assert_outcomes(passed=6)
    steps = re.findall(r"(?:up|down) (?:here|inside)", result.stdout.str())
    assert [step for step in steps if "here" in step] == ["up here", "down here"] * 2
    assert [step for step in steps if "inside" in step] == ["up inside", "down inside"] * 3


@pytest.mark.parametrize("last", ["here", "inside"])
def test_an_error_at_the_end_of_a_module_is_reported_wherever_it_ends(pytester: pytest.Pytester, last: str) -> None:
    """pytest-forked: what a shared fixture's teardown raised was nobody's error."""
    pytester.makepyfile(f"""
        import pytest

        @pytest.fixture(scope="module")
        def bad_end():
            yield
            raise ValueError("bad end")

        @pytest.mark.isolation(enabled={last == "here"})
        def test_one(bad_end): pass
        @pytest.mark.isolation(enabled={last == "inside"})
        def test_two(): pass
    """)
    result = run(pytester, "--isolation", "--junitxml=out.xml")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_two*", "*ValueError: bad end*"])


# Green results that are none.


def test_no_death_is_lost(pytester: pytest.Pytester) -> None:
    """insubprocess: a test that died was "deselected", and the run green; zygote, fast, xdist: after a few deaths, the other
    tests were not reported at all."""
    pytester.makepyfile("""
        import os, signal
        import pytest

        @pytest.mark.parametrize("how", range(24))
        def test_dies(how):
            if how % 4 == 0: os._exit(0)
            if how % 4 == 1: os._exit(7)
            if how % 4 == 2: os.abort()
            os.kill(os.getpid(), signal.SIGKILL)
        def test_lives(): pass
    """)
    result = run(pytester, "--isolation", "--isolation-jobs=2")
    assert result.ret == 1
    result.assert_outcomes(failed=24, passed=1)


def test_a_failed_subtest_fails(pytester: pytest.Pytester) -> None:
    """forked, isolate, zygote: its report was lost, and the test passed."""
    pytester.makepyfile("""
        import unittest
        def test_it(subtests):
            with subtests.test("bad", n=1): assert False
            with subtests.test("good"): pass
        class TestUnit(unittest.TestCase):
            def test_it(self):
                for n in range(3):
                    with self.subTest(n=n): self.assertNotEqual(n, 1)
    """)
    plain, isolated = run(pytester), run(pytester, "--isolation")
    assert isolated.ret == plain.ret == 1
    assert isolated.parseoutcomes() == plain.parseoutcomes()
    assert plain.parseoutcomes()["failed"] >= 2


def test_outcomes_within_a_class(pytester: pytest.Pytester) -> None:
    """bwrap: skip and xfail in a test were a pass, a strict xpass an xfail, and methods errors."""
    pytester.makepyfile("""
        import pytest
        class TestIt:
            def test_skip(self): pytest.skip("no")
            def test_xfail(self): pytest.xfail("known")
            @pytest.mark.xfail(strict=True)
            def test_strict(self): pass
            @pytest.mark.xfail(raises=ValueError)
            def test_other_error(self): raise KeyError
    """)
    result = run(pytester, "--isolation")
    result.assert_outcomes(skipped=1, xfailed=1, failed=2)
    assert result.ret == 1


@pytest.mark.parametrize("marker", ["isolation", "isolation()", "isolation(timeout='5s')"])
def test_a_bare_marker_isolates(pytester: pytest.Pytester, marker: str) -> None:
    """isolate: with a marker that has no arguments, the test ran in pytest's own process."""
    pytester.makepyfile(f"import os, pytest\n@pytest.mark.{marker}\ndef test_it(): assert os.getpid() < 10\n")
    run(pytester, "--isolation").assert_outcomes(passed=1)


def test_a_result_cannot_be_left_for_the_runner(pytester: pytest.Pytester) -> None:
    """forked, isolated, insubprocess, bwrap: whoever wrote a result to where the runner looks for it, and exited, had passed.
    Nothing of that kind is here: no file, no variable, no argument; and a report alone is not the end of a test."""
    pytester.makepyfile("""
        import os, sys
        def test_it(request):
            worker = request.config.pluginmanager.getplugin("isolation-worker")
            report = __import__("pytest").TestReport(request.node.nodeid, request.node.location, {}, "passed", None, "call")
            worker.pytest_runtest_logreport(report)
            os._exit(0)
    """)
    result = run(pytester, "--isolation")
    assert result.ret == 1
    assert result.parseoutcomes().get("errors", 0) + result.parseoutcomes().get("failed", 0) == 1


# Code of a test's in pytest's own process.


def test_nothing_is_rebuilt_from_what_a_test_names(pytester: pytest.Pytester) -> None:
    """isolate: `record_property` with a `__reduce__` ran in the parent; xdist: so did the function that a warning's class
    posed as. Both got the attacker what he wanted: a mark on the host."""
    mark = pytester.path.parent / "mark"
    pytester.makepyfile(f"""
        import os, warnings

        class Evil:
            def __reduce__(self): return os.mkdir, ({str(mark)!r},)
            def __repr__(self): return "evil"
        class Poses(Warning): pass
        Poses.__module__, Poses.__name__, Poses.__qualname__ = "os", "mkdir", "mkdir"

        def test_property(record_property): record_property("x", Evil()); record_property(Evil(), "x")
        def test_warning(): warnings.warn_explicit(Poses({str(mark)!r}), None, "f.py", 1)
        def test_assertion(): assert Evil() == 1
        def test_user_properties(request): request.node.user_properties.append(("x", {{Evil(): Evil()}}))
    """)
    result = run(pytester, "--isolation", "--junitxml=out.xml", "-o", "junit_family=xunit1")
    result.assert_outcomes(passed=3, failed=1, warnings=1)
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    assert not mark.exists()
    assert 'name="x" value="evil"' in (pytester.path / "out.xml").read_text()


# What was lost.


def test_warnings_as_errors_are_the_test_s_own(pytester: pytest.Pytester) -> None:
    """forked left two files open for each test: under `-W error` every test was an error."""
    pytester.makepyfile("""
        import gc, warnings
        import pytest
        @pytest.fixture(scope="module")
        def wide(): yield 1
        def test_clean(wide, tmp_path): gc.collect()
        def test_too(): gc.collect()
        def test_warns(): warnings.warn("x")
        @pytest.mark.isolation(enabled=False)
        def test_here(): gc.collect()
        def test_last(): gc.collect()
    """)
    result = run(pytester, "--isolation", "--isolation-jobs=2", "-W", "error", "-W", "ignore:.*fork.*:DeprecationWarning")
    result.assert_outcomes(passed=4, failed=1)
    assert "ResourceWarning" not in result.stdout.str() + result.stderr.str()


def test_output_before_a_crash_and_bytes_that_are_no_text(pytester: pytest.Pytester) -> None:
    """forked: a crash's output was lost; isolate: bytes that are not UTF-8 were an INTERNALERROR; isolated: what child
    processes wrote was lost."""
    pytester.makepyfile(r"""
        import os, sys
        def test_crash():
            print("printed"); print("to stderr", file=sys.stderr); os.system("echo by a child"); os.write(1, b"\xff\xfe raw\n")
            os.abort()
        def test_bytes(): os.write(1, b"\xff\xfe\x00 raw\n"); os.system("echo by a child"); assert False
    """)
    result = run(pytester, "--isolation")
    result.assert_outcomes(failed=2)
    text = result.stdout.str()
    for wanted, times in (("printed", 1), ("to stderr", 1), ("by a child", 2), (" raw", 2)):
        assert sum(line.endswith(wanted) and not line.startswith((" ", ">")) for line in text.splitlines()) == times, wanted


def test_what_it_left_running_is_ended(pytester: pytest.Pytester) -> None:
    """isolate waited for who held its pipes (8.7 s); in most, a process in a session of its own survived the run."""
    pytester.makepyfile("""
        import subprocess, sys
        def test_it():
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(77.125)"], start_new_session=True)
    """)
    result = run(pytester, "--isolation", "--isolation-timeout=60s")
    result.assert_outcomes(passed=1)
    assert result.duration < 60
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and b"time.sleep(77.125)" in _command(pid)]
    assert left == []


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_guards_in_the_same_process_can_be_passed_by_this_cannot(pytester: pytest.Pytester) -> None:
    """pytest-socket: `_socket`, or a child process; sideeffects: `_io.FileIO`; hygiene did not see builtins, nor files."""
    outside = pytester.path.parent / "outside"
    outside.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        pytester.makepyfile(f"""
            import _io, _socket, builtins, json, os, subprocess, sys
            import pytest
            PORT = {server.getsockname()[1]}
            def test_reaches():
                made = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
                with pytest.raises(OSError): made.connect(("127.0.0.1", PORT))
                code = f"import socket; socket.create_connection(('127.0.0.1', {{PORT}}))"
                assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode
            def test_writes():
                for path in ({str(outside / "x")!r}, os.path.expanduser("~/isolation-x"), "x", "/tmp/isolation-x"):
                    try: _io.FileIO(path, "w").close()
                    except OSError: pass
                    subprocess.run(["touch", path], stderr=subprocess.DEVNULL)
                builtins.HYG = json.HYG = 1
            def test_sees():
                assert not hasattr(builtins, "HYG") and not hasattr(json, "HYG") and not os.path.exists("/tmp/isolation-x")
        """)
        run(pytester, "--isolation").assert_outcomes(passed=3)
    found = [outside / "x", Path.home() / "isolation-x", pytester.path / "x", Path("/tmp/isolation-x")]
    assert [path for path in found if path.exists()] == []


def test_started_elsewhere(pytester: pytest.Pytester) -> None:
    """isolated, bwrap, fast: no test was found when pytest was started outside of its rootdir."""
    for name in ("project/pkg", "project/tests", "elsewhere"):
        (pytester.path / name).mkdir(parents=True)
    (pytester.path / "project" / "pytest.ini").write_text("[pytest]\npythonpath = pkg\n")
    (pytester.path / "project" / "pkg" / "product.py").write_text("VALUE = 1\n")
    (pytester.path / "project" / "tests" / "test_o.py").write_text(
        "def test_o():\n    import product\n    assert product.VALUE\ndef test_p(tmp_path): open(tmp_path / 'x', 'w').close()\n"
    )
    os.chdir(pytester.path / "elsewhere")
    for arguments in (
        ["../project/tests/test_o.py"],
        ["../project/tests/test_o.py::test_o", "../project/tests/test_o.py::test_p"],
        ["--rootdir=../project", "../project/tests"],
        ["-c", "../project/pytest.ini", "../project"],
    ):
        for mode in ("prepend", "importlib"):
            run(pytester, "--isolation", f"--import-mode={mode}", *arguments).assert_outcomes(passed=2)


def test_times_counts_and_the_end(pytester: pytest.Pytester) -> None:
    """isolated counted failures twice; fast ignored --maxfail and --sw; xdist hid what was deselected, and made of a file
    that is not there "no tests ran"; bwrap's times had the start of an interpreter in them."""
    pytester.makepyfile("""
        import time
        def test_slow(): time.sleep(0.3)
        def test_one(): assert 0
        def test_two(): assert 0
        def test_three(): assert 0
    """)
    result = run(
        pytester, "--isolation", "--maxfail=2", "--durations=1", "--deselect=test_times_counts_and_the_end.py::test_three"
    )
    result.assert_outcomes(passed=1, failed=2, deselected=1)
    result.stdout.re_match_lines([r"0\.[34]\ds call +\S+::test_slow"])
    for arguments, status in (
        (["nowhere.py"], 4),
        (["test_times_counts_and_the_end.py::test_none"], 4),
        (["-k", "none"], 5),
    ):
        assert run(pytester, "--isolation", *arguments).ret == status
    pytester.makepyfile(test_broken="import nothing_of_that_name")
    result = run(pytester, "--isolation")
    assert result.ret == 2
    result.assert_outcomes(errors=1)
    result = run(pytester, "--isolation", "--continue-on-collection-errors", "-k", "slow or broken")
    assert result.ret == 1
    result.assert_outcomes(passed=1, errors=1, deselected=3)


def test_a_fork_bomb_is_its_own_affair(pytester: pytest.Pytester) -> None:
    """None of them has a limit on processes, and none ends what is left of them."""
    pytester.makepyfile("""
        import os, time
        def test_bomb():
            made = 0
            try:
                while made < 500:
                    if os.fork() == 0: time.sleep(60)
                    made += 1
            except BlockingIOError: pass
            assert made < 500
        def test_next(): assert os.fork() or os._exit(0)
    """)
    run(pytester, "--isolation", "--isolation-pids=40").assert_outcomes(passed=2)
