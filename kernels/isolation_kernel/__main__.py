"""`python -I -m isolation_kernel OPTION… -f CONNECTION_FILE`: what a kernelspec runs."""

from isolation_kernel.launcher import main

if __name__ == "__main__":
    raise SystemExit(main())
