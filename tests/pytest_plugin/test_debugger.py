"""A debugger in a sandbox, on the user's terminal."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.once("user"), pytest.mark.usefixtures("nothing_left")]

SUITE = """
    import os, sys, time
    import pytest

    def test_fails():
        value = 41
        print("captured")
        assert value == 42

    def test_breaks():
        value = 7
        breakpoint()
        assert value == 8
        assert os.getpid() < 10  # in its own PID namespace
        with open("of-the-sandbox", "w"): pass

    def test_fine(): pass

    @pytest.fixture(scope="session")
    def wide():
        value = 5
        breakpoint()
        return value

    def test_wide(wide): assert wide == 6
    def test_wide_too(wide): assert wide == 6

    def test_loops():
        breakpoint()
        print("aslee" + "p", flush=True); time.sleep(60)
"""


def piped(pytester: pytest.Pytester, keys: str, *arguments: str) -> str:
    pytester.makepyfile(SUITE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--isolation", *arguments]
    done = subprocess.run(command, input=keys, capture_output=True, text=True, timeout=600, check=False)
    return done.stdout + done.stderr


def test_pdb_of_a_failure(pytester: pytest.Pytester) -> None:
    text = piped(pytester, "p value + 1\nc\n", "--pdb", "-k", "fails or fine")
    assert text.index("E       assert") < text.index("entering PDB")
    assert "(Pdb) 42\n" in text.replace("\r", "")
    assert "1 failed, 1 passed" in text


@pytest.mark.parametrize("capture", ["fd", "sys", "no"])
def test_breakpoint(pytester: pytest.Pytester, capture: str) -> None:
    text = piped(pytester, "p value * 6\n!value = 8\nc\n", "-k", "breaks or fine", f"--capture={capture}")
    assert "(Pdb) 42\n" in text.replace("\r", "")
    assert "2 passed" in text
    assert not (pytester.path / "of-the-sandbox").exists()


def test_trace(pytester: pytest.Pytester) -> None:
    text = piped(pytester, "n\nc\n", "--trace", "-k", "fine")
    assert "def test_fine" in text
    assert "1 passed" in text


def test_breakpoint_of_a_wide_fixture(pytester: pytest.Pytester) -> None:
    text = piped(pytester, "!value = 6\nc\n", "-k", "test_wide")
    assert text.count("PDB set_trace") == 1
    assert "2 passed" in text


def test_quitting_ends_the_run(pytester: pytest.Pytester) -> None:
    text = piped(pytester, "q\n", "-k", "breaks or fine")
    assert "Exit: Quitting debugger" in text
    assert "passed" not in text


def test_the_end_of_what_is_typed_quits(pytester: pytest.Pytester) -> None:
    for keys in ("", "p value * 6\n"):
        text = piped(pytester, keys, "-k", "breaks or fine")
        assert ("(Pdb) 42\n" in text.replace("\r", "")) == bool(keys)
        assert "FAILED" in text
        assert "bdb.BdbQuit" in text  # as in plain pytest


def test_much_is_typed_ahead(pytester: pytest.Pytester) -> None:
    """More than a terminal takes at once."""
    text = piped(pytester, "!x = 1\n" * 3000 + "!value = 8\nc\n", "-k", "breaks or fine")
    assert "2 passed" in text


def test_where_there_is_no_terminal_to_lend(pytester: pytest.Pytester) -> None:
    assert "need --isolation-jobs=1" in piped(pytester, "", "--pdb", "--isolation-jobs=2")
    text = piped(pytester, "", "-k", "breaks or fine", "--isolation-jobs=2")
    assert "no debugger here: tests run at the same time" in text
    assert "1 failed, 1 passed" in text


class Screen:
    """A terminal with pytest on it."""

    def __init__(self, command: list[str]) -> None:
        self._master, slave = os.openpty()
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.text = ""

    def until(self, wanted: str, after: int = 0) -> int:
        """Wait until it shows `wanted`; returns where it ends."""
        deadline = time.monotonic() + 300
        while wanted not in self.text[after:]:
            assert time.monotonic() < deadline, self.text
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self._master, 65536).decode(errors="replace")
                except OSError:
                    assert wanted in self.text[after:], self.text
        return self.text.index(wanted, after) + len(wanted)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_a_real_terminal(pytester: pytest.Pytester) -> None:
    """Line editing is the debugger's, Ctrl-C interrupts what it runs, and the terminal is as it was afterwards."""
    pytester.makepyfile(SUITE)
    screen = Screen([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--isolation", "-k", "loops or fine"])
    try:
        # Nobody asked for a debugger on the command line: it is said whose the keys are before they are.
        at = screen.until("(Pdb) ", screen.until("::test_loops has come to a debugger: what you type is its own"))
        screen.type("p 6 * 8\x7f7\r")
        at = screen.until("42", at)
        screen.type("p __import__('os').get_terminal_size()\r")
        at = screen.until("terminal_size", screen.until("get_terminal_size", at))
        screen.type("n\r")
        at = screen.until("asleep", at)
        screen.type("\x03")
        at = screen.until("KeyboardInterrupt", at)
        screen.type("q\r")
        screen.until("no tests ran" if "no tests ran" in screen.text else "=====", at)
        assert screen.process.wait(600) in (1, 2)
    finally:
        screen.close()


FLOODS = """
    def flood(guest):
        guest.send({"debugger": "enter"})
        guest.receive()
        frames = b"\\0\\0\\0\\x02\\0\\0\\0\\0{}" * 20000
        while True: guest.wire.sock.sendall(frames)

    def test_floods(request): flood(request.config.pluginmanager.getplugin("isolation-worker").guest)
    def test_fine(): pass
"""


def test_a_flood_instead_of_a_debugger(pytester: pytest.Pytester) -> None:
    """It counts as all that a test says, and is no reason to be late."""
    pytester.makepyfile(FLOODS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--isolation", "--isolation-timeout=60s"]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=600, check=False)
    assert "1 failed, 1 passed" in done.stdout
    assert "more than 200000 messages" in done.stdout or "timed out" in done.stdout


def test_a_flood_does_not_keep_the_keys(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FLOODS.replace("sendall(frames)", "sendall(frames[:10])"))
    screen = Screen([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--isolation", "-k", "floods"])
    try:
        at = screen.until("what you type is its own")
        screen.type("\x03\x03\x03\x03\x03")
        screen.until("=====", at)  # by the keys, or because it has said too much
        assert screen.process.wait(600) in (1, 2)
    finally:
        screen.close()


def test_what_the_debugger_has_shown_is_not_shown_again(pytester: pytest.Pytester) -> None:
    text = piped(pytester, "c\n", "--pdb", "-k", "fails")
    assert text.count("E       assert 41 == 42") == 1
    assert "1 failed" in text
