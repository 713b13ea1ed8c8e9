"""Slices that are only described: their names, and the devices to compile for."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

from gamayun_jax.config import UserError
from gamayun_jax.training.chips import CHIPS

# Chip -> number of dimensions of its slices, and an example.
TOPOLOGIES = {
    "v4": (3, "v4:4x4x8"),
    "v5e": (2, "v5e:16x16"),
    "v5p": (3, "v5p:4x4x8"),
    "v6e": (2, "v6e:16x16"),
    "tpu7x": (3, "tpu7x:4x4x8"),
}
# GPUs, of which a host's are one slice: h100:8. Nothing is compiled for them.
GPUS = tuple(name for name in CHIPS if name not in TOPOLOGIES)
# libtpu asks the cloud's metadata server for the machine it runs on, locks a file, and
# logs.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def chip_name(topology: str) -> str:
    """The chip of a topology's name; UserError where the name is none."""
    known = ", ".join(example for _, example in TOPOLOGIES.values())
    m = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if m and m[1] in GPUS and m[2].isdigit() and int(m[2]):
        return m[1]
    if not m or m[1] not in TOPOLOGIES:
        raise UserError(
            f"--topology {topology!r} is unknown: write CHIP:AxB or CHIP:AxBxC; the "
            f"chips are {', '.join(TOPOLOGIES)}, for example {known}; GPUs of a host "
            f"are {', '.join(f'{name}:8' for name in GPUS)}"
        )
    sizes, example = TOPOLOGIES[m[1]]
    if m[2].count("x") + 1 != sizes or 0 in map(int, m[2].split("x")):
        raise UserError(
            f"--topology {topology!r}: slices of {m[1]} have {sizes} sizes of at "
            f"least 1, for example {example}"
        )
    return m[1]


def dimensions(chip: str) -> int:
    """Of the torus that a slice is; 1: a switch joins all GPUs of a host."""
    return TOPOLOGIES[chip][0] if chip in TOPOLOGIES else 1


@functools.cache
def topology_devices(topology: str, slices: int = 1) -> tuple[Any, ...]:
    """The devices of slices that are only described; None for each GPU.

    Raises:
      UserError: unknown topology, or no libtpu.
    """
    chip = chip_name(topology)
    if chip in GPUS:
        return (None,) * (int(topology.partition(":")[2]) * slices)
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    try:
        import libtpu  # noqa: F401
    except ImportError as e:
        raise UserError(
            "plan needs the TPU compiler, for Linux: in a checkout of the project, "
            "pip install -e '.[tpu]'"
        ) from e
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip == "v4":  # two cores a chip work as one device
        options["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except Exception as e:  # whatever libtpu raises for shapes that are not built
        raise UserError(
            f"--topology {topology!r} is not one that the TPU compiler knows "
            f"({str(e).splitlines()[0][:160]}): for example {TOPOLOGIES[chip][1]}"
        ) from e
    return tuple(described.devices)
