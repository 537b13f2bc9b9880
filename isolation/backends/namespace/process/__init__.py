"""Runs in the new process of a sandbox, from the clone until it is sealed; then nothing of it is trusted any more.

Nothing is imported between the two: what a step needs was imported by whoever was forked.
"""
