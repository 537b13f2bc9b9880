"""Kernels that are started before anybody asks for them.

    launcher, or provisioner ── asks ──> daemon.py      one per user, in the background; keeps some kernels ready
            │  (client.py)                  │ starts, and hands the asker's connection over to
            └── signals, exit code ───> standby.py     the host's part of one such kernel: from its start to its end

A kernel waits in its sandbox, with its sockets open and the scientific stack imported. What it has to be told is little: its
key, its environment, new random numbers. A sandbox shows its notebook's directory from the start, so kernels are kept by
kernelspec *and* directory; a first start in another directory is an ordinary one, and lets the daemon keep some for it, too.
A kernel that was handed out is never handed out again.
"""
