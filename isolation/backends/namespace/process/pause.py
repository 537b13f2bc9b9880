"""PID 1 of a fork: sleeps, while the kernel reaps.

A fork's payload has the supervisor for its parent, so its PID 1 need not run Python; and copying a warm interpreter's page
tables for a process that only sleeps would double the cost of a fork (0.5 ms for a bare interpreter here, 2.3 ms with
numpy). So it shares the supervisor's memory (CLONE_VM), and runs the dozen instructions below on a stack of its own:

    rt_sigaction(SIGCHLD, SIG_IGN)    orphans inside are reaped by the kernel (wait(2), NOTES)
    poll(NULL, 0, -1)                 for ever: it ends by SIGKILL, from the supervisor or with the supervisor's PID
    namespace exit_group(0)

It holds the supervisor's credentials and descriptors, and is out of the guest's reach as the supervisor is: neither is
dumpable, and signals from inside do not reach a PID 1 without handlers.
"""

from __future__ import annotations

import ctypes
import errno
import signal
import struct

from isolation.linux import syscalls
from isolation.linux.machine_code import MachineCode
from isolation.linux.script_process import ChildStack

_CODE = {
    "x86_64": bytes.fromhex(
        "4889fe"  # mov rsi, rdi           the argument: struct kernel_sigaction
        "bf11000000"  # mov edi, 17        SIGCHLD
        "31d2"  # xor edx, edx
        "41ba08000000"  # mov r10d, 8
        "b80d000000"  # mov eax, 13        rt_sigaction
        "0f05"  # syscall
        "31ff"  # xor edi, edi
        "31f6"  # xor esi, esi
        "baffffffff"  # mov edx, -1
        "b807000000"  # mov eax, 7         poll
        "0f05"  # syscall
        "31ff"  # xor edi, edi
        "b8e7000000"  # mov eax, 231       exit_group
        "0f05"  # syscall
    ),
    "aarch64": struct.pack(
        "<15I",
        0xAA0003E1,  # mov x1, x0
        0xD2800220,  # mov x0, #17
        0xD2800002,  # mov x2, #0
        0xD2800103,  # mov x3, #8
        0xD28010C8,  # mov x8, #134        rt_sigaction
        0xD4000001,  # svc #0
        0xD2800000,  # mov x0, #0
        0xD2800001,  # mov x1, #0
        0xD2800003,  # mov x3, #0
        0xD2800004,  # mov x4, #0
        0xD2800928,  # mov x8, #73         ppoll
        0xD4000001,  # svc #0
        0xD2800000,  # mov x0, #0
        0xD2800BC8,  # mov x8, #94         exit_group
        0xD4000001,  # svc #0
    ),
}
_SIG_IGN = 1


class Sleeper:
    """Makes sleeping PID 1s for one supervisor. Their stack is shared: they never return, and all hold the same."""

    def __init__(self) -> None:
        self._code = MachineCode(_CODE[syscalls.MACHINE])
        self._flags = syscalls.CLONE_VM | signal.SIGCHLD
        self._argument = ctypes.create_string_buffer(struct.pack("=4Q", _SIG_IGN, 0, 0, 0))
        self.stack = ChildStack(self._code.address, ctypes.addressof(self._argument))

    def clone(self) -> tuple[int, int]:
        """A sleeping PID 1 for the namespace that the caller's next child is born into: (pid, pidfd). Raises OSError."""
        about = ctypes.addressof(self._argument)
        try:
            return syscalls.clone_function(self._code.address, self.stack.top, self._flags, about)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._flags & syscalls.CLONE_VM:
                raise
        # Older kernels (6.1, say) let nobody be born into a new time namespace who shares memory with who stays outside.
        self._flags &= ~syscalls.CLONE_VM
        return syscalls.clone_function(self._code.address, self.stack.top, self._flags, about)
