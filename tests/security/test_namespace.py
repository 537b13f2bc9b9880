"""Nothing of the host's can be reached from inside; and each attack succeeds where its defence is switched off."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from security import attacks
from security.driver import RUNNERS, SECRET, Host, run_command, run_fork

from isolation.backends.namespace.host.sandbox import NamespaceMachine
from isolation.backends.namespace.plan import ALL_DEFENCES
from isolation.backends.namespace.planner import make_plan
from isolation.backends.showing import python_environment
from isolation.sandbox import Sandbox
from isolation.spec import Mount, SandboxSpec


@pytest.fixture
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    made = Host(tmp_path_factory.mktemp("h"))
    yield made
    made.close()


CONTAINED = [name for name, value in vars(attacks).items() if name.isupper() and isinstance(value, str)]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("attack", CONTAINED)
def test_contained(host: Host, attack: str, runner: str) -> None:
    if attack == "MEMORY" and runner != "command":
        pytest.xfail("a fork has the memory of the process that it is a fork of: SECURITY.md says so")
    before = Path(sys.executable).resolve().read_bytes()
    output = RUNNERS[runner](host, getattr(attacks, attack))
    if runner == "template":  # it may make user namespaces, and enter those of its forks; nothing else is different
        output = output.replace("BREACH system call unshare user", "")
    assert "BREACH" not in output
    assert host.secret_file.read_text() == SECRET
    assert Path(sys.executable).resolve().read_bytes() == before
    with contextlib.suppress(TimeoutError):
        assert host.udp.recv(100) is None


@pytest.mark.parametrize(
    ("attack", "without"),
    [
        ("HOST_FILE", "view"),
        ("TCP", "network"),
        ("ABSTRACT", "network landlock"),
        ("CAPABILITIES", "capabilities"),
        ("SYSTEM_CALLS", "seccomp"),
        ("POWER_OVER_INIT", "seccomp"),
        ("COUNTERS", "counters"),
        ("SHARED", "seccomp"),
        ("INIT_IS_OPEN", "dumpable"),
        ("MEMORY", "dumpable"),
        ("PROC", "proc-masks"),
    ],
)
def test_command_breaks_out_without(host: Host, attack: str, without: str) -> None:
    assert "BREACH" in run_command(host, getattr(attacks, attack), without)


@pytest.mark.parametrize(
    ("attack", "without"),
    [
        ("HOST_FILE", "view"),
        ("HOST_DIRECTORY_BY_FD", "fds"),
        ("TCP", "network"),
        ("CAPABILITIES", "capabilities"),
        ("SYSTEM_CALLS", "seccomp"),
        ("INHERITED_SOCKET", "fds"),
        ("SIBLING", "seccomp"),
        ("POWER_OVER_INIT", "seccomp"),
        ("COUNTERS", "counters"),
        ("SHARED", "seccomp"),
    ],
)
@pytest.mark.usefixtures("nothing_left")
def test_fork_breaks_out_without(host: Host, attack: str, without: str) -> None:
    directory = os.open("/", os.O_RDONLY)
    spare = socket.socket()
    try:
        assert "BREACH" in run_fork(host, getattr(attacks, attack), without)
    finally:
        os.close(directory)
        spare.close()


@pytest.mark.parametrize("runner", ["template", "fork-of-fork"])
@pytest.mark.parametrize(
    ("attack", "without"),
    [
        ("TCP", "network"),
        ("SYSTEM_CALLS", "seccomp"),
        ("SIBLING", "seccomp"),
        ("INHERITED_SOCKET", "fds"),
        ("HOST_FILE", "view"),
    ],
)
@pytest.mark.usefixtures("nothing_left")
def test_forks_of_forks_break_out_without(host: Host, attack: str, without: str, runner: str) -> None:
    spare = socket.socket()
    try:
        assert "BREACH" in RUNNERS[runner](host, getattr(attacks, attack), without)
    finally:
        spare.close()


ON_THE_HOST = "HOST_FILE TCP UDP ABSTRACT PATHNAME HOST_PROCESSES NAMESPACES NO_NEW_PRIVILEGES DEVICES DEVICE_TIMES HOST_ID SHADOW".split()
OF_ROOT = ("HOST_ID", "SHADOW")  # an ordinary user has nothing of the kind to lose


@pytest.mark.parametrize("attack", ON_THE_HOST)
def test_attacks_work_on_the_host(host: Host, attack: str) -> None:
    source = getattr(attacks, attack).format_map(host.facts())
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    if attack == "UDP":
        assert host.udp.recv(100) == b"leak"
    else:
        assert ("BREACH" in done.stdout) is (attack not in OF_ROOT or os.geteuid() == 0)


def test_a_file_that_is_shown_for_writing_is_written_to(host: Host) -> None:
    """What WRITE_HOST does where it may."""
    directory = host.secret_file.parent
    with Sandbox(SandboxSpec(mounts=[Mount(directory, mode="rw")])) as box:
        box.run([sys.executable, "-c", attacks.WRITE_HOST.format_map(host.facts())])
    assert host.secret_file.read_text() == SECRET + "owned"


def test_an_inherited_file_is_written_to(host: Host) -> None:
    with host.secret_file.open("r+b") as file:
        output = run_fork(host, attacks.INHERITED_FILE, "fds")
        file.seek(0)
        assert file.read(5) == b"owned", output


def test_shared_memory_is_seen(host: Host) -> None:
    """Where the host has some, a fork has an area of its own for each; whose it is, its list of areas does not say."""
    with contextlib.closing(mmap.mmap(-1, mmap.PAGESIZE)):
        assert "BREACH" in run_fork(host, attacks.SHARED_MEMORY)


def test_each_attack_is_shown_to_work_somewhere() -> None:
    """Or it would prove nothing that it fails."""
    text = Path(__file__).read_text(encoding="utf-8")
    nowhere = {
        "KILL_INIT",  # the kernel's own rule for PID 1 of a namespace, pid_namespaces(7): there is nothing to switch off
        "HIDDEN_TREE",  # what pivot_root(2) has left behind, in a tree that is made without it
    }
    shown = {name for name in CONTAINED if f'("{name}", "' in text or f"attacks.{name}" in text or name in ON_THE_HOST}
    shown |= {"ENVIRONMENT", "REOPEN_STDIN"}  # test_environment, test_stdin
    assert set(CONTAINED) - shown == nowhere


def _stdin_attack(host: Host, without: str) -> str:
    """A file given as stdin, open for reading only, must not become writable by /proc/self/fd/0."""
    spec = SandboxSpec()
    plan = make_plan(spec, python=python_environment(), defences=ALL_DEFENCES - set(without.split()))
    host.secret_file.chmod(0o666)
    with Sandbox.borrowed(NamespaceMachine(plan)) as box, host.secret_file.open() as given:
        process = box.popen([sys.executable, "-c", attacks.REOPEN_STDIN], stdin=given.fileno(), stdout=-1)
        return process.communicate(timeout=600).stdout.decode()


def test_a_file_given_to_read_stays_read_only(host: Host) -> None:
    assert "BREACH" not in _stdin_attack(host, "")
    assert host.secret_file.read_text() == SECRET
    assert "BREACH" in _stdin_attack(host, "landlock")


def test_writes_through_inherited_files_stay_inside(host: Host) -> None:
    with host.secret_file.open("r+") as held:
        assert held.fileno() > 2
        run_fork(host, attacks.INHERITED_FILE)
        assert host.secret_file.read_text() == SECRET
        run_fork(host, attacks.INHERITED_FILE, "fds")
        assert host.secret_file.read_text() != SECRET


@pytest.mark.parametrize("runner", ["fork", "template", "fork-of-fork"])
@pytest.mark.parametrize(("without", "breach"), [("", False), ("sharing", True)])
def test_shared_memory_leads_nowhere(host: Host, runner: str, without: str, breach: bool) -> None:
    """Of a file of the project and one outside of it, one that is mapped for reading only, one without a name, none at all."""
    files = {name: host.project / name for name in ("written", "read")}
    files["outside"] = host.secret_file.parent / "outside"
    files["unlinked"] = host.project / "unlinked"
    # What str.splitlines() takes for the end of a line, and then for the kernel's word on the area.
    for number, end in enumerate("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"):
        files[f"odd {number}"] = host.project / f"x{end}VmFlags: dc io"
    with contextlib.ExitStack() as stack:
        opened = {}
        for name, path in files.items():
            path.write_bytes(b"good" + bytes(mmap.PAGESIZE - 4))
            opened[name] = stack.enter_context(path.open("r+b"))
        files["unlinked"].unlink()
        fds = {name: file.fileno() for name, file in opened.items()}
        fds["memfd"] = os.memfd_create("test")
        stack.callback(os.close, fds["memfd"])
        os.write(fds["memfd"], b"good" + bytes(mmap.PAGESIZE - 4))
        fds["anonymous"] = -1
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        pages = {}
        for name, fd in fds.items():
            protection = mmap.PROT_READ if name == "read" else mmap.PROT_READ | mmap.PROT_WRITE
            flags = mmap.MAP_SHARED | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
            pages[name] = libc.mmap(None, ctypes.c_size_t(mmap.PAGESIZE), protection, flags, fd, ctypes.c_long(0))
            stack.callback(libc.munmap, ctypes.c_void_p(pages[name]), ctypes.c_size_t(mmap.PAGESIZE))
        ctypes.memmove(pages["anonymous"], b"good", 4)
        host.areas = list(pages.values())
        RUNNERS[runner](host, attacks.SHARED_AREAS, without)
        found = {name: ctypes.string_at(page, 4) for name, page in pages.items()}
        assert found == dict.fromkeys(pages, b"EVIL" if breach else b"good")
        assert files["written"].read_bytes()[:4] == files["read"].read_bytes()[:4] == found["read"]


def test_session_keyring_is_left(host: Host) -> None:
    read = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
found = libc.syscall(ctypes.c_long(250), 10, -3, b"user", b"isolation-test-key", 0)
if found > 0:
    print("BREACH a key of the host's session")
"""
    if os.uname().machine != "x86_64":
        pytest.xfail("keyctl's number is x86_64's")
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def in_thread() -> None:  # a session keyring of this thread's own, so that the test leaves nothing in the user's
        libc.syscall(ctypes.c_long(250), 1, None, 0, 0, 0)
        assert libc.syscall(ctypes.c_long(248), b"user", b"isolation-test-key", b"x", ctypes.c_size_t(1), -3) > 0
        results.append(run_command(host, read, "seccomp"))
        results.append(run_command(host, read, "seccomp keyring"))

    results: list[str] = []
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert "BREACH" not in results[0]
    assert "BREACH" in results[1]


@pytest.mark.parametrize(
    ("runner", "without", "inherit", "breach"),
    [
        ("command", "", "", False),
        ("command", "dumpable environment", "", True),
        ("fork", "", "", False),
        ("fork", "environment", "", True),
        ("fork", "", "inherit", True),  # what `pytest --isolation` does, and says
    ],
)
def test_environment(runner: str, without: str, inherit: str, breach: bool) -> None:
    """The block behind /proc/PID/environ, of a host that was started with a secret in it."""
    command = [sys.executable, "-m", "security.driver", runner, "ENVIRONMENT", without, *([inherit] if inherit else [])]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "ISOLATION_TEST_SECRET": SECRET}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert ("BREACH" in done.stdout) is breach, done
