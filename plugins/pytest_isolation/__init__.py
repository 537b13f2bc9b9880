"""`pytest --isolation`: every test in its own fresh, sealed sandbox."""
