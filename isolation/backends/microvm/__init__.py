"""The microVM backend: a sandbox is a QEMU machine, a fork is its snapshot, mapped copy-on-write."""
