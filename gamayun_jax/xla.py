"""The compiler's flags, per platform and each with its reason, and its cache.

TPU: none. The compiler's defaults run the gathers of weights beside the products that
do not need them, and they are what `gamayun plan` compiles with: the program that was
planned is the one that runs.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

GPU_FLAGS = {
    "--xla_gpu_enable_latency_hiding_scheduler=true": "start collectives as early, and "
    "wait for them as late, as the program allows",
    "--xla_gpu_enable_pipelined_all_gather=true": "gather the next layer's weights "
    "during this layer's products: the loop over layers would wait for each",
    "--xla_gpu_enable_pipelined_reduce_scatter=true": "likewise for the gradients of "
    "the layer before",
}


def set_flags(
    environment: MutableMapping[str, str] = os.environ,
    driver: Path = Path("/dev/nvidiactl"),
) -> None:
    """Set the flags of the platform at hand, before JAX looks for devices.

    What the user has put into XLA_FLAGS stands behind ours, so that it decides.
    """
    if driver.exists():
        former = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = " ".join([*GPU_FLAGS, former]).strip()


def keep_compilations(folder: Path) -> None:
    """Keep compiled programs on disk: a run that goes on does not compile again.

    JAX_COMPILATION_CACHE_DIR names another folder. Not on CPUs, where a program
    compiled for one machine's instructions may not run on the next.
    """
    import jax

    if (
        jax.default_backend() != "cpu"
        and not jax.config.values["jax_compilation_cache_dir"]
    ):
        jax.config.update("jax_compilation_cache_dir", str(folder))
