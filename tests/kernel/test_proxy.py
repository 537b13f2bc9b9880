"""Network mode "allow": a local package index is reached, and nothing else."""

from __future__ import annotations

import hashlib
import http.server
import io
import queue
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from isolation_kernel import proxy
from isolation_kernel.proxy import Allowed, Refused, parse
from kernel.frontend import Kernel

pytestmark = pytest.mark.once

Kernels = Callable[..., Kernel]


def wheel() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("hello_sandbox.py", "ANSWER = 42\n")
        file.writestr("hello_sandbox-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: hello-sandbox\nVersion: 1.0\n")
        file.writestr("hello_sandbox-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("hello_sandbox-1.0.dist-info/RECORD", "")
    return data.getvalue()


class Index:
    """A package index, and what was asked of it."""

    def __init__(self) -> None:
        content = wheel()
        name = "hello_sandbox-1.0-py3-none-any.whl"
        page = f'<a href="/{name}#sha256={hashlib.sha256(content).hexdigest()}">{name}</a>'.encode()
        asked = self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                body = content if self.path.endswith(".whl") else page
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream" if body is content else "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def index() -> Iterator[Index]:
    found = Index()
    yield found
    found.close()


GET = "import urllib.request\nprint(urllib.request.urlopen('{}', timeout=600).read())"


def test_pip_install_from_an_allowed_host(kernels: Kernels, index: Index) -> None:
    kernel = kernels("argv", "--network", "allow:localhost")
    url = f"http://localhost:{index.port}/simple"
    reply = kernel.run(f"%pip install --quiet --disable-pip-version-check --index-url {url} hello-sandbox", timeout=600)
    assert reply.status == "ok", reply.text
    assert kernel.value("__import__('hello_sandbox').ANSWER") == "42", reply.text
    assert "/simple/hello-sandbox/" in index.asked


def test_pip_install_without_a_network(kernels: Kernels, tmp_path: Path) -> None:
    """A wheel that is there can be installed; for all else it is said what is missing."""
    (tmp_path / "notebook").mkdir(exist_ok=True)
    (tmp_path / "notebook/hello_sandbox-1.0-py3-none-any.whl").write_bytes(wheel())
    kernel = kernels("argv", cwd=tmp_path / "notebook")
    reply = kernel.run("%pip install --quiet --disable-pip-version-check ./hello_sandbox-1.0-py3-none-any.whl", timeout=600)
    assert kernel.value("__import__('hello_sandbox').ANSWER") == "42", reply.text
    missing = kernel.run("%pip install there-is-no-such-thing", timeout=600).text
    assert "No matching distribution" in missing
    assert "Retrying" not in missing
    assert "isolation: this kernel has no network" in missing


def test_a_tunnel(kernels: Kernels, index: Index) -> None:
    """As HTTPS has it: CONNECT, and then bytes."""
    kernel = kernels("provisioner", "--network", "allow:localhost")
    reply = kernel.run(
        "import socket\ns = socket.create_connection(('127.0.0.1', 3128), 10)\n"
        f"s.sendall(b'CONNECT localhost:{index.port} HTTP/1.1\\r\\n\\r\\n')\nprint(s.recv(100))\n"
        "s.sendall(b'GET /tunnelled HTTP/1.0\\r\\n\\r\\n')\ndata = b''\n"
        "while more := s.recv(1000): data += more\nprint(b'hello_sandbox' in data)"
    )
    assert reply.text == "b'HTTP/1.1 200 Connection established\\r\\n\\r\\n'\nTrue\n", reply.error
    assert index.asked == ["/tunnelled"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "2130706433", "[::1]", "0.0.0.0", "example.org", "localhost.example.org"]
)
def test_other_hosts_are_refused(kernels: Kernels, index: Index, host: str) -> None:
    kernel = kernels("argv", "--network", "allow:localhost")
    code = (
        "import http.client\nc = http.client.HTTPConnection('127.0.0.1', 3128, timeout=600)\n"
        f"c.request('GET', 'http://{host}:{index.port}/')\nr = c.getresponse()\nprint(r.status, r.read())"
    )
    assert kernel.run(code).text.startswith("403 ")
    assert index.asked == []


def test_there_is_no_other_route(kernels: Kernels, index: Index) -> None:
    kernel = kernels("argv", "--network", "allow:localhost")
    reply = kernel.run(f"import socket\nsocket.create_connection(('127.0.0.1', {index.port}), 5)")
    assert reply.content["ename"] == "ConnectionRefusedError"
    assert kernel.run("import socket\nsocket.create_connection(('1.1.1.1', 443), 5)").content["ename"] == "OSError"
    assert kernel.run("import socket\nsocket.getaddrinfo('example.org', 80)").content["ename"] == "gaierror"


def test_a_flood_harms_only_its_kernel(kernels: Kernels, index: Index) -> None:
    kernel = kernels("argv", "--network", "allow:localhost")
    reply = kernel.run(
        "import socket\nends = []\nfor _ in range(300):\n    s = socket.create_connection(('127.0.0.1', 3128), 5)\n"
        "    s.settimeout(1)\n    ends.append(s)\n    s.sendall(b'x' * 1000)\nprint(len(ends))",
        timeout=600,
    )
    assert reply.status in ("ok", "error")
    assert kernel.value("6*7") == "42"
    other = kernels("argv", "--network", "allow:localhost")
    assert "hello_sandbox" in other.run(GET.format(f"http://localhost:{index.port}/")).text


@pytest.mark.parametrize(
    ("hosts", "host", "resolved", "good"),
    [
        (["pypi.org"], "pypi.org", "151.101.0.223", True),
        (["pypi.org"], "PyPI.org.", "151.101.0.223", True),
        (["*.example.org"], "a.b.example.org", "93.184.215.14", True),
        (["*.example.org"], "example.org", "93.184.215.14", False),
        (["*.example.org"], "badexample.org", "93.184.215.14", False),
        (["pypi.org"], "evil.org", "151.101.0.223", False),
        (["pypi.org"], "pypi.org.evil.org", "151.101.0.223", False),
        (["pypi.org"], "pypi.org", "127.0.0.1", False),  # DNS rebinding
        (["pypi.org"], "pypi.org", "10.0.0.1", False),
        (["pypi.org"], "pypi.org", "169.254.169.254", False),
        (["pypi.org"], "pypi.org", "::1", False),
        (["pypi.org"], "pypi.org", "::ffff:127.0.0.1", False),
        (["pypi.org"], "pypi.org", "fd00::1", False),
        (["pypi.org"], "pypi.org", "224.0.0.1", False),
        (["pypi.org"], "pypi.org", "2a04:4e42::223", True),
        (["pypi.org"], "pypi.org", "64:ff9b::9765:df", True),  # NAT64
        (["pypi.org"], "pypi.org", "64:ff9b::a9fe:a9fe", False),
        (["pypi.org"], "pypi.org", "64:ff9b::7f00:1", False),
        (["pypi.org"], "pypi.org", "64:ff9b:1::1", False),
        (["pypi.org"], "pypi.org", "2002:7f00:1::", False),
        (["pypi.org"], "pypi.org", "::127.0.0.1", False),
        (["pypi.org"], "pypi.org", "::ffff:0:127.0.0.1", False),
        (["pypi.org"], "pypi.org", "fec0::1", False),
        (["pypi.org"], "pypi.org", "5f00::1", False),
        (["pypi.org"], "pypi.org", "3fff::1", False),
        (["pypi.org"], "pypi.org", "100.64.0.1", False),
        (["index.corp", "10.0.0.5"], "index.corp", "10.0.0.5", True),
        (["index.corp", "10.0.0.5"], "10.0.0.5", "10.0.0.5", True),
        (["localhost"], "localhost", "127.0.0.1", True),
        (["localhost"], "127.0.0.1", "127.0.0.1", False),
        (["localhost"], "127.1", "127.0.0.1", False),
    ],
)
def test_the_list(monkeypatch: pytest.MonkeyPatch, hosts: list[str], host: str, resolved: str, good: bool) -> None:
    monkeypatch.setattr(
        proxy.socket, "getaddrinfo", lambda _name, port, **_rest: [(socket.AF_INET, 1, 6, "", (resolved, port))]
    )
    if good:
        assert Allowed(hosts).addresses(host, 443) == [resolved]
    else:
        with pytest.raises(Refused):
            Allowed(hosts).addresses(host, 443)


def test_only_the_addresses_that_were_checked_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, 1, 6, "", (address, 443)) for address in ("127.0.0.1", "151.101.0.223")]
    monkeypatch.setattr(proxy.socket, "getaddrinfo", lambda *_arguments, **_rest: both)
    assert Allowed(["pypi.org"]).addresses("pypi.org", 443) == ["151.101.0.223"]


@pytest.mark.parametrize("port", [22, 25, 0, 1023, 65536, -1])
def test_ports(port: int) -> None:
    with pytest.raises(Refused):
        Allowed(["localhost"]).addresses("localhost", port)


class Guest:
    """A sandbox's side of a proxy: connections that it has dialled, one after the other."""

    def __init__(self) -> None:
        self._dialled: queue.Queue[socket.socket] = queue.Queue()
        self.ended = threading.Event()

    def connect(self, _channel: int) -> socket.socket:
        if self.ended.is_set():
            raise OSError("it is gone")
        ours, theirs = socket.socketpair()
        self._dialled.put(ours)
        return theirs

    def end(self) -> None:
        """The proxy sees the ends of all connections that wait, asks for others, and is told that there are none."""
        self.ended.set()
        while not self._dialled.empty():
            self._dialled.get().close()

    def ask(self, request: bytes) -> bytes:
        """What comes back, to its end, or to the first bytes of an open tunnel."""
        with self._dialled.get(timeout=30) as end:
            end.settimeout(30)
            end.sendall(request)
            return end.recv(1000)


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    """Of a proxy that lets everything below example.org be reached, and to which this host's loopback is a public host."""
    monkeypatch.setattr(Allowed, "_reachable", lambda *_arguments: True)
    found = Guest()
    served = proxy.Proxy(["*.example.org"], found)  # type: ignore[arg-type]
    yield found
    found.end()
    served.close()
    for thread in threading.enumerate():
        if thread.name in ("proxy", "proxied"):
            thread.join(30)
    found.end()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """The witness: a server of the host's that nobody allowed."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        found.setblocking(False)
        yield found


# What ends a name for one function and not for another, or is something else to it.
ODD = (
    "\0",
    "\0.",
    "%00",
    " ",
    "\t",
    "\n",
    "\r",
    "\x0b",
    "\x1f",
    "\x7f",
    "\x80",
    "\xa0",
    "\xad",
    "\xff",
    "%25lo",
    "#",
    "?",
    "\\",
    "@",
    ",",
    ":",
)


@pytest.mark.parametrize("odd", ODD)
def test_a_name_is_a_name_or_nothing(guest: Guest, listener: socket.socket, odd: str) -> None:
    port = listener.getsockname()[1]
    name = f"127.0.0.1{odd}.example.org"
    for request in (
        f"CONNECT {name}:{port} HTTP/1.1",
        f"GET http://{name}:{port}/ HTTP/1.1",
        f"GET http://{name}/ HTTP/1.1",
    ):
        assert guest.ask(request.encode("latin-1") + b"\r\n\r\n").split()[1] in (b"400", b"403", b"502")
    with pytest.raises(Refused):
        Allowed(["*.example.org"]).addresses(name, port)
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_the_grammar_of_names_is_what_holds(monkeypatch: pytest.MonkeyPatch, guest: Guest, listener: socket.socket) -> None:
    """Without it, getaddrinfo(3) is asked for what stands before the NUL."""
    port = listener.getsockname()[1]
    monkeypatch.setattr(proxy, "parse", lambda head: proxy.Target(head.split()[1].rpartition(b":")[0].decode(), port, b""))
    request = f"CONNECT 127.0.0.1\0.example.org:{port} HTTP/1.1\r\n\r\n".encode()
    assert guest.ask(request).startswith(b"HTTP/1.1 400 ")
    with pytest.raises(BlockingIOError):
        listener.accept()
    monkeypatch.setattr(proxy, "is_host_name", lambda _text: True)
    assert guest.ask(request).startswith(b"HTTP/1.1 200 ")
    listener.accept()[0].close()


def test_nothing_of_a_malformed_request_reaches_the_log(guest: Guest, capfd: pytest.CaptureFixture[str]) -> None:
    for target in ("http://a:80:22/", "http://[::1]x:80/", "http://a:99999999999999999999/", "http://a:²/", "http://[]/"):
        assert guest.ask(f"GET {target} HTTP/1.1\r\n\r\n".encode("latin-1")).startswith(b"HTTP/1.1 400 ")
    assert capfd.readouterr() == ("", "")


def test_requests() -> None:
    assert parse(b"CONNECT pypi.org:443 HTTP/1.1\r\nHost: x") == ("pypi.org", 443, b"")
    assert parse(b"CONNECT [::1]:443 HTTP/1.1") == ("::1", 443, b"")
    found = parse(b"GET http://a.org:8000/x?y=1 HTTP/1.1\r\nHost: a.org\r\nProxy-Authorization: s\r\nConnection: keep-alive")
    assert found == ("a.org", 8000, b"GET /x?y=1 HTTP/1.1\r\nHost: a.org:8000\r\nConnection: close\r\n\r\n")
    assert parse(b"GET http://a.org HTTP/1.1").first == b"GET / HTTP/1.1\r\nHost: a.org\r\nConnection: close\r\n\r\n"
    assert parse(b"GET http://a.org?y HTTP/1.1").first.startswith(b"GET /?y HTTP/1.1\r\n")
    assert parse(b"GET http://a.org:/ HTTP/1.1")[:2] == ("a.org", 80)
    assert b"inner" not in parse(b"GET http://a.org/ HTTP/1.1\r\nhOst:inner\r\nAccept: x").first


def test_the_header_fields_of_a_request_are_lines() -> None:
    for line in (
        b"A: b\nHost: inner",
        b"A: b\rHost: inner",
        b"A: b\0",
        b" folded",
        b"Connection : x",
        b": x",
        b"no field",
        b"",
    ):
        with pytest.raises(Refused, match="no request"):
            parse(b"GET http://a.org/ HTTP/1.1\r\nAccept: x\r\n" + line + b"\r\nB: c")


@pytest.mark.parametrize(
    "head",
    [b"", b"GET / HTTP/1.1", b"GET ftp://a/ HTTP/1.1", b"GET http://u:p@a/ HTTP/1.1", b"CONNECT a HTTP/1.1",
     b"CONNECT a:b HTTP/1.1", b"GET http:///x HTTP/1.1", b"X" * 1000, b"\xff\xfe", b"GET http://a/ SPDY/1",
     b"CONNECT a: HTTP/1.1", b"CONNECT a:-1 HTTP/1.1", b"CONNECT a:4_4 HTTP/1.1", b"CONNECT ::1:443 HTTP/1.1",
     b"GET http://a/\n HTTP/1.1", b"GET http://a/\xe4 HTTP/1.1", b"GET http://a/ HTTP/1.1 ", b"G\0T http://a/ HTTP/1.1"],
)  # fmt: skip
def test_what_is_no_request(head: bytes) -> None:
    with pytest.raises(Refused):
        parse(head)
