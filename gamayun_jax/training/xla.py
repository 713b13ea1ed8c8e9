"""The compiler's flags, per platform and each with its reason, and its cache.

TPU: none. The compiler's defaults run the gathers of weights beside the products that
do not need them, and they are what `gamayun plan` compiles with: the program that was
planned is the one that runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from gamayun_jax.storage import is_bucket

PCI = Path("/sys/bus/pci/devices")
GOOGLE, GOOGLE_NETWORK = "0x1ae0", "0x0042"  # PCI vendor; its device that is no TPU
CPUINFO = Path("/proc/cpuinfo")
CPU_FIELDS = {  # of x86 and of Arm
    *("vendor_id", "cpu family", "model", "flags"),
    *("CPU implementer", "CPU part", "CPU variant", "Features"),
}
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


def instructions(cpuinfo: Path = CPUINFO) -> str:
    """A name for the processor's kind and instructions; empty where it isn't known."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    told = {line for line in lines if line.partition(":")[0].strip() in CPU_FIELDS}
    named = "\n".join(sorted(told)).encode()
    return f"cpu-{hashlib.sha256(named).hexdigest()[:12]}" if told else ""


def keep_compilations(folder: Path) -> None:
    """Keep compiled programs, small ones too: a run that goes on on as many processes
    compiles none again.

    JAX_COMPILATION_CACHE_DIR names another folder. On CPUs each kind has a folder of
    its own in it: what is compiled for one's instructions may not run on the next.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"]:
        return
    if (backend := jax.default_backend()) == "cpu":
        kind = instructions()
        if not kind:
            return
        folder = folder / kind
        if jax.process_count() > 1:
            same_keys()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # XLA's own caches are for GPUs and no buckets; their path would be part of every
    # program's key, so that a folder that was moved would be compiled for anew.
    if backend != "gpu" or is_bucket(folder):
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def same_keys() -> None:
    """Give a program the same key on every process of a CPU run.

    JAX writes the first process's programs only. On CPUs alone, its keys contain which
    devices are the process's own, so that the others never find what the first one
    wrote. A program is loaded for the devices of the process that loads it.
    """
    from jax._src import cache_key  # there is no public way to it

    def hash_devices(hash_obj: Any, accelerators: Any) -> None:
        for d in accelerators.flat:
            word = f"{d.id} {d.process_index} {d.device_kind}\n"
            hash_obj.update(word.encode())

    former = getattr(cache_key, "_hash_accelerator_config", None)
    # Of another JAX with other arguments, or none: the others compile anew.
    if former and len(inspect.signature(former).parameters) == 2:
        cache_key._hash_accelerator_config = hash_devices
