"""Runs in a sandbox: pytest's own protocol for one unit of tests, and what a fork cannot carry."""
