"""Runs in the user's pytest: `--isolation-report`, a record of the run and the page that shows it."""
