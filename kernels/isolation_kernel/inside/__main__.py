"""`python -I -m isolation_kernel.inside [--standby]`: the kernel's process."""

import sys

from isolation_kernel.inside.start import main

if __name__ == "__main__":
    main(sys.argv[1:])
