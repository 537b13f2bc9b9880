"""`python -I -S …/supervisor.py PIPE PID`: what the first kernel's process becomes, see holder.py.

It ends as the kernel does, whose pid is the last that it has read from the pipe; before the first, PID. Signals are for the
kernels, which are in the same process group.
"""

import os
import signal
import sys

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(pipe: int, kernel: int) -> None:
    """Does not return."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.set_blocking(pipe, False)
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            os._exit(1)
        try:
            while len(data := os.read(pipe, 8)) == 8:
                kernel = int.from_bytes(data, "little")
        except BlockingIOError:
            pass
        if pid == kernel:
            _end_like(status)


def _end_like(status: int) -> None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 255)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
