"""Runs in the pytest that the user has started: hands tests to sandboxes, and tells pytest what came back."""
