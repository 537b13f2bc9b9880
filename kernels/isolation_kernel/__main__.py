"""`python -I -m isolation_kernel OPTION… -f CONNECTION_FILE`: what a kernelspec runs."""

import gc

if __name__ == "__main__":
    gc.disable()  # an eighth of the time that imports take; session.py enables it
    from isolation_kernel.launcher import main

    raise SystemExit(main())
