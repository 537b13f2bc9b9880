"""Whole runs: several sandboxes at a time, what a test did, what is kept of it."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = [pytest.mark.once("user"), pytest.mark.usefixtures("nothing_left")]


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


# Several at a time.

SLEEPERS = """
    import time
    import pytest

    @pytest.mark.parametrize("number", range(8))
    def test_sleeps(number):
        print("number", number)
        time.sleep(0.5 if number % 3 == 0 else 0.01)
        assert number != 5
"""


def test_output_is_in_order_whatever_ends_first(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SLEEPERS)
    one, four = run(pytester, "--isolation", "-v"), run(pytester, "--isolation", "-v", "--isolation-jobs=4")

    def lines(result: pytest.RunResult) -> list[str]:
        return [line for line in result.outlines if " in " not in line and not line.startswith(("isolation:", "wall "))]

    assert lines(four) == lines(one)
    four.assert_outcomes(passed=7, failed=1)


def test_they_do_run_at_the_same_time(pytester: pytest.Pytester) -> None:
    """Each waits for the other, by a file of the host."""
    meeting = pytester.mkdir("meeting")
    pytester.makepyfile(f"""
        import time
        from pathlib import Path
        import pytest

        @pytest.mark.parametrize("number", [0, 1, 2])
        def test_meet(number):
            Path({str(meeting)!r}, str(number)).touch()
            deadline = time.monotonic() + 300
            while len(list(Path({str(meeting)!r}).iterdir())) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    """)
    run(pytester, "--isolation", "--isolation-jobs=3", f"--isolation-mount={meeting}:{meeting}:rw").assert_outcomes(passed=3)


@pytest.mark.parametrize(("option", "failed", "passed"), [("-x", 1, 2), ("--maxfail=2", 2, 3)])
def test_stopping_is_exact(pytester: pytest.Pytester, option: str, failed: int, passed: int) -> None:
    """What ran ahead of the test that ends the run has not run."""
    pytester.makepyfile("""
        import pytest
        @pytest.mark.parametrize("number", range(10))
        def test_it(number): assert number not in (2, 4)
    """)
    result = run(pytester, "--isolation", "--isolation-jobs=4", option)
    result.assert_outcomes(failed=failed, passed=passed)
    assert result.ret == 1


def test_deaths_among_others(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import os, time
        import pytest

        @pytest.mark.parametrize("number", range(12))
        def test_it(number):
            if number == 3: os._exit(0)
            if number == 5: os.kill(os.getpid(), 11)
            if number == 7: time.sleep(60)
            if number == 9: pytest.skip("no")
    """)
    result = run(pytester, "--isolation", "--isolation-jobs=3", "--isolation-timeout=8s")
    result.assert_outcomes(passed=8, failed=3, skipped=1)


@pytest.mark.parametrize("grain", ["class", "module"])
def test_a_death_in_a_coarser_grain_is_one_test_s(pytester: pytest.Pytester, grain: str) -> None:
    """Those behind it run in a sandbox of their own."""
    pytester.makepyfile("""
        import os
        seen = []
        class TestOne:
            def test_a(self): seen.append("a")
            def test_dies(self): os.kill(os.getpid(), 9)
            def test_c(self): assert seen == []; seen.append("c")
            def test_d(self): assert seen == ["c"]
    """)
    run(pytester, "--isolation", f"--isolation-per={grain}", "--isolation-jobs=2").assert_outcomes(passed=3, failed=1)


def test_tests_outside_of_sandboxes_keep_their_place(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import os
        import pytest
        here = []
        def test_a(): assert os.getpid() < 10
        @pytest.mark.isolation(enabled=False)
        def test_b(): here.append(os.getpid()); assert os.getpid() > 10
        def test_c(): assert os.getpid() < 10 and not here
        @pytest.mark.isolation(enabled=False)
        def test_d(): assert here == [os.getpid()]
    """)
    run(pytester, "--isolation", "--isolation-jobs=3", "-v").assert_outcomes(passed=4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--isolation-jobs=0"], "isolation_jobs is a number from 1"),
        (["--isolation-jobs=many"], "isolation_jobs is a number from 1"),
        (["--isolation-per=test"], "one of function, class, module"),
        (["--isolation-report=out.txt"], ".html or .json"),
    ],
)
def test_bad_settings(pytester: pytest.Pytester, arguments: list[str], said: str) -> None:
    pytester.makepyfile("def test_it(): pass")
    result = run(pytester, "--isolation", *arguments)
    assert result.ret == 4
    assert said in result.stderr.str()


def test_ini(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("seen = []\ndef test_a(): seen.append(1)\ndef test_b(): assert seen == [1]")
    pytester.makeini(
        "[pytest]\nisolation = namespace\nisolation_jobs = auto\nisolation_per = module\nisolation_strict = true"
    )
    result = run(pytester)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["isolation: namespace, a fresh sandbox for every module*"])


# What a test did.

DOES = """
    import os, socket, subprocess, sys
    import pytest

    def test_writes():
        with open("made.txt", "w") as file: file.write("x" * 100)
        os.unlink("data.txt")
        assert "--fail" not in sys.argv

    def test_leaves_a_process():
        subprocess.Popen(["sleep", "77"], start_new_session=True)
        assert "--fail" not in sys.argv

    def test_reaches_out():
        with pytest.raises(OSError): socket.create_connection(("192.0.2.1", 80), timeout=2)
        assert "--fail" not in sys.argv

    def test_clean(tmp_path):
        (tmp_path / "mine").write_text("x")
"""


@pytest.fixture
def doing(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(DOES.replace('"--fail" not in sys.argv', "True"))
    (pytester.path / "data.txt").write_text("original")
    return pytester


def test_strict(doing: pytest.Pytester) -> None:
    result = run(doing, "--isolation", "--isolation-strict", "-rA")
    result.assert_outcomes(passed=2, failed=2)
    text = result.stdout.str()
    assert re.search(r"added .*/made\.txt", text)
    assert re.search(r"deleted .*/data\.txt", text)
    assert "still running: sleep 77" in text
    assert "PASSED test_strict.py::test_clean" in text


def test_strict_with_templates(pytester: pytest.Pytester) -> None:
    """What a wide fixture has written is not the test's."""
    pytester.makepyfile("""
        import pytest
        @pytest.fixture(scope="module")
        def wide():
            with open("of-the-module", "w"): pass
        def test_clean(wide): pass
        def test_unclean(wide):
            with open("of-the-module", "a") as file: file.write("more")
    """)
    for _ in range(
        8
    ):  # the template ends with the last test, and its supervisor could be quicker than that test's last words
        result = run(pytester, "--isolation", "--isolation-strict")
        result.assert_outcomes(passed=1, failed=1)
        assert "of-the-module" in result.stdout.str()


def test_a_failure_says_what_the_test_did(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import socket, threading
        def test_it():
            threading.Thread(target=int).start()
            try: socket.create_connection(("192.0.2.1", 80), timeout=2)
            except OSError: pass
            assert False
    """)
    result = run(pytester, "--isolation")
    result.stdout.re_match_lines(
        [r"-+ isolation -+", r"wall \d+\.\d\d s, cpu .* s, peak memory .*, 1 process or threads started"]
    )
    result.stdout.fnmatch_lines(["network: * refused, as there is no route"])


def test_junit_has_it_too(doing: pytest.Pytester) -> None:
    run(doing, "--isolation", "--junitxml=out.xml", "-o", "junit_family=xunit1").assert_outcomes(passed=4)
    found = {}
    for case in ElementTree.parse(doing.path / "out.xml").iter("testcase"):
        found[case.get("name")] = {each.get("name"): each.get("value") for each in case.iter("property")}
    assert found["test_writes"]["isolation_changes"] == "2"
    assert found["test_leaves_a_process"]["isolation_processes_left"] == "1"
    assert int(found["test_reaches_out"]["isolation_network_refused"] or 0) >= 1
    assert found["test_clean"]["isolation_changes"] == "0"
    assert float(found["test_clean"]["isolation_cpu"] or 0) > 0
    assert int(found["test_clean"]["isolation_memory"] or 0) > 1 << 20


def test_the_report(doing: pytest.Pytester) -> None:
    before = time.time()
    run(doing, "--isolation", "--isolation-jobs=2", "--isolation-report=out.json").assert_outcomes(passed=4)
    told = json.loads((doing.path / "out.json").read_text())
    tests = {test["nodeid"].partition("::")[2]: test for test in told["tests"]}
    assert set(tests) == {"test_writes", "test_leaves_a_process", "test_reaches_out", "test_clean"}
    assert {change["path"].rpartition("/")[2] for change in tests["test_writes"]["changes"]} == {"made.txt", "data.txt"}
    assert tests["test_leaves_a_process"]["processes"] == ["sleep 77"]
    assert tests["test_clean"]["changes"] == []
    assert len({test["sandbox"] for test in told["tests"]}) == 4
    assert {test["worker"] for test in told["tests"]} <= {0, 1}
    assert all(before <= test["start"] <= time.time() and test["wall"] >= 0 for test in told["tests"])
    assert told["jobs"] == 2
    assert told["backend"] == "namespace"
    run(doing, "--isolation", "--isolation-report=out.html")
    page = (doing.path / "out.html").read_text()
    assert "test_leaves_a_process" in page
    assert "<script" in page


# tmp_path.

KEEPS = """
    import os
    import pytest

    @pytest.mark.parametrize("name", ["/one", "_one"])
    def test_fails(tmp_path, name):
        (tmp_path / "below").mkdir()
        (tmp_path / "below" / "file.txt").write_text(name)
        (tmp_path / "run.sh").write_text("echo")
        (tmp_path / "run.sh").chmod(0o777)
        os.symlink("/etc/passwd", tmp_path / "link")
        os.mkfifo(tmp_path / "fifo")
        print("path:", tmp_path)
        assert False

    def test_passes(tmp_path):
        (tmp_path / "file").write_text("x")

    def test_lies(tmp_path):
        (tmp_path / "deep").mkdir()
        assert False
"""


@pytest.mark.parametrize("option", ["", "--basetemp=given"])
def test_files_of_a_failed_test_are_there_afterwards(pytester: pytest.Pytester, option: str) -> None:
    pytester.makepyfile(KEEPS)
    import subprocess
    import sys

    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--isolation", *filter(None, [option])]
    text = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False).stdout
    paths = [Path(path) for path in re.findall(r"path: (\S+)", text)]
    assert len(set(paths)) == 2
    for path, content in zip(paths, ("/one", "_one"), strict=True):
        assert (path / "below" / "file.txt").read_text() == content
        assert sorted(os.listdir(path)) == ["below", "run.sh"]
        assert (path / "run.sh").stat().st_mode & 0o777 == 0o600
    assert not list(paths[0].parent.glob("test_passes*/file"))
    if option:
        assert paths[0].parent == pytester.path / "given"


def test_names_that_lead_elsewhere_are_refused(pytester: pytest.Pytester) -> None:
    from pytest_isolation.peers.carrier import Refused
    from pytest_isolation.peers.tmp_path import TmpPathCarrier

    item = pytester.getitem("def test_it(tmp_path): pass", "test_it")
    carrier = TmpPathCarrier(item.config)
    for parts in (["..", "x"], ["a/b"], [""], ["."], ["a", "..", "b"], [], ["x" * 300], ["a\0"], [1], "ab"):
        with pytest.raises(Refused):
            carrier.check(item, {"files": [[parts, None]], "cut": False})
    with pytest.raises(ValueError, match=r"base64|padding|alphabet"):
        carrier.check(item, {"files": [[["a"], "%%%"]], "cut": False})


# What is shown, or written, past the reports.

LOGS = """
    import logging
    import pytest

    @pytest.fixture(scope="module")
    def wide():
        logging.getLogger("app").warning("up")
        yield
        logging.getLogger("app").warning("down")
    @pytest.fixture
    def narrow():
        logging.getLogger("app").warning("set up")
        yield
        logging.getLogger("app").warning("torn down")

    def test_one(wide, narrow): logging.getLogger("app").warning("one \\x1b]0;title\\x07")
    def test_two(wide, narrow): logging.getLogger("app").warning("two"); assert False
    def test_three(wide): logging.getLogger("app").info("three")
"""


def test_log_file(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(LOGS)
    run(pytester, "--log-file=plain.log", "--log-file-level=INFO")
    result = run(
        pytester, "--log-file=isolated.log", "--log-file-level=INFO", "--isolation", "--isolation-jobs=2",
        "-W", "error", "-W", "ignore:.*fork.*:DeprecationWarning",
    )  # fmt: skip
    result.assert_outcomes(passed=2, failed=1)
    plain, isolated = ((pytester.path / f"{name}.log").read_text() for name in ("plain", "isolated"))
    assert isolated == plain.replace("\x1b", "\\x1b").replace("\x07", "\\x07")
    assert isolated.count("WARNING") == 8


@pytest.mark.parametrize("arguments", [["--log-cli-level=INFO"], ["--setup-show"], ["-s", "-v"]])
def test_what_is_printed_at_once_is_in_its_place(pytester: pytest.Pytester, arguments: list[str]) -> None:
    """Among the letters, too, that tell how tests went."""
    pytester.makepyfile(LOGS.replace(r" \x1b]0;title\x07", ""))
    found = []
    for isolation in ([], ["--isolation"]):
        lines = run(pytester, *arguments, *isolation).outlines
        start = next(number for number, line in enumerate(lines) if line.startswith("collect"))
        end = next(number for number, line in enumerate(lines) if "FAILURES" in line)
        # Live logs: there is one more heading where a wide fixture was set up, and a column of its own for percentages.
        found.append([line.split() for line in lines[start:end] if line and "live log" not in line])
    assert found[1] == found[0]


def test_attributes_of_a_test_in_junit(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(r"""
        def test_one(record_xml_attribute):
            record_xml_attribute("assertions", "REQ <1>")
            if __import__("os").getpid() < 50:
                record_xml_attribute("name", "test_two")
                record_xml_attribute('a="1"><evil', "x")
        def test_two(): assert False
    """)
    found = []
    for isolation in ([], ["--isolation"]):
        run(pytester, "--junitxml=out.xml", "-o", "junit_family=xunit1", *isolation).assert_outcomes(passed=1, failed=1)
        cases = list(ElementTree.parse(pytester.path / "out.xml").iter("testcase"))
        found.append([{name: value for name, value in case.items() if name != "time"} for case in cases])
    assert found[1] == found[0]
    assert found[0][0]["assertions"] == "REQ <1>"


def test_a_file_for_junit_s_newer_schema_is_valid(pytester: pytest.Pytester) -> None:
    """In which a test case has no properties; pytest writes them there only for who asks for them, and warns."""
    pytester.makepyfile("def test_one(): pass")
    run(pytester, "--isolation", "--junitxml=out.xml", "--isolation-strict").assert_outcomes(passed=1)
    assert [each.tag for each in ElementTree.parse(pytester.path / "out.xml").iter()] == [
        "testsuites",
        "testsuite",
        "testcase",
    ]


def test_a_directory_that_is_asked_for_by_name(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """As doctests do. Its place on the host is not there inside, unless somebody makes it."""
    monkeypatch.setenv("PYTEST_DEBUG_TEMPROOT", str(pytester.path.parent / "elsewhere"))
    (pytester.path.parent / "elsewhere").mkdir()
    pytester.makepyfile("def test_it(request): assert request.getfixturevalue('tmp_path').is_dir()")
    run(pytester, "--isolation").assert_outcomes(passed=1)
