"""What the accelerators can do, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """One chip (one JAX device, except v4/v5p megacore: still one device a chip)."""

    flops: float  # dense bfloat16 matrix products per second
    hbm_bytes: float
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second, all links of a chip, one direction
    # bytes per second and chip between slices; 0: not known
    dcn_bandwidth: float = 0.0
    clock: float = 0.0  # Hz of a TPU's core; 0: not known


GIB = 2.0**30

# cloud.google.com/tpu/docs/system-architecture-tpu-vm; NVIDIA H100/H200/A100 sheets.
# DCN: the pages of v5e and v6e (6.4 and 25.6 Tbit/s for 256 chips); v4 and v5p: assumed
# 100 and 200 Gbit/s for a host of 4 chips. Clocks: with them, the compiler's cycles for
# a large matrix product give the peak (v4: its data sheet).
CHIPS: dict[str, Chip] = {
    "v4": Chip(275e12, 32 * GIB, 1.2288e12, 270e9, 3.1e9, 1.05e9),
    "v5e": Chip(197e12, 16 * GIB, 0.819e12, 180e9, 3.1e9, 1.5e9),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 540e9, 6.2e9, 1.75e9),
    "v6e": Chip(918e12, 32 * GIB, 1.638e12, 360e9, 12.5e9, 1.75e9),
    "a100": Chip(312e12, 80 * GIB, 2.039e12, 300e9),
    "h100": Chip(989e12, 80 * GIB, 3.35e12, 450e9),
    "h200": Chip(989e12, 141 * GIB, 4.8e12, 450e9),
}

# device_kind as JAX reports it, in lower case -> name in CHIPS; first match counts
DEVICE_KINDS = (
    ("tpu v4", "v4"),
    ("tpu v5 lite", "v5e"),
    ("tpu v5e", "v5e"),
    ("tpu v5p", "v5p"),
    ("tpu v5", "v5p"),
    ("tpu v6", "v6e"),
    ("a100", "a100"),
    ("h100", "h100"),
    ("h200", "h200"),
)


def chip_of(device: jax.Device) -> Chip | None:
    """The chip behind a device; None where it is unknown (no MFU is better than a
    wrong one, and a CPU has no meaningful peak)."""
    kind = device.device_kind.lower()
    return next((CHIPS[name] for part, name in DEVICE_KINDS if part in kind), None)
