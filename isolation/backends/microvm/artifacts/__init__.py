"""Makes, on the host, what a virtual machine is started with: its kernel, its initramfs and the images of its disks.

All of it lies in a cache of the user's (cache.py), is made once, and looked at again before it is used.
"""
