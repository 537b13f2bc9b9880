"""What a user sees is what plain pytest shows; and what plain pytest cannot show, a test that dies."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import leftovers

pytestmark = pytest.mark.once("user")

SUITE = """
    import logging, os, sys, unittest, warnings
    import pytest

    def test_pass(): print("to stdout"); print("to stderr", file=sys.stderr)
    def test_fail():
        print("shown \\x1b[31mred\\x1b[0m"); logging.getLogger("app").warning("logged")
        value = {"a": [1, 2]}
        assert value == {"a": [1, 3]}
    def test_skip(): pytest.skip("not today")
    @pytest.mark.skip(reason="never")
    def test_marked_skip(): pass
    @pytest.mark.xfail(reason="known")
    def test_xfail(): assert 0
    @pytest.mark.xfail(strict=True)
    def test_xpass_strict(): pass
    @pytest.mark.xfail
    def test_xpass(): pass
    def test_warns(): warnings.warn("old", DeprecationWarning); warnings.warn(UserWarning("mine"))
    class Odd(UserWarning): pass
    def test_odd_warning(): warnings.warn("odd", Odd)
    @pytest.fixture
    def broken(): raise ValueError("in setup")
    def test_setup_error(broken): pass
    @pytest.fixture
    def leaves():
        yield
        raise ValueError("in teardown")
    def test_teardown_error(leaves): pass
    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_parametrized(n): assert n != 2
    class TestCase(unittest.TestCase):
        @classmethod
        def setUpClass(cls): cls.shared = 1
        def test_unit(self): self.assertEqual(self.shared, 1)
        def test_unit_fails(self): self.assertEqual(self.shared, 2)
        @unittest.skip("unit skip")
        def test_unit_skip(self): pass
        @unittest.expectedFailure
        def test_unit_xfail(self): self.fail()
    class TestClass:
        @pytest.fixture(scope="class", autouse=True)
        def state(self, request): request.cls.value = 5
        def test_method(self): assert self.value == 5
    def test_property(record_property): record_property("key", "value")
    def test_capfd(capfd): os.system("echo hi"); assert capfd.readouterr().out == "hi\\n"
    def test_caplog(caplog): logging.warning("x"); assert "x" in caplog.text
    def test_tmp_path(tmp_path): (tmp_path / "f").write_text("x")
    def test_monkeypatch(monkeypatch): monkeypatch.setenv("A", "b"); monkeypatch.chdir("/")
    def test_sysexit(): sys.exit(3)
    def test_chained():
        try: 1 / 0
        except ZeroDivisionError as error: raise KeyError("k") from error
"""


def outcome_lines(result: pytest.RunResult) -> list[str]:
    words = ("PASSED", "FAILED", "SKIPPED", "XFAIL", "XPASS", "ERROR")
    return sorted(line for line in result.outlines if line.startswith(words))


def without_noise(lines: list[str]) -> list[str]:
    """Without what differs from run to run, and what a failure's report says of its sandbox."""
    noise = ("isolation:", "platform", "plugins", "rootdir", "wall ")
    return [line for line in lines if not line.startswith(noise) and " in " not in line and "--- isolation ---" not in line]


def shape(path: Path) -> list[tuple[str, str | None, list[str]]]:
    """A junit file without its times."""
    tree = ElementTree.parse(path)
    for case in tree.iter("testcase"):
        for properties in case.findall("properties"):
            for each in properties.findall("property"):
                if (each.get("name") or "").startswith("isolation_"):
                    properties.remove(each)
            if not len(properties):
                case.remove(properties)
    found = [(e.tag, e.get("name"), [f"{c.tag} {c.get('message')}" for c in e]) for e in tree.iter()]
    return [(tag, name, [c for c in children if c]) for tag, name, children in found]


@pytest.mark.parametrize("arguments", [["-rA"], ["-rA", "-s"], ["-rA", "--capture=sys"], ["-rA", "--tb=native"], ["-v"]])
def test_output_is_that_of_plain_pytest(pytester: pytest.Pytester, arguments: list[str]) -> None:
    pytester.makepyfile(SUITE)
    arguments = [*arguments, "-p", "no:cacheprovider"]
    plain = pytester.runpytest_subprocess(*arguments)
    isolated = pytester.runpytest_subprocess("--isolation", *arguments)
    assert isolated.ret == plain.ret == 1
    assert outcome_lines(isolated) == outcome_lines(plain)
    if "-s" not in arguments:
        assert without_noise(isolated.outlines) == without_noise(plain.outlines)
    else:
        assert sorted(without_noise(isolated.outlines)) == sorted(without_noise(plain.outlines))


def test_junit_is_that_of_plain_pytest(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE + "\n    def test_suite(record_testsuite_property): record_testsuite_property('p', 'q')\n")

    pytester.runpytest_subprocess("--junitxml=plain.xml")
    pytester.runpytest_subprocess("--isolation", "--junitxml=isolated.xml")
    assert shape(pytester.path / "isolated.xml") == shape(pytester.path / "plain.xml")


@pytest.mark.parametrize(
    ("arguments", "ret"),
    [
        (["-x"], 1),
        (["--maxfail=2"], 1),
        (["-k", "test_pass"], 0),
        (["-k", "nothing_has_this_name"], 5),
        (["--co", "-q"], 0),
        (["test_no_such_file.py"], 4),
        (["--durations=3"], 1),
        (["-m", "xfail"], 1),
        (["--setup-show", "-k", "tmp_path"], 0),
    ],
)
def test_selection_and_exit_status(pytester: pytest.Pytester, arguments: list[str], ret: int) -> None:
    pytester.makepyfile(SUITE)
    plain = pytester.runpytest_subprocess(*arguments, "-p", "no:cacheprovider")
    isolated = pytester.runpytest_subprocess("--isolation", *arguments, "-p", "no:cacheprovider")
    assert isolated.ret == plain.ret == ret
    assert isolated.parseoutcomes() == plain.parseoutcomes() if ret in (0, 1) and "--co" not in arguments else True


def test_last_failed_and_stepwise(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pass\ndef test_d(): assert 0\n")
    pytester.runpytest_subprocess("--isolation")
    pytester.runpytest_subprocess("--isolation", "--lf").assert_outcomes(failed=2)
    pytester.runpytest_subprocess("--isolation", "--sw").assert_outcomes(passed=1, failed=1)
    pytester.runpytest_subprocess("--isolation", "--sw").assert_outcomes(failed=1, deselected=1)


def test_the_value_of_the_option_is_not_a_path(pytester: pytest.Pytester) -> None:
    pytester.mkpydir("sub").joinpath("conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--mine')\n")
    pytester.path.joinpath("sub", "test_x.py").write_text(
        "def test_x(pytestconfig): assert pytestconfig.getoption('mine') == '1'\n"
    )
    pytester.runpytest_subprocess("--isolation", "sub", "--mine=1").assert_outcomes(passed=1)
    pytester.runpytest_subprocess("--isolation=namespace", "sub", "--mine=1").assert_outcomes(passed=1)
    result = pytester.runpytest_subprocess("--isolation=nonsense", "sub")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*no backend 'nonsense'*namespace*"])


def test_deaths(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import ctypes, os, signal, threading, time
        import pytest

        def test_exit(): print("so far", flush=True); os._exit(0)
        def test_signal(): os.kill(os.getpid(), signal.SIGKILL)
        def test_segv(): print("before"); ctypes.string_at(0)
        def test_kill_all():
            try: os.kill(-1, signal.SIGKILL)
            except ProcessLookupError: pass
        @pytest.mark.isolation(timeout="400ms")
        def test_hang():
            threading.Thread(target=time.sleep, args=(60,), name="helper", daemon=True).start()
            print("waiting")
            time.sleep(60)
        @pytest.mark.isolation(memory="64M")
        def test_memory():
            hoard = []
            while True: hoard.append(bytearray(1 << 20))
        @pytest.fixture
        def dies(): os._exit(7)
        def test_dies_in_setup(dies): pass
        @pytest.fixture
        def dies_late():
            yield
            os._exit(7)
        def test_dies_in_teardown(dies_late): pass
        @pytest.mark.xfail
        def test_xfail_dies(): os._exit(1)
        def test_orphans(): os.fork() or time.sleep(60)
        def test_after(): pass
        """
    )
    result = pytester.runpytest_subprocess("--isolation", "-rA", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=4, failed=6, errors=1, xfailed=1)
    output = result.stdout.str()
    for expected in (
        "ended with status 0 before the test was over",
        "so far",
        "killed by signal 9 (SIGKILL)",
        "killed by signal 11 (SIGSEGV)",
        "in test_segv",
        "timed out after 0.4s",
        "in test_hang",
        "waiting",
        "ran out of memory (isolation memory limit: 64M)",
        "in test_memory",
        "ended with status 7",
    ):
        assert expected in output, expected
    assert output.count("Thread 0x") >= 1


@pytest.mark.parametrize("option", ["--isolation", "--isolation=auto"])
def test_conftest_files_above_the_root_are_not_loaded(pytester: pytest.Pytester, option: str) -> None:
    """As in plain pytest, in which the tree of what is collected begins there, too."""
    pytester.makeconftest("raise RuntimeError('above')\n")
    root = pytester.mkdir("root")
    (root / "pytest.ini").write_text("[pytest]\n")
    (root / "test_it.py").write_text(
        "def test_it(request): assert sorted(request.node.keywords) == ['', 'root', 'test_it', 'test_it.py']\n"
    )
    os.chdir(root)
    for arguments in ([], [option]):
        pytester.runpytest_subprocess(*arguments, "-p", "no:cacheprovider").assert_outcomes(passed=1)


@pytest.mark.parametrize("style", ["auto", "long", "short", "line", "native", "no"])
def test_a_death_is_shown_as_a_failure_is_in_each_style(pytester: pytest.Pytester, style: str) -> None:
    pytester.makepyfile("""
        import os
        import pytest

        def test_dies():
            print("its output")
            os._exit(7)
        @pytest.fixture(scope="module")
        def late():
            yield
            os._exit(8)
        def test_late(late): pass
    """)
    result = pytester.runpytest_subprocess("--isolation", f"--tb={style}", "-rA", "-p", "no:cacheprovider")
    text = result.stdout.str()
    where = f"{pytester.path}/test_a_death_is_shown_as_a_failure_is_in_each_style.py"
    said = [line for line in result.outlines if line.startswith(f"{where}:")]
    of_line = [f"{where}:4: the test's process ended with status 7 before the test was over"]
    assert [line.partition(" (")[0] for line in said] == (of_line if style == "line" else [])
    shown = sum(line.startswith("the test's process ended with status") for line in result.outlines)
    assert shown == (0 if style == "no" else 2)
    assert ("its output" in text) == (style != "no")
    assert "FAILED test_a_death_is_shown" in text
    assert "ERROR test_a_death_is_shown" in text
    assert "_Place" not in text


def test_isolated_from_one_another_and_from_the_host(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        helper="state = 0",
        test_it="""
        import os, socket, helper
        from pathlib import Path

        def leave(): helper.state = 1; Path("left.txt").touch(); Path("/tmp/left").touch(); os.environ["LEFT"] = "1"
        def check():
            assert helper.state == 0
            assert not Path("left.txt").exists() and not Path("/tmp/left").exists() and "LEFT" not in os.environ
            assert os.getpid() == 2 and len([p for p in os.listdir("/proc") if p.isdigit()]) == 2
        def test_1(): check(); leave(); socket.create_server(("127.0.0.1", 80))
        def test_2(): check(); leave(); socket.create_server(("127.0.0.1", 80))
        """,
    )
    pytester.runpytest_subprocess("--isolation", "-p", "no:cacheprovider").assert_outcomes(passed=2)
    assert not (pytester.path / "left.txt").exists()
    assert not Path("/tmp/left").exists()


def test_markers_and_ini(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nisolation = namespace\nisolation_timeout = 30s\n")
    pytester.makepyfile(
        """
        import os, socket, pytest
        host = os.readlink("/proc/self/ns/net")
        @pytest.mark.isolation(enabled=False)
        def test_plain(): assert os.getpid() != 2
        @pytest.mark.isolation(network="host")
        def test_network(): assert os.readlink("/proc/self/ns/net") == host and os.getpid() == 2
        def test_no_network(): assert os.readlink("/proc/self/ns/net") != host
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["isolation: namespace, a fresh sandbox for every test; *wall 30s"])
    assert "isolation:" not in pytester.runpytest_subprocess("--isolation=no").stdout.str()


@pytest.mark.parametrize("marker", ["memory='lots'", "networks='none'", "'host'", "network='moon'", "timeout=-1"])
def test_bad_markers(pytester: pytest.Pytester, marker: str) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.isolation({marker})\ndef test_x(): pass\n")
    result = pytester.runpytest_subprocess("--isolation")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*test_bad_markers.py::test_x*"])


@pytest.mark.parametrize("off", ["no", "off", "0"])
def test_a_sandbox_where_tests_have_none(pytester: pytest.Pytester, off: str) -> None:
    pytester.makeini("[pytest]\nisolation = namespace")
    pytester.makepyfile("def test_it(sandbox): assert sandbox.run(['true']).returncode == 0")
    pytester.runpytest_subprocess(f"--isolation={off}").assert_outcomes(passed=1)


def test_a_sandbox_that_was_lent_is_for_commands(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
    import pytest
    from isolation.errors import FeatureMissing
    def test_it(sandbox):
        with pytest.raises(FeatureMissing, match="lent"): sandbox.template("json:dumps")
        with pytest.raises(FeatureMissing, match="lent"): sandbox.load_template("/x", "json:dumps")
    """)
    pytester.runpytest_subprocess("--isolation").assert_outcomes(passed=1)


def test_mount_option(pytester: pytest.Pytester, tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen" / "f").write_text("hello")
    pytester.makepyfile(
        """
        from pathlib import Path
        def test_x(): assert Path("/seen/f").read_text() == "hello"; Path("/out/g").write_text("result")
        """
    )
    arguments = [f"--isolation-mount={tmp_path}/seen:/seen", f"--isolation-mount={tmp_path}/seen:/out:rw"]
    pytester.runpytest_subprocess("--isolation", *arguments).assert_outcomes(passed=1)
    assert (tmp_path / "seen" / "g").read_text() == "result"


def test_sandbox_fixture(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os
        from pathlib import Path
        def test_it(sandbox, tmp_path):
            if os.getpid() == 2:
                Path("mine.txt").write_text("x")
            done = sandbox.run(["sh", "-c", "ls; echo out > /tmp/f; exit 3"], timeout=600)
            assert done.returncode == 3 and b"test_sandbox_fixture.py" in done.stdout and b"mine" not in done.stdout
            (tmp_path / "in").write_text("in")
            sandbox.copy_in(tmp_path / "in", "/tmp/in")
            assert sandbox.run(["cat", "/tmp/in"]).stdout == b"in"
            sandbox.copy_out("/tmp/f", tmp_path / "f")
            assert (tmp_path / "f").read_text() == "out\\n"
        """
    )
    for arguments in (["--isolation"], []):
        pytester.runpytest_subprocess(*arguments).assert_outcomes(passed=1)


def test_a_test_may_end_the_session(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\ndef test_a(): pytest.exit('enough', returncode=9)\ndef test_b(): pass\n")
    result = pytester.runpytest_subprocess("--isolation")
    assert result.ret == 9
    pytester.makepyfile("def test_a(request): request.session.shouldstop = 'told to'\ndef test_b(): pass\n")
    result = pytester.runpytest_subprocess("--isolation")
    assert result.ret == 2
    result.assert_outcomes(passed=1)


def test_a_test_cannot_end_the_session_well(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import pytest\ndef test_a(): assert 0\ndef test_b(): pytest.exit('bye', returncode=0)\ndef test_c(): pass\n"
    )
    assert pytester.runpytest_subprocess("--isolation").ret == 2


def test_no_escape_reaches_a_terminal(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        r"""
        import os
        def test_a():
            for fd in range(1, 40):
                try: os.write(fd, b"\x1b]0;OWNED\x07\x1b[2J \x1b[31mred\x1b[0m")
                except OSError: pass
        """
    )
    output = b""

    def read(fd: int) -> bytes:
        nonlocal output
        data = os.read(fd, 4096)
        output += data
        return b"."  # nothing of it on this test's own terminal

    os.chdir(pytester.path)
    pty.spawn([sys.executable, "-m", "pytest", "--isolation", "-p", "no:cacheprovider", "-s"], read)
    assert b"red" in output
    assert b"\x1b]0;" not in output
    assert b"\x1b[2J" not in output


def test_without_the_option_nothing_of_ours_is_imported(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import sys\ndef test_x(): assert not [m for m in sys.modules if m == 'isolation' or m.startswith('isolation.')]\n"
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_pyc_and_caches_stay_inside(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        lazily="value = 1",
        test_it="""
        import sys
        def test_x(request):
            import lazily
            request.config.cache.set("mine/key", 1)
        """,
    )
    pytester.runpytest_subprocess("--isolation").assert_outcomes(passed=1)
    assert not list(pytester.path.glob("__pycache__/lazily*"))
    assert not (pytester.path / ".pytest_cache" / "v" / "mine").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_at_any_moment(pytester: pytest.Pytester, number: signal.Signals) -> None:
    """Nothing stays alive, and an interrupted run says so.

    While Python and pytest still import and collect, an interrupt may have any exit code: importlib loses it now and
    then, and pytest fails on one in its own assertion rewriting. From the first sandbox on, it is 2, always.
    """
    path = pytester.makepyfile(
        "import pytest, time\n@pytest.mark.parametrize('n', range(500))\ndef test_x(n): time.sleep(0.01)\n"
    )
    command = [sys.executable, "-u", "-m", "pytest", "--isolation", "--isolation-memory=200M", path.name]
    for delay in (0.2, 0.35, 0.45, 0.5, 0.6, 0.7):
        process = subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(number)
        process.wait(60)
    for delay in (0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8):
        with subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout
            seen = b""
            while f"{path.name} .".encode() not in seen:
                more = os.read(process.stdout.fileno(), 1 << 16)
                assert more, seen
                seen += more
            time.sleep(delay)
            process.send_signal(number)
            process.stdout.read()
            assert process.wait(600) == (2 if number == signal.SIGINT else -number)
    deadline = time.monotonic() + 300
    mark = os.fsencode(path.name)
    while leftovers(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert leftovers(mark) == set()


def test_forged_messages(pytester: pytest.Pytester) -> None:
    """A test that finds the wire can spoil its own result, and no other's."""
    pytester.makepyfile(
        """
        import json, os, pytest, struct

        def wires():
            for fd in range(3, 200):
                try:
                    if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"): yield fd
                except OSError: pass

        def send(message, data=b""):
            text = json.dumps(message).encode()
            for fd in wires(): os.write(fd, struct.pack(">II", len(text), len(data)) + text + data)

        def report(**fields):
            base = {"nodeid": "test_forged_messages.py::test_victim", "outcome": "passed", "when": "call", "location": ["a", 1, "b"],
                    "keywords": {}, "longrepr": None, "sections": [], "user_properties": [], "duration": 0, "start": 0, "stop": 0}
            return json.dumps(base | fields).encode()

        def test_garbage():
            for fd in wires(): os.write(fd, b"garbage" * 100)
        def test_huge():
            for fd in wires(): os.write(fd, b"\\xff" * 8)
        def test_other_test(): send({"report": True}, report())
        def test_bad_outcome(request): send({"report": True}, report(nodeid=request.node.nodeid, outcome="splendid"))
        def test_bad_longrepr(request):
            send({"report": True}, report(nodeid=request.node.nodeid, longrepr={"reprcrash": 1, "reprtraceback": {"x": 1}}))
        def test_bad_number(request): send({"report": True}, report(nodeid=request.node.nodeid, duration="1"))
        def test_deep(request): send({"report": True}, b"[" * 100000)
        def test_done(): send({"done": {}}); os._exit(0)
        def test_flood():
            for _ in range(1000): send({"nothing": "x" * 1000})
        def test_warning_class(): send({"warning": {"message": "x", "category": "system", "filename": "/dev/zero", "lineno": 1,
                                        "line": "l", "when": "runtest", "nodeid": "x", "location": None}})
        def test_skip_without_reason(request): send({"report": True}, report(nodeid=request.node.nodeid, outcome="skipped", longrepr="str"))
        def test_failure_without_reason(request): send({"report": True}, report(nodeid=request.node.nodeid, outcome="failed"))
        def test_never_reads(pytestconfig):
            guest = pytestconfig.pluginmanager.getplugin("isolation-worker").guest
            for _ in range(5000): guest.send({"sandbox": True})
        def test_empty_messages():
            while True: send({})
        def test_grows_the_stacks_file():
            for fd in range(3, 200):
                try:
                    if "isolation-stacks" in os.readlink(f"/proc/self/fd/{fd}"): os.ftruncate(fd, 2**63 - 1)
                except OSError: pass
            import time; time.sleep(60)
        def test_inner_error(): send({"done": {"internal_error": "boo"}})
        def test_surrogates(record_property): record_property("\\ud800", "v\\ud800"); print("\\ud800")
        def test_victim(): assert False
        """
    )
    result = pytester.runpytest_subprocess(
        "--isolation", "-rA", "-vv", "--junitxml=out.xml", "--isolation-timeout=10s", timeout=600
    )
    # A name of another test's, and an outcome without its reason, are taken as the test's own; its own report is then one too many.
    result.assert_outcomes(failed=14, passed=3, skipped=1, errors=3)
    assert "FAILED test_forged_messages.py::test_victim" in result.stdout.str()
    assert "INTERNALERROR" not in result.stdout.str()


def test_without_pytest_s_own_plugins(pytester: pytest.Pytester) -> None:
    """Those that can be left out; nothing of ours relies on one."""
    pytester.makepyfile(
        "import pytest\n@pytest.fixture(scope='module')\ndef wide(): return 1\ndef test_x(wide): assert wide\ndef test_y(): assert 0\n"
    )
    for name in (
        "capture",
        "terminal",
        "logging",
        "junitxml",
        "warnings",
        "tmpdir",
        "faulthandler",
        "skipping",
        "debugging",
        "unittest",
        "subtests",
    ):
        plain = pytester.runpytest_subprocess("-p", f"no:{name}", "-p", "no:cacheprovider")
        result = pytester.runpytest_subprocess("--isolation", "-p", f"no:{name}", "-p", "no:cacheprovider")
        assert (name, result.ret, result.stderr.str()) == (name, plain.ret, plain.stderr.str())


def test_an_item_that_names_itself(pytester: pytest.Pytester) -> None:
    """Its reports do not have that name, as in plain pytest."""
    pytester.makeconftest("""
        import pytest
        class Odd(pytest.Item):
            nodeid = "odd"
            def runtest(self): pytest.xfail("expected")
        def pytest_collect_file(file_path, parent):
            if file_path.suffix == ".odd":
                return Odd.from_parent(name="odd", parent=parent)
    """)
    pytester.makefile(".odd", a="")
    pytester.runpytest_subprocess("--isolation").assert_outcomes(xfailed=1)
