"""What plug-ins and conftest files put on a test's report, or change of it, is on the host's: as in plain pytest, and no more."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
from pytest_isolation.wire import attributes
from pytest_isolation.wire.values import NotPlain, pack, unpack

pytestmark = [pytest.mark.once("user"), pytest.mark.usefixtures("nothing_left")]


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


def both(pytester: pytest.Pytester, *arguments: str) -> tuple[pytest.RunResult, pytest.RunResult]:
    """Plain and isolated."""
    plain, isolated = run(pytester, *arguments), run(pytester, "--isolation", *arguments)
    assert (isolated.ret, isolated.parseoutcomes()) == (plain.ret, plain.parseoutcomes()), isolated.stdout.str()
    return plain, isolated


def test_attributes_cross(pytester: pytest.Pytester) -> None:
    """Of every phase, of a subtest, of a test that fails; whichever plug-in or conftest asks for them."""
    pytester.makeconftest("""
        import enum, pathlib
        import pytest

        class Kind(str, enum.Enum):
            SLOW = "slow"

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(item, call):
            report = yield
            report.owner = "team-a"
            report.nested = {"list": [1, 2.5, None, True], "deep": {"x": [{"y": "z"}]}}
            report.odd = (1, (2, {3: "three", (4, 5): {6}}), frozenset([7]), Kind.SLOW, pathlib.PurePath("a/b"), float("inf"), {"$": 1})
            report._private = item.name
            report.number = 10 ** 50
            return report

        def pytest_runtest_logreport(report):
            with open("told.txt", "a") as file:
                values = [getattr(report, name, "LOST") for name in ("owner", "nested", "odd", "_private", "number")]
                values[2] = [*values[2][:-2], str(values[2][-3]), str(values[2][-2]), *values[2][-1:]]
                values[2][-5:-3] = []
                print(report.nodeid, report.when, values, file=file)

        def pytest_report_teststatus(report, config):
            if report.when == "call" and report.passed: return "passed", "O", f"OWNED-{report.owner}"
    """)
    pytester.makepyfile("""
        def test_ok(): pass
        def test_bad(): assert 0
        def test_subtests(subtests):
            with subtests.test(n=1): pass
            with subtests.test(n=2): assert 0
    """)
    seen = []
    for more in ([], ["--isolation"], ["--isolation", "--isolation-jobs=2"]):
        done = run(pytester, "-v", *more)
        assert sum("OWNED-team-a" in line for line in done.outlines) == 1
        found = (pytester.path / "told.txt").read_text()
        assert "LOST" not in found
        seen.append((done.parseoutcomes(), found))
        (pytester.path / "told.txt").unlink()
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


def test_who_relies_on_an_attribute_does_not_end_the_run(pytester: pytest.Pytester) -> None:
    """A test that dies has left none, nor does one that takes it off."""
    pytester.makeconftest("""
        import pytest
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(item, call):
            report = yield
            report.owner = "team-a"
            return report
        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_logreport(report):
            assert report.owner == "team-a"
    """)
    pytester.makepyfile("""
        import os
        def test_dies(): os._exit(0)
        def test_takes_it_off(request):
            class Takes:
                def pytest_runtest_logreport(self, report): vars(report).pop("owner", None)
            worker = request.config.pluginmanager.getplugin("isolation-worker")
            request.config.pluginmanager.unregister(worker)
            conftest = next(each for each in request.config.pluginmanager.get_plugins() if getattr(each, "__file__", "").endswith("conftest.py"))
            request.config.pluginmanager.unregister(conftest)
            request.config.pluginmanager.register(worker)
        def test_fine(): pass
    """)
    result = run(pytester, "--isolation", "--junitxml=out.xml")
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    found = result.parseoutcomes()
    assert found.pop("passed") == 1
    assert sum(found.values()) == 2, found  # the second one's call, or its teardown: as far as it had come meanwhile
    result.stdout.fnmatch_lines(["*ended with status 0*"])
    assert result.ret == 1


def test_what_is_no_plain_value_stays_and_is_named(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
        import pytest

        class Bad(dict):
            def items(self): raise ValueError("no items")

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(item, call):
            report = yield
            report.call = call
            report.bad = Bad(x=1)
            report.long = "x" * (5 << 20)
            report.within = ["text", object]
            return report

        def pytest_runtest_logreport(report):
            if report.when == "call":
                print("TOLD", [hasattr(report, name) for name in ("call", "bad", "long")], report.within)
    """)
    pytester.makepyfile("def test_it(): pass\n")
    result = run(pytester, "--isolation", "-s")
    result.assert_outcomes(passed=1)
    assert "TOLD [False, False, False] ['text', \"<class 'object'>\"]" in result.stdout.str()
    result.stdout.fnmatch_lines(
        [
            "*attributes of reports that are no plain values stay in the tests' processes: call (CallInfo), bad (Bad), long (too large)"
        ]
    )


CHANGES = """
    import pytest

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(item, call):
        report = yield
        marker = item.get_closest_marker("change")
        if marker is not None and report.when == marker.kwargs.get("when", "call"):
            for name, value in marker.kwargs.items():
                setattr(report, name, value)
        report.nodeid = report.nodeid.encode("utf-8").decode("unicode_escape")
        return report

    def pytest_configure(config): config.addinivalue_line("markers", "change: of a report")
"""


def test_changes_of_a_report_hold(pytester: pytest.Pytester) -> None:
    """Of its outcome, with a reason or without, and of its times; and the usual way to have ids of another script readable."""
    pytester.makeconftest(CHANGES)
    pytester.makepyfile("""
        import pytest
        change = pytest.mark.change

        @change(outcome="failed")
        def test_to_failed(): pass
        @change(outcome="failed", longrepr="because")
        def test_to_failed_because(): pass
        @change(outcome="passed", longrepr=None)
        def test_to_passed(): assert 0
        @change(outcome="passed")
        def test_to_passed_with_reason(): assert 0
        @change(outcome="failed", when="setup")
        def test_setup_to_failed(): pass
        @change(outcome="failed", when="teardown")
        def test_teardown_to_failed(): pass
        @change(wasxfail="known", outcome="skipped")
        def test_to_xfail(): assert 0
        @change(duration=float("inf"))
        def test_for_ever(): pass
        @change(duration=3.25)
        def test_long(): pass
        @pytest.mark.parametrize("word", ["中文", "é"])
        def test_script(word): assert word == "é"
    """)
    plain, isolated = both(pytester, "-v")
    status = [[line for line in each.outlines if "::" in line and "%]" in line] for each in (plain, isolated)]
    assert status[0] == status[1]
    assert any("test_script[中文] FAILED" in line for line in status[1])
    isolated = run(pytester, "--isolation", "-rA", "--junitxml=out.xml", "--durations=0", "-vv")
    assert "INTERNALERROR" not in isolated.stdout.str() + isolated.stderr.str()
    assert "3.25s call" in isolated.stdout.str()


def test_what_is_changed_of_a_failure_while_it_is_handled(pytester: pytest.Pytester) -> None:
    """Its report has been sent then, but has not been shown: pytest-ruff shows its own message so, others add a section."""
    pytester.makeconftest("""
        import pytest
        def pytest_exception_interact(node, call, report):
            if "message" in node.name: report.longrepr = f"only {call.excinfo.value}"
            if "section" in node.name: report.sections.append(("Of a conftest", "what it\\x1b[2J says"))
    """)
    pytester.makepyfile("""
        import pytest
        def test_message(): raise ValueError("this")
        def test_section(): print("printed"); raise ValueError("that")
        @pytest.fixture
        def bad(): raise ValueError("in setup")
        def test_message_of_setup(bad): pass
        @pytest.fixture
        def late():
            yield
            raise ValueError("in teardown")
        def test_message_of_teardown(late): pass
        def test_other(): assert 0
    """)
    plain, isolated = both(pytester)
    for result in (plain, isolated):
        for line in ("only this", "only in setup", "only in teardown", "printed", "*- Of a conftest -*"):
            result.stdout.fnmatch_lines([line])
        result.stdout.no_fnmatch_line("*ValueError: this*")
    isolated.stdout.fnmatch_lines(["what it?x1b?2J says"])


def test_a_skip_has_a_reason(pytester: pytest.Pytester) -> None:
    """Where a plug-in says of a failure that it is a skip, plain pytest may end in an internal error."""
    pytester.makeconftest(CHANGES)
    pytester.makepyfile("""
        import pytest
        @pytest.mark.change(outcome="skipped")
        def test_fails(): assert 0
        @pytest.mark.change(outcome="skipped")
        def test_passes(): pass
    """)
    result = run(pytester, "--isolation", "-rs", "-v")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED*test_a_skip_has_a_reason.py:2: assert 0"])


def test_no_report_takes_another_test_s_name(pytester: pytest.Pytester) -> None:
    """Whatever a plug-in calls it: it is of the test that has run."""
    pytester.makeconftest(f"""{CHANGES}
    import os

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logreport(report):
        if report.nodeid.endswith("test_poses") and os.getpid() < 10: report.nodeid = report.nodeid.replace("poses", "victim")
        return (yield)
    """)
    pytester.makepyfile("""
        import pytest
        def test_poses(): pass
        def test_victim(): assert 0
        @pytest.mark.parametrize("word", ["x", "y"], ids=["\\\\x41", "A"])
        def test_escaped(word): assert word == "y"
    """)
    result = run(
        pytester, "--isolation", "-v", "-o", "disable_test_id_escaping_and_forfeit_all_rights_to_community_support=true"
    )
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(["*::test_poses PASSED*", "*::test_victim FAILED*", "*test_escaped?A? PASSED*"])
    assert sum("test_escaped[A]" in line and "%]" in line for line in result.outlines) == 1


def test_an_outcome_of_a_project_s_own(pytester: pytest.Pytester) -> None:
    """Where the project says how it is shown. Elsewhere it is none."""
    pytester.makeconftest(
        CHANGES
        + """
    def pytest_report_teststatus(report, config):
        if report.outcome == "postponed" and report.when == "call": return "postponed", "P", "POSTPONED"
    """
    )
    pytester.makepyfile(
        "import pytest\n@pytest.mark.change(outcome='postponed')\ndef test_it(): pass\ndef test_fine(): pass\n"
    )
    _plain, isolated = both(pytester)
    assert isolated.parseoutcomes() == {"postponed": 1, "passed": 1}
    pytester.makepyfile(
        "import pytest\n@pytest.mark.change(outcome='splendid')\ndef test_it(): pass\ndef test_fine(): pass\n"
    )
    result = run(pytester, "--isolation")
    assert result.parseoutcomes() == {"failed": 1, "passed": 1}
    result.stdout.fnmatch_lines(["*no such outcome*"])


# What a sandbox says of them is not believed.


@pytest.mark.parametrize(
    "sent",
    [
        [],
        {"outcome": "passed"},
        {"nodeid": "x"},
        {"passed": True},
        {"__class__": 1},
        {"_isolation_after": ["failed", ""]},
        {"isolation_after": 1},
        {"_id": "x"},
        {"wasxfail": "x"},
        {"node": {}},
        {"not a name": 1},
        {"x" * 300: 1},
        {f"n{number}": 1 for number in range(101)},
        {"x": {"$": "tuple"}},
        {"x": {"$": "object", "items": []}},
        {"x": {"$": "dict", "items": [[{"a": 1}, 1]]}},
        {"x": {"$": "dict", "items": [1]}},
        {"x": {"$": "set", "items": [[1]]}},
        {"x": [0] * 60_000},
        {"x": "x" * (5 << 20)},
        {"x": 10**300},
        {"extras": [{"content": {"$": "set", "items": [1]}}]},
        {"_json_report_extra": {"metadata": {"$": "dict", "items": [[{"$": "tuple", "items": [1]}, 1]]}}},
        {"x": json.loads("[" * 100 + "]" * 100)},
    ],
    ids=lambda sent: str(sent)[:40],
)
def test_what_is_no_attribute_is_refused(sent: Any) -> None:
    report = pytest.TestReport("a.py::b", ("a.py", 0, "b"), {}, "passed", None, "call")
    before = dict(vars(report))
    with pytest.raises(attributes.BadAttribute):
        attributes.put(report, sent)
    assert (report.outcome, report.nodeid) == ("passed", "a.py::b")
    assert {name: vars(report)[name] for name in before} == before


def test_values_come_out_as_they_went_in() -> None:
    for value in (
        None,
        True,
        -1,
        1.5,
        "text",
        [1, [2]],
        (1, (2,)),
        {1, 2},
        frozenset("a"),
        {"a": {"b": 1}},
        {1: 2, (3, 4): 5},
        {"$": "set"},
    ):
        assert unpack(json.loads(json.dumps(pack(value)))) == value
    assert unpack(pack("\x1b]0;title\x07")) == "\\x1b]0;title\\x07"
    assert unpack(pack({"\x1b[2J": 1})) == {"\\x1b[2J": 1}
    with pytest.raises(NotPlain):
        pack(object())


def test_html_extras_of_a_liar_are_no_files_and_no_scripts(pytester: pytest.Pytester) -> None:
    """pytest-html writes some of them to files, whose names end as the report says, and puts others into its page."""
    pytest.importorskip("pytest_html")
    pytester.makepyfile("""
        import pytest_html
        def test_it(extras):
            extras.append(pytest_html.extras.extra("evil", "text", "<img src=x onerror=alert(1)>", "text/plain", "txt"))
            extras.append(pytest_html.extras.url("javascript:alert(2)"))
            extras.append(pytest_html.extras.url(" java\\\\nscript:alert(3)"))
            extras.append(pytest_html.extras.url('http://example.invalid/"onclick="alert(4)'))
            extras.append(pytest_html.extras.html("<script>alert(5)</script><b>bold</b>"))
    """)
    result = run(pytester, "--isolation", "-p", "metadata", "-p", "html", "-p", "html_fixtures", "--html=out.html")
    result.assert_outcomes(passed=1)
    text = Path("out.html").read_text()
    page = html.unescape(text[text.index("data-jsonblob") :].split('"')[1])
    for bad in ("<img", "<script", 'href=\\"javascript', 'href=\\" ', '\\"onclick'):
        assert bad not in page, bad
    for good in ("&lt;img", "http://example.invalid", "iframe sandbox", "bold"):
        assert good in page, good
    report = pytest.TestReport("a.py::b", ("a.py", 0, "b"), {}, "passed", None, "call")
    extra = {"content": "evil", "format_type": "text", "name": "Text", "mime_type": "text/plain"}
    attributes.put(report, {"extras": [extra | {"extension": each} for each in ("txt", "/" * 300 + "etc/evil", "../x", 1)]})
    assert [each["extension"] for each in report.extras] == ["txt", None, None, None]


# What cannot be carried is said.


@pytest.mark.parametrize("quiet", [[], ["-q"], ["-p", "xdist", "-n2"]], ids=" ".join)
def test_what_a_plugin_keeps_is_named_before_the_first_test(pytester: pytest.Pytester, quiet: list[str]) -> None:
    """Those that are known, where they are in use; and whichever says so of itself."""
    pytester.makepyfile(
        **{
            "inline_snapshot/__init__": "",
            "inline_snapshot/pytest_plugin": "def pytest_addoption(parser): parser.addoption('--inline-snapshot', dest='inline_snapshot')\n",
            "pytest_vcr": "def pytest_addoption(parser): parser.addoption('--vcr-record', dest='vcr_record')\n",
            "mine": "def pytest_isolation_keeps(config): return ['mine keeps\\x1b[2J this', 'mine keeps that']\n",
            "test_it": "def test_it(): pass\n",
        }
    )
    pytester.syspathinsert()
    options = ["-p", "inline_snapshot.pytest_plugin", "-p", "pytest_vcr", "-p", "mine", "--inline-snapshot=create", *quiet]
    result = run(pytester, "--isolation", *options)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "isolation: inline-snapshot keeps new snapshots in the test's process; run it with --isolation=no for that",
            "isolation: mine keeps*x1b?2J this",
            "isolation: mine keeps that",
            "*1 passed*",
        ]
    )
    assert "vcr" not in "".join(line for line in result.outlines if line.startswith("isolation"))
    assert sum("mine keeps that" in line for line in result.outlines) == 1
    assert "mine" not in run(pytester, "--isolation=no", *options).stdout.str().replace("-p mine", "")


def test_results_that_other_tests_would_ask_for(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        **{
            "pytest_harvest/__init__": "",
            "pytest_harvest/plugin": "import pytest\n@pytest.fixture\ndef results_bag(): return {}\n",
            "test_it": "def test_it(results_bag): pass\n",
        }
    )
    pytester.syspathinsert()
    result = run(pytester, "--isolation", "-p", "pytest_harvest.plugin")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["isolation: pytest-harvest keeps results in the test's process, where no other test finds them*"]
    )
