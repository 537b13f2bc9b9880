"""What stands for the harm that each attack could do."""

import os


def leave_mark(name):
    """A file that tells in which PID namespace the attack has worked."""
    os.makedirs("/tmp/isolation-untrusted", exist_ok=True)
    with open(f"/tmp/isolation-untrusted/{name}", "w") as file:
        file.write(os.readlink("/proc/self/ns/pid"))
