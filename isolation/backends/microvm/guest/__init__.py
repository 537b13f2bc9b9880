"""What runs inside of a virtual machine: the agent, which is root there, and the programs that it starts.

Standard library only, and what of this package it imports is packed into the initramfs with it (artifacts/initramfs.py).
Nothing here runs on the host, but for constants that both ends of the stream know.
"""
