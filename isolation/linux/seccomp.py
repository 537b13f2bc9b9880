"""The system call filter: a profile in JSON, compiled here to the classic BPF that seccomp(2) takes.

The profile, `seccomp.json`, is in the form of the OCI runtime specification ("Linux Seccomp"), which is
Docker's too. It is read strictly, since what is ignored in a filter is a hole: an unknown key, action or
operator is an error. Only a system call that this machine does not have is skipped, because calls differ
between machines.

What a program does, precisely:

* A call is looked up by its number, and the entries that name it are tried in the order of the file. The
  first whose `args` all match decides; where none matches, or none names the call, it is the profile's
  default.
* `includes` and `excludes` know one key, an extension of this project: `nesting`, for sandboxes that may
  make sandboxes themselves.
* A call of another architecture (32-bit programs, `int 0x80`) kills the process with SIGSYS. The other
  choice, ENOSYS, is no kinder: a 32-bit program cannot even exit then, and one linked with musl spins for
  ever.
* A call of the x32 ABI is ENOSYS, as on the many kernels that are built without it.

The kernel passes arguments as 64 bits, also where it reads an int from the lower half. A comparison that
looks at both halves is therefore by-passed by whoever sets the upper one (CVE-2019-10063): use
SCMP_CMP_MASKED_EQ.

Only opcodes that the kernel can follow itself lead to a decision by number, so that from Linux 5.11 on it
finds out at installation which calls are always allowed, and runs no filter for them.
"""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from isolation.errors import IsolationError
from isolation.linux.syscall_script import SyscallScript
from isolation.linux.syscall_table import (
    AUDIT_ARCH,
    AUDIT_ARCH_LE,
    AUDIT_ARCH_X86_64,
    NUMBERS,
    X32_SYSCALL_BIT,
)
from isolation.linux.syscalls import CLONE_NEWUSER, MACHINE
from isolation.plain import json, os

# Instructions, from <linux/bpf_common.h>; each is a class | a size or operation | a mode or source.
_BPF_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_BPF_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_BPF_JUMP = 0x05  # BPF_JMP | BPF_JA
_BPF_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_BPF_IF_GREATER = 0x25  # BPF_JMP | BPF_JGT | BPF_K
_BPF_IF_GREATER_OR_EQUAL = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_BPF_RETURN = 0x06  # BPF_RET | BPF_K
_BPF_FARTHEST = 255  # a conditional jump's offset is one byte
_BPF_MAXINSNS = 4096

# Offsets in struct seccomp_data, from <linux/seccomp.h>.
_DATA_NR = 0
_DATA_ARCH = 4
_DATA_ARGS = 16
_MAX_ERRNO = 4095

_RET_ERRNO = 0x00050000
_RET_KILL_PROCESS = 0x80000000
_ACTIONS = {
    "SCMP_ACT_ALLOW": 0x7FFF0000,
    "SCMP_ACT_ERRNO": _RET_ERRNO,
    "SCMP_ACT_KILL": 0,
    "SCMP_ACT_KILL_PROCESS": _RET_KILL_PROCESS,
    "SCMP_ACT_KILL_THREAD": 0,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_TRAP": 0x00030000,
}
_ARCHITECTURES = {"SCMP_ARCH_AARCH64": "aarch64", "SCMP_ARCH_X86_64": "x86_64"}
_OPERATORS = frozenset(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))

_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1

_WORD = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF


class ProfileError(IsolationError, ValueError):
    """A profile that cannot be read, or cannot be compiled for this machine; the message says which part."""


@dataclass(frozen=True)
class Condition:
    """A comparison of the argument `index`. SCMP_CMP_MASKED_EQ is `(argument & value) == value_two`."""

    index: int
    value: int
    value_two: int
    operator: str


class Rule(NamedTuple):
    """What to do with some system calls if all `conditions` hold; `action` is what the filter returns."""

    names: tuple[str, ...]
    action: int
    conditions: tuple[Condition, ...] = ()
    nesting: bool | None = None  # True: for nesting sandboxes only; False: for the others only; None: for all


class Profile(NamedTuple):
    """A profile as it was read: `rules` in the order of the file."""

    default_action: int
    machines: frozenset[str]
    rules: tuple[Rule, ...]


def for_templates(profile: Profile) -> Profile:
    """`profile`, and with it what a template of its own forks needs: to enter a namespace, which only those can that were
    made for it, and to make a user namespace, but no other. With the capabilities that these bring it can do what `profile`
    allows, and so neither mount nor trace."""
    user = Condition(0, _WORD, CLONE_NEWUSER, "SCMP_CMP_MASKED_EQ")
    rules = (Rule(("setns",), _ACTIONS["SCMP_ACT_ALLOW"]), Rule(("unshare",), _ACTIONS["SCMP_ACT_ALLOW"], (user,)))
    return profile._replace(rules=(*rules, *profile.rules))


def against_templates(profile: Profile) -> Profile:
    """A filter to put on top of that, which only refuses what it added."""
    user = Condition(0, CLONE_NEWUSER, CLONE_NEWUSER, "SCMP_CMP_MASKED_EQ")
    refuse = _RET_ERRNO | errno.EPERM
    rules = (Rule(("setns",), refuse), Rule(("unshare",), refuse, (user,)))
    return Profile(_ACTIONS["SCMP_ACT_ALLOW"], profile.machines, rules)


# --- reading ------------------------------------------------------------------------------------------


@functools.cache  # a supervisor does not see the file any more, if this package is somewhere beneath /tmp
def load_profile() -> Profile:
    """The profile that comes with this package."""
    # importlib.resources would take longer to import than all the rest here.
    with open(os.path.join(os.path.dirname(__file__), "seccomp.json"), encoding="utf-8") as file:
        return parse_profile(json.loads(file.read()))


def parse_profile(document: object) -> Profile:
    """A profile from its JSON form."""
    top = _object(document, "the profile", {"defaultAction", "defaultErrnoRet", "architectures", "syscalls"})
    machines = frozenset(_machine(name) for name in _strings(top, "architectures", "the profile"))
    entries = top.get("syscalls", [])
    if not isinstance(entries, list):
        raise ProfileError("'syscalls' of the profile must be a list of entries.")
    rules = tuple(_rule(entry, f"entry {number} of 'syscalls'") for number, entry in enumerate(entries, 1))
    default = _action(top.get("defaultAction"), top.get("defaultErrnoRet"), "the default of the profile")
    return Profile(default, machines, rules)


def _rule(entry: object, where: str) -> Rule:
    keys = {"names", "action", "errnoRet", "args", "comment", "includes", "excludes"}
    fields = _object(entry, where, keys)
    names = _strings(fields, "names", where)
    if not names:
        raise ProfileError(f"{where} names no system call.")
    arguments = fields.get("args") or []
    if not isinstance(arguments, list):
        raise ProfileError(f"'args' of {where} must be a list of comparisons.")
    conditions = tuple(_condition(argument, f"'args' of {where}") for argument in arguments)
    action = _action(fields.get("action"), fields.get("errnoRet"), where)
    return Rule(names, action, conditions, _nesting(fields, where))


def _condition(argument: object, where: str) -> Condition:
    fields = _object(argument, where, {"index", "value", "valueTwo", "op"})
    operator = fields.get("op")
    if not isinstance(operator, str) or operator not in _OPERATORS:
        known = ", ".join(sorted(_OPERATORS))
        raise ProfileError(f"{where}: unknown operator {operator!r}; known are {known}.")
    index = _number(fields.get("index"), 5, f"'index' in {where}")
    value = _number(fields.get("value"), _LONG, f"'value' in {where}")
    value_two = _number(fields.get("valueTwo", 0), _LONG, f"'valueTwo' in {where}")
    if operator == "SCMP_CMP_MASKED_EQ" and value_two & ~value:
        raise ProfileError(f"{where}: 'valueTwo' has bits outside the mask in 'value', so it never matches.")
    return Condition(index, value, value_two, operator)


def _nesting(fields: dict[str, Any], where: str) -> bool | None:
    wanted: set[bool] = set()
    for key, when_true in (("includes", True), ("excludes", False)):
        filters = _object(fields.get(key) or {}, f"'{key}' of {where}", {"nesting"})
        if "nesting" not in filters:
            continue
        if not isinstance(filters["nesting"], bool):
            raise ProfileError(f"'nesting' in '{key}' of {where} must be true or false.")
        wanted.add(filters["nesting"] is when_true)
    if len(wanted) > 1:
        raise ProfileError(f"'includes' and 'excludes' of {where} together leave no sandbox.")
    return wanted.pop() if wanted else None


def _action(name: object, errno_ret: object, where: str) -> int:
    if not isinstance(name, str) or name not in _ACTIONS:
        raise ProfileError(f"{where}: unknown action {name!r}; known are {', '.join(sorted(_ACTIONS))}.")
    if name != "SCMP_ACT_ERRNO":
        if errno_ret is not None:
            raise ProfileError(f"{where}: an errno makes no sense with {name}.")
        return _ACTIONS[name]
    number = errno.EPERM if errno_ret is None else _number(errno_ret, _MAX_ERRNO, f"the errno of {where}")
    return _RET_ERRNO | number


def _machine(architecture: str) -> str:
    if architecture not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ProfileError(f"Unknown architecture {architecture!r} in the profile; known are {known}.")
    return _ARCHITECTURES[architecture]


def _object(value: object, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProfileError(f"{where} must be a JSON object, not {type(value).__name__}.")
    unknown = sorted(set(value) - known)
    if unknown:
        raise ProfileError(f"{where} has keys that are not understood here: {', '.join(map(repr, unknown))}.")
    return value


def _strings(fields: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = fields.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ProfileError(f"'{key}' of {where} must be a list of strings.")
    return tuple(value)


def _number(value: object, most: int, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ProfileError(f"{what} must be a whole number from 0 to {most}, not {value!r}.")
    return value


# --- compiling ----------------------------------------------------------------------------------------


def compile_profile(profile: Profile, *, machine: str | None = None, nesting: bool = False) -> bytes:
    """The profile as an array of `struct sock_filter`; `machine` is as uname(2) names it."""
    name = machine or MACHINE
    if name not in NUMBERS:
        known = ", ".join(sorted(NUMBERS))
        raise ProfileError(f"No table of system calls for {name!r}; there are tables for {known}.")
    if name not in profile.machines:
        raise ProfileError(f"The profile is not for {name!r}; its 'architectures' leave it out.")
    arch = AUDIT_ARCH[name]
    code = _Assembler(little_endian=bool(arch & AUDIT_ARCH_LE))
    leaves = _leaves(code, profile, NUMBERS[name], nesting)
    code.by_architecture(arch, code.by_number(leaves, profile.default_action))
    return code.packed()


def _leaves(code: _Assembler, profile: Profile, numbers: dict[str, int], nesting: bool) -> dict[int, int]:
    """Where in the program each system call is decided, by its number."""
    rules: dict[int, list[Rule]] = {}
    for rule in profile.rules:
        if rule.nesting is None or rule.nesting is nesting:
            for name in rule.names:
                if name in numbers:
                    rules.setdefault(numbers[name], []).append(rule)
    return {number: code.first_match(rules[number], profile.default_action) for number in sorted(rules)}


class _Assembler:
    """A program written from its last instruction to its first.

    Every jump goes forward, so its target is in place when the jump is written, and the offset is known. A
    position is counted from the end: the last instruction's is 0. What is asked for twice is written once.
    """

    def __init__(self, *, little_endian: bool) -> None:
        self._little_endian = little_endian
        self._backwards: list[tuple[int, int, int, int]] = []
        self._known: dict[tuple[int, int, int, int], int] = {}
        self._relays: dict[int, int] = {}

    def packed(self) -> bytes:
        """The program, which starts at what was written last."""
        if len(self._backwards) > _BPF_MAXINSNS:
            length = len(self._backwards)
            raise ProfileError(f"The profile needs {length} instructions; {_BPF_MAXINSNS} are possible.")
        layout = struct.Struct("<HBBI" if self._little_endian else ">HBBI")
        return b"".join(layout.pack(*instruction) for instruction in reversed(self._backwards))

    # The shape of the program.

    def by_architecture(self, arch: int, native: int) -> int:
        """The program's head: foreign calls go first, since the same number means another call there."""
        if arch == AUDIT_ARCH_X86_64:
            x32 = self._return(_RET_ERRNO | errno.ENOSYS)
            native = self._branch(_BPF_IF_GREATER_OR_EQUAL, X32_SYSCALL_BIT, x32, native)
        native = self._then(_BPF_LOAD_WORD, _DATA_NR, native)
        native = self._branch(_BPF_IF_EQUAL, arch, native, self._return(_RET_KILL_PROCESS))
        return self._then(_BPF_LOAD_WORD, _DATA_ARCH, native)

    def by_number(self, leaves: dict[int, int], default_action: int) -> int:
        """A binary search for the number, over ranges with the same end."""
        default = self._return(default_action)
        ranges = [(0, default)]
        for number in sorted(leaves.keys() | {number + 1 for number in leaves}):
            leaf = leaves.get(number, default)
            if leaf != ranges[-1][1]:
                ranges.append((number, leaf))
        return self._search(ranges)

    def _search(self, ranges: Sequence[tuple[int, int]]) -> int:
        if len(ranges) == 1:
            return ranges[0][1]
        middle = len(ranges) // 2
        upper, lower = self._search(ranges[middle:]), self._search(ranges[:middle])
        return self._branch(_BPF_IF_GREATER_OR_EQUAL, ranges[middle][0], upper, lower)

    def first_match(self, rules: Sequence[Rule], default_action: int) -> int:
        """The rules of one system call, tried in their order."""
        position = self._return(default_action)
        for rule in reversed(rules):
            otherwise, position = position, self._return(rule.action)
            for condition in reversed(rule.conditions):
                position = self._compare(condition, position, otherwise)
        return position

    # Comparisons of 64 bits, in two halves.

    def _compare(self, condition: Condition, yes: int, no: int) -> int:
        match condition.operator:
            case "SCMP_CMP_MASKED_EQ":
                return self._equal(condition.index, condition.value, condition.value_two, yes, no)
            case "SCMP_CMP_EQ":
                return self._equal(condition.index, _LONG, condition.value, yes, no)
            case "SCMP_CMP_NE":
                return self._equal(condition.index, _LONG, condition.value, no, yes)
            case "SCMP_CMP_GT":
                return self._greater(_BPF_IF_GREATER, condition, yes, no)
            case "SCMP_CMP_LE":
                return self._greater(_BPF_IF_GREATER, condition, no, yes)
            case "SCMP_CMP_GE":
                return self._greater(_BPF_IF_GREATER_OR_EQUAL, condition, yes, no)
            case "SCMP_CMP_LT":
                return self._greater(_BPF_IF_GREATER_OR_EQUAL, condition, no, yes)
        raise ProfileError(f"Unknown operator {condition.operator!r}.")

    def _equal(self, index: int, mask: int, wanted: int, yes: int, no: int) -> int:
        position = self._half_equal(self._low(index), mask & _WORD, wanted & _WORD, yes, no)
        return self._half_equal(self._high(index), mask >> 32, wanted >> 32, position, no)

    def _half_equal(self, offset: int, mask: int, wanted: int, yes: int, no: int) -> int:
        if mask == 0:
            return yes
        position = self._branch(_BPF_IF_EQUAL, wanted, yes, no)
        if mask != _WORD:
            position = self._then(_BPF_AND, mask, position)
        return self._then(_BPF_LOAD_WORD, offset, position)

    def _greater(self, low_test: int, condition: Condition, yes: int, no: int) -> int:
        high, low = condition.value >> 32, condition.value & _WORD
        position = self._branch(low_test, low, yes, no)
        position = self._then(_BPF_LOAD_WORD, self._low(condition.index), position)
        position = self._branch(_BPF_IF_EQUAL, high, position, no)
        position = self._branch(_BPF_IF_GREATER, high, yes, position)
        return self._then(_BPF_LOAD_WORD, self._high(condition.index), position)

    def _low(self, index: int) -> int:
        return _DATA_ARGS + 8 * index + (0 if self._little_endian else 4)

    def _high(self, index: int) -> int:
        return _DATA_ARGS + 8 * index + (4 if self._little_endian else 0)

    # Single instructions. Each gives its position.

    def _return(self, action: int) -> int:
        key = (_BPF_RETURN, action, 0, 0)
        if key not in self._known:
            self._known[key] = self._append(_BPF_RETURN, 0, 0, action)
        return self._known[key]

    def _then(self, code: int, operand: int, position: int) -> int:
        """An instruction after which the program goes on at `position`."""
        key = (code, operand, position, position)
        if key not in self._known:
            if position != len(self._backwards) - 1:
                self._relay(position)
            self._known[key] = self._append(code, 0, 0, operand)
        return self._known[key]

    def _branch(self, code: int, operand: int, yes: int, no: int) -> int:
        if yes == no:
            return yes
        key = (code, operand, yes, no)
        if key not in self._known:
            yes, no = self._within_reach(yes), self._within_reach(no)
            end = len(self._backwards) - 1
            self._known[key] = self._append(code, end - yes, end - no, operand)
        return self._known[key]

    def _within_reach(self, position: int) -> int:
        """`position`, or an unconditional jump to it where a conditional one does not get that far."""
        for candidate in (position, self._relays.get(position, position)):
            # Less, not equal: a relay for the jump's other target may yet come between.
            if len(self._backwards) - 1 - candidate < _BPF_FARTHEST:
                return candidate
        return self._relay(position)

    def _relay(self, position: int) -> int:
        self._relays[position] = self._append(_BPF_JUMP, 0, 0, len(self._backwards) - 1 - position)
        return self._relays[position]

    def _append(self, code: int, if_true: int, if_false: int, operand: int) -> int:
        self._backwards.append((code, if_true, if_false, operand))
        return len(self._backwards) - 1


# --- installing ---------------------------------------------------------------------------------------


def install(program: bytes) -> None:
    """Put the calling process, all its threads, and what they start under `program`. There is no way back.

    Needs no_new_privs (or CAP_SYS_ADMIN), see seccomp(2).
    """
    script = SyscallScript()
    write_install(script, program)
    script.finish()
    script.run()


def write_install(script: SyscallScript, program: bytes) -> None:
    """`install`, as a step. Raises OSError for bytes that cannot be a program."""
    length, rest = divmod(len(program), 8)
    if rest or not 0 < length <= _BPF_MAXINSNS:
        raise OSError(errno.EINVAL, f"seccomp: {len(program)} bytes are no filter program")
    fprog = script.memory(struct.pack("=HHIQ", length, 0, 0, 0))  # struct sock_fprog
    script.point(fprog.at(8), script.memory(program))
    # A positive result is the number of a thread that has another filter, so that none was set.
    about = "seccomp(SECCOMP_SET_MODE_FILTER)"
    script.call("seccomp", _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, fprog, only=0, about=about)


@functools.cache
def compiled_filter(nesting: bool) -> bytes:
    """The system call filter, compiled once per process."""
    return compile_profile(load_profile(), nesting=nesting)


@functools.cache
def compiled_template_filter() -> bytes:
    """That of a template below another's level: it may also enter the namespaces that its supervisor makes for its forks."""
    return compile_profile(for_templates(load_profile()))


@functools.cache
def compiled_leaf_filter() -> bytes:
    """What a fork of such a template adds, to lose that again."""
    return compile_profile(against_templates(load_profile()))
