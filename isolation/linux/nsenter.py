"""From a template into the namespaces of its fork: a copy of this process, made by one that shares its memory.

Who enters a PID namespace is not in it, but its children are. So the way in takes two processes, and were both copies of a
warm interpreter, the second would cost as much as the first. The first shares the template's memory instead, which waits
meanwhile (CLONE_VFORK); enters, by a script of system calls on a stack of its own; and forks. That fork is a copy of the
template as it waits, and returns, on a copy of the template's own stack, from the call that the template is in.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from isolation.linux import fork as forking
from isolation.linux import syscalls
from isolation.linux.machine_code import MachineCode
from isolation.linux.namespaces import ENTERED
from isolation.linux.syscall_script import SyscallScript
from isolation.plain import os

# enter(about): in the template the pid of the first process, in the fork 0. about: the function that walks a script and its
# two arguments; the top of a stack; what walking returned; the template's stack pointer; what the fork returned.
_CODE = {
    "x86_64": bytes.fromhex(
        "53 55 4154 4155 4156 4157"  # push rbx; rbp; r12; r13; r14; r15
        "4989fc 4989642428"  # mov r12, rdi; mov [r12+40], rsp
        "b838000000 bf11410000 498b742418"  # clone(CLONE_VM | CLONE_VFORK | SIGCHLD, [r12+24], 0, 0, 0)
        "31d2 4531d2 4531c0 0f05"
        "4885c0 7548"  # test rax, rax; jnz out
        "498b7c2408 498b742410 41ff1424"  # mov rdi, [r12+8]; mov rsi, [r12+16]; call [r12]
        "4989442420 4885c0 7520"  # mov [r12+32], rax; test rax, rax; jnz fail
        "b838000000 bf11000000 31f6 31d2 4531d2 4531c0 0f05"  # clone(SIGCHLD, 0, 0, 0, 0)
        "4885c0 740e"  # test rax, rax; jz forked
        "4989442430"  # mov [r12+48], rax
        "31ff b83c000000 0f05"  # fail: exit(0)
        "498b642428 31c0"  # forked: mov rsp, [r12+40]; xor eax, eax
        "415f 415e 415d 415c 5d 5b c3"  # out: pop r15; r14; r13; r12; rbp; rbx; ret
    ),
    "aarch64": struct.pack(
        "<45I",
        0xA9BA7BFD, 0xA90153F3, 0xA9025BF5, 0xA90363F7, 0xA9046BF9, 0xA90573FB,  # stp x29, x30, [sp, #-96]!; stp x19…x28
        0xAA0003F3, 0x910003E9, 0xF9001669,  # mov x19, x0; mov x9, sp; str x9, [x19, #40]
        0xD2801B88, 0xD2882220, 0xF9400E61, 0xD2800002, 0xD2800003, 0xD2800004, 0xD4000001,  # clone(0x4111, [x19, #24], …)
        0xB50002C0,  # cbnz x0, out
        0xF9400660, 0xF9400A61, 0xF9400270, 0xD63F0200,  # ldr x0, [x19, #8]; ldr x1, [x19, #16]; ldr x16, [x19]; blr x16
        0xF9001260, 0xB5000140,  # str x0, [x19, #32]; cbnz x0, fail
        0xD2801B88, 0xD2800220, 0xD2800001, 0xD2800002, 0xD2800003, 0xD2800004, 0xD4000001,  # clone(SIGCHLD, 0, 0, 0, 0)
        0xB40000A0, 0xF9001A60,  # cbz x0, forked; str x0, [x19, #48]
        0xD2800000, 0xD2800BA8, 0xD4000001,  # fail: exit(0)
        0xF9401669, 0x9100013F, 0xD2800000,  # forked: ldr x9, [x19, #40]; mov sp, x9; mov x0, #0
        0xA94153F3, 0xA9425BF5, 0xA94363F7, 0xA9446BF9, 0xA94573FB, 0xA8C67BFD, 0xD65F03C0,  # out: ldp …; ret
    ),
}  # fmt: skip
_WALKED, _FORKED = 4, 6
_STACK = 4096


class NsEnter:
    """Into namespaces of the kinds `names`; made once, used for each fork."""

    def __init__(self, names: Sequence[str]) -> None:
        self._script = script = SyscallScript()
        flags = dict(ENTERED)
        self._slots = [script.slot() for _ in names]
        for name, slot in zip(names, self._slots, strict=True):
            script.call("setns", slot.value(), flags[name], about=f"the fork's {name} namespace")
        script.finish()
        self._stack = ctypes.create_string_buffer(_STACK)
        top = (ctypes.addressof(self._stack) + _STACK) & ~0xF
        walk, first, last = script.walk()
        self._about = (ctypes.c_uint64 * 7)(walk, first, last, top, 0, 0, 0)
        self._code = MachineCode(_CODE[syscalls.MACHINE])
        # PYFUNCTYPE keeps the interpreter's lock, as the brackets around a fork expect.
        self._enter = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(self._code.address)

    def fork(self, namespaces: Sequence[int]) -> bool:
        """True in the fork, False in the template. Raises OSError in the template, or (where that has threads) in a process
        that is to end then."""
        for slot, fd in zip(self._slots, namespaces, strict=True):
            self._script.set(slot, fd)
        if len(os.listdir("/proc/self/task")) > 1:
            return self._fork_slowly()
        self._about[_WALKED] = self._about[_FORKED] = 0
        syscalls.fork_before()
        pid = self._enter(ctypes.addressof(self._about))
        if pid == 0:
            syscalls.fork_after_child()
            return True
        syscalls.fork_after_parent()
        if pid < 0:
            raise OSError(-pid, f"clone: {os.strerror(-pid)}")
        os.waitpid(pid, 0)
        self._script.check(self._about[_WALKED])
        forked = ctypes.c_int64(self._about[_FORKED]).value
        if forked < 0:
            raise OSError(-forked, f"clone in the fork's namespaces: {os.strerror(-forked)}")
        return False

    def _fork_slowly(self) -> bool:
        """Other threads' locks (malloc's, the interpreter's) are in any state, which fork(3) sees to."""
        pid = forking.fork()
        if pid:
            os.waitpid(pid, 0)
            return False
        self._script.run()
        if syscalls.clone(0)[0]:
            os._exit(0)
        return True
