"""`pytest --isolation=microvm`: the same plug-in, and what a user sees is the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import alive, machines
from pytest_plugin.test_outcomes import SUITE, outcome_lines, shape, without_noise

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("microvm_ready")]


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, real_cache: str) -> None:
    """pytester gives its runs a home directory of their own, and images take a minute to make."""
    monkeypatch.setenv("XDG_CACHE_HOME", real_cache)


@pytest.mark.parametrize("arguments", [["-rA"], ["-rA", "-s"]])
def test_output_is_that_of_plain_pytest(pytester: pytest.Pytester, arguments: list[str]) -> None:
    pytester.makepyfile(SUITE + "\n    def test_suite(record_testsuite_property): record_testsuite_property('p', 'q')\n")
    arguments = [*arguments, "-p", "no:cacheprovider", "--junitxml=out.xml"]
    plain = pytester.runpytest_subprocess(*arguments)
    plain_shape = shape(pytester.path / "out.xml")
    isolated = pytester.runpytest_subprocess("--isolation=microvm", *arguments)
    assert isolated.ret == plain.ret == 1
    assert outcome_lines(isolated) == outcome_lines(plain)
    ours, theirs = (without_noise(result.outlines) for result in (isolated, plain))
    assert (sorted(ours) == sorted(theirs)) if "-s" in arguments else (ours == theirs)
    assert shape(pytester.path / "out.xml") == plain_shape
    isolated.stdout.fnmatch_lines(["isolation: microvm (*), a fresh sandbox for every test; network: own loopback only;*"])


def test_last_failed_stepwise_and_selection(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pass\ndef test_d(): assert 0\n")
    selected = pytester.runpytest_subprocess("--isolation=microvm", "-k", "not test_c", "--deselect", "test_x")
    selected.assert_outcomes(passed=1, failed=2, deselected=1)
    pytester.runpytest_subprocess("--isolation=microvm", "--lf", "-x").assert_outcomes(failed=1)


def test_every_test_is_a_machine_of_its_own(pytester: pytest.Pytester) -> None:
    """Deaths, limits, and what one test leaves to the next: nothing. One marker sends a test to the other backend."""
    pytester.makepyfile(
        """
        import os, random, signal, sys, time, threading, pathlib
        import pytest

        def test_one(): leave()
        def test_two(): leave()
        def leave():
            assert not os.path.exists("/tmp/left") and not os.path.exists("left") and "LEFT" not in os.environ
            assert threading.active_count() == 1
            open("/tmp/left", "w").close(); open("left", "w").close(); os.environ["LEFT"] = "1"
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            if os.fork() == 0: time.sleep(60)
        def test_segfault(): print("words before"); os.kill(os.getpid(), signal.SIGSEGV)
        def test_exit(): os._exit(0)
        @pytest.mark.isolation(timeout="10s")
        def test_hang(): time.sleep(600)
        def test_memory():
            hoard = []
            while True: hoard.append(bytearray(1 << 20))
        @pytest.mark.isolation(backend="namespace")
        def test_in_a_container(): assert os.uname().release == HOST
        def test_in_a_machine(): assert os.uname().release != HOST
        def test_sandbox(sandbox):
            assert sandbox.run(["echo", "a container in a machine"]).stdout == b"a container in a machine\\n"
        HOST = "HOST"
        """.replace('"HOST"', repr(os.uname().release))
    )
    result = pytester.runpytest_subprocess(
        "--isolation=microvm", "-rA", "-p", "no:cacheprovider", "--isolation-memory=300M", "--isolation-timeout=60s"
    )
    result.assert_outcomes(passed=5, failed=4)
    result.stdout.fnmatch_lines_random([
        "*test's process was killed by signal 11 (SIGSEGV)*",
        "*in test_segfault*",
        "words before",
        "*ended with status 0 before*",
        "*timed out after 10s*",
        "*in test_hang*",
        "*ran out of memory (isolation memory limit: 300M)*",
    ])  # fmt: skip
    assert not (pytester.path / "left").exists()


def test_containers_in_a_machine(pytester: pytest.Pytester) -> None:
    """The other order: one machine, and in it every test in a namespace fork; on the machine's kernel, not on the host's."""
    pytester.makepyfile(
        "import os, pathlib\n"
        f"def test_one(): assert os.uname().release != {os.uname().release!r}; pathlib.Path('left').touch()\n"
        "def test_two(): assert not os.path.exists('left')\n"
        "def test_three(): assert 0\n"
    )
    # Inside, too, only the plug-in that this is about: to import the others takes half a minute under emulation.
    given = ["--env=PYTEST_DISABLE_PLUGIN_AUTOLOAD", "--env=PYTEST_PLUGINS"]
    command = [sys.executable, "-m", "isolation", "run", "--backend", "microvm", *given, "--"]
    command += [sys.executable, "-m", "pytest", "--isolation", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "isolation: namespace, a fresh sandbox" in done.stdout
    assert "1 failed, 2 passed" in done.stdout, done.stdout


def test_what_is_not_collected_inside_is_said(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import os, pytest\n@pytest.mark.parametrize('n', [os.uname().release])\ndef test_x(n): pass\ndef test_y(): pass\n"
    )
    result = pytester.runpytest_subprocess("--isolation=microvm", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*collected on the host, but not inside of the sandbox*"])


def test_an_error_in_the_worker_is_told(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(f"import os\nif os.uname().release != {os.uname().release!r}: raise RuntimeError('only inside')\n")
    pytester.makepyfile("def test_x(): pass\n")
    result = pytester.runpytest_subprocess("--isolation=microvm")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*the template exited with status 4 before it was warm*only inside*"])


@pytest.mark.parametrize("delay", [1.0, 4.0, 9.0])
def test_killed_at_any_moment(pytester: pytest.Pytester, delay: float) -> None:
    path = pytester.makepyfile("import pytest\n@pytest.mark.parametrize('n', range(500))\ndef test_x(n): pass\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "--isolation=microvm", path.name], cwd=pytester.path, stdout=subprocess.DEVNULL
    )
    time.sleep(delay)
    running = machines(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 300
    while alive(running) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(running) == set()
    assert not list(Path(pytester.path).glob("**/*.part"))
