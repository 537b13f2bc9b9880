"""Runs in a launcher, on the host: a kernel in a virtual machine, with checkpoints that are whole machines.

    snapshot_cache.py    the template: a machine in which a kernel stands by, kept in the user's cache
    renewing.py          a new one, made while the old one serves
    notebook_archive.py  the notebook's directory, as an archive that is unpacked inside
    kernel.py            one machine, its kernel, and the one stream to both
    session.py           the loop: frontends' connections, the kernel's requests, signals; checkpoint and rollback

The other end of the stream is inside/bridge.py.
"""
