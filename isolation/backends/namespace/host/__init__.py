"""Runs in the user's process: handles of sandboxes and templates, and the supervisors that are kept for the next ones."""
