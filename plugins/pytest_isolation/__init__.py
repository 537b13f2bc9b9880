"""`pytest --isolation`: every test in its own fresh, sealed sandbox.

PYTEST_DONT_REWRITE: see the package `isolation`.
"""
