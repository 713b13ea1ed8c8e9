"""`python -m gamayun_jax` is the `gamayun` command."""

import sys

from gamayun_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
