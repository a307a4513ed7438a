"""`python -m cavmae`: the command from an unpacked tree that is not installed, and the module that
`torchrun -m` and `deepspeed --module` start."""

import sys

from cavmae.cli import main

if __name__ == "__main__":
    sys.exit(main())
