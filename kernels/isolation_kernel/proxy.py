"""The way out for network mode "allow": an HTTP proxy on the host, for the named hosts only.

The sandbox has no network. A program of ours in it (inside/forwarder.py) holds a listening unix socket, into which this
proxy keeps a few connections dialled; the guest uses one by sending a request on it. So the host takes no descriptor from
the guest, and the guest has no socket that it could connect to anything else.

What the guest may reach is decided here, by the name that it asks for, and by the address that this name turns out to have:

* What a request consists of is held against a grammar before anything else is done with it: a name that one function reads
  in another way than the next (getaddrinfo(3) ends it at a NUL) is no name.
* Names and addresses on the list; `*.example.org` stands for all below it. An IP literal has to be on the list as such.
* Names are resolved here, once, and the address that was checked is the one that is connected to.
* An address that is not a public one (loopback, private, link-local: this machine's services, the cloud's metadata) has
  to be on the list itself, whatever name leads to it, or a name on the list that its owner points there (DNS rebinding)
  would open them. Of `localhost`, loopback is what one expects.
* Ports 80 and 443, and those from 1024 up.
"""

from __future__ import annotations

import ipaddress
import re
import select
import socket
import threading
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from isolation.spec import is_host_name
from isolation_kernel.protocol.connection import Doors

_WAITING: Final = 4  # connections that are dialled ahead
_AT_WORK: Final = 64
_HEAD_AT_MOST: Final = 32 << 10
_HEAD_PATIENCE: Final = 30.0  # s
_CONNECT_PATIENCE: Final = 20.0  # s
_SILENCE: Final = 600.0  # s, of a connection that is open
_CHUNK: Final = 1 << 16
_PORTS: Final = (80, 443)
_FIRST_FREE_PORT: Final = 1024
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_TUNNELS_AND_EXAMPLES: Final = tuple(map(ipaddress.IPv6Network, ("2001::/32", "2002::/16", "3fff::/20")))

# RFC 9110 and 9112. A target has no space, control character or byte beyond ASCII, a header no line of its own.
_REQUEST: Final = re.compile(r"([A-Za-z]{1,32}) ([!-~]+) HTTP/1\.[01]")
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[\t -~\x80-\xff]*")
_AUTHORITY: Final = re.compile(
    r"(?:\[(?P<literal>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9_.-]{1,254}))(?::(?P<port>[0-9]{0,5}))?"
)
# Of one connection to one proxy; and Host, which is the target's whatever the client says (RFC 9112, 3.2.2).
_NOT_PASSED_ON: Final = ("connection", "host", "keep-alive")


class Refused(Exception):
    """The HTTP status, and why."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


class Target(NamedTuple):
    """Where a request goes, and what is sent there first (nothing for CONNECT)."""

    host: str
    port: int
    first: bytes


class Allowed:
    """The list."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self._names = {host.lower().rstrip(".") for host in hosts if not host.startswith("*.")}
        self._below = tuple(host[1:].lower().rstrip(".") for host in hosts if host.startswith("*."))
        self._addresses = {address for address in map(_address, self._names) if address is not None}

    def addresses(self, host: str, port: int) -> list[str]:
        """Those that may be connected to for this name. Raises Refused."""
        name = host.lower().removesuffix(".")
        literal = _address(name)
        if literal is not None:
            if literal not in self._addresses:
                raise Refused("403 Forbidden", f"the address {host} is not on the list of this kernel (--network allow:…)")
        elif not is_host_name(name):
            raise Refused("400 Bad Request", f"{host[:300]!a} is not the name of a host")
        elif name not in self._names and not name.endswith(self._below or ("\0",)):
            raise Refused("403 Forbidden", f"{host} is not on the list of this kernel (--network allow:…)")
        if port not in _PORTS and not _FIRST_FREE_PORT <= port <= 65535:
            raise Refused("403 Forbidden", f"port {port} is not one that this kernel may connect to")
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            raise Refused("502 Bad Gateway", f"{host} is not known: {error}") from error
        good = [str(address[0]) for *_rest, address in found if self._reachable(name, str(address[0]))]
        if not good:
            raise Refused("403 Forbidden", f"{host} leads to an address that is not public, and not on the list itself")
        return list(dict.fromkeys(good))

    def _reachable(self, name: str, text: str) -> bool:
        address = _address(text.partition("%")[0])
        if address is None:
            return False
        address = _embedded(address)
        if address in self._addresses or (name == "localhost" and address.is_loopback):
            return True
        if isinstance(address, ipaddress.IPv6Address) and not _is_global_unicast(address):
            return False
        return address.is_global and not address.is_multicast


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """That a literal stands for, if it is one: for getaddrinfo(3), "127.1", "0x7f000001" and "2130706433" are, too."""
    if ":" not in text and not is_host_name(text):
        return None  # inet_aton(3) would pass over what follows a space
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        pass
    try:
        return ipaddress.ip_address(socket.inet_aton(text)) if text[:1].isdigit() else None
    except (OSError, ValueError):
        return None


def _embedded(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that one of IPv6 stands for: mapped, or behind a gateway to IPv4 (NAT64, RFC 6052)."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _is_global_unicast(address: ipaddress.IPv6Address) -> bool:
    """By IANA's registry, of which a Python may know an old state; without tunnels, whose other end may be inside."""
    return address in _GLOBAL_UNICAST and not any(address in network for network in _TUNNELS_AND_EXAMPLES)


def parse(head: bytes) -> Target:
    """Of a request's first line and headers. Raises Refused."""
    first, *lines = head.decode("latin-1").split("\r\n")
    request = _REQUEST.fullmatch(first)
    headers = [_HEADER.fullmatch(line) for line in lines]
    if request is None or None in headers:
        raise _no_request()
    method, target = request.groups()
    if method == "CONNECT":
        host, port = _split(target, None)
        return Target(host, port, b"")
    scheme, _, rest = target.partition("://")
    authority, path = re.fullmatch(r"([^/?#]*)(.*)", rest).groups()  # type: ignore[union-attr]  # anything fits
    if scheme.lower() != "http":
        raise _no_request()
    host, port = _split(authority, 80)
    # One request a connection: the next one of this client may be to another host.
    kept = [found[0] for found in headers if found and not _is_dropped(found[1])]
    line = f"{method} {path if path.startswith('/') else '/' + path} HTTP/1.1"
    text = "\r\n".join([line, f"Host: {authority}", *kept, "Connection: close", "", ""])
    return Target(host, port, text.encode("latin-1"))


def _is_dropped(header: str) -> bool:
    return header.lower() in _NOT_PASSED_ON or header.lower().startswith("proxy-")


def _split(authority: str, default: int | None) -> tuple[str, int]:
    found = _AUTHORITY.fullmatch(authority)
    if found is None or not (found["port"] or default):
        raise _no_request()
    return found["literal"] or found["name"], int(found["port"] or default or 0)


def _no_request() -> Refused:
    return Refused("400 Bad Request", "this is no request to a proxy")


class Proxy:
    """Serves one sandbox, on threads: names take time to resolve."""

    def __init__(self, hosts: Sequence[str], exits: Doors) -> None:
        self._allowed = Allowed(hosts)
        self._exits = exits
        self._ended = threading.Event()
        self._at_work = threading.Semaphore(_AT_WORK)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._watch, name="proxy", daemon=True).start()

    def _watch(self) -> None:
        """Keep some connections waiting, and give those that are used to a thread each."""
        waiting: dict[int, socket.socket] = {}
        try:
            self._keep_waiting(waiting)
        finally:
            for end in waiting.values():
                end.close()

    def _keep_waiting(self, waiting: dict[int, socket.socket]) -> None:
        while not self._ended.is_set():
            while len(waiting) < _WAITING:
                try:
                    end = self._exits.connect(0)
                except (OSError, IndexError):
                    return  # the sandbox is gone, or its forwarder is
                waiting[end.fileno()] = end
            poller = select.poll()
            for fd in waiting:
                poller.register(fd, select.POLLIN)
            for fd, _events in poller.poll(1000):
                self._at_work.acquire()
                threading.Thread(target=self._serve, args=(waiting.pop(fd),), name="proxied", daemon=True).start()

    def _serve(self, guest: socket.socket) -> None:
        with self._lock:
            self._open.add(guest)
        try:
            guest.settimeout(_HEAD_PATIENCE)
            head, rest = _read_head(guest)
            if head:
                self._pass_on(guest, head, rest)
        except Refused as error:
            body = f"{error}\n".encode()
            text = f"HTTP/1.1 {error.status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
            try:
                guest.sendall(text.encode() + b"Connection: close\r\n\r\n" + body)
            except OSError:
                pass  # it did not wait for the answer
        except OSError:
            pass  # one of the two is gone
        finally:
            with self._lock:
                self._open.discard(guest)
            guest.close()
            self._at_work.release()

    def _pass_on(self, guest: socket.socket, head: bytes, rest: bytes) -> None:
        target = parse(head)
        addresses = self._allowed.addresses(target.host, target.port)
        with _connect(addresses, target) as outside:
            if target.first:
                outside.sendall(target.first)
            else:
                guest.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if rest:
                outside.sendall(rest)
            _join(guest, outside)

    def close(self) -> None:
        """End every connection."""
        self._ended.set()
        with self._lock:
            for end in self._open:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # its thread was quicker


def _read_head(guest: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        if len(data) > _HEAD_AT_MOST:
            raise Refused("431 Request Header Fields Too Large", "the headers of this request are too long")
        more = guest.recv(_CHUNK)
        if not more:
            return b"", b""
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def _connect(addresses: Sequence[str], target: Target) -> socket.socket:
    """To the first that answers: addresses that were checked, not the name again."""
    last: OSError | None = None
    for address in addresses:
        try:
            return socket.create_connection((address, target.port), _CONNECT_PATIENCE)
        except OSError as error:
            last = error
    raise Refused("502 Bad Gateway", f"{target.host}:{target.port} cannot be reached: {last}")


def _join(a: socket.socket, b: socket.socket) -> None:
    """Both ways, until both have said all, or nobody has said anything for long."""
    for end in (a, b):
        end.settimeout(_SILENCE)
    back = threading.Thread(target=_copy, args=(b, a), name="proxied back", daemon=True)
    back.start()
    _copy(a, b)
    back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(_CHUNK):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed already
