"""The compiler's flags, per platform and each with its reason, and its cache.

TPU: none. The compiler's defaults run the gathers of weights beside the products that
do not need them, and they are what `gamayun plan` compiles with: the program that was
planned is the one that runs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from gamayun_jax.storage import is_bucket

PCI = Path("/sys/bus/pci/devices")
GOOGLE, GOOGLE_NETWORK = "0x1ae0", "0x0042"  # PCI vendor; its device that is no TPU
GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))

GPU_FLAGS = {
    "--xla_gpu_enable_latency_hiding_scheduler=true": "start collectives as early, and "
    "wait for them as late, as the program allows",
    "--xla_gpu_enable_pipelined_all_gather=true": "gather the next layer's weights "
    "during this layer's products: the loop over layers would wait for each",
    "--xla_gpu_enable_pipelined_reduce_scatter=true": "likewise for the gradients of "
    "the layer before",
}

GPU_MEMORY = "0.93"  # share of a GPU's memory that JAX may take


def set_flags(
    environment: MutableMapping[str, str] = os.environ,
    driver: Path = Path("/dev/nvidiactl"),
) -> None:
    """Set the flags of the platform at hand, before JAX looks for devices.

    What the user has put into XLA_FLAGS stands behind ours, so that it decides; so does
    a share of the GPU's memory that is given already, of which JAX takes 75 %.
    """
    if driver.exists():
        former = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = " ".join([*GPU_FLAGS, former]).strip()
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY)


def only_cpus(
    environment: Mapping[str, str] = os.environ,
    pci: Path = PCI,
    drivers: Sequence[Path] = GPU_DRIVERS,
) -> bool:
    """Whether JAX will compute on CPUs: it is told to, or nothing else is at hand."""
    if "JAX_PLATFORMS" in environment:
        return environment["JAX_PLATFORMS"] == "cpu"

    def read(path: Path) -> str:
        return path.read_text().strip() if path.exists() else ""

    tpu = any(
        read(device / "vendor") == GOOGLE and read(device / "device") != GOOGLE_NETWORK
        for device in pci.glob("*")
    )
    return not (tpu or any(driver.exists() for driver in drivers))


def skip_absent_tpu(
    environment: MutableMapping[str, str] = os.environ,
    pci: Path = PCI,
    drivers: Sequence[Path] = GPU_DRIVERS,
) -> None:
    """Have JAX take the CPU where libtpu is installed, for `gamayun plan`, and nothing
    but CPUs is at hand: looking for TPUs, libtpu would print lines of errors.

    Must come before JAX is imported. What the user has put into JAX_PLATFORMS stays.
    """
    if importlib.util.find_spec("libtpu") and only_cpus(environment, pci, drivers):
        environment["JAX_PLATFORMS"] = "cpu"


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
        if is_bucket(folder):  # which XLA's own caches cannot write
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
