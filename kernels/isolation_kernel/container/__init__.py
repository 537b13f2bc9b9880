"""Runs in a launcher, on the host: a kernel in a container. Its sockets are the launcher's own, and handed to it."""
