"""Runs in a supervisor, a trusted fork of the user's process: it clones, watches and ends sandboxes for one host."""
