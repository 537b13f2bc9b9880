"""What a guest reaches from inside of a machine, and what a QEMU reaches that its guest has taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import machines as running
from security import attacks
from security.driver import SECRET, Host

from isolation import Mount, Sandbox, SandboxSpec
from isolation.backends.microvm.vm import memory, qemu
from isolation.backends.microvm.vm.qemu import Hardware
from isolation.backends.microvm.vm.vm import Vm

pytestmark = [pytest.mark.once("user"), pytest.mark.usefixtures("microvm_ready")]

# Of the attacks on a namespace sandbox, those that mean something to a machine with a kernel and processes of its own.
ATTACKS = (
    "HOST_FILE HOST_DIRECTORY_BY_FD TCP UDP ABSTRACT PATHNAME INHERITED_SOCKET ENVIRONMENT MEMORY INIT_IS_OPEN KILL_INIT "
    "CAPABILITIES NO_NEW_PRIVILEGES SHADOW DEVICES WRITE_HOST SHARED_MEMORY"
).split()
_SETFCAP = 31

SIGNAL_HOST = """
import os
for pid in {pids!r}:
    try:
        line = open("/proc/%d/cmdline" % pid, "rb").read()
        if line == {cmdline!r}:
            print("BREACH a host process is seen", pid)
    except OSError:
        pass
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    made = Host(tmp_path_factory.mktemp("h"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def box(host: Host, microvm_ready: None) -> Iterator[Sandbox]:
    os.environ["ISOLATION_TEST_SECRET"] = SECRET
    try:
        spec = SandboxSpec(backend="microvm", mounts=[Mount.overlay(host.project)], workdir=str(host.project))
        with Sandbox(spec) as made:
            yield made
    finally:
        del os.environ["ISOLATION_TEST_SECRET"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_contained(host: Host, box: Sandbox, attack: str) -> None:
    before = Path(sys.executable).resolve().read_bytes()
    done = box.run([sys.executable, "-c", getattr(attacks, attack).format_map(host.facts())], timeout=600)
    assert done.returncode == 0, done
    output = done.stdout.decode()
    if attack == "INIT_IS_OPEN" and os.geteuid() == 0:
        output = output.replace("BREACH fds of PID 1", "")  # their numbers, to a user of the same number; nothing opens
    if attack == "CAPABILITIES" and os.geteuid() == 0:
        # Root of a namespace within needs it (user_namespaces(7)); nothing that it could be put on gains by it.
        output = "".join(line for line in output.splitlines(keepends=True) if not line.endswith(f"{1 << _SETFCAP:016x}\n"))
    assert "BREACH" not in output, done
    assert host.secret_file.read_text() == SECRET
    assert Path(sys.executable).resolve().read_bytes() == before
    with pytest.raises(TimeoutError):
        host.udp.recv(100)


def processes() -> dict[str, Any]:
    return {"pids": [os.getpid(), os.getppid()], "cmdline": Path("/proc/self/cmdline").read_bytes()}


def test_host_processes_are_not_seen(box: Sandbox) -> None:
    source = SIGNAL_HOST.format_map(processes())
    assert b"BREACH" not in box.run([sys.executable, "-c", source]).stdout
    assert "BREACH" in subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("attack", ["ENVIRONMENT", "HOST_FILE", "TCP", "ABSTRACT", "PATHNAME", "DEVICES", "WRITE_HOST"])
def test_attacks_work_on_the_host(host: Host, attack: str) -> None:
    facts = dict(host.facts())
    if attack == "WRITE_HOST":  # of the files that it would write, only the one made for it
        facts["executable"] = facts["path"]
        source = attacks.WRITE_HOST.replace('"/etc/passwd", "/usr/bin/true", ', "").format_map(facts)
    else:
        source = getattr(attacks, attack).format_map(facts)
    env = os.environ | {"ISOLATION_TEST_SECRET": SECRET}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, env=env)
    if attack == "WRITE_HOST":
        assert host.secret_file.read_text() != SECRET
        host.secret_file.write_text(SECRET)
    else:
        assert "BREACH" in done.stdout


# What follows is asked by a program that is started in place of QEMU, with the same descriptors in the same sandbox.

PROBE = """
import ctypes, errno, fcntl, json, mmap, os, socket, stat, sys
facts = json.loads(sys.argv[1])
found = {}
def tries(name, action):
    try:
        found[name] = repr(action())
    except Exception as error:
        found[name] = errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__)
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
found["status"] = {name: status[name].split() for name in ("NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "CapBnd", "CapAmb", "Uid", "Gid")}
found["uid_map"] = open("/proc/self/uid_map").read().split()
found["processes"] = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
fds = {}
for name in os.listdir("/proc/self/fd"):
    try:
        fds[int(name)] = [os.readlink("/proc/self/fd/" + name), fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE]
    except OSError:
        pass
found["fds"] = fds
ram, drives = facts["ram"], facts["drives"]
def map_shared(fd):
    with mmap.mmap(fd, 4096) as pages:
        pages[0:1] = b"x"
for fd, what in [(ram, "ram"), *((drive, "drive") for drive in drives)]:
    tries(what + " write", lambda: os.pwrite(fd, b"owned", 0))
    tries(what + " map", lambda: map_shared(fd))
    tries(what + " truncate", lambda: os.ftruncate(fd, 0))
    tries(what + " punch", lambda: ctypes.CDLL(None, use_errno=True).fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)))
    tries(what + " chmod", lambda: os.fchmod(fd, 0o777) if what == "drive" else None)
    def reopen():
        again = os.open("/proc/self/fd/%d" % fd, os.O_RDWR)
        try:
            return os.pwrite(again, b"owned", 0)
        finally:
            os.close(again)
    tries(what + " reopen", reopen)
tries("secret", lambda: open(facts["path"]).read())
tries("kvm", lambda: os.open("/dev/kvm", os.O_RDWR))
tries("tcp", lambda: socket.create_connection(("127.0.0.1", facts["port"]), 2))
def abstract():
    s = socket.socket(socket.AF_UNIX)
    s.connect("\\0" + facts["abstract"])
tries("abstract", abstract)
tries("interfaces", lambda: socket.if_nameindex())
tries("mount", lambda: ctypes.CDLL(None, use_errno=True).mount(b"x", b"/tmp", b"tmpfs", 0, None))
tries("ptrace 1", lambda: os.readlink("/proc/1/exe"))
tries("home", lambda: os.listdir(facts["home"]))
found["devices"] = sorted(name for name in os.listdir("/dev"))
sys.stderr.write(json.dumps(found) + "\\n")
"""


def probe(host: Host, monkeypatch: pytest.MonkeyPatch, *, sealed: bool) -> tuple[dict[str, Any], bytes, bytes]:
    """What a QEMU could do that its guest has taken over; and what there is in its memory's and its drive's file after that."""
    image = host.secret_file.parent / "image"
    image.write_bytes(b"layer" * 1000)
    drive = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    ram = memory.empty(8 << 20)
    os.pwrite(ram, b"template", 0)
    if sealed:
        memory.seal(ram)
    command = qemu.command
    numbers: dict[str, Any] = {}

    def instead(found: Any, hardware: Any, descriptors: Any, **given: Any) -> list[str]:
        argv = command(found, hardware, descriptors, **given)
        by_fd = {fd: number for number, fd in enumerate(descriptors.fds, qemu.FIRST_PASSED)}
        numbers.update(ram=by_fd[given["memory"]], drives=[by_fd[fd] for fd in given["drives"]])
        assert argv[0].startswith("/")
        facts = dict(host.facts()) | numbers | {"home": os.path.expanduser("~")}
        return [sys.executable, "-c", PROBE, json.dumps(facts)]

    monkeypatch.setattr(qemu, "command", instead)
    try:
        vm = Vm(Hardware("microvm", "tcg", 8 << 20, 1, 1, 0), [drive], ram, owns_ram=False, shared=not sealed, boot=None)
        vm.link.join(60)
        vm.close()
        found = json.loads(bytes(vm.link.errors))
        return found, os.pread(ram, 8, 0), image.read_bytes()
    finally:
        os.close(drive)
        os.close(ram)


def test_what_a_qemu_reaches_that_was_taken_over(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    found, ram, image = probe(host, monkeypatch, sealed=True)
    status = found["status"]
    assert status["NoNewPrivs"] == ["1"]
    assert status["Seccomp"] == ["2"]
    for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        assert int(status[name][0], 16) == 0, name
    assert found["processes"][0] == 1
    assert len(found["processes"]) <= 3
    # The memory, three sockets, one drive; and the three of every program.
    fds = {int(number): target for number, target in found["fds"].items()}
    assert sorted(fds) == [0, 1, 2, *range(qemu.FIRST_PASSED, qemu.FIRST_PASSED + 5)]
    assert sum(target.startswith("socket:") for target, _mode in fds.values()) == 3
    for what in ("ram", "drive"):
        for way in ("write", "map", "truncate", "reopen"):
            assert found[f"{what} {way}"] in (
                "EPERM",
                "EACCES",
                "EBADF",
                "EROFS",
                "EINVAL",
                "ENOENT",
                "ETXTBSY",
                "ValueError",
            ), (what, way)
        assert found[f"{what} punch"] == "-1"
    assert ram == b"template"
    assert image == b"layer" * 1000
    for name in ("secret", "kvm", "tcp", "abstract", "ptrace 1"):
        assert found[name].startswith("E"), (name, found[name])
    assert found["mount"] == "-1"
    assert found["interfaces"] == "[(1, 'lo')]"
    if found["home"].startswith("["):
        assert not {".ssh", ".bashrc", ".profile"} & set(json.loads(found["home"].replace("'", '"')))
    assert set(found["devices"]) <= {
        "fd",
        "full",
        "null",
        "ptmx",
        "pts",
        "random",
        "shm",
        "stderr",
        "stdin",
        "stdout",
        "tty",
        "urandom",
        "zero",
        "mqueue",
        "core",
        "console",
    }


def test_the_probe_finds_what_is_not_sealed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template's own QEMU, before it is saved, writes its memory: that is how it is saved."""
    found, ram, _image = probe(host, monkeypatch, sealed=False)
    assert found["ram write"] == "5"
    assert ram != b"template"


def test_qemu_as_the_host_sees_it(host: Host) -> None:
    """The real one: its own filter, no privileges, not root."""
    before = running(os.getpid())
    with Sandbox(SandboxSpec(backend="microvm")) as box:
        assert box.run(["true"]).returncode == 0
        (pid,) = running(os.getpid()) - before
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert int(status["Seccomp_filters"]) >= 2  # its own, and the sandbox's
        for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh"):
            assert int(status[name], 16) == 0
        assert "0" not in status["Uid"].split()
        assert "0" not in status["Gid"].split()
        for name in ("mnt", "net", "pid", "ipc", "uts", "user"):
            assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
