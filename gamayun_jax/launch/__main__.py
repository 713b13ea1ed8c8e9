"""`python -m gamayun_jax.launch`: needs Python alone, so that any laptop can launch."""

import sys

from gamayun_jax.launch.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
