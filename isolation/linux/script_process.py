"""A part of a script that runs apart: in a process that shares this one's memory, on a stack of its own.

Such a process can enter namespaces, which cannot be left again, and costs no copy of a warm interpreter's page tables. It
runs machine code only; Python's own state is not its to touch.
"""

from __future__ import annotations

import ctypes
import struct

from isolation.linux import syscalls
from isolation.linux.machine_code import MachineCode
from isolation.linux.syscall_script import SyscallScript

# go(about): about[3] = about[2](about[0], about[1]); exit_group(about[3] != 0)
_CODE = {
    "x86_64": bytes.fromhex(
        "57 488b7708 488b4710 488b3f"  # push rdi; mov rsi, [rdi+8]; mov rax, [rdi+16]; mov rdi, [rdi]
        "ffd0 5f 48894718"  # call rax; pop rdi; mov [rdi+24], rax
        "31ff 4885c0 400f95c7"  # xor edi, edi; test rax, rax; setne dil
        "b8e7000000 0f05"  # mov eax, 231; syscall
    ),
    "aarch64": struct.pack(
        "<9I",
        0xAA0003F3, 0xA9400660, 0xF9400A70,  # mov x19, x0; ldp x0, x1, [x19]; ldr x16, [x19, #16]
        0xD63F0200, 0xF9000E60,  # blr x16; str x0, [x19, #24]
        0xF100001F, 0x1A9F07E0,  # cmp x0, #0; cset w0, ne
        0xD2800BC8, 0xD4000001,  # mov x8, #94; svc #0
    ),
}  # fmt: skip
_STACK = 4096
_WORD = 8


class ScriptProcess:
    """A part of a finished script, ready to run; again as often as wanted, but one at a time.

    function, argument  for clone(3), whose new process is on `stack`
    """

    def __init__(self, script: SyscallScript, first: int = 0, end: int | None = None) -> None:
        self._script = script
        self._code = MachineCode(_CODE[syscalls.MACHINE])
        walk, start, last = script.walk(first, end)
        self._about = (ctypes.c_uint64 * 4)(start, last, walk, 0)
        self._stack = ChildStack(self._code.address, ctypes.addressof(self._about))
        self.function, self.argument, self.stack = self._code.address, ctypes.addressof(self._about), self._stack.top

    def begin(self) -> int:
        """Before each run. Returns the stack for `SyscallScript.spawn`."""
        self._about[3] = 0
        return self._stack.begin()

    def check(self) -> None:
        """After it: raises OSError for the step that failed."""
        self._script.check(self._about[3])


class ChildStack:
    """A stack for a process that shares this one's memory; on top of it, what `SyscallScript.spawn` expects there."""

    def __init__(self, function: int, argument: int) -> None:
        self._memory = ctypes.create_string_buffer(_STACK)
        self.top = (ctypes.addressof(self._memory) + _STACK - 64) & ~0xF
        self._words = (argument, function)

    def begin(self) -> int:
        """Write the two words again, which the last process has overwritten; returns where they stand."""
        for index, word in enumerate(self._words):
            ctypes.c_uint64.from_address(self.top + index * _WORD).value = word
        return self.top
