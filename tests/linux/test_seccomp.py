"""The filter: what the program says, by an interpreter, and what the kernel does under it, in children."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import mmap
import multiprocessing
import os
import platform
import random
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from isolation.errors import IsolationError
from isolation.linux import seccomp, syscall_table
from isolation.linux.syscall_table import AARCH64, AUDIT_ARCH, NUMBERS, X86_64

PROFILE: dict[str, Any] = json.loads(Path(seccomp.__file__).with_name("seccomp.json").read_text())
MACHINES = ("x86_64", "aarch64")

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
AUDIT_ARCH_I386 = 0x40000003
AUDIT_ARCH_ARM = 0x40000028
CLONE_THREAD_FLAGS = 0x3D0F00  # as glibc's pthread_create has them
CLONE_NEW_FLAGS = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
CLONE_NEWTIME = 0x80
CLONE_NEWUSER = 0x10000000
HIGH = 1 << 32
TIOCSTI = 0x5412

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def refused(number: int) -> int:
    """What a filter returns for "fail with this errno"."""
    return 0x00050000 | number


# --- an interpreter -------------------------------------------------------------------------------------


def simulate(program: bytes, *, arch: int, nr: int, args: Sequence[int] = ()) -> int:
    """What the kernel would get from `program`, a little-endian one, for this call."""
    padded = [value % (1 << 64) for value in args] + [0] * (6 - len(args))
    data = struct.pack("<IIQ6Q", nr % (1 << 32), arch, 0xDEADBEEF, *padded)
    instructions: list[tuple[int, int, int, int]] = list(struct.iter_unpack("<HBBI", program))
    accumulator = 0
    position = 0
    while True:
        code, if_true, if_false, operand = instructions[position]
        position += 1
        if code == 0x20:
            assert operand % 4 == 0
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x05:
            position += operand
        elif code == 0x06:
            return operand
        else:
            holds = {0x15: accumulator == operand, 0x25: accumulator > operand, 0x35: accumulator >= operand}
            position += if_true if holds[code] else if_false


# --- a naive reading of the profile ---------------------------------------------------------------------

_COMPARE: dict[str, Callable[[int, int, int], bool]] = {
    "SCMP_CMP_NE": lambda argument, value, two: argument != value,
    "SCMP_CMP_LT": lambda argument, value, two: argument < value,
    "SCMP_CMP_LE": lambda argument, value, two: argument <= value,
    "SCMP_CMP_EQ": lambda argument, value, two: argument == value,
    "SCMP_CMP_GE": lambda argument, value, two: argument >= value,
    "SCMP_CMP_GT": lambda argument, value, two: argument > value,
    "SCMP_CMP_MASKED_EQ": lambda argument, value, two: argument & value == two,
}
_ACTIONS = {
    "SCMP_ACT_ALLOW": ALLOW,
    "SCMP_ACT_KILL_PROCESS": KILL_PROCESS,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_TRAP": 0x00030000,
}


def entries_for(profile: dict[str, Any], name: str | None, nesting: bool) -> list[dict[str, Any]]:
    return [
        entry
        for entry in profile["syscalls"]
        if name in entry["names"]
        and entry.get("includes", {}).get("nesting", nesting) == nesting
        and entry.get("excludes", {}).get("nesting", not nesting) != nesting
    ]


def expected(profile: dict[str, Any], name: str | None, args: Sequence[int], nesting: bool) -> int:
    for entry in entries_for(profile, name, nesting):
        if all(
            _COMPARE[rule["op"]](args[rule["index"]], rule["value"], rule.get("valueTwo", 0))
            for rule in entry.get("args", [])
        ):
            action, number = entry["action"], entry.get("errnoRet", errno.EPERM)
            return refused(number) if action == "SCMP_ACT_ERRNO" else _ACTIONS[action]
    default = profile["defaultAction"]
    return refused(profile["defaultErrnoRet"]) if default == "SCMP_ACT_ERRNO" else _ACTIONS[default]


def interesting_arguments(rules: list[dict[str, Any]], dice: random.Random) -> list[int]:
    """Six arguments, mostly on or next to the boundaries of a comparison."""
    bounds = [rule[key] for rule in rules for key in ("value", "valueTwo") if key in rule] or [0]
    args = []
    for _ in range(6):
        value = dice.choice([dice.choice(bounds) + dice.choice((-1, 0, 0, 0, 1)), dice.getrandbits(64), 0])
        value ^= dice.choice([0, 0, 1 << dice.randrange(64), dice.getrandbits(32) << 32])
        args.append(value % (1 << 64))
    return args


def assert_agrees(profile: dict[str, Any], program: bytes, machine: str, nesting: bool, seed: int) -> None:
    dice = random.Random(seed)
    names = {number: name for name, number in NUMBERS[machine].items()}
    beyond = [max(names) + 1, 600, 4095, 0x3FFFFFFF]
    for number in [*range(max(names) + 1), *beyond]:
        name = names.get(number)
        rules = [rule for entry in entries_for(profile, name, nesting) for rule in entry.get("args", [])]
        for _ in range(25 if rules else 2):
            args = interesting_arguments(rules, dice)
            got = simulate(program, arch=AUDIT_ARCH[machine], nr=number, args=args)
            wanted = expected(profile, name, args, nesting)
            assert got == wanted, f"{name} ({number}) {[hex(item) for item in args]}"


# --- the tables -----------------------------------------------------------------------------------------


def header_numbers(path: str) -> dict[str, int]:
    file = Path(path)
    if not file.exists():
        pytest.skip(f"needs {path} (linux-libc-dev)")
    found = re.findall(r"^#define\s+__NR(?:3264)?_(\w+)\s+(\d+)\b", file.read_text(), re.MULTILINE)
    return {name: int(number) for name, number in found}


def test_x86_64_numbers_are_those_of_the_kernel_header() -> None:
    header = header_numbers("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    assert {name: X86_64.get(name) for name in header if header[name] <= 467} == {
        name: number for name, number in header.items() if number <= 467
    }


def test_aarch64_numbers_are_those_of_the_generic_header() -> None:
    header = header_numbers("/usr/include/asm-generic/unistd.h")
    renamed = {"fstatat": "newfstatat"}  # __NR3264_fstatat is newfstatat where words have 64 bits
    known = {renamed.get(name, name): number for name, number in header.items()}
    wrong = {name: number for name, number in AARCH64.items() if number <= 450 and known.get(name) != number}
    assert not wrong


@pytest.mark.parametrize("machine", MACHINES)
def test_no_number_has_two_names(machine: str) -> None:
    assert len(set(NUMBERS[machine].values())) == len(NUMBERS[machine])


def test_both_machines_agree_on_calls_since_linux_5_1() -> None:
    recent = {machine: {n: v for n, v in NUMBERS[machine].items() if v >= 424} for machine in MACHINES}
    assert recent["x86_64"] == recent["aarch64"]
    assert sorted(recent["x86_64"].values()) == list(range(424, 468))


def test_audit_architectures() -> None:
    machines = {"x86_64": 62, "aarch64": 183}  # EM_X86_64, EM_AARCH64
    assert {name: 0xC0000000 | number for name, number in machines.items()} == AUDIT_ARCH
    assert all(arch & syscall_table.AUDIT_ARCH_LE for arch in AUDIT_ARCH.values())


# --- the profile ----------------------------------------------------------------------------------------


def test_every_known_call_is_named_and_every_named_call_is_known() -> None:
    named = {name for entry in PROFILE["syscalls"] for name in entry["names"]}
    assert named == set(X86_64) | set(AARCH64)


def test_all_comparisons_are_masked() -> None:
    """An unmasked one can be by-passed through the upper half of the register: CVE-2019-10063."""
    rules = [rule for entry in PROFILE["syscalls"] for rule in entry.get("args", [])]
    assert rules
    assert {rule["op"] for rule in rules} == {"SCMP_CMP_MASKED_EQ"}
    assert all(rule["value"] <= 0xFFFFFFFF for rule in rules)


@pytest.mark.parametrize("nesting", [False, True])
def test_every_call_ends_in_an_entry_without_conditions(nesting: bool) -> None:
    """So that no call falls through to the default by accident."""
    profile = seccomp.load_profile()
    last: dict[str, seccomp.Rule] = {}
    for rule in profile.rules:
        if rule.nesting in (None, nesting):
            last.update(dict.fromkeys(rule.names, rule))
    assert not [name for name, rule in last.items() if rule.conditions]


# --- the compiled program -------------------------------------------------------------------------------


@pytest.fixture(params=[(m, n) for m in MACHINES for n in (False, True)], ids=lambda p: f"{p[0]}-{p[1]:d}")
def variant(request: pytest.FixtureRequest) -> tuple[str, bool, bytes]:
    machine, nesting = request.param
    return machine, nesting, seccomp.compile_profile(seccomp.load_profile(), machine=machine, nesting=nesting)


def test_program_agrees_with_the_profile_on_every_number(variant: tuple[str, bool, bytes]) -> None:
    machine, nesting, program = variant
    assert_agrees(PROFILE, program, machine, nesting, seed=20190510)


def test_program_is_short(variant: tuple[str, bool, bytes]) -> None:
    program = variant[2]
    assert len(program) % 8 == 0
    assert len(program) // 8 < 200


def test_foreign_architectures_are_refused(variant: tuple[str, bool, bytes]) -> None:
    machine, _, program = variant
    foreign = {AUDIT_ARCH_I386, AUDIT_ARCH_ARM, 0, 0xFFFFFFFF, *AUDIT_ARCH.values()} - {AUDIT_ARCH[machine]}
    for arch in foreign:
        for number in range(500):
            assert simulate(program, arch=arch, nr=number) == KILL_PROCESS


def test_x32_is_refused(variant: tuple[str, bool, bytes]) -> None:
    machine, _, program = variant
    for number in [*range(600), 0x3FFFFFFF, 0x7FFFFFFF, 0xBFFFFFFF]:
        got = simulate(program, arch=AUDIT_ARCH[machine], nr=number | 0x40000000)
        assert got == refused(errno.ENOSYS)


def test_x32_is_refused_by_a_profile_that_allows_everything() -> None:
    program = compiled({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []})
    arch = AUDIT_ARCH["x86_64"]
    assert simulate(program, arch=arch, nr=0) == ALLOW
    assert simulate(program, arch=arch, nr=0x40000000) == refused(errno.ENOSYS)
    assert simulate(program, arch=arch, nr=-1) == refused(errno.ENOSYS)


def test_tiocsti_is_refused_whatever_the_upper_half(variant: tuple[str, bool, bytes]) -> None:
    machine, _, program = variant
    number, arch = NUMBERS[machine]["ioctl"], AUDIT_ARCH[machine]
    for request in (TIOCSTI, 0x541C):
        for high in (0, HIGH, 0x80000000 * HIGH, 0xFFFFFFFF * HIGH):
            got = simulate(program, arch=arch, nr=number, args=(0, request + high))
            assert got == refused(errno.EPERM)
    for request in (0x5401, 0x5413, TIOCSTI << 1, TIOCSTI | 0x80000000):
        assert simulate(program, arch=arch, nr=number, args=(0, request)) == ALLOW


def test_socket_families(variant: tuple[str, bool, bytes]) -> None:
    machine, _, program = variant
    for call, allowed in (("socket", {1, 2, 10, 16}), ("socketpair", {1})):
        for family in range(64):
            for high in (0, HIGH, 0xFFFFFFFF * HIGH):
                number, args = NUMBERS[machine][call], (family + high, 1, 0)
                got = simulate(program, arch=AUDIT_ARCH[machine], nr=number, args=args)
                assert got == (ALLOW if family in allowed else refused(errno.EAFNOSUPPORT))


def test_clone_flags(variant: tuple[str, bool, bytes]) -> None:
    machine, nesting, program = variant
    number, arch = NUMBERS[machine]["clone"], AUDIT_ARCH[machine]
    plain = (signal.SIGCHLD, CLONE_THREAD_FLAGS, 0x4111, 0x1200011, HIGH)
    for flags in plain:
        assert simulate(program, arch=arch, nr=number, args=(flags,)) == ALLOW
    for flag in CLONE_NEW_FLAGS:
        for flags in (flag, flag | signal.SIGCHLD, flag | HIGH):
            got = simulate(program, arch=arch, nr=number, args=(flags,))
            assert got == (ALLOW if nesting else refused(errno.EPERM))


def test_unshare_flags(variant: tuple[str, bool, bytes]) -> None:
    machine, nesting, program = variant
    number, arch = NUMBERS[machine]["unshare"], AUDIT_ARCH[machine]
    assert simulate(program, arch=arch, nr=number, args=(0x600,)) == ALLOW  # CLONE_FS | CLONE_FILES
    for flag in (*CLONE_NEW_FLAGS, CLONE_NEWTIME):
        got = simulate(program, arch=arch, nr=number, args=(flag | 0x600,))
        assert got == (ALLOW if nesting else refused(errno.EPERM))


def test_single_calls(variant: tuple[str, bool, bytes]) -> None:
    machine, nesting, program = variant

    def outcome(name: str, *args: int) -> int:
        return simulate(program, arch=AUDIT_ARCH[machine], nr=NUMBERS[machine][name], args=args)

    assert outcome("clone3") == refused(errno.ENOSYS)
    for name in ("bpf", "io_uring_setup", "open_by_handle_at", "add_key", "request_key", "pidfd_getfd"):
        assert outcome(name) == refused(errno.EPERM)
    for name in ("mount", "setns", "pivot_root", "move_mount", "sethostname"):
        assert outcome(name) == (ALLOW if nesting else refused(errno.EPERM))
    assert outcome("keyctl", 1) == outcome("keyctl", 1 + HIGH) == outcome("mount")
    assert outcome("keyctl", 0) == outcome("keyctl", 11) == refused(errno.EPERM)
    assert outcome("personality", 0xFFFFFFFF) == outcome("personality", 0x40000) == ALLOW
    assert outcome("personality", 0x400000) == refused(errno.EPERM)  # READ_IMPLIES_EXEC
    assert outcome("read") == outcome("seccomp") == outcome("landlock_restrict_self") == ALLOW


# --- the compiler, with other profiles ------------------------------------------------------------------


def compiled(document: dict[str, Any], machine: str = "x86_64", nesting: bool = False) -> bytes:
    document = {"architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"], **document}
    return seccomp.compile_profile(seccomp.parse_profile(document), machine=machine, nesting=nesting)


def random_entry(dice: random.Random, names: list[str]) -> dict[str, Any]:
    action = dice.choice(["SCMP_ACT_ERRNO", *_ACTIONS])
    entry: dict[str, Any] = {"names": names, "action": action}
    if action == "SCMP_ACT_ERRNO":
        entry["errnoRet"] = dice.randrange(4096)
    entry["args"] = [random_condition(dice) for _ in range(dice.choice((0, 1, 1, 1, 2, 3)))]
    if dice.random() < 0.2:
        entry[dice.choice(("includes", "excludes"))] = {"nesting": dice.random() < 0.5}
    return entry


def random_condition(dice: random.Random) -> dict[str, Any]:
    operator = dice.choice(list(_COMPARE))
    value = dice.getrandbits(dice.choice((4, 32, 33, 64)))
    two = value & dice.getrandbits(64) if operator == "SCMP_CMP_MASKED_EQ" else 0
    return {"index": dice.randrange(6), "value": value, "valueTwo": two, "op": operator}


@pytest.mark.parametrize("seed", range(12))
def test_program_agrees_with_a_random_profile(seed: int) -> None:
    dice = random.Random(seed)
    machine, nesting = dice.choice(MACHINES), dice.random() < 0.5
    calls = sorted(NUMBERS[machine])
    most = dice.choice((5, 60, 150))
    entries = [random_entry(dice, dice.sample(calls, dice.choice((1, 2, 9)))) for _ in range(most)]
    document = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 77, "syscalls": entries}
    assert_agrees(document, compiled(document, machine, nesting), machine, nesting, seed)


def long_profile(calls: Sequence[str], rules: int) -> dict[str, Any]:
    """Some calls, each with `rules` rules of its own: `n` in the first argument is errno `base + n`."""
    entries = [
        {
            "names": [name],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 100 + place * rules + n,
            "args": [
                {"index": 0, "value": n, "op": "SCMP_CMP_EQ"},
                {"index": 5, "value": HIGH, "op": "SCMP_CMP_GE"},
            ],
        }
        for place, name in enumerate(calls)
        for n in range(rules)
    ]
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": entries}


UNUSED_CALLS = (
    "acct",
    "bpf",
    "kcmp",
    "reboot",
    "swapon",
    "swapoff",
    "vhangup",
    "quotactl",
    "lookup_dcookie",
    "setns",
)


def test_jumps_farther_than_255() -> None:
    document = long_profile(UNUSED_CALLS, 40)
    program = compiled(document)
    instructions = list(struct.iter_unpack("<HBBI", program))
    assert len(instructions) > 2000
    assert any(code == 0x05 for code, _, _, _ in instructions)
    assert_agrees(document, program, "x86_64", False, seed=1)


def test_too_long_a_profile_is_an_error() -> None:
    with pytest.raises(seccomp.ProfileError, match=r"needs \d+ instructions; 4096 are possible"):
        compiled(long_profile(UNUSED_CALLS, 200))


def test_the_first_entry_that_matches_decides() -> None:
    small = {"index": 0, "value": 10, "op": "SCMP_CMP_LT"}
    entries = [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [small]},
        {"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5},
        {"names": ["read"], "action": "SCMP_ACT_KILL_PROCESS"},
    ]
    program = compiled({"defaultAction": "SCMP_ACT_TRAP", "syscalls": entries})
    arch = AUDIT_ARCH["x86_64"]
    assert simulate(program, arch=arch, nr=0, args=(9,)) == ALLOW
    assert simulate(program, arch=arch, nr=0, args=(10,)) == refused(5)
    assert simulate(program, arch=arch, nr=1) == 0x00030000


def test_names_that_a_machine_lacks_are_skipped() -> None:
    entries = [{"names": ["open", "no_such_call", "openat"], "action": "SCMP_ACT_ALLOW"}]
    program = compiled({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": entries}, "aarch64")
    arch = AUDIT_ARCH["aarch64"]
    assert simulate(program, arch=arch, nr=AARCH64["openat"]) == ALLOW
    assert simulate(program, arch=arch, nr=X86_64["open"]) == refused(errno.EPERM)


def bad_profiles() -> Iterator[Any]:
    def entry(**fields: Any) -> dict[str, Any]:
        item = {"names": ["read"], "action": "SCMP_ACT_ALLOW", **fields}
        return {"defaultAction": "SCMP_ACT_ALLOW", "architectures": [], "syscalls": [item]}

    def comparison(**fields: Any) -> dict[str, Any]:
        return entry(args=[{"index": 0, "value": 1, "op": "SCMP_CMP_EQ", **fields}])

    yield pytest.param([], "must be a JSON object", id="no-object")
    yield pytest.param({}, "'architectures' of the profile must be a list", id="empty")
    yield pytest.param({**entry(), "listenerPath": "/x"}, "'listenerPath'", id="unknown-key")
    yield pytest.param({**entry(), "defaultAction": "SCMP_ACT_NOTIFY"}, "the default .* 'SCMP_ACT_NOTIFY'", id="default")
    yield pytest.param({**entry(), "architectures": ["SCMP_ARCH_X86"]}, "SCMP_ARCH_X86", id="architecture")
    yield pytest.param({**entry(), "syscalls": {}}, "'syscalls' of the profile must be a list", id="syscalls")
    yield pytest.param(entry(action="SCMP_ACT_TRACE"), "entry 1 .* unknown action 'SCMP_ACT_TRACE'", id="action")
    yield pytest.param(entry(action=[]), r"unknown action \[\]", id="action-type")
    yield pytest.param(entry(names=[]), "names no system call", id="no-names")
    yield pytest.param(entry(names="read"), "'names' of entry 1 .* list of strings", id="names")
    yield pytest.param(entry(errnoRet=1), "makes no sense with SCMP_ACT_ALLOW", id="errno-of-allow")
    yield pytest.param(entry(action="SCMP_ACT_ERRNO", errnoRet=4096), "from 0 to 4095, not 4096", id="errno")
    yield pytest.param(entry(includes={"caps": ["CAP_BPF"]}), "'caps'", id="includes-caps")
    yield pytest.param(entry(includes={"nesting": 1}), "must be true or false", id="nesting")
    both = entry(includes={"nesting": True}, excludes={"nesting": True})
    yield pytest.param(both, "together leave no sandbox", id="never")
    yield pytest.param(entry(args={}) | {"x": 1}, "'x'", id="unknown-key-too")
    yield pytest.param(entry(args="x"), "must be a list of comparisons", id="args")
    yield pytest.param(comparison(op="SCMP_CMP_LIKE"), "unknown operator 'SCMP_CMP_LIKE'", id="operator")
    yield pytest.param(comparison(op=[]), r"unknown operator \[\]", id="operator-type")
    yield pytest.param(comparison(index=6), "'index' .* from 0 to 5, not 6", id="index")
    yield pytest.param(comparison(value=-1), "'value' .* not -1", id="negative")
    yield pytest.param(comparison(value=True), "'value' .* not True", id="bool")
    yield pytest.param(comparison(op="SCMP_CMP_MASKED_EQ", valueTwo=2), "never matches", id="outside-mask")


@pytest.mark.parametrize(("document", "message"), list(bad_profiles()))
def test_a_bad_profile_is_an_error_that_says_where(document: Any, message: str) -> None:
    with pytest.raises(seccomp.ProfileError, match=message):
        seccomp.parse_profile(document)


def test_unknown_machines_are_an_error() -> None:
    with pytest.raises(ValueError, match="No table of system calls for 'm68k'") as caught:
        seccomp.compile_profile(seccomp.load_profile(), machine="m68k")
    assert isinstance(caught.value, IsolationError)
    only_arm = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_AARCH64"], "syscalls": []}
    with pytest.raises(seccomp.ProfileError, match="not for 'x86_64'"):
        compiled(only_arm)


# --- under the filter, for real -------------------------------------------------------------------------

real = pytest.mark.skipif(platform.machine() not in NUMBERS, reason="no filter for this machine")
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="an x86_64 matter")


def in_child(action: Callable[[], Any], program: bytes | None) -> tuple[int, Any]:
    """The wait status of a forked child, and what `action` gave there, under `program`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        signal.alarm(60)
        try:
            if program is not None:
                assert _libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
                seccomp.install(program)
            answer = {"result": action()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    answer = json.loads(text or "{}")
    assert "error" not in answer, answer["error"]
    return status, answer.get("result")


def filtered(action: Callable[[], Any], *, nesting: bool = False) -> Any:
    program = seccomp.compile_profile(seccomp.load_profile(), nesting=nesting)
    status, result = in_child(action, program)
    assert status == 0
    return result


def raw(name: str | int, *args: int) -> str:
    """A system call without the C library's wrapper: "" or the name of its errno."""
    number = name if isinstance(name, int) else NUMBERS[platform.machine()][name]
    ctypes.set_errno(0)
    result = _libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, args))
    return "" if result >= 0 else errno.errorcode[ctypes.get_errno()]


@real
def test_the_kernel_refuses() -> None:
    def action() -> dict[str, str]:
        return {
            "TIOCSTI": raw("ioctl", 0, TIOCSTI, 0),
            "TIOCSTI + 2**32": raw("ioctl", 0, TIOCSTI + HIGH, 0),
            "AF_VSOCK": raw("socket", 40, 1, 0),
            "AF_ALG": raw("socket", 38, 5, 0),
            "AF_ALG + 2**32": raw("socket", 38 + HIGH, 5, 0),
            "socketpair AF_INET": raw("socketpair", 2, 1, 0, 0),
            "unshare": raw("unshare", CLONE_NEWUSER),
            "clone": raw("clone", CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0),
            "keyctl": raw("keyctl", 0, 0, 0),
            "clone3": raw("clone3", 0, 0),
            "mount": raw("mount", 0, 0, 0, 0, 0),
            "io_uring_setup": raw("io_uring_setup", 1, 0),
            "unknown": raw(4000),
        }

    assert filtered(action) == {
        "TIOCSTI": "EPERM",
        "TIOCSTI + 2**32": "EPERM",
        "AF_VSOCK": "EAFNOSUPPORT",
        "AF_ALG": "EAFNOSUPPORT",
        "AF_ALG + 2**32": "EAFNOSUPPORT",
        "socketpair AF_INET": "EAFNOSUPPORT",
        "unshare": "EPERM",
        "clone": "EPERM",
        "keyctl": "EPERM",
        "clone3": "ENOSYS",
        "mount": "EPERM",
        "io_uring_setup": "EPERM",
        "unknown": "ENOSYS",
    }


@real
def test_nesting_lets_namespace_calls_through_to_the_kernel() -> None:
    """With arguments that the kernel itself answers with something else than the filter does."""

    def action() -> dict[str, str]:
        return {
            "unshare": raw("unshare", 1),  # no such flag
            "setns": raw("setns", 2**32 - 1, 0),
            "clone3": raw("clone3", 0, 0),
            "add_key": raw("add_key", 0, 0, 0, 0, 0),
        }

    assert filtered(action, nesting=True) == {
        "unshare": "EINVAL",
        "setns": "EBADF",
        "clone3": "ENOSYS",
        "add_key": "EPERM",
    }


@real
@x86_only
def test_x32_calls_are_refused_by_the_kernel() -> None:
    assert filtered(lambda: raw(0x40000000 | X86_64["getpid"])) == "ENOSYS"


@real
@x86_only
def test_32_bit_calls_are_refused_by_the_kernel() -> None:
    def getpid_32() -> bool:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        return bool(ctypes.CFUNCTYPE(ctypes.c_int)(address)() == os.getpid())

    status, worked = in_child(getpid_32, None)
    if status != 0 or not worked:
        pytest.skip("this kernel has no 32-bit calls anyway")
    status, worked = in_child(getpid_32, seccomp.compile_profile(seccomp.load_profile()))
    assert worked is None
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSYS


@real
def test_the_kernel_takes_a_long_program_with_relays() -> None:
    def action() -> list[str]:
        return [raw("setns", 7, 0, 0, 0, 0, HIGH), raw("acct", 3, 0, 0, 0, 0, 2 * HIGH)]

    rules = 30
    calls = (*UNUSED_CALLS[:-1], "setns")
    document = long_profile(calls, rules)
    for entry in document["syscalls"]:
        entry["errnoRet"] = errno.EXDEV
    program = compiled(document, platform.machine())
    assert in_child(action, program) == (0, ["EXDEV", "EXDEV"])


@real
def test_threads_that_run_already_are_filtered_too() -> None:
    def action() -> str:
        started, filter_set, answers = threading.Event(), threading.Event(), list[str]()

        def work() -> None:
            started.set()
            filter_set.wait()
            answers.append(raw("keyctl", 0, 0, 0))

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        _libc.prctl(38, 1, 0, 0, 0)
        seccomp.install(seccomp.compile_profile(seccomp.load_profile()))
        filter_set.set()
        thread.join()
        return answers[0]

    assert in_child(action, None) == (0, "EPERM")


@real
def test_install_says_what_is_wrong() -> None:
    def action() -> list[int | None]:
        numbers: list[int | None] = []
        for program in (b"", b"1234567", b"\xff" * 8):
            try:
                seccomp.install(program)
            except OSError as error:
                numbers.append(error.errno)
        return numbers

    assert in_child(action, compiled({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}, platform.machine())) == (
        0,
        [errno.EINVAL] * 3,
    )


# --- ordinary Python under the filter -------------------------------------------------------------------


def run_subprocess() -> Any:
    return subprocess.run(["true"], check=False).returncode


def run_ls() -> Any:
    done = subprocess.run(["ls", "-l", "/"], capture_output=True, text=True, check=False)
    return [done.returncode, done.stderr, "proc" in done.stdout]


def run_threads() -> Any:
    results: list[int] = []
    threads = [threading.Thread(target=results.append, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(results)


def run_sockets() -> Any:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"over")
        received = right.recv(4).decode()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0] as peer,
    ):
        client.sendall(b"done")
        return [received, peer.recv(4).decode()]


def run_asyncio() -> Any:
    async def main() -> list[str]:
        process = await asyncio.create_subprocess_exec("echo", "hello", stdout=subprocess.PIPE)
        output, _ = await process.communicate()
        return [output.decode().strip(), await asyncio.to_thread(str, 7)]

    return asyncio.run(main())


def run_multiprocessing() -> Any:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(abs, [-1, -2, 3])


def run_spawn() -> Any:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=os.getpid)
    process.start()
    process.join()
    return process.exitcode


def run_sqlite() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        connection = sqlite3.connect(os.path.join(folder, "a.db"))
        connection.execute("pragma journal_mode=wal")
        connection.execute("create table t (x)")
        connection.execute("insert into t values (42)")
        connection.commit()
        row = connection.execute("select x from t").fetchone()
        connection.close()
    return row


def run_random() -> Any:
    return len(os.urandom(16))


def run_tempfile() -> Any:
    with tempfile.NamedTemporaryFile() as file, tempfile.TemporaryFile() as unnamed:
        file.write(b"x" * 10)
        file.flush()
        unnamed.write(b"y")
        return os.stat(file.name).st_size


@real
@pytest.mark.parametrize("nesting", [False, True])
@pytest.mark.parametrize(
    ("action", "wanted"),
    [
        (run_subprocess, 0),
        (run_ls, [0, "", True]),
        (run_threads, list(range(8))),
        (run_sockets, ["over", "done"]),
        (run_asyncio, ["hello", "7"]),
        (run_multiprocessing, [1, 2, 3]),
        (run_spawn, 0),
        (run_sqlite, [42]),
        (run_random, 16),
        (run_tempfile, 10),
    ],
)
def test_ordinary_python_works(action: Callable[[], Any], wanted: Any, nesting: bool) -> None:
    assert filtered(action, nesting=nesting) == wanted
