"""A process that a test has forked, and that comes back as if it were the test: only the test itself reports."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.once("user"), pytest.mark.usefixtures("nothing_left")]

FORKING = """
    import os, sys
    import pytest

    def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def test_fails_and_its_child_returns():
        if (pid := os.fork()) == 0: return
        assert ended(pid) == 7, "the test itself"

    def test_fails_and_its_child_skips():
        if (pid := os.fork()) == 0: pytest.skip("in the child")
        ended(pid)
        pytest.fail("the test itself")

    def test_fails_before_its_child_returns():
        ready, go = os.pipe()
        if os.fork() == 0:
            os.close(go)
            os.read(ready, 1)  # until the test is over
            return
        pytest.fail("the test itself")

    def test_passes_and_its_child_fails():
        print("printed before the fork"); os.write(2, b"written before the fork\\n")
        if (pid := os.fork()) == 0: print("printed by the child"); raise ValueError("in the child")
        assert ended(pid) == 1

    def test_passes_and_its_child_exits():
        if (pid := os.fork()) == 0: sys.exit(3)
        assert ended(pid) == 3

    def test_grandchild():
        if (pid := os.fork()) == 0:
            if (pid := os.fork()) == 0: return
            os._exit(ended(pid))
        assert ended(pid) == 0

    def test_replaces_what_tells_processes_apart(monkeypatch):
        monkeypatch.setattr(os, "getpid", lambda: 2)
        if (pid := os.fork()) == 0: return
        assert ended(pid) == 7, "the test itself"

    @pytest.fixture
    def forks():
        pid = os.fork()
        yield pid
        with open("torn-down", "a") as file: file.write("x")

    def test_set_up_comes_back_twice(forks):
        if forks: assert ended(forks) == 0  # its "test" passed, and it has ended before its teardown
        assert not os.path.exists("torn-down")

    @pytest.fixture
    def forks_at_the_end():
        yield
        if (pid := os.fork()) == 0: return
        assert ended(pid) == 7, "the fixture itself"

    def test_teardown_comes_back_twice(forks_at_the_end): pass

    @pytest.fixture(scope="module")
    def wide():
        if (pid := os.fork()) == 0: return "child"
        ended(pid)
        return "test"

    def test_of_a_wide_fixture(wide): assert wide == "test"
    def test_of_a_wide_fixture_again(wide): assert wide == "test"
    def test_last(): pass
"""


def test_only_the_test_itself_reports(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FORKING)
    result = pytester.runpytest_subprocess("--isolation", "-rA", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=8, failed=4, errors=1)
    text = result.stdout.str()
    assert text.count("the test itself\n") >= 4
    assert text.count("ValueError: in the child") == 1
    for what in ("printed before the fork", "written before the fork", "printed by the child"):
        assert text.count(f"{what}\n") == 1
    assert "came back from it: ended with status 1" in text


def test_of_a_test_that_runs_in_pytests_own_process(pytester: pytest.Pytester) -> None:
    """The child has the whole run, with the sandboxes' wires, and would go on with it."""
    pytester.makepyfile("""
        import os
        import pytest

        @pytest.mark.isolation(enabled=False)
        def test_fails():
            if (pid := os.fork()) == 0: return
            os.waitpid(pid, 0)
            pytest.fail("the test itself")

        def test_after(): pass
    """)
    result = pytester.runpytest_subprocess("--isolation", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1)
    assert result.stdout.str().count("test session starts") == 1
    assert result.stdout.str().count("1 failed, 1 passed") == 1
