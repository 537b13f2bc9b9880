"""Keeps all processors busy while a command runs: a test that fails then waits for time, and not for events.

python tests/load.py 8 make test      # with eight processes that do nothing but work
"""

from __future__ import annotations

import os
import subprocess
import sys


def main(count: str, *command: str) -> int:
    work = ["-c", f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10000))"]  # ends with this process, too
    busy = [subprocess.Popen([sys.executable, *work]) for _ in range(int(count))]
    try:
        return subprocess.call(command)
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdigit():
        sys.exit((__doc__ or "").partition("\n\n")[2])
    sys.exit(main(*sys.argv[1:]))
