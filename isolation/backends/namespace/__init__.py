"""The namespace backend: a Linux container made by one process, in pure Python over ctypes.

Theory of operation. Four kinds of process, and who waits for whom:

    host      the program that asked (pytest, the command line, a library's user)
     └ supervisor    a fork of the host, single-threaded, in the host's namespaces (supervisor.py). It clones
       │         sandboxes when asked over its wire, makes and removes their cgroups, and ends them all
       │         when the host goes away, however it goes.
       └ init       PID 1 of one sandbox (init.py): born by one clone(2) into every namespace, it executes
         │          the plan (plan.py, mounts.py), locks itself down (privileges.py), and from then on
         │          only reaps, starts and signals the guest's processes, as the host tells it over its own wire.
         └ payload     what was asked for: a command, or a Python function called in the forked memory.

A template's supervisor holds warm memory, and so every init it clones is a fork of that. Everything that can be
decided is decided before the fork, on the host (plan.py): a clone only executes.
"""
