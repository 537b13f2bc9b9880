"""System calls in a row, written down once and made in every fork, without Python.

Most of what a fork does to become a sandbox is the same each time: some 150 system calls. Made from Python they cost a
millisecond of bytecode, and touch, and so copy, pages of the warm interpreter at some 2 µs each, which is more than most
of the calls take. So the supervisor writes them down beforehand, in a few pages of their own: an array of steps, which some
forty instructions of machine code walk through. A step is

    number, flags            which call, and how to read the rest
    six arguments            each a value, or (flag) the address of one: a slot, or the result of an earlier step
    result                   what the call returned, or minus its errno
    two accepted results     which are no failure, though they are negative; or (flag) the only ones that are none

and the first that fails ends the walk.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Sequence
from typing import NamedTuple

from isolation.linux import machine_code, syscalls
from isolation.linux.syscall_table import NUMBERS
from isolation.plain import os

_STEP = struct.Struct("=II6Qqqq")
_RESULT = 56  # offset in a step
_SIXTH = 48
_ONLY = 64  # flag: nothing but the accepted results will do
_ANY = 128  # flag: no result is a failure
_SPAWN = 256  # flag: a process that this call makes goes on elsewhere, see `SyscallScript.spawn`
_NO_RESULT = 1 << 62  # accepted where nothing is: no call returns it

# run(first step, end of steps): 0, or the address of the step that failed.
_CODE = {
    "x86_64": bytes.fromhex(
        "53 55 4154"  # push rbx; push rbp; push r12
        "4889fb 4889f5"  # mov rbx, rdi; mov rbp, rsi
        "4839eb 0f839a000000"  # next: cmp rbx, rbp; jae done
        "448b6304"  # mov r12d, [rbx+4]
        "488b7b08 41f6c401 7403 488b3f"  # mov rdi, [rbx+8]; test r12b, 1; jz .+3; mov rdi, [rdi]
        "488b7310 41f6c402 7403 488b36"  # the same for rsi
        "488b5318 41f6c404 7403 488b12"  # rdx
        "4c8b5320 41f6c408 7403 4d8b12"  # r10
        "4c8b4328 41f6c410 7403 4d8b00"  # r8
        "4c8b4b30 41f6c420 7403 4d8b09"  # r9
        "8b03 0f05"  # mov eax, [rbx]; syscall
        "41f7c400010000 7409 4885c0 7504"  # test r12d, 256; jz .+9; test rax, rax; jnz .+4
        "5f 58 ffe0"  # in a new process, on its own stack: pop rdi; pop rax; jmp rax
        "48894338"  # mov [rbx+56], rax
        "41f6c440 750e"  # test r12b, 64; jnz only
        "483d01f0ffff 7217"  # cmp rax, -4095; jb good
        "41f6c480 7511"  # test r12b, 128; jnz good
        "483b4340 740b 483b4348 7405"  # only: cmp rax, [rbx+64]; je good; cmp rax, [rbx+72]; je good
        "4889d8 eb0b"  # mov rax, rbx; jmp out
        "4883c350 e95dffffff"  # good: add rbx, 80; jmp next
        "31c0"  # done: xor eax, eax
        "415c 5d 5b c3"  # out: pop r12; pop rbp; pop rbx; ret
    ),
    "aarch64": struct.pack(
        "<42I",
        0xAA0003E9, 0xAA0103EA,  # mov x9, x0; mov x10, x1
        0xEB0A013F, 0x540004A2,  # next: cmp x9, x10; b.hs done
        0xB940052B,  # ldr w11, [x9, #4]
        0xA9408520, 0xA9418D22, 0xA9429524,  # ldp x0, x1, [x9, #8]; ldp x2, x3, [x9, #24]; ldp x4, x5, [x9, #40]
        0x3600004B, 0xF9400000,  # tbz w11, #0, .+8; ldr x0, [x0]
        0x3608004B, 0xF9400021,  # the same for x1
        0x3610004B, 0xF9400042,  # x2
        0x3618004B, 0xF9400063,  # x3
        0x3620004B, 0xF9400084,  # x4
        0x3628004B, 0xF94000A5,  # x5
        0xB9400128, 0xD4000001,  # ldr w8, [x9]; svc #0
        0x3640008B, 0xB5000060,  # tbz w11, #8, .+16; cbnz x0, .+12
        0xA8C143E0, 0xD61F0200,  # in a new process, on its own stack: ldp x0, x16, [sp], #16; br x16
        0xF9001D20,  # str x0, [x9, #56]
        0x3730008B,  # tbnz w11, #6, only
        0xB13FFC1F, 0x54000123,  # cmn x0, #4095; b.lo good
        0x3738010B,  # tbnz w11, #7, good
        0xA944352C,  # only: ldp x12, x13, [x9, #64]
        0xEB0C001F, 0x540000A0,  # cmp x0, x12; b.eq good
        0xEB0D001F, 0x54000060,  # cmp x0, x13; b.eq good
        0xAA0903E0, 0xD65F03C0,  # mov x0, x9; ret
        0x91014129, 0x17FFFFDB,  # good: add x9, x9, #80; b next
        0xD2800000, 0xD65F03C0,  # done: mov x0, #0; ret
    ),
}  # fmt: skip


class Memory(NamedTuple):
    """A place in the script's own memory; as an argument, its address."""

    offset: int

    def at(self, more: int) -> Memory:
        """A place `more` bytes further."""
        return Memory(self.offset + more)

    def value(self) -> Value:
        """What will stand there when the call is made."""
        return Value(self)


class Value(NamedTuple):
    """As an argument: the 64 bits at a place, at the time of the call."""

    place: Memory


class Result(NamedTuple):
    """As an argument: what an earlier step returned."""

    step: int


class SixthArgument(NamedTuple):
    """As an argument: the address of an earlier step's sixth, behind which its result lies. A call that takes five makes
    nothing of it, and so the two can be a structure that holds a descriptor."""

    step: int


Argument = int | str | bytes | Memory | Value | Result | SixthArgument


class Step(NamedTuple):
    """One call, as it was written down."""

    name: str
    arguments: tuple[Argument, ...]
    accept: tuple[int, ...]
    only: bool
    about: str
    spawns: bool = False


class SyscallScript:
    """Write with `call`, then `finish`, then `run` as often as wanted, in this process or its forks."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._data = bytearray()
        self._texts: dict[bytes, Memory] = {}
        self._pointers: list[tuple[Memory, Memory]] = []

    def call(
        self,
        name: str,
        *arguments: Argument,
        accept: Sequence[int] = (),
        accept_any: bool = False,
        only: int | None = None,
        about: str = "",
    ) -> Result:
        """Make the system call `name`. Text is passed as the address of a string that ends with a zero byte.

        accept      two errnos at most that are no failure; accept_any: none is
        only        what it must return, and all else is a failure
        about       for the error message, instead of the call's name
        """
        if accept_any:
            accept = (-1,)
        kept = (only,) if only is not None else tuple(accept)
        self.steps.append(Step(name, arguments, kept, only is not None, about))
        return Result(len(self.steps) - 1)

    def spawn(self, flags: int, stack: int, pidfd: Argument, *, about: str = "") -> Result:
        """Make the system call clone(2). The new process starts on `stack`, the address of two words: an argument, and the
        function that it is for (apart.ScriptProcess has such). It needs CLONE_VM, or what it does is not seen here."""
        self.steps.append(Step("clone", (flags, stack, pidfd, 0, 0), (), False, about, spawns=True))
        return Result(len(self.steps) - 1)

    def memory(self, content: bytes) -> Memory:
        """Some bytes that calls may read and write."""
        self._data += bytes(-len(self._data) % 8)
        place = Memory(len(self._data))
        self._data += content
        return place

    def slot(self) -> Memory:
        """Eight bytes for a number that is different each time: set with `set`, used as `slot.value()`."""
        return self.memory(bytes(8))

    def point(self, place: Memory, to: Memory) -> None:
        """Let `place` hold the address of `to`."""
        self._pointers.append((place, to))

    def mark(self) -> int:
        """The number of the next step, for `run`."""
        return len(self.steps)

    def finish(self) -> None:
        """Lay it all out in memory. No steps can be added then."""
        for step in self.steps:
            for argument in step.arguments:
                if isinstance(argument, (str, bytes)):
                    self._text(os.fsencode(argument))
        size = len(self.steps) * _STEP.size + len(self._data)
        self._pages = machine_code.private_pages(max(1, size))
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        data = len(self.steps) * _STEP.size
        self._data_start = self._start + data
        self._pages[data : data + len(self._data)] = bytes(self._data)
        for place, to in self._pointers:
            self.set(place, self._resolve(to))
        for index, step in enumerate(self.steps):
            self._pages[index * _STEP.size : (index + 1) * _STEP.size] = self._encode(step)
        self._code = machine_code.MachineCode(_CODE[syscalls.MACHINE])
        # PYFUNCTYPE does not let go of the interpreter's lock, whose state is unknown until PyOS_AfterFork_Child().
        self._walk = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(self._code.address)

    def set(self, slot: Memory, value: int) -> None:
        """Give a slot its value."""
        ctypes.c_uint64.from_address(self._data_start + slot.offset).value = value

    def read(self, slot: Memory) -> int:
        """A slot's lower half, signed: an int that a call has written."""
        return ctypes.c_int32.from_address(self._data_start + slot.offset).value

    def result(self, step: Result) -> int:
        """What a step has returned."""
        return ctypes.c_int64.from_address(self._step_address(step.step) + _RESULT).value

    def run(self, first: int = 0, end: int | None = None) -> None:
        """Make the calls from mark `first` to mark `end`. Raises OSError for the first that fails."""
        last = len(self.steps) if end is None else end
        self.check(self._walk(self._step_address(first), self._step_address(last)))

    def walk(self, first: int = 0, end: int | None = None) -> tuple[int, int, int]:
        """For machine code that runs a part: the addresses of the function that walks, and of its two arguments."""
        last = len(self.steps) if end is None else end
        return self._code.address, self._step_address(first), self._step_address(last)

    def check(self, failed: int | None) -> None:
        """What a walk has returned: the address of the step that failed. Raises OSError."""
        if failed:
            number = (failed - self._start) // _STEP.size
            step, result = self.steps[number], self.result(Result(number))
            code = -result if result < 0 else errno.EPROTO
            raise OSError(code, f"{step.about or step.name}: {os.strerror(code)}")

    def _step_address(self, number: int) -> int:
        return self._start + number * _STEP.size

    def _text(self, text: bytes) -> Memory:
        if text not in self._texts:
            self._texts[text] = self.memory(text + b"\0")
        return self._texts[text]

    def _encode(self, step: Step) -> bytes:
        flags = _ONLY if step.only else _ANY if step.accept == (-1,) else _SPAWN if step.spawns else 0
        values = []
        for position, argument in enumerate(step.arguments):
            if isinstance(argument, (Value, Result)):
                flags |= 1 << position
            values.append(self._resolve(argument))
        values += [0] * (6 - len(values))
        accepted = [number if step.only else -number for number in step.accept]
        accepted += [_NO_RESULT] * (2 - len(accepted))
        return _STEP.pack(NUMBERS[syscalls.MACHINE][step.name], flags, *values, 0, *accepted)

    def _resolve(self, argument: Argument) -> int:
        match argument:
            case int():
                return argument & 0xFFFFFFFFFFFFFFFF
            case str() | bytes():
                return self._data_start + self._text(os.fsencode(argument)).offset
            case Memory():
                return self._data_start + argument.offset
            case Value():
                return self._data_start + argument.place.offset
            case Result():
                return self._step_address(argument.step) + _RESULT
            case SixthArgument():
                return self._step_address(argument.step) + _SIXTH
