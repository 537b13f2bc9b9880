"""Runs one virtual machine, on the host: QEMU in a sandbox of its own, the link to the agent inside, saved states."""
