"""fork(2) of a Python process that may have threads, as os.fork() does it: without any Python in between.

os.fork() itself warns of threads from Python 3.12 on. Its three functions and the C library's fork(3) can be called by
ctypes, but not one by one: in the new process Python would run a few bytecodes before PyOS_AfterFork_Child(), and where
another thread had just asked for the interpreter's lock, it would give way there, to a thread that was not forked, for ever.
"""

from __future__ import annotations

import ctypes
import struct

from isolation.linux import syscalls
from isolation.linux.machine_code import MachineCode
from isolation.plain import os

# bracket(before, fork, child, parent): before(), then fork(), then child() or parent(); returns what fork() did.
_CODE = {
    "x86_64": bytes.fromhex(
        "53 4154 4155 4883ec10"  # push rbx; push r12; push r13; sub rsp, 16
        "4889f3 4989d4 4989cd"  # mov rbx, rsi; mov r12, rdx; mov r13, rcx
        "ffd7 ffd3 89c3"  # call rdi; call rbx; mov ebx, eax
        "85c0 7505"  # test eax, eax; jnz parent
        "41ffd4 eb03"  # call r12; jmp out
        "41ffd5"  # parent: call r13
        "89d8 4883c410 415d 415c 5b c3"  # out: mov eax, ebx; add rsp, 16; pop r13; pop r12; pop rbx; ret
    ),
    "aarch64": struct.pack(
        "<19I",
        0xA9BD7BFD, 0x910003FD,  # stp x29, x30, [sp, #-48]!; mov x29, sp
        0xA90153F3, 0xF90013F5,  # stp x19, x20, [sp, #16]; str x21, [sp, #32]
        0xAA0103F3, 0xAA0203F4, 0xAA0303F5,  # mov x19, x1; mov x20, x2; mov x21, x3
        0xD63F0000, 0xD63F0260, 0x2A0003F3,  # blr x0; blr x19; mov w19, w0
        0x35000060,  # cbnz w0, parent
        0xD63F0280, 0x14000002,  # blr x20; b out
        0xD63F02A0,  # parent: blr x21
        0x2A1303E0, 0xF94013F5,  # out: mov w0, w19; ldr x21, [sp, #32]
        0xA94153F3, 0xA8C37BFD, 0xD65F03C0,  # ldp x19, x20, [sp, #16]; ldp x29, x30, [sp], #48; ret
    ),
}  # fmt: skip

_code: MachineCode | None = None


def fork() -> int:
    """0 in the new process, whose hooks (os.register_at_fork) have run; else its pid. Raises OSError."""
    global _code
    if _code is None:
        _code = MachineCode(_CODE[syscalls.MACHINE])
    # PYFUNCTYPE keeps the interpreter's lock, as PyOS_BeforeFork() and its like expect.
    bracket = ctypes.PYFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(_code.address)
    python, libc = ctypes.pythonapi, ctypes.PyDLL(None)
    functions = (python.PyOS_BeforeFork, libc.fork, python.PyOS_AfterFork_Child, python.PyOS_AfterFork_Parent)
    pid = int(bracket(*[ctypes.cast(function, ctypes.c_void_p) for function in functions]))
    if pid < 0:
        libc.__errno_location.restype = ctypes.POINTER(ctypes.c_int)
        number = libc.__errno_location().contents.value
        raise OSError(number, f"fork: {os.strerror(number)}")
    return pid
