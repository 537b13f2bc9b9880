"""As an enemy would: tests, fixtures and templates that say what they must not, and runs that are disturbed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pytest_isolation.wire import sanitize, values

pytestmark = pytest.mark.usefixtures("nothing_left")


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


# What a sandbox says.

SENDS = """
    import json, os
    import pytest

    def send(request, message, data=b""):
        request.config.pluginmanager.getplugin("isolation-worker")._guest.send(message, data)

    def report(nodeid, **fields):
        base = {"nodeid": nodeid, "outcome": "passed", "when": "call", "location": ["a", 1, "b"], "keywords": {}, "longrepr": None,
                "sections": [], "user_properties": [], "duration": 0, "start": 0, "stop": 0}
        return json.dumps(base | fields).encode()
"""


def test_a_test_that_runs_more_than_once_is_told_of_each_time(pytester: pytest.Pytester) -> None:
    """Some plug-ins, or a conftest, do that; what went wrong the second time was lost."""
    pytester.makeconftest("""
        from _pytest.runner import runtestprotocol
        def pytest_runtest_protocol(item, nextitem):
            runtestprotocol(item, nextitem=nextitem)
    """)
    pytester.makepyfile("count = 0\ndef test_it():\n    global count\n    count += 1\n    assert count < 2\n")
    result = run(pytester, "--isolation")
    result.assert_outcomes(passed=1, failed=1)
    assert result.ret == 1


def test_what_goes_wrong_behind_the_last_report_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
        import os, pytest
        @pytest.hookimpl(trylast=True)
        def pytest_runtest_logfinish(nodeid):
            if os.getpid() < 10 and "dies" in nodeid: os._exit(0)
            if os.getpid() < 10 and "raises" in nodeid: raise ValueError("late")
    """)
    pytester.makepyfile("def test_dies(): pass\ndef test_raises(): pass\ndef test_fine(): pass\n")
    result = run(pytester, "--isolation")
    result.assert_outcomes(passed=3, errors=2)
    result.stdout.fnmatch_lines(["*ended with status 0*", "*ValueError: late*"])


def test_messages_that_break_who_reads_them_end_one_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        SENDS
        + """
    huge = 10 ** 4000
    warning = {"message": "m", "category": "UserWarning", "filename": "f", "lineno": 1, "line": "l", "when": "runtest",
               "nodeid": "n", "location": ["f", 1, "g"]}
    bad = [
        {"warning": warning | {"location": [1]}}, {"warning": warning | {"location": ["f", "1", "g"]}},
        {"warning": warning | {"lineno": None}}, {"warning": warning | {"category": ["x"]}}, {"warning": [warning]}, {"warning": 1},
        {"next": 1}, {"next": None}, {"next": [[]]},
        {"carried": "tmp_path"}, {"carried": ["tmp_path"]}, {"carried": "coverage"}, {"carried": None}, {"carried": {}},
        {"xml_attribute": 1}, {"xml_attribute": [1, 2]}, {"report": True}, {"report": 1, "wait": True}, {"unshared": 1}, {},
        {"setup": 1}, {"teardown": True}, {"wide": 1}, {"sandbox": "x" * 100, "report": 1}, {"capture": [[]] * 1_100_000},
    ]
    @pytest.mark.parametrize("number", range(len(bad)))
    def test_bad(request, number): send(request, bad[number])
    @pytest.mark.parametrize("fields", [
        {"start": huge}, {"duration": -huge}, {"keywords": {"\\x1b]0;t\\x07": 1}, "outcome": None}, {"sections": [["a", "b", "c"]]},
        {"sections": [[[], []]]}, {"user_properties": [1]}, {"user_properties": [[1]]}, {"longrepr": ["a", 1], "outcome": "skipped"},
        {"longrepr": {"reprcrash": {"message": 1}, "reprtraceback": {}}, "outcome": "failed"},
        {"longrepr": {"reprcrash": None, "reprtraceback": {"reprentries": [{"type": "os", "data": {}}]}}, "outcome": "failed"},
        {"wasxfail": 1}, {"_report_type": "SubTestReport"}, {"_report_type": "SubTestReport", "_subtest.context": {"msg": 1}},
        {"isolation_after": {"outcome": "passed"}}, {"outcome": "rerun", "longrepr": "x"}, {"when": "???"}, {"location": None, "when": 1},
        {"user_properties": [["name", [[]] * 250_000]]}, {"sections": [["a", {str(n): [] for n in range(110_000)}]]},
    ])
    def test_bad_report(request, fields): send(request, {"report": True}, report(request.node.nodeid, **fields))
    @pytest.mark.parametrize("files", [[["..", "x"]], [[]], [["/etc/x"]], [["a" * 300]], [["a\\0"]], [1], None, [[["a"]]]])
    def test_bad_files(request, tmp_path, files):
        found = files and [[parts, ""] for parts in files]
        send(request, {"carried": "tmp_path"}, json.dumps({"files": found, "cut": False}).encode())
    def test_fine(): pass
    """
    )
    result = run(pytester, "--isolation", "-rA", "--junitxml=out.xml")
    result.assert_outcomes(passed=1, failed=52)
    assert "INTERNALERROR>" not in result.stdout.str() + result.stderr.str()
    assert ElementTree.parse(pytester.path / "out.xml").getroot()[0].get("failures") == "52"


def test_what_is_told_in_time_counts_when_it_is_heard_late(pytester: pytest.Pytester) -> None:
    """The process that reads may be busy with another test when a time limit passes."""
    pytester.makeconftest(
        "import time\ndef pytest_runtest_logreport(report):\n    if report.when == 'setup': time.sleep(3)\n"
    )
    pytester.makepyfile("import pytest\n@pytest.mark.parametrize('n', range(2))\ndef test_it(n): pass\n")
    result = run(pytester, "--isolation", "--isolation-jobs=2", "--isolation-timeout=5s")
    result.assert_outcomes(passed=2)


def test_a_run_keeps_no_more_than_it_has_room_for(pytester: pytest.Pytester) -> None:
    """What a test sends for other plug-ins is bounded in all, and of tests that pass no files are kept."""
    pytester.makepyfile(
        SENDS
        + """
    @pytest.fixture
    def flood(request, tmp_path):
        yield
        first = 3 * (request.node.name == "test_fails")
        for number in range(first, first + 3):
            files = [[[f"{number}-{n}"], ""] for n in range(1500)]
            send(request, {"carried": "tmp_path"}, json.dumps({"files": files, "cut": False}).encode())
    def test_passes(flood): pass
    def test_fails(flood): assert False
    """
    )
    result = run(pytester, "--isolation", "--basetemp=base", "-o", "tmp_path_retention_policy=failed")
    result.assert_outcomes(passed=1, failed=1)
    made = sorted({path.name.partition("-")[0] for path in (pytester.path / "base").glob("*/*")})
    assert made == ["3"]


def test_a_flood_of_what_is_kept_is_bounded(pytester: pytest.Pytester) -> None:
    """Of small and of large messages alike, from a test and from a template: in the memory of whoever reads them."""
    pytester.makepyfile(
        SENDS
        + """
    def flood(request, message):
        while True: send(request, message)
    @pytest.fixture(scope="module")
    def floods(request): flood(request, {"unshared": [os.urandom(1000).hex() for _ in range(500)], "name": "n", "left": "l"})
    def test_suite_property(request): flood(request, {"suite_property": ["n", "v" * 60_000]})
    def test_attribute(request): flood(request, {"xml_attribute": ["n", "v" * 60_000]})
    def test_of_a_template(floods): pass
    def test_fine(): pass
    """
    )
    code = (
        "import resource, sys, pytest; status = pytest.main(sys.argv[1:]); "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--isolation", "-q", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert "3 failed, 1 passed" in done.stdout
    assert int(re.findall(r"peak (\d+)", done.stdout)[0]) < 2000  # without a bound, all that the machine has


def test_a_template_speaks_for_its_own_tests_only(pytester: pytest.Pytester) -> None:
    """And what it says is shown as what a test says."""
    pytester.makepyfile(
        test_a=SENDS
        + """
    @pytest.fixture(scope="module")
    def evil(request):
        other = "test_b.py::test_other"
        nothing = {"duration": 0, "sections": []}
        send(request, {"wide": [other, 0], "duration": 500, "sections": [["Captured stdout setup", "forged"]]})
        send(request, {"wide": [request.session.items[0].nodeid, 0], "duration": 1,
                       "sections": [["Captured stdout \\x1b]0;title\\x07", "\\x1b[2J in the text"]]})
        send(request, {"carried": "tmp_path", "of": other}, json.dumps({"files": [[["planted"], ""]], "cut": False}).encode())
        for bad in ([other], 1, [[], {}], [other, -1], None): send(request, nothing | {"wide": bad})
        own = [request.session.items[0].nodeid, 0]
        for bad in (10 ** 4000, "x", None, [], float("inf")): send(request, {"wide": own, "duration": bad, "sections": []})
        for bad in (1, None, [1], [["a"]], {"a": 1}, [[None, None]] * 1000): send(request, {"wide": own, "duration": 0, "sections": bad})
        for bad in (1, None, {}, [1]): send(request, {"warning": bad}); send(request, nothing | {"wide": own})
        for bad in (1, None, [[]], "abc"): send(request, {"unshared": bad, "name": [], "left": "\\x1b[2J"})
        for bad in ({}, {"exit": 0}, [], None): send(request, {"carried": bad, "of": bad})
        send(request, {"report": True}, report("test_b.py::test_other"))
        send(request, {"teardown": True}, report("test_b.py::test_other"))
    def test_own(evil): assert False
    """,
        test_b="def test_other(tmp_path): print(tmp_path); assert False\n",
    )
    result = run(pytester, "--isolation", "--color=no")
    result.assert_outcomes(failed=2)
    text = result.stdout.str()
    assert "\x1b" not in text
    assert "forged" not in text
    assert "\\x1b[2J in the text" in text
    (kept,) = re.findall(r"^(/\S+test_other0)$", text, re.MULTILINE)
    assert os.listdir(kept) == []
    assert "INTERNALERROR" not in text


def test_a_debugger_that_nobody_has_asked_for(pytester: pytest.Pytester) -> None:
    """Where nobody sits at a terminal, it does not stop the clock."""
    pytester.makepyfile(
        SENDS
        + """
    import time
    def test_it(request): send(request, {"debugger": "enter"}); time.sleep(60)
    def test_template(evil): pass
    @pytest.fixture(scope="module")
    def evil(request): send(request, {"debugger": "enter"}); time.sleep(60)
    """
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--isolation", "--isolation-timeout=3s", "-q", "-p", "no:cacheprovider"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert "2 failed" in done.stdout
    assert done.stdout.count("timed out after 3s") >= 2


# Runs that are to hang, and processes that are to outlive them.

HANGS = (
    SENDS
    + """
    import ctypes, signal, time
    libc = ctypes.CDLL(None, use_errno=True)
    CLONE, PTRACE = (56, 101) if os.uname().machine == "x86_64" else (220, 117)

    def call(*arguments):
        return libc.syscall(*map(ctypes.c_long, arguments))

    def traced_zombie():
        '''Ends while a process traces it that does not let go.'''
        me = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # one that came while it is traced would stop it first
        ready, its_ready = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                call(PTRACE, 0x4206, me, 0, 0)  # PTRACE_SEIZE
                os.write(its_ready, b"r")
                time.sleep(600)
            os._exit(0)
        os.read(ready, 1)
        os._exit(0)

    def sibling():
        '''A child of its own parent, which is the supervisor.'''
        made = call(CLONE, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0)
        if made == 0:
            time.sleep(600)
        return made
"""
)


def supervisors(mark: str) -> set[int]:
    """Processes with this in the command line of the host, or of what it became."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                if mark.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                    found.add(int(name))
            except OSError:
                continue
    return found


def test_a_tracer_does_not_keep_the_dead(pytester: pytest.Pytester) -> None:
    """The supervisor is single-threaded, and waited for a process that another one traced; then nobody's time was kept."""
    pytester.makepyfile(
        HANGS
        + """
    def test_zombie(): traced_zombie()
    @pytest.fixture(scope="module")
    def wide(): return 1
    def test_zombie_of_a_template(wide): traced_zombie()
    def test_slow(): time.sleep(600)
    def test_fine(wide): pass
    """
    )
    result = run(pytester, "--isolation", "--isolation-timeout=8s", "-q")
    result.assert_outcomes(passed=1, failed=3)
    text = result.stdout.str()
    assert text.count("ended with status 0 before the test was over") >= 2
    assert "timed out after 8s" in text


def test_a_wide_fixture_that_is_traced_to_death(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        HANGS
        + """
    @pytest.fixture(scope="module")
    def evil(): traced_zombie()
    def test_one(evil): pass
    def test_fine(): pass
    """
    )
    run(pytester, "--isolation", "-q").assert_outcomes(passed=1, failed=1)


def test_no_guest_makes_siblings(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        HANGS
        + """
    @pytest.fixture(scope="module")
    def wide(): return sibling()
    def test_of_a_test(): assert sibling() == -1 and ctypes.get_errno() == 1
    def test_of_a_template(wide): assert wide == -1
    def test_of_its_fork(wide): assert sibling() == -1
    """
    )
    run(pytester, "--isolation", "-q").assert_outcomes(passed=3)


def test_everything_ends_with_a_killed_host(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        HANGS
        + """
    @pytest.fixture(scope="module")
    def wide(): return 1
    def test_zombie(wide, request):
        send(request, {"debugger": "enter"}) if False else None
        print("begun", file=sys.__stderr__, flush=True)
        traced_zombie()
    """.replace("import ", "import sys, ", 1)
    )
    mark = str(pytester.path)
    command = [sys.executable, "-m", "pytest", "--isolation", "-s", "-q", "-p", "no:cacheprovider", mark]
    host = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert host.stdout is not None
    for line in host.stdout:
        if "begun" in line:
            break
    host.send_signal(signal.SIGKILL)
    host.wait()
    deadline = time.monotonic() + 300
    while supervisors(mark) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert supervisors(mark) == set()
    host.stdout.close()


# What a sandbox asks of the run.


@pytest.mark.parametrize(
    ("options", "times"), [("", 1), ("-p pytest_rerunfailures", 1), ("-p pytest_rerunfailures --reruns=2", 3)]
)
def test_no_test_runs_more_often_than_an_option_says(pytester: pytest.Pytester, options: str, times: int) -> None:
    pytester.makepyfile(
        SENDS
        + """
    def test_again(request):
        os.write(2, b"run\\n")
        send(request, {"done": {"rerun": True}})
        while True: pass
    def test_fine(): pass
    """
    )
    result = run(pytester, "--isolation", "-q", "--capture=no", *options.split())
    assert result.errlines.count("run") == times
    assert "1 failed, 1 passed" in result.stdout.str()
    result.stdout.fnmatch_lines(["*asked to run once more, which no option or marker allows*"])


def test_a_template_that_refuses_to_be_forked_spoils_its_own_tests_only(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import os, signal
        import pytest

        @pytest.fixture(scope="module")
        def refuses():
            from isolation.backends.namespace.process.fork_point import ForkPoint
            ForkPoint._fork_into = lambda *arguments: None if os.getpid() else None

        @pytest.fixture(scope="class")
        def dies():
            from isolation.backends.namespace.process.fork_point import ForkPoint
            ForkPoint._fork_into = lambda *arguments: os._exit(1)

        class TestDies:
            def test_one(self, dies): pass
            def test_two(self, dies): pass

        def test_fine(): pass
        def test_refused(refuses): pass
    """)
    result = run(pytester, "--isolation", "--isolation-timeout=8s", "-q")
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    text = result.stdout.str()
    assert re.search(r"FAILED \S+::test_refused", text)
    assert not re.search(r"FAILED \S+::test_fine", text)


def test_a_template_speaks_of_its_own_fixtures_only(pytester: pytest.Pytester) -> None:
    """Those that it says cannot be shared, every test sets up: another's would be torn from under it."""
    pytester.makepyfile(
        test_a=SENDS
        + """
    @pytest.fixture(scope="module")
    def evil(request): send(request, {"unshared": ["shared", "evil2", "request"], "name": "shared", "left": "nothing"})
    def test_own(evil): pass
    """,
        test_b="""
    import pytest
    @pytest.fixture(scope="module")
    def shared(): print("up shared")
    def test_one(shared): pass
    def test_two(shared): pass
    """,
    )
    result = run(pytester, "--isolation", "-rA")
    result.assert_outcomes(passed=3)
    assert result.outlines.count("up shared") == 1
    result.stdout.no_fnmatch_line("*cannot carry*")


def test_no_text_from_inside_moves_the_terminal() -> None:
    """Names in objects are text, too: who iterates over a list takes an object as well, and prints them."""
    assert sanitize.clean("a\rb\r\nc\td \u202egnp.txt\u2066") == "a\\x0db\r\nc\td \\u202egnp.txt\\u2066"
    assert sanitize.clean_output("10 %\r20 %\n\u202e\x1b[A") == "10 %\r20 %\n\\u202e\\x1b[A"
    assert sanitize.clean_name("a\r\nb\u202e") == "a\\x0d\\x0ab\\u202e"
    cleaned = sanitize.clean_all({"lines": {"\x1b]52;c;eA==\x07": 1, "\x9b6n": ["\x1b[2J"]}, "red": "\x1b[31mx\x1b[0m"})
    assert cleaned == {"lines": {"\\x1b]52;c;eA==\\x07": 1, "\\x9b6n": ["\\x1b[2J"]}, "red": "\x1b[31mx\x1b[0m"}


def test_a_template_that_never_stops_talking(pytester: pytest.Pytester) -> None:
    """A process that it has left behind says more than anybody reads, while the template waits to be forked."""
    pytester.makepyfile("""
        import os, pytest

        @pytest.fixture(scope="session")
        def evil(request):
            from pytest_isolation.inside import unforkable
            unforkable.Held.describe = lambda *a, **k: ""
            guest = request.config.pluginmanager.getplugin("isolation-worker").guest
            fd = os.dup(guest.wire.sock.fileno())
            if os.fork() == 0:
                os.setsid()
                frames = b"\\0\\0\\0\\x02\\0\\0\\0\\0{}" * 50
                while True: os.write(fd, frames)
            yield 1

        def test_uses(evil): pass
        def test_innocent(): pass
    """)
    result = pytester.runpytest_subprocess("--isolation", "-p", "no:cacheprovider", "--isolation-timeout=60s", timeout=600)
    assert result.parseoutcomes()["passed"] >= 1


def test_values_of_one_hash_are_no_work_for_the_host() -> None:
    """What is looked up among them would be searched for."""
    modulus = sys.hash_info.modulus
    same = [number * modulus for number in range(1, 10_000)]
    for sent in (
        {"$": "set", "items": same}, {"$": "frozenset", "items": same[:17]}, {"$": "dict", "items": [[number, 1] for number in same]},
        {"$": "set", "items": [{"$": "tuple", "items": [number]} for number in same]},
    ):  # fmt: skip
        with pytest.raises(values.NotPlain, match="one hash"):
            values.unpack(sent)
    assert values.unpack({"$": "set", "items": list(range(10_000))}) == set(range(10_000))
    assert values.unpack(values.pack({(1, 2): {"a"}, -1: {-1, -2}})) == {(1, 2): {"a"}, -1: {-1, -2}}
