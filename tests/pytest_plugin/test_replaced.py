"""What a project or a test replaces of the standard library does not reach what supervises it, or carries its reports."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.once("user")
REPLACE = """
import json, select, socket, subprocess, threading, time


def replaced(*_arguments, **_more):
    raise RuntimeError("this is the project's, and not for others")


class Replaced:
    __init__ = replaced


def replace():
    for module, names in (
        (json, "dumps loads dump load JSONEncoder JSONDecoder"), (select, "poll select epoll"),
        (socket, "socket socketpair create_connection fromfd send_fds recv_fds"), (subprocess, "Popen run check_output"),
        (threading, "Thread Timer"), (time, "sleep"),
    ):
        for name in names.split():
            setattr(module, name, Replaced if name[0].isupper() or name == "socket" else replaced)
    for name in ("encode", "iterencode", "item_separator"):
        setattr(json.encoder.JSONEncoder, name, replaced)
"""
TESTS = """
import json, pytest, warnings

@pytest.fixture(scope="module")
def wide(): return 1

def test_passes(wide): print("said")
def test_fails(): assert [1] == [2]
def test_warns(): warnings.warn("something")
@pytest.mark.skip(reason="because")
def test_is_skipped(): pass
@pytest.mark.parametrize("name", ["dumps", "loads"])
def test_for_itself(monkeypatch, name): monkeypatch.setattr(json, name, None)
def test_dies(): import os; os._exit(3)
def test_with_a_command(sandbox): assert sandbox.run(["true"]).returncode == 0
"""


@pytest.mark.parametrize("where", ["conftest", "module", "test"])
def test_what_a_project_replaces(pytester: pytest.Pytester, where: str) -> None:
    pytester.makepyfile(replacing=REPLACE)
    code = "from replacing import replace\nreplace()\n"
    if where == "conftest":
        pytester.makeconftest(code)
    early = code if where == "module" else ""
    late = (
        "import replacing\n\n@pytest.fixture(autouse=True)\ndef replaced(): replacing.replace()\n" if where == "test" else ""
    )
    pytester.makepyfile(test_it=early + TESTS + late)
    result = pytester.runpytest_subprocess("--isolation", "-p", "no:cacheprovider", "-rA")
    result.stdout.fnmatch_lines(["*ended with status 3*"])
    result.assert_outcomes(passed=5, failed=2, skipped=1, warnings=1)


@pytest.mark.parametrize("seconds", [0, 0.0001, 5])
def test_a_default_timeout_of_sockets(pytester: pytest.Pytester, seconds: float) -> None:
    pytester.makepyfile(f"import socket\nsocket.setdefaulttimeout({seconds})\n" + TESTS)
    result = pytester.runpytest_subprocess("--isolation", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=5, failed=2, skipped=1, warnings=1)


GREEN = """
import socket, subprocess, sys, threading, time

def test_sleep():
    began = time.monotonic()
    together(lambda: time.sleep(2), 20)
    assert time.monotonic() - began < 35  # and not 40

def test_server():
    place = serve()
    with socket.create_connection(place) as end: assert end.recv(1) == b"x"

def test_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(1))
    thread.start()
    thread.join(60)
    assert found == [1]

def test_command(): assert subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True).stdout == b"1\\n"
def test_fails(): assert 1 == 2
"""
LIBRARIES = {
    "gevent": """
from gevent import monkey; monkey.patch_all()
import gevent
from gevent.server import StreamServer
def together(function, times): gevent.joinall([gevent.spawn(function) for _ in range(times)])
def serve():
    server = StreamServer(("127.0.0.1", 0), lambda end, _place: end.sendall(b"x"))
    server.start()
    return server.address
""",
    "eventlet": """
import eventlet; eventlet.monkey_patch()
def together(function, times):
    pool = eventlet.GreenPool()
    for _ in range(times): pool.spawn(function)
    pool.waitall()
def serve():
    server = eventlet.listen(("127.0.0.1", 0))
    eventlet.spawn(eventlet.serve, server, lambda end, _place: end.sendall(b"x"))
    return server.getsockname()
""",
}
TWISTED = """
from twisted.internet import defer, protocol, reactor, task
from twisted.trial import unittest

class Factory(protocol.Factory):
    def buildProtocol(self, _address):
        made = protocol.Protocol()
        made.connectionMade = lambda: made.transport.loseConnection()
        return made

class TestTwisted(unittest.TestCase):
    def test_later(self): return task.deferLater(reactor, 0.05, lambda: None)
    @defer.inlineCallbacks
    def test_server(self):
        port = reactor.listenTCP(0, Factory(), interface="127.0.0.1")
        yield port.stopListening()
    def test_fails(self): self.assertEqual(1, 2)
"""


@pytest.mark.parametrize("library", [*LIBRARIES, "twisted"])
def test_suites_of_libraries_that_replace_much(pytester: pytest.Pytester, library: str) -> None:
    """They end as in plain pytest. (With all plug-ins loaded, plain pytest itself does not survive gevent.)"""
    pytester.makepyfile(TWISTED if library == "twisted" else LIBRARIES[library] + GREEN)
    passed = 2 if library == "twisted" else 4
    for options in ((), ("--isolation",), ("--isolation", "--isolation-jobs=2"), ("--isolation", "--isolation-per=module")):
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)
        assert {name: result.parseoutcomes().get(name, 0) for name in ("passed", "failed", "errors")} == {
            "passed": passed, "failed": 1, "errors": 0,
        }  # fmt: skip
