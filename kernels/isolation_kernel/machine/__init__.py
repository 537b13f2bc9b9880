"""A kernel in a virtual machine: started from a saved warm one, with checkpoints that are whole machines.

    saved.py     the template: a machine in which a kernel stands by, kept in the user's cache
    renewing.py  a new one, made while the old one serves
    files.py     the notebook's directory, as an archive that is unpacked inside
    box.py       one machine, its kernel, and the one stream to both
    hosting.py   the loop: frontends' connections, the kernel's requests, signals; checkpoint and rollback

The other end of the stream is inside/bridge.py.
"""
