"""Slices of TPUs: what the cloud calls them, their chips and their VMs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gamayun_jax.fields import UserError


@dataclass(frozen=True)
class Accelerator:
    """How the cloud calls a kind of TPU."""

    type: str  # what the TPU API's types begin with
    per_type: int  # what they count, a chip: chips or TensorCores
    machine: str  # of Compute Engine, with 4 chips a VM
    gke: str  # value of the node label cloud.google.com/gke-tpu-accelerator
    version: str  # runtime of the TPU API; none: its queued resources have no such TPU
    image: str  # family of images for Compute Engine; none: made by the TPU API alone
    chips: tuple[int, ...]  # chips a VM may have: a slice of more has 4 in each
    dimensions: int


# cloud.google.com/tpu/docs: types-topologies, runtimes, tpus-and-migs;
# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, tpu-ironwood.
IMAGES = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"
ACCELERATORS = {
    "v4": Accelerator("v4", 2, "ct4p-hightpu-4t", "tpu-v4-podslice",
                      "tpu-ubuntu2204-base", "", (4,), 3),
    "v5e": Accelerator("v5litepod", 1, "ct5lp-hightpu-4t", "tpu-v5-lite-podslice",
                       "v2-alpha-tpuv5-lite", "", (1, 4, 8), 2),
    "v5p": Accelerator("v5p", 2, "ct5p-hightpu-4t", "tpu-v5p-slice",
                       "v2-alpha-tpuv5", IMAGES, (4,), 3),
    "v6e": Accelerator("v6e", 1, "ct6e-standard-4t", "tpu-v6e-slice",
                       "v2-alpha-tpuv6e", IMAGES, (1, 4, 8), 2),
    "tpu7x": Accelerator("tpu7x", 2, "tpu7x-standard-4t", "tpu7x",
                         "", "ubuntu-accel-2404-amd64-tpu-tpu7x", (4,), 3),
}  # fmt: skip
# Chips -> topology of v5e and v6e; of the others several have the same number.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
        256: "16x16"}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """One slice: its chips, and its VMs."""

    kind: str  # in ACCELERATORS
    topology: str  # "4x4"; empty where only the number of chips is known

    chips: int

    @property
    def hosts(self) -> int:
        """VMs of the slice."""
        return max(1, self.chips // 4)

    @property
    def chips_per_host(self) -> int:
        return min(4, self.chips)

    @property
    def accelerator(self) -> Accelerator:
        return ACCELERATORS[self.kind]

    @property
    def machine(self) -> str:
        """Compute Engine's machine type of one VM."""
        return self.accelerator.machine.replace("4t", f"{self.chips_per_host}t")


def slice_of(type_: str, topology: str) -> Slice:
    """The slice that an accelerator type or a topology names.

    Raises:
      UserError: neither is given, an unknown kind, or sizes that are none.
    """
    examples = "v5litepod-256, v6e:16x16 or tpu7x:4x4x4"
    if topology:
        m = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", topology)
        kind = m[1] if m else ""
        if not m or kind not in ACCELERATORS:
            raise UserError(
                f"--topology {topology!r} is unknown: write CHIP:AxB, of "
                f"{', '.join(ACCELERATORS)}, e.g. {examples}"
            )
        sizes = [int(n) for n in m[2].split("x")]
        if len(sizes) != ACCELERATORS[kind].dimensions or 0 in sizes:
            raise UserError(
                f"--topology {topology!r}: slices of {kind} have "
                f"{ACCELERATORS[kind].dimensions} sizes of at least 1"
            )
        chips = math.prod(sizes)
        if chips % 4 if chips > 4 else chips not in ACCELERATORS[kind].chips:
            raise UserError(
                f"--topology {topology!r} has {chips} chips: VMs have 4 chips each"
            )
        if len(sizes) == 2 and m[2] not in FLAT.values():
            raise UserError(
                f"--topology {topology!r}: {kind} has {', '.join(FLAT.values())}"
            )
        return Slice(kind, m[2], chips)
    for kind, accelerator in ACCELERATORS.items():
        m = re.fullmatch(rf"{accelerator.type}-([1-9]\d*)", type_)
        if m and not int(m[1]) % accelerator.per_type:
            chips = int(m[1]) // accelerator.per_type
            if accelerator.dimensions == 3:
                return Slice(kind, "", chips)
            if chips in FLAT:
                return Slice(kind, FLAT[chips], chips)
    raise UserError(
        f"--type {type_!r} is not known here: give --topology, e.g. {examples}"
    )
