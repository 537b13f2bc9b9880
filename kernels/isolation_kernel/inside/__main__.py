"""`python -I -m isolation_kernel.inside [--standby]`: the kernel's process."""

import gc
import sys

if __name__ == "__main__":
    gc.disable()  # nothing of what is imported is garbage, and to look for some takes an eighth of the time; see start.py
    from isolation_kernel.inside.start import main

    main(sys.argv[1:])
