"""A Jupyter kernel whose cells cannot touch the machine: an ordinary ipykernel, in a sandbox.

Theory of operation. Who speaks to whom:

    frontend ── five TCP ports, or unix sockets ──┐
       │ starts                                   │
    launcher.py    one process per kernel, on the host. It listens before anything else, so that no client
       │           has to try again; makes the sandbox (kernel.py); forwards signals; ends with its parent
       │             relay.py     passes bytes from TCP to the kernel's unix sockets; no key, no parsing
       │             requests.py  answers what the kernel asks for (status, changes, export), holds the clock of cells
       │ five listening unix sockets, one wire
    inside/        in the sandbox: ipykernel, which takes those sockets instead of making some

The unix sockets are bound by the host, and the guest is given the listening descriptors. So there is no directory
that both can write, nothing to plant a symlink in, and nothing is left behind, however anything ends. No internet socket
is ever passed in: one made outside is a way out of the network namespace.

What is not trusted: everything that comes from inside. Relayed bytes are for the frontend, as they are with any kernel.
"""
