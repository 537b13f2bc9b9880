"""`%isolation checkpoint` and `rollback`.

In a virtual machine the host does it all: it saves the machine in the middle of a cell, and what goes back there has only to
see which request it answers then (request.py). In a container it is done by forking the kernel at a cell boundary:

    kernel ──fork──> holder     a copy that waits, with nothing of the kernel's but its listening sockets   (holder.py)
                       │ fork, when it is woken
                       └──────> kernel   another ipykernel around the same shell and the same variables       (rebuild.py)

A fork has one thread, no child process, and shares what is open with the process that it is a fork of. So a checkpoint is
refused while there is anything of the user's that a fork would lose or share (refusals.py); what is shared and can be set
back, is (state.py); and the kernel's own threads, sockets and event loops, a dozen (own.py), are made anew. Files go back by
what the host does to the sandbox's layers meanwhile (isolation.Sandbox.keep_files).
"""
