"""What the accelerators can do, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what reads the table alone starts without JAX
    import jax


@dataclass(frozen=True)
class Chip:
    """One JAX device: a whole chip, or one of a TPU7x chip's two."""

    flops: float  # dense bfloat16 matrix products per second
    hbm_bytes: float
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second, all links of a chip, one direction
    # bytes per second and chip between slices; 0: not known
    dcn_bandwidth: float = 0.0
    clock: float = 0.0  # Hz of a TPU's core; 0: not known
    devices: int = 1  # JAX devices of a chip, which is what is counted and paid for
    # USD a chip-hour, on demand in US regions; 0: not known. As published in 2025:
    # prices change, spot and grants have their own.
    price: float = 0.0


GIB = 2.0**30

# cloud.google.com/tpu/docs/system-architecture-tpu-vm; NVIDIA H100/H200/A100 sheets.
# DCN: the pages of v5e and v6e (6.4 and 25.6 Tbit/s for 256 chips); v4 and v5p: assumed
# 100 and 200 Gbit/s for a host of 4 chips. Clocks: with them, the compiler's cycles for
# a large matrix product give the peak (v4: its data sheet).
# TPU7x, docs.cloud.google.com/tpu/docs/tpu7x: a chip has 2,307 TFLOP/s in bfloat16,
# 192 GiB at 7,380 GB/s, ICI of 1,200 GB/s both ways, DCN of 100 Gbit/s; JAX sees two
# devices with half of each. Its clock: as many products a cycle and core as v6e's.
# B200, NVIDIA's DGX B200 sheet: 8 GPUs have 1,440 GB at 64 TB/s, NVLink of 14.4 TB/s
# both ways, 72 PFLOP/s of FP8 with sparsity, of which a quarter is dense bfloat16.
# GPUs between hosts: DGX systems' network adapters, 200 (A100) and 400 Gbit/s a GPU.
CHIPS: dict[str, Chip] = {
    "v4": Chip(275e12, 32 * GIB, 1.2288e12, 270e9, 3.1e9, 1.05e9, price=3.22),
    "v5e": Chip(197e12, 16 * GIB, 0.819e12, 180e9, 3.1e9, 1.5e9, price=1.2),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 540e9, 6.2e9, 1.75e9, price=4.2),
    "v6e": Chip(918e12, 32 * GIB, 1.638e12, 360e9, 12.5e9, 1.75e9, price=2.7),
    "tpu7x": Chip(1153.5e12, 96 * GIB, 3.69e12, 300e9, 6.25e9, 2.2e9, devices=2),
    "a100": Chip(312e12, 80 * GIB, 2.039e12, 300e9, 25e9),
    "h100": Chip(989e12, 80 * GIB, 3.35e12, 450e9, 50e9),
    "h200": Chip(989e12, 141 * GIB, 4.8e12, 450e9, 50e9),
    "b200": Chip(2250e12, 180 * GIB, 8e12, 900e9, 50e9),
}

# device_kind as JAX reports it, in lower case -> name in CHIPS; first match counts
DEVICE_KINDS = (
    ("tpu v4", "v4"),
    ("tpu v5 lite", "v5e"),
    ("tpu v5e", "v5e"),
    ("tpu v5p", "v5p"),
    ("tpu v5", "v5p"),
    ("tpu v6", "v6e"),
    ("tpu7x", "tpu7x"),
    ("a100", "a100"),
    ("h100", "h100"),
    ("h200", "h200"),
    ("b200", "b200"),
)


def chip_of(device: jax.Device) -> Chip | None:
    """The chip behind a device; None where it is unknown (no MFU is better than a
    wrong one, and a CPU has no meaningful peak)."""
    kind = device.device_kind.lower()
    return next((CHIPS[name] for part, name in DEVICE_KINDS if part in kind), None)
