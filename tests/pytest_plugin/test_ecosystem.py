"""Other plug-ins do with --isolation what they do without: each test runs the real one twice, and compares."""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import coverage  # here, since an extension module cannot be loaded again in a later test
import pytest
from pytest_isolation.peers.carriers import Carriers, Refused

pytestmark = pytest.mark.once("user")

ISOLATION = "--isolation"


def need(*modules: str) -> None:
    """A plug-in may be missing where someone works on other things."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")


def run(pytester: pytest.Pytester, *arguments: str, cache: bool = False) -> pytest.RunResult:
    quiet = [] if cache else ["-p", "no:cacheprovider"]
    return pytester.runpytest_subprocess(*quiet, *arguments, timeout=600)


def outcomes(result: pytest.RunResult) -> list[str]:
    """A line for each report of -rA, without the message, which may name a process or a time."""
    words = ("PASSED", "FAILED", "SKIPPED", "XFAIL", "XPASS", "ERROR", "RERUN", "SUBFAILED", "SUBPASSED")
    return sorted(line.split(" - ")[0] for line in result.outlines if line.startswith(words))


def both(pytester: pytest.Pytester, *arguments: str, cache: bool = False) -> tuple[pytest.RunResult, pytest.RunResult]:
    """Plain and isolated, with the same outcomes."""
    plain = run(pytester, "-rA", *arguments, cache=cache)
    isolated = run(pytester, "-rA", *arguments, ISOLATION, cache=cache)
    assert outcomes(isolated) == outcomes(plain), isolated.stdout.str() + isolated.stderr.str()
    assert outcomes(plain)
    assert isolated.ret == plain.ret
    return plain, isolated


def told_by_both(plain: pytest.RunResult, isolated: pytest.RunResult, pattern: str) -> list[str]:
    """What of their output matches, sorted: the same in both, as their outcomes are."""
    assert isolated.parseoutcomes() == plain.parseoutcomes()
    told = [sorted(re.findall(pattern, each.stdout.str())) for each in (plain, isolated)]
    assert told[0] == told[1]
    return told[0]


# coverage.py

CODE = """
    def branchy(n):
        if n > 1:
            return "big"
        elif n == 1:
            return "one"
        return "small"

    def in_fixture():
        return 1

    def in_teardown():
        return 2

    def in_thread():
        return 3

    def in_child():
        return 4

    def never():
        return 5
"""
TESTS = """
    import subprocess, sys, threading
    import pytest
    from app import code

    @pytest.fixture(scope="module")
    def wide():
        yield code.in_fixture()
        code.in_teardown()

    def test_a(wide): assert code.branchy(2) == "big"
    def test_b(wide): assert code.branchy(0) == "small"
    def test_lazy():
        from app import lazy
        assert lazy.f() == 1
    def test_thread():
        thread = threading.Thread(target=code.in_thread)
        thread.start()
        thread.join()
    def test_fails(): assert code.branchy(1) == "nope"
    def test_child(): subprocess.run([sys.executable, "-c", "from app import code; code.in_child()"], check=True)
"""


@pytest.fixture
def measured(pytester: pytest.Pytester) -> pytest.Pytester:
    need("pytest_cov")
    package = pytester.mkpydir("app")
    package.joinpath("lazy.py").write_text("def f():\n    return 1\n")
    pytester.makepyfile(**{"app/code": CODE, "tests/test_it": TESTS})
    pytester.syspathinsert()
    return pytester


def table(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if line.startswith(("app/", "TOTAL", "FAIL Required", "Required"))]


def data(path: Path) -> dict[tuple[str, str], set[object]]:
    """By context and file, what a data file holds; the run with a child's process id in it has none."""
    found = coverage.CoverageData(str(path))
    found.read()
    content = {}
    for context in found.measured_contexts():
        found.set_query_context(context)
        for file in found.measured_files():
            numbers = set(found.arcs(file) or ()) or set(found.lines(file) or ())
            if numbers:
                content[context, file] = numbers
    assert content
    return content


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cov=app"],
        ["--cov=app", "--cov-branch"],
        ["--cov=.", "--cov-branch"],
        ["--cov=app", "--cov-context=test"],
        ["--cov=app", "--cov-fail-under=99"],
        ["--cov=app", "--cov-fail-under=10"],
    ],
    ids=" ".join,
)
def test_cov(measured: pytest.Pytester, arguments: list[str]) -> None:
    arguments = ["-p", "pytest_cov", *arguments, "tests"]
    results = []
    for more in ([], [ISOLATION]):
        done = run(measured, "-rA", *arguments, *more)
        results.append((outcomes(done), table(done), done.ret, data(measured.path / ".coverage")))
        (measured.path / ".coverage").unlink()
    assert results[1] == results[0]
    assert any(line.startswith("TOTAL") for line in results[0][1])


def test_cov_with_xdist(measured: pytest.Pytester) -> None:
    need("xdist")
    plain, isolated = both(measured, "-p", "pytest_cov", "-p", "xdist", "-n2", "--cov=app", "--cov-branch", "tests")
    assert table(isolated) == table(plain)


@pytest.mark.parametrize("config", ["branch = true\nparallel = true", "patch = subprocess", "relative_files = true"])
def test_coverage_run(measured: pytest.Pytester, config: str) -> None:
    """Without pytest-cov; processes that a test starts are counted where coverage.py is told to."""
    (measured.path / ".coveragerc").write_text(f"[run]\nsource = app\n{config}\n")
    reports = []
    for more in ([], [ISOLATION]):
        for old in measured.path.glob(".coverage.*"):
            old.unlink()
        command = [sys.executable, "-m", "coverage", "run", "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests", *more]
        done = measured.run(*command)
        assert "1 failed, 5 passed" in done.stdout.str()
        if list(measured.path.glob(".coverage.*")):
            measured.run(sys.executable, "-m", "coverage", "combine")
        report = measured.run(sys.executable, "-m", "coverage", "report", "-m")
        reports.append(report.outlines)
    assert reports[1] == reports[0]
    assert any(line.startswith("TOTAL") for line in reports[0])


def test_coverage_of_a_liar(measured: pytest.Pytester) -> None:
    """A test says what it likes of lines and files: only lines of the project's own files are taken."""
    measured.makepyfile(
        **{
            "tests/test_it": """
        import pytest, sys
        from app import code

        def test_lies(request):
            carriers = request.config.pluginmanager.getplugin("isolation-worker")._carriers
            recorder = next(each for each in carriers._found() if each.name == "coverage")._recorder
            for path in ("/etc/passwd", sys.modules["pytest"].__file__, "/nowhere/app/code.py", "app/code.py\\0"):
                recorder.add_lines({path: {1, 2}})
            recorder.add_lines({code.__file__: {2, 999_999}})
    """
        }
    )
    done = run(measured, "-p", "pytest_cov", "--cov=app", ISOLATION, "tests")
    assert done.ret == 0
    assert {os.path.basename(file) for _context, file in data(measured.path / ".coverage")} == {"__init__.py", "code.py"}
    with sqlite3.connect(measured.path / ".coverage") as database:
        names = {Path(path).name for (path,) in database.execute("select path from file")}
    assert names <= {"__init__.py", "code.py", "lazy.py"}


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"[]",
        b"null",
        b'{"branch": false, "contexts": {"": {"a": [-1]}}, "tracers": {}}',
        b'{"branch": false, "contexts": {"": {"a": [true]}}, "tracers": {}}',
        b'{"branch": false, "contexts": {"": {"a": [1e9]}}, "tracers": {}}',
        b'{"branch": false, "contexts": {"": {"a": [99999999]}}, "tracers": {}}',
        b'{"branch": true, "contexts": {}, "tracers": {}}',
        b"[" * 100_000,
    ],
    ids=lambda sent: sent.decode()[:60],
)
def test_what_is_not_coverage_is_refused(request: pytest.FixtureRequest, sent: bytes) -> None:
    measuring = coverage.Coverage(data_file=None, branch=False)
    with measuring.collect():
        carriers = Carriers(request.config)
        with pytest.raises(Refused):
            carriers.check("coverage", request.node, sent)
        with pytest.raises(Refused):
            carriers.check("pickle", request.node, sent)


# Plug-ins that decide on when and how a test runs.

SUITE = """
    import unittest
    import pytest

    @pytest.fixture(scope="module")
    def wide(): return 1
    def test_pass(wide): assert wide == 1
    def test_fail(wide): assert wide == 2
    def test_skip(): pytest.skip("not today")
    @pytest.mark.xfail
    def test_xfail(): assert 0
    @pytest.fixture
    def broken(): raise ValueError("in setup")
    def test_error(broken): pass
    @pytest.mark.parametrize("n", range(10))
    def test_many(n): assert n != 7
    class TestCase(unittest.TestCase):
        @classmethod
        def setUpClass(cls): cls.shared = 1
        def test_unit(self): self.assertEqual(self.shared, 1)
        def test_unit_fails(self): self.assertEqual(self.shared, 2)
        @unittest.skip("unit skip")
        def test_unit_skip(self): pass
        def test_sub(self):
            for n in range(3):
                with self.subTest(n=n): self.assertNotEqual(n, 1)
    def test_subtests(subtests):
        for n in range(3):
            with subtests.test(n=n): assert n != 1
"""


@pytest.mark.parametrize("how", [["-n2"], ["-n2", "--dist=loadfile"], ["-n2", "--dist=loadgroup"], ["-n0"]], ids=" ".join)
def test_xdist(pytester: pytest.Pytester, how: list[str]) -> None:
    need("xdist")
    pytester.makepyfile(test_one=SUITE, test_two=SUITE)
    both(pytester, "-p", "xdist", *how)


def test_xdist_goes_on_after_a_crash(pytester: pytest.Pytester) -> None:
    need("xdist")
    pytester.makepyfile("import os\ndef test_dies(): os.abort()\ndef test_lives(): pass\n")
    done = run(pytester, "-p", "xdist", "-n2", ISOLATION)
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*SIGABRT*"])
    done.stdout.no_fnmatch_line("*worker*crashed*")


RERUNS = """
    import os
    import pytest

    def test_always(): assert 0
    @pytest.mark.flaky(reruns=2)
    def test_third(request):
        assert not os.path.exists("made-here")
        open("made-here", "w").close()
        assert request.node.execution_count == 3
    def test_ok(): pass
    @pytest.fixture
    def bad(): raise ValueError
    def test_setup(bad): pass
    @pytest.fixture
    def late():
        yield
        raise KeyError
    def test_both(late): assert 0
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--reruns=2"],
        ["--reruns=1", "--only-rerun=Value"],
        ["--reruns=3", "--max-suite-reruns=2"],
        ["-p", "xdist", "-n2", "--reruns=2"],
    ],
    ids=" ".join,
)
def test_rerunfailures(pytester: pytest.Pytester, arguments: list[str]) -> None:
    need("pytest_rerunfailures", "xdist")
    pytester.makepyfile(
        RERUNS.replace('assert not os.path.exists("made-here")', 'if os.path.exists("made-here"): os.unlink("made-here")')
    )
    _plain, isolated = both(pytester, "-p", "rerunfailures", *arguments)
    assert "rerun" in isolated.outlines[-1]


def test_each_rerun_is_in_a_fork_of_its_own(pytester: pytest.Pytester) -> None:
    need("pytest_rerunfailures")
    pytester.makepyfile(RERUNS)
    done = run(pytester, "-p", "rerunfailures", "-k", "test_third", ISOLATION)
    assert done.parseoutcomes() == {"passed": 1, "rerun": 2, "deselected": 4}


FLAKY = """
    import pytest
    from flaky import flaky

    first, second, third = [], [], []

    @flaky
    def test_second():
        first.append(1)
        assert len(first) == 2
    @flaky(max_runs=3)
    def test_never(): assert 0
    @pytest.mark.flaky(max_runs=4, min_passes=2)
    def test_twice():
        second.append(1)
        assert len(second) != 2
    @pytest.mark.flaky
    def test_skips(): pytest.skip("not today")
    @pytest.fixture
    def bad(): raise ValueError
    @pytest.mark.flaky
    def test_setup(bad): pass
    @pytest.fixture(scope="module")
    def wide(): return []
    @flaky
    class TestAll:
        def test_method(self, wide):
            third.append(1)
            assert len(third) == 2
    def test_plain(): assert 0
"""


@pytest.mark.parametrize(
    "arguments", [[], ["--force-flaky", "--max-runs=3"], ["--no-success-flaky-report"], ["-p", "xdist", "-n1"]], ids=" ".join
)
def test_flaky(pytester: pytest.Pytester, arguments: list[str]) -> None:
    """A retry is a retry, and told of at the end."""
    need("flaky", "xdist")
    pytester.makepyfile(FLAKY)
    plain, isolated = both(pytester, "-p", "flaky.flaky_pytest_plugin", *arguments)
    assert any("runs remaining" in line for line in told_by_both(plain, isolated, r"(?m)^test_.*(?:failed|passed).*$"))


RETRIES = """
    import pytest

    count = [0]

    @pytest.fixture(scope="module")
    def wide(): return []
    @pytest.mark.flaky(retries=2)
    def test_third(wide):
        count[0] += 1
        assert count[0] == 3
    @pytest.mark.flaky(retries=1)
    def test_never(wide): assert 0
    @pytest.mark.flaky(retries=3, only_on=[KeyError])
    def test_other_error(): raise ValueError
    @pytest.fixture
    def bad(): raise ValueError
    @pytest.mark.flaky
    def test_setup(bad): pass
    @pytest.mark.flaky
    def test_skips(): pytest.skip("not today")
    def test_plain(): assert 0
    def test_fine(): pass
"""


@pytest.mark.parametrize("arguments", [[], ["--retries=2"], ["--retry-outcome=again"], ["-p", "xdist", "-n2"]], ids=" ".join)
def test_retry(pytester: pytest.Pytester, arguments: list[str]) -> None:
    need("pytest_retry", "xdist")
    pytester.makepyfile(RETRIES)
    plain, isolated = both(pytester, "-p", "pytest_retry.retry_plugin", *arguments)
    assert told_by_both(plain, isolated, r"(?m)^\ttest_.* attempts?.*$")


@pytest.mark.parametrize(
    ("plugin", "sent", "said"),
    [
        (None, ["retried"], "no such outcome"),
        ("pytest_retry.retry_plugin", ["retried", "retried"], "a second report of its call"),
        (
            "flaky.flaky_pytest_plugin",
            ["call", "teardown", "setup", "call", "teardown", "setup"],
            "a second report of its setup",
        ),
    ],
)
def test_no_test_is_retried_more_often_than_its_marker_says(
    pytester: pytest.Pytester, plugin: str | None, sent: list[str], said: str
) -> None:
    need("flaky", "pytest_retry")
    pytester.makeini("[pytest]\nmarkers = flaky: runs again\n")
    pytester.makepyfile(f"""
        import pytest
        @pytest.mark.flaky
        def test_it(request):
            for each in {sent}:
                outcome, when = ("retried", "call") if each == "retried" else ("passed", each)
                report = pytest.TestReport(request.node.nodeid, request.node.location, {{}}, outcome, None, when)
                request.node.ihook.pytest_runtest_logreport(report=report)
        def test_fine(): pass
    """)
    done = run(pytester, *(["-p", plugin] if plugin else []), ISOLATION)
    done.stdout.fnmatch_lines([f"*sent a report that pytest cannot use ({said}*"])
    assert done.ret == 1


DEPENDENCIES = """
    import os
    import pytest
    from pytest_dependency import depends

    dependency = pytest.mark.dependency

    @dependency
    def test_a(): pass
    @dependency(name="named")
    def test_b(): assert 0
    @dependency(depends=["test_a"])
    def test_on_a(): pass
    @dependency(depends=["named"])
    def test_on_b(): raise RuntimeError
    @dependency(depends=["test_on_a", "test_a"])
    def test_on_both(): pass
    @dependency(depends=["test_on_b"])
    def test_on_skipped(): raise RuntimeError
    @dependency(depends=["test_unknown"])
    def test_on_unknown(): pass
    @dependency
    @pytest.mark.parametrize("n", [0, 1])
    def test_many(n): assert n
    @dependency(depends=["test_many[1]"])
    def test_on_one(): pass
    @dependency(depends=["test_many[0]"])
    def test_on_zero(): raise RuntimeError
    def test_asks(request): depends(request, ["test_a"])
    def test_asks_in_vain(request):
        depends(request, ["named"])
        raise RuntimeError
    @pytest.fixture(scope="class")
    def wide(): return 1
    class TestClass:
        @dependency
        def test_one(self, wide): pass
        @dependency(depends=["TestClass::test_one"])
        def test_two(self, wide): pass
        @dependency(depends=["test_one"], scope="class")
        def test_three(self): pass
        @dependency(depends=["{module}::test_a", "{module}::TestClass::test_two"], scope="session")
        def test_four(self): pass
        @dependency(depends=["{module}::test_b"], scope="session")
        def test_five(self): raise RuntimeError
    @pytest.mark.isolation(enabled=False)
    @dependency(depends=["test_on_a"])
    def test_here(): pass
    @dependency(depends=["test_here"])
    def test_on_here(): pass
"""


@pytest.mark.parametrize(
    "arguments", [[], ["--isolation-jobs=2"], ["--isolation-per=class"], ["--isolation-per=module"], ["--ignore-unknown-dependency"]],
    ids=" ".join,
)  # fmt: skip
def test_dependency(pytester: pytest.Pytester, arguments: list[str]) -> None:
    """A dependent test runs, in a fork as elsewhere, when what it depends on has passed."""
    need("pytest_dependency")
    pytester.makepyfile(
        test_one=DEPENDENCIES.replace("{module}", "test_one.py"),
        test_two="""
        import pytest
        @pytest.mark.dependency(depends=["test_one.py::TestClass::test_four"], scope="session")
        def test_on_other_module(): pass
        @pytest.mark.dependency(depends=["test_one.py::test_b"], scope="session")
        def test_on_other_failure(): raise RuntimeError
        def test_plain(): pass
    """,
    )
    mine = [each for each in arguments if "isolation" in each]
    theirs = [each for each in arguments if each not in mine]
    plain = run(pytester, "-rA", "-v", "-p", "pytest_dependency", *theirs)
    isolated = run(pytester, "-rA", "-v", "-p", "pytest_dependency", *theirs, ISOLATION, *mine)
    assert outcomes(isolated) == outcomes(plain), isolated.stdout.str()
    assert isolated.parseoutcomes() == plain.parseoutcomes()
    assert theirs or "RuntimeError" not in isolated.stdout.str()


def test_dependency_on_all_tests(pytester: pytest.Pytester) -> None:
    """Where each is one that others may depend on; and on one that dies."""
    need("pytest_dependency")
    pytester.makeini("[pytest]\nautomark_dependency = true\n")
    pytester.makepyfile("""
        import os, pytest
        def test_a(): pass
        def test_dies():
            if os.getpid() < 10: os._exit(0)
            assert 0
        @pytest.mark.dependency(depends=["test_a"])
        def test_on_a(): pass
        @pytest.mark.dependency(depends=["test_dies"])
        def test_on_death(): raise RuntimeError
    """)
    both(pytester, "-p", "pytest_dependency")


FEATURE = """
    @shop
    Feature: Shopping
        A description

        Rule: Nobody pays twice
            @good
            Scenario: Pay
                Given a basket
                When I pay
                Then I have "nothing"

        Scenario: Fail
            Given a basket
            When I fail
            Then I have "nothing"
"""
STEPS = """
    from pytest_bdd import given, parsers, scenarios, then, when

    scenarios("shop.feature")

    @given("a basket", target_fixture="basket")
    def basket(): return []
    @when("I pay")
    def pay(basket): basket.append("nothing")
    @when("I fail")
    def fail(): assert 0
    @then(parsers.parse('I have "{what}"'))
    def have(basket, what): assert basket == [what]
    def test_no_scenario(): pass
"""


@pytest.mark.parametrize("verbose", ["", "-v", "-vv"])
def test_bdd(pytester: pytest.Pytester, verbose: str) -> None:
    need("pytest_bdd")
    pytester.makefile(".feature", shop=FEATURE)
    pytester.makepyfile(STEPS)
    seen = []
    for more in ([], [ISOLATION]):
        options = [
            "-p",
            "pytest-bdd",
            "--cucumberjson=out.json",
            "--gherkin-terminal-reporter",
            *([verbose] if verbose else []),
        ]
        done = run(pytester, *options, *more)
        lines = [
            line.strip()
            for line in done.outlines
            if re.match(r"\s*(Feature|Rule|Scenario|Given|When|Then|\* |PASSED|FAILED)", line)
        ]
        data = json.loads(re.sub(r'(?<="duration": )\d+|0x\w+', "0", (pytester.path / "out.json").read_text()))
        seen.append((done.ret, done.parseoutcomes(), lines, data))
    assert seen[1] == seen[0]
    assert len(seen[0][3][0]["elements"]) == 2
    assert not verbose or "Feature: Shopping" in seen[0][2]


def test_scenario_of_a_liar(pytester: pytest.Pytester, request: pytest.FixtureRequest) -> None:
    need("pytest_bdd")
    pytester.makefile(".feature", shop=FEATURE)
    pytester.makepyfile(STEPS)
    pytester.makeconftest("""
        import pytest
        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_runtest_makereport(item, call):
            report = yield
            if report.when == "call": report.pytest_bdd_context = {"scenario": {"steps": [1], "feature": []}, "name": []}
            return report
    """)
    done = run(
        pytester,
        "-p",
        "pytest-bdd",
        "--cucumberjson=out.json",
        "--gherkin-terminal-reporter",
        "-v",
        "-k",
        "no_scenario",
        ISOLATION,
    )
    assert done.parseoutcomes()["passed"] == 1
    assert json.loads((pytester.path / "out.json").read_text()) == []


@pytest.mark.parametrize("method", ["signal", "thread"])
@pytest.mark.parametrize("mark", ["", ", func_only=True"])
def test_timeout(pytester: pytest.Pytester, method: str, mark: str) -> None:
    """The thread method ends all of plain pytest; here it can only end the one test."""
    need("pytest_timeout")
    pytester.makepyfile(f"""
        import time
        import pytest

        @pytest.mark.timeout(0.5, method={method!r}{mark})
        def test_hangs(): time.sleep(30)
        @pytest.mark.timeout(20, method={method!r}{mark})
        def test_after(): pass
    """)
    done = run(pytester, "-p", "timeout", ISOLATION)
    done.assert_outcomes(passed=1, failed=1)
    assert "from pytest-timeout" in done.stdout.str() or (method == "thread" and mark)


def test_session_timeout(pytester: pytest.Pytester) -> None:
    need("pytest_timeout")
    pytester.makepyfile("import time\ndef test_a(): time.sleep(1)\ndef test_b(): pass\n")
    _plain, isolated = both(pytester, "-p", "timeout", "--session-timeout=0.5")
    assert "session-timeout" in isolated.stdout.str()


def test_randomly(pytester: pytest.Pytester) -> None:
    need("pytest_randomly")
    pytester.makepyfile("""
        import random, pytest
        @pytest.mark.parametrize("n", range(8))
        def test_it(n): print("DRAWN", n, random.random())
    """)
    drawn = []
    for more in ([], [ISOLATION], [ISOLATION, "--isolation-jobs=2"]):
        done = run(pytester, "-p", "randomly", "--randomly-seed=7", "-s", *more)
        assert done.ret == 0
        drawn.append(re.findall(r"DRAWN (\d+) (\S+)", done.stdout.str()))
    assert drawn[0] == drawn[1] == drawn[2]
    assert [n for n, _ in drawn[0]] != sorted(n for n, _ in drawn[0])


# Plug-ins that run a test's function.


def test_asyncio(pytester: pytest.Pytester) -> None:
    need("pytest_asyncio")
    pytester.makepyfile("""
        import asyncio, pytest, pytest_asyncio
        pytestmark = pytest.mark.asyncio(loop_scope="module")

        @pytest_asyncio.fixture(loop_scope="module", scope="module")
        async def wide():
            await asyncio.sleep(0)
            loop = asyncio.get_running_loop()
            yield loop
            assert loop is asyncio.get_running_loop()

        async def test_wide(wide): assert asyncio.get_running_loop() is wide
        async def test_wide_again(wide): assert asyncio.get_running_loop() is wide
        async def test_fails(wide): assert 0
        @pytest.mark.asyncio(loop_scope="function")
        async def test_function(): await asyncio.sleep(0.01)
        @pytest.mark.asyncio(loop_scope="session")
        async def test_session():
            server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
            server.close()
    """)
    both(pytester, "-p", "asyncio", "-o", "asyncio_default_fixture_loop_scope=function")


def test_anyio(pytester: pytest.Pytester) -> None:
    need("anyio")
    pytester.makepyfile("""
        import anyio, pytest
        pytestmark = pytest.mark.anyio

        @pytest.fixture(scope="module")
        def anyio_backend(): return "asyncio"
        @pytest.fixture(scope="module")
        async def wide():
            await anyio.sleep(0)
            yield 1

        async def test_a(wide): await anyio.sleep(0.01)
        async def test_b(wide): assert wide == 2
        async def test_c(): await anyio.sleep(0.01)
    """)
    both(pytester, "-p", "anyio")


HYPOTHESIS = """
    from hypothesis import given, strategies as st

    @given(st.integers())
    def test_int(n): assert n < 1000
    @given(st.text())
    def test_text(text): pass
"""


def test_hypothesis(pytester: pytest.Pytester) -> None:
    """What the first run finds, the second begins with; the statistics say so."""
    need("hypothesis")
    pytester.makepyfile(HYPOTHESIS)
    both(pytester, "-p", "hypothesispytest", "--hypothesis-seed=1")
    for path in (pytester.path / ".hypothesis" / "examples").rglob("*"):
        if path.is_file():
            path.unlink()
    first = run(pytester, "-p", "hypothesispytest", "--hypothesis-show-statistics", ISOLATION)
    assert "during generate phase" in first.stdout.str()
    found = [path for path in (pytester.path / ".hypothesis" / "examples").rglob("*") if path.is_file()]
    assert found
    assert not any(os.access(path, os.X_OK) for path in found)
    second = run(pytester, "-p", "hypothesispytest", "-k", "test_int", "--hypothesis-show-statistics", ISOLATION)
    assert "during reuse phase" in second.stdout.str()
    assert "during generate phase" not in second.stdout.str()


def test_examples_of_a_liar(pytester: pytest.Pytester, request: pytest.FixtureRequest) -> None:
    need("hypothesis")
    from hypothesis.database import DirectoryBasedExampleDatabase
    from pytest_isolation.peers.hypothesis import HypothesisCarrier

    carrier = HypothesisCarrier(DirectoryBasedExampleDatabase(pytester.path / "here" / "examples"))
    key, value = (base64.b64encode(each).decode() for each in (b"../../../outside", b"x"))
    carrier.apply(request.node, carrier.check(request.node, [[True, key, value]]))
    made = [path for path in pytester.path.rglob("*") if path.is_file()]
    assert made
    assert all(path.is_relative_to(pytester.path / "here" / "examples") for path in made)
    for bad in ([[True, "", value]], [[True, key, base64.b64encode(bytes(2 << 20)).decode()]], [[True, "!", value]], 5):
        with pytest.raises((Refused, ValueError)):
            carrier.check(request.node, bad)


def test_mock(pytester: pytest.Pytester) -> None:
    need("pytest_mock")
    pytester.makepyfile("""
        import os, pytest
        def test_patched(mocker):
            mocker.patch("os.getcwd", return_value="/x")
            assert os.getcwd() == "/x"
        def test_after(): assert os.getcwd() != "/x"
        @pytest.fixture(scope="module")
        def wide(module_mocker): module_mocker.patch("os.cpu_count", return_value=99)
        def test_wide(wide): assert os.cpu_count() == 99
        def test_not_called(mocker): mocker.Mock().assert_called_once_with(2)
    """)
    both(pytester, "-p", "pytest_mock")


# Plug-ins that report.


def test_benchmark(pytester: pytest.Pytester) -> None:
    need("pytest_benchmark")
    pytester.makepyfile("""
        import pytest
        def test_sum(benchmark): assert benchmark(sum, range(100)) == 4950
        @pytest.mark.parametrize("n", [1, 2])
        @pytest.mark.benchmark(group="g", min_rounds=7)
        def test_par(benchmark, n):
            benchmark.extra_info["about"] = {"n": n}
            benchmark(lambda: n * 2)
        def test_pedantic(benchmark): benchmark.pedantic(len, args=([],), rounds=3, iterations=2)
    """)
    about = []
    options = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2", "-p", "benchmark"]
    for name, more in (("plain", []), ("isolated", [ISOLATION])):
        done = run(pytester, *options, f"--benchmark-json={name}.json", *more)
        assert done.ret == 0
        done.stdout.fnmatch_lines(["*benchmark: 2 tests*", "*test_sum*", "*benchmark 'g': 2 tests*"])
        found = json.loads((pytester.path / f"{name}.json").read_text())["benchmarks"]
        assert all(each["stats"]["min"] > 0 for each in found)
        assert [each["stats"]["rounds"] for each in found][3:] == [3]
        about.append([{key: value for key, value in each.items() if key != "stats"} for each in found])
    assert about[1] == about[0]


ALLURE = """
    import allure, pytest

    @pytest.fixture(scope="module")
    def wide(tmp_path_factory):
        with allure.step("in wide"): pass
        allure.attach("of wide", name="wide text", attachment_type=allure.attachment_type.TEXT)
        yield 1
        allure.attach("of the end", name="end text")
    @pytest.fixture
    def narrow(): yield 2
    @allure.title("A title of {n}")
    @allure.severity(allure.severity_level.CRITICAL)
    @allure.issue("http://example.invalid/1", "one")
    @pytest.mark.parametrize("n", [1, 2])
    def test_steps(wide, narrow, n, tmp_path):
        allure.dynamic.description("said late")
        with allure.step(f"first {n}"):
            with allure.step("within"): allure.attach(b"\\x00\\xff", name="bytes", extension="bin")
        (tmp_path / "f.txt").write_text("from a file")
        allure.attach.file(tmp_path / "f.txt", name="file")
        print("printed")
        assert n == 1
    def test_uses(wide): pass
    def test_skip(): pytest.skip("not today")
    @pytest.mark.xfail(reason="known")
    def test_xfail(): assert 0
    @pytest.fixture
    def broken(): raise ValueError("in setup")
    def test_error(broken): pass
    @pytest.mark.isolation(enabled=False)
    def test_here(narrow): pass
"""


def allure_of(folder: Path) -> tuple[list[object], list[object]]:
    """Results, and which fixtures each test has used, without what differs from run to run."""

    def steps(of: dict[str, object]) -> list[object]:
        files = [
            (each["name"], each.get("type", ""), (folder / each["source"]).read_bytes())
            for each in of.get("attachments", ())
        ]  # type: ignore[attr-defined]
        return [of["name"], of.get("status"), files, [steps(each) for each in of.get("steps", ())]]  # type: ignore[attr-defined]

    data = {path: json.loads(path.read_text()) for path in folder.glob("*.json")}
    results = {each["uuid"]: each for path, each in data.items() if path.name.endswith("-result.json")}
    found: list[object] = []
    for each in results.values():
        labels = sorted(
            (label["name"], label["value"]) for label in each.get("labels", ()) if label["name"] not in ("host", "thread")
        )
        rest = [
            each.get(name)
            for name in ("fullName", "historyId", "testCaseId", "description", "parameters", "links", "titlePath")
        ]
        found.append([steps(each), labels, rest, each.get("statusDetails", {}).get("message")])
    used = [
        (results[child]["fullName"], results[child]["name"], phase, *steps(fixture))
        for path, each in data.items()
        if path.name.endswith("-container.json")
        for child in each.get("children", ())
        for phase in ("befores", "afters")
        for fixture in each.get(phase, ())
    ]
    return sorted(found, key=repr), sorted(used, key=repr)


@pytest.mark.parametrize(
    "arguments", [[], ["--isolation-jobs=2"], ["--isolation-per=module"], ["-p", "xdist", "-n2"]], ids=" ".join
)
def test_allure(pytester: pytest.Pytester, arguments: list[str]) -> None:
    """Results with their steps and attachments, and the fixtures that tests have used."""
    need("allure_pytest", "xdist")
    pytester.makepyfile(ALLURE)
    found = []
    for name, more in (("plain", []), ("isolated", [ISOLATION, *arguments])):
        done = run(pytester, "-p", "allure_pytest.plugin", f"--alluredir={name}", *more)
        assert done.parseoutcomes() == {"passed": 3, "failed": 1, "skipped": 1, "xfailed": 1, "errors": 1}, done.stdout.str()
        found.append(allure_of(pytester.path / name))
    assert found[1][0] == found[0][0]
    assert len(found[0][0]) == 7
    assert [each for each in found[1][1] if "tmp_path" not in str(each)] == [
        each for each in found[0][1] if "tmp_path" not in str(each)
    ]


def test_allure_of_the_dead_and_of_liars(pytester: pytest.Pytester) -> None:
    need("allure_pytest")
    pytester.makepyfile("""
        import json, os, sys
        import allure_commons
        from allure_commons.utils import md5
        NAME = "test_allure_of_the_dead_and_of_liars#test_"
        def recorder(): return next(each for each in allure_commons.plugin_manager.get_plugins() if type(each).__name__ == "_Recorder")
        def test_dies(): os._exit(3)
        def test_name(): recorder().entries.append(["attachment", "../../evil", ""])
        def test_other(): recorder().entries.append(["result", json.dumps({"fullName": "test_it#test_fine", "name": "x"})])
        def test_victim(): assert 0
        def test_poses(): recorder().entries.append(["result", json.dumps({"name": "test_poses", "historyId": md5(NAME + "victim"), "testCaseId": md5(NAME + "victim")})])
        def test_kind(): recorder().entries.append(["evil", "{}"])
        def test_no_data(): recorder().entries.append(["result", "[]"])
        def test_fine(): pass
    """)
    done = run(pytester, "-p", "allure_pytest.plugin", "--alluredir=out/made", ISOLATION)
    assert done.parseoutcomes() == {"passed": 6, "failed": 2, "errors": 4}, done.stdout.str()
    assert [path.name for path in (pytester.path / "out").iterdir()] == ["made"]
    assert not (pytester.path / "evil").exists()
    data = [json.loads(path.read_text()) for path in (pytester.path / "out" / "made").glob("*-result.json")]
    assert {(each["name"], each.get("status")) for each in data} >= {("test_dies", "broken"), ("test_fine", "passed")}
    assert sum(each.get("fullName", "").endswith("#test_fine") for each in data) == 1
    victim = next(each for each in data if each["name"] == "test_victim")
    assert victim["status"] == "failed"
    assert [each["name"] for each in data if each.get("historyId") == victim["historyId"]] == ["test_victim"]


def test_json_report(pytester: pytest.Pytester) -> None:
    """What it keeps of a test on its reports: metadata, streams, log."""
    need("pytest_jsonreport")
    pytester.makeconftest("""
        import pytest
        @pytest.hookimpl(optionalhook=True)
        def pytest_json_runtest_metadata(item, call): return {"of": item.name, call.when: True}
    """)
    pytester.makepyfile("""
    import pytest
    def test_pass(): pass
    def test_fail(): assert 0
    def test_skip(): pytest.skip("not today")
    @pytest.fixture
    def broken(): raise ValueError("in setup")
    def test_error(broken): pass
    def test_talks(json_metadata, record_property):
        import logging, sys
        json_metadata["deep"] = {"list": [1, 2, {"x": None}]}
        record_property("p", 1)
        print("to stdout")
        print("to stderr", file=sys.stderr)
        logging.getLogger().warning("a %s", "record")
    """)
    found = []
    for more in ([], [ISOLATION]):
        done = run(
            pytester, "-p", "metadata", "-p", "pytest_jsonreport", "--json-report", "--json-report-file=out.json", *more
        )
        data = json.loads((pytester.path / "out.json").read_text())
        assert "report saved" in done.stdout.str()
        for test in data["tests"]:
            test["user_properties"] = [each for each in test.get("user_properties", ()) if "isolation" not in str(each)]
            for phase in ("setup", "call", "teardown"):
                test.get(phase, {}).pop("duration", None)
                for record in test.get(phase, {}).get("log", ()):
                    for name in ("created", "msecs", "relativeCreated", "thread", "process", "processName"):
                        record.pop(name)
        found.append((data["summary"], data["tests"]))
    assert found[1] == found[0]
    assert any(test["metadata"].get("deep") for test in found[0][1])


def test_csv(pytester: pytest.Pytester) -> None:
    need("pytest_csv")
    pytester.makepyfile("""
        import os, pytest
        @pytest.mark.parametrize("n", [1, 2])
        def test_many(n, record_property):
            'What it is.'
            record_property("property", n)
            assert n == 1
        @pytest.fixture
        def bad(): raise ValueError
        def test_error(bad): pass
        def test_skip(): pytest.skip("not today")
    """)
    rows = []
    options = [
        "-p",
        "pytest_csv._plugin",
        "--csv=out.csv",
        "--csv-columns=id,doc,status,message,parameters,properties,success",
        "-W",
        "ignore",
    ]
    for more in ([], [ISOLATION]):
        run(pytester, *options, *more)
        rows.append((pytester.path / "out.csv").read_text())
    assert rows[1] == rows[0]
    assert len(rows[0].splitlines()) == 5
    pytester.makepyfile("""
        import os
        def test_dies(): os._exit(0)
        def test_lies(request): request.config.pluginmanager.getplugin("isolation-worker")._carriers.sent = lies
        def lies(item, report): report._csv_rows = {"id": {("a", 1): 2}}
        def test_fine(): pass
    """)
    done = run(pytester, *options, ISOLATION)
    assert "INTERNALERROR" not in done.stdout.str()
    assert done.parseoutcomes().pop("passed") == 1
    found = (pytester.path / "out.csv").read_text()
    assert [found.count(f"::{name},") for name in ("test_dies", "test_lies", "test_fine")] == [1, 1, 1]


def test_html_extras(pytester: pytest.Pytester) -> None:
    need("pytest_html")
    pytester.makepyfile("""
        import pytest_html
        def test_ok(extras):
            extras.append(pytest_html.extras.text("the text of a test"))
            extras.append(pytest_html.extras.url("http://example.invalid/page?a=b"))
            extras.append(pytest_html.extras.png("iVBORw0KGgo="))
        def test_bad(extras):
            extras.append(pytest_html.extras.json({"key": "the JSON of a test"}))
            assert 0
    """)
    found = []
    for name, more in (("plain", []), ("isolated", [ISOLATION])):
        where = pytester.mkdir(name)
        done = run(pytester, "-p", "metadata", "-p", "html", "-p", "html_fixtures", f"--html={where}/out.html", *more)
        assert done.parseoutcomes() == {"passed": 1, "failed": 1, "warnings": 1}
        files = {path.name: path.read_bytes() for path in (where / "assets").iterdir()}
        blob = html.unescape((where / "out.html").read_text().split('data-jsonblob="')[1].split('"')[0])
        tests = json.loads(blob)["tests"]
        found.append(
            (
                files,
                {
                    test: [(each["extras"], each["resultsTableRow"][3]) for each in results]
                    for test, results in tests.items()
                },
            )
        )
    assert found[1] == found[0]
    assert sum(b" of a test" in content for content in found[0][0].values()) == 2


def test_html(pytester: pytest.Pytester) -> None:
    need("pytest_html")
    pytester.makepyfile(SUITE + "\n    def test_printed(): print('printed text')\n")
    rows = []
    for name, more in (("plain", []), ("isolated", [ISOLATION])):
        run(pytester, "-p", "metadata", "-p", "html", f"--html={name}.html", "--self-contained-html", *more)
        text = (pytester.path / f"{name}.html").read_text()
        blob = re.search(r'data-jsonblob="([^"]*)"', text)
        assert blob is not None
        assert "printed text" in text
        tests = json.loads(
            blob[1]
            .replace("&#34;", '"')
            .replace("&quot;", '"')
            .replace("&amp;", "&")
            .replace("&#39;", "'")
            .replace("&lt;", "<")
            .replace("&gt;", ">")
        )["tests"]
        rows.append({test: [each["result"] for each in results] for test, results in tests.items()})
    assert rows[1] == rows[0]


@pytest.mark.parametrize("plugin", ["sugar", "instafail"])
def test_other_reporters(pytester: pytest.Pytester, plugin: str) -> None:
    need(f"pytest_{plugin}")
    pytester.makepyfile(SUITE)
    flag = {"sugar": "--force-sugar", "instafail": "--instafail"}[plugin]
    results = [run(pytester, "-p", plugin, flag, "-rA", *more) for more in ([], [ISOLATION])]
    assert outcomes(results[0]) == outcomes(results[1])
    assert results[0].ret == results[1].ret == 1
    counts = [re.findall(r"^\s+(\d+) (\w+)$", each.stdout.str(), re.MULTILINE) for each in results]
    assert counts[0] == counts[1]
    assert results[1].stderr.str() == results[0].stderr.str()


SNAPSHOTS = """
    from syrupy.extensions.json import JSONSnapshotExtension

    def test_a(snapshot): assert {"a": 1} == snapshot
    def test_two(snapshot):
        assert [1, 2] == snapshot
        assert "two" == snapshot
    def test_named(snapshot): assert 5 == snapshot(name="five")
    def test_json(snapshot): assert {"j": 1} == snapshot(extension_class=JSONSnapshotExtension)
    def test_none(): pass
"""


def test_syrupy(pytester: pytest.Pytester) -> None:
    need("syrupy")
    steps = []
    for more in ([], [ISOLATION, "--isolation-mount=tests/__snapshots__:rw"]):
        where = pytester.mkdir("plain" if not more else "isolated")
        folder = where / "tests" / "__snapshots__"
        folder.mkdir(parents=True)
        file = where / "tests" / "test_it.py"
        os.chdir(where)
        seen = []
        for text, update in (
            (SNAPSHOTS, True),
            (SNAPSHOTS, False),
            (SNAPSHOTS.replace("5 ==", "6 =="), False),
            (SNAPSHOTS.replace("test_a", "test_b"), False),
            (SNAPSHOTS.replace("test_a", "test_b").replace("5 ==", "6 =="), True),
        ):
            file.write_text(pytester_dedent(text))
            done = run(pytester, "-p", "syrupy", "--rootdir=.", *(["--snapshot-update"] if update else []), *more)
            said = [line for line in done.outlines if "snapshot" in line and not line.startswith(("rootdir", "configfile"))]
            files = {str(each.relative_to(where)): each.read_text() for each in sorted(folder.rglob("*")) if each.is_file()}
            seen.append((done.ret, said, files))
        steps.append(seen)
    for plain, isolated in zip(*steps, strict=True):
        assert isolated == plain


def test_syrupy_says_what_is_lost(pytester: pytest.Pytester) -> None:
    need("syrupy")
    pytester.makepyfile(SNAPSHOTS)
    done = run(pytester, "-p", "syrupy", "--snapshot-update", ISOLATION)
    done.stdout.fnmatch_lines(["*syrupy: snapshots were written in sandboxes only*--isolation-mount=__snapshots__:rw*"])


def pytester_dedent(text: str) -> str:
    import textwrap

    return textwrap.dedent(text)


# What is pytest's own.


def test_doctests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        module='''
        def f(x):
            """
            >>> f(1)
            2
            >>> f(2)
            4
            """
            return x + 1
        def g(x):
            """
            >>> g(1)
            1
            """
            return x
    '''
    )
    pytester.maketxtfile(test_text=">>> 1 + 1\n2\n")
    plain, isolated = both(pytester, "--doctest-modules", "--doctest-glob=*.txt")
    assert [line for line in isolated.outlines if line.startswith(("Expected", "Got", "    "))] == [
        line for line in plain.outlines if line.startswith(("Expected", "Got", "    "))
    ]


@pytest.mark.parametrize(
    "arguments",
    [["--lf"], ["--ff"], ["--sw"], ["--nf"], ["--cache-clear"], ["--lf", "--lfnf=none"], ["--sw", "--sw-skip"]],
    ids=" ".join,
)
def test_cache(pytester: pytest.Pytester, arguments: list[str]) -> None:
    """The second run goes by the first, and leaves the same cache for a third."""
    pytester.makepyfile(SUITE)
    found = []
    for more in ([], [ISOLATION]):
        subprocess.run(["rm", "-rf", ".pytest_cache"], check=True)
        runs = [run(pytester, "-v", *(arguments if number else []), *more, cache=True) for number in range(3)]
        cache = {
            str(path.relative_to(pytester.path)): re.sub(r'(_date_str": )".*"', r"\1…", path.read_text())
            for path in sorted((pytester.path / ".pytest_cache" / "v").rglob("*"))
            if path.is_file()
        }
        # What a TestCase's subtests report at once, plain pytest writes into its own capture of the test.
        lines = [[line for line in each.outlines if "%]" in line and "test_sub SUB" not in line] for each in runs]
        found.append(([each.ret for each in runs], lines, cache))
    for one, other in zip(*found, strict=True):
        assert one == other


def test_basetemp(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        def test_it(tmp_path, tmp_path_factory):
            assert tmp_path.parent == tmp_path_factory.getbasetemp()
            (tmp_path / "file").write_text("content")
            print("AT", tmp_path)
        def test_fails(tmp_path):
            (tmp_path / "file").write_text("content")
            assert 0
    """)
    plain, isolated = both(pytester, "--basetemp=made")
    shown = [[line for line in each.outlines if line.startswith("AT ")] for each in (plain, isolated)]
    assert shown[0] == shown[1]
    assert shown[0]
