"""Linux, as every backend that isolates by the kernel itself needs it: system calls, and what is built of nothing else.

No process is at home here: the host, supervisors and processes that become sandboxes all use these modules. They know
nothing of sandboxes, and import nothing of this project but `isolation.errors` and `isolation.plain`.
"""
