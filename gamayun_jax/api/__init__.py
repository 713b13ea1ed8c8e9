"""What `import gamayun_jax as gx` offers: the functions of a notebook.

Each is a thin layer over the rooms; the commands call them too. Libraries are kept
quiet, and flags of the platform are set, before JAX looks for devices.
"""

import logging

from gamayun_jax.training import xla

xla.skip_absent_tpu()
xla.set_flags()
for name in ("absl", "orbax"):
    logging.getLogger(name).setLevel(logging.ERROR)
