"""What was seen to go wrong in other runners of isolated tests: a green result that is none, and what got lost.

Each test names the fault. Those that other files of this folder look at already are not here.
"""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.usefixtures("nothing_left")


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

        @pytest.mark.isolation(enabled={last == 'here'})
        def test_one(bad_end): pass
        @pytest.mark.isolation(enabled={last == 'inside'})
        def test_two(): pass
    """)
    result = run(pytester, "--isolation", "--junitxml=out.xml")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_two*", "*ValueError: bad end*"])
