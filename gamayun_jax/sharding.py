"""Mesh, logical-axis rules, and the shardings of state and batch.

The model speaks of logical axes only ("batch", "heads", "embed", ...); the rules
here map them to the mesh axes `data` (replicas; crosses slices), `fsdp` (parameters
and optimiser state sharded, batch too) and `tensor` (heads, mlp, vocabulary).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gamayun_jax.config import Config, MeshConfig, ModelConfig, UserError

AXES = ("data", "fsdp", "tensor")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("layers", None),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("norm", None),
)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh; raises UserError if the sizes do not multiply to the devices."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    count = len(devices)
    if sizes.count(-1) > 1:
        raise UserError("mesh: only one axis may be -1")
    if any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"mesh: sizes {sizes} must be positive, or -1 for what is left")
    if -1 in sizes:
        known = int(np.prod([s for s in sizes if s > 0]))
        if count % known:
            raise UserError(
                f"mesh: data={cfg.data} fsdp={cfg.fsdp} tensor={cfg.tensor} does not "
                f"fit {count} devices: {known} does not divide {count}"
            )
        sizes[sizes.index(-1)] = count // known
    if int(np.prod(sizes)) != count:
        raise UserError(
            f"mesh: data={sizes[0]} x fsdp={sizes[1]} x tensor={sizes[2]} is "
            f"{int(np.prod(sizes))} devices, but there are {count}; set one axis to -1"
        )
    # Linen's logical constraints need Auto axes (jax defaults to Explicit).
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def check_divisible(cfg: Config, mesh: Mesh) -> None:
    """Raise UserError where the batch or the model does not divide over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = cfg.data.batch_size // cfg.compute.microbatches
    if rows % ways:
        raise UserError(
            f"data.batch_size={cfg.data.batch_size} in {cfg.compute.microbatches} "
            f"microbatches gives {rows} examples, which do not divide over "
            f"data x fsdp = {ways} devices: use a multiple of "
            f"{ways * cfg.compute.microbatches}"
        )
    check_model(cfg.model, mesh)


def check_model(cfg: ModelConfig, mesh: Mesh) -> None:
    """Raise UserError where the model's sizes do not divide over the mesh."""
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for name, ways, axis in (
        ("num_heads", tensor, "tensor"),
        ("num_kv_heads", tensor, "tensor"),
        ("d_ff", tensor, "tensor"),
        ("vocab_size", tensor, "tensor"),
        ("d_model", fsdp, "fsdp"),
    ):
        if getattr(cfg, name) % ways:
            raise UserError(
                f"model.{name}={getattr(cfg, name)} does not divide over "
                f"mesh.{axis}={ways}: choose a mesh.{axis} that divides it"
            )


def logical_shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of boxed (logically partitioned) abstract values."""
    specs = nn.get_partition_spec(boxed)
    return nn.logical_to_mesh_sharding(specs, mesh, RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a [B, T] batch over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
