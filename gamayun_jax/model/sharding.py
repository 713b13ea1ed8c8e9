"""Mesh, logical-axis rules, and the shardings of state and batch.

The model speaks of logical axes only ("batch", "heads", "embed", ...); the rules
here map them to the mesh axes `data` (replicas; crosses slices), `fsdp` (parameters
and optimiser state sharded, batch too) and `tensor` (heads, mlp, vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gamayun_jax.config import Config, MeshConfig, ModelConfig, UserError
from gamayun_jax.model.weights import find_weight, parameter_path

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
    # Rows of the matrices whose last axis is the model's width: a TPU gathers and
    # scatters rows, and all-reduces whole gradients where it would cut columns.
    ("vocab_rows", ("tensor", "fsdp")),
    ("mlp_rows", ("tensor", "fsdp")),
    ("head_rows", ("tensor", "fsdp")),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("norm", None),
)


def mesh_sizes(cfg: MeshConfig, count: int) -> list[int]:
    """Sizes of the axes, -1 filled in; UserError if they are not `count` devices."""
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if sizes.count(-1) > 1:
        raise UserError("mesh: only one axis may be -1")
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
    return sizes


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh, with `data` across slices where there are several.

    Raises:
      UserError: the sizes do not multiply to the devices, or data does not divide over
        the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes, count = mesh_sizes(cfg, len(devices)), len(devices)
    # Linen's logical constraints need Auto axes (jax defaults to Explicit).
    types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform != "tpu":
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    # An axis may take a part of a dimension of the torus (fsdp=16 on 8 x 8 chips).
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
        return Mesh(grid, AXES, axis_types=types)
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} is not a multiple of the {slices} slices, which "
            f"only data crosses: set mesh.data=-1 and mesh.fsdp to a divisor of "
            f"the {count // slices} devices of a slice"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]),
        (slices, 1, 1),
        devices,
        allow_split_physical_axes=True,
    )
    return Mesh(grid, AXES, axis_types=types)


def check_divisible(cfg: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raise UserError where the batch or the model does not divide over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    updates = cfg.updates_at(0)
    while updates > 1:
        rows, count = cfg.data.batch_size // updates, cfg.microbatches_of(updates)
        if rows % (count * ways):
            raise UserError(
                f"optimizer.first_batch_size={cfg.optimizer.first_batch_size}: updates "
                f"of {rows} examples in {count} microbatches do not divide over data x "
                f"fsdp = {ways} devices: use multiples of {ways}, and "
                "compute.microbatches that is a power of two"
            )
        updates //= 2
    rows = cfg.data.batch_size // cfg.compute.microbatches
    if rows % ways:
        raise UserError(
            f"data.batch_size={cfg.data.batch_size} in {cfg.compute.microbatches} "
            f"microbatches gives {rows} examples, which do not divide over "
            f"data x fsdp = {ways} devices: use a multiple of "
            f"{ways * cfg.compute.microbatches}"
        )
    check_model(cfg.model, mesh)


def check_model(cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
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


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings of parameters, also of those within other trees: a train state.

    What is no parameter is whole on every device.
    """

    def place(path: tuple[Any, ...], x: Any) -> NamedSharding:
        weight = find_weight(parameter_path(path))
        if weight is None:
            return replicated(mesh)
        axes = (*("layers",) * weight.stacked, *weight.logical_axes)
        return NamedSharding(mesh, parameter_spec(x.shape, axes, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def place_abstract(tree: Any, mesh: Mesh) -> Any:
    """Abstract values with `parameter_shardings`, to restore or compile with."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        parameter_shardings(tree, mesh),
    )


def parameter_spec(
    shape: Sequence[int], axes: Sequence[str | None], mesh: Any
) -> PartitionSpec:
    """How a parameter with these logical axes is divided over the mesh.

    An axis that does not divide over fsdp leaves it to the next whole one that does
    (a vocabulary of 151,936 has rows for 128 devices, not for 256).
    """
    spec = list(nn.logical_to_mesh_axes(axes, RULES) or ())
    spec += [None] * (len(shape) - len(spec))
    for i, names in enumerate(spec):
        names = names if isinstance(names, tuple) else (names,)
        if "fsdp" not in names:
            continue
        if shape[i] % int(np.prod([mesh.shape[name] for name in names])):
            others = tuple(name for name in names if name != "fsdp")
            spec[i] = others[0] if len(others) == 1 else others or None
            free = (
                j
                for j in range(i + 1, len(shape))
                if spec[j] is None and shape[j] % mesh.shape["fsdp"] == 0
            )
            j = next(free, None)
            if j is not None:
                spec[j] = "fsdp"
    return PartitionSpec(*spec)


def without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    """The same division but for fsdp, over which the array is whole."""
    names = [k if isinstance(k, tuple) else (k,) for k in spec]
    return PartitionSpec(*(tuple(k for k in ks if k and k != "fsdp") for ks in names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a [B, T] batch over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def params_on_devices(params: Any, mesh: Mesh) -> Any:
    """NumPy arrays whole on every device, what is on devices as it is.

    A program that is given NumPy arrays copies them at every call.
    """
    whole = replicated(mesh)

    def placed(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return leaf
        # device_put would send all of it between processes, to compare.
        return jax.make_array_from_callback(leaf.shape, whole, leaf.__getitem__)

    return jax.tree.map(placed, params)


def batch_groups(rows: int) -> tuple[int, int]:
    """Parts that so many rows are divided into, along (data, fsdp) of the mesh in use.

    (1, 1) without a mesh, and where they do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or rows % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return 1, 1
    return mesh.shape["data"], mesh.shape["fsdp"]


def divide_groups(x: jax.Array) -> jax.Array:
    """[data, fsdp, ...], from `batch_groups`: each device has its own part."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[:2] == (1, 1):
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data", "fsdp", *free))


def sum_groups(parts: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Sum a parameter's gradients [data, fsdp, *shape], each on its own device.

    Over fsdp first, so that a device gets only its part, then these over data: the
    partitioner would sum whole gradients over all devices. The dtype stays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or parts.shape[:2] == (1, 1):
        total = parts.reshape(-1, *parts.shape[2:])
        if len(total) > 1:
            total = jax.lax.reduce(total, jnp.zeros((), total.dtype), jax.lax.add, (0,))
        return constrain_parameter(total.reshape(parts.shape[2:]), axes)
    spec = parameter_spec(parts.shape[2:], axes, mesh)

    def add(x: jax.Array) -> jax.Array:
        x = x[0, 0]
        at = next((i for i, k in enumerate(spec) if "fsdp" in (k or "")), None)
        if at is None:
            return jax.lax.psum(x, ("data", "fsdp"))
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=at, tiled=True)
        return jax.lax.psum(x, "data")

    return jax.shard_map(
        add,
        in_specs=PartitionSpec("data", "fsdp", *without_fsdp(spec)),
        out_specs=spec,
    )(parts)


def gather(w: jax.Array, axes: tuple[str | None, ...], dtype: jnp.dtype) -> jax.Array:
    """A parameter with these logical axes, in a dtype, whole over fsdp.

    What a layer computes with. For use inside of custom gradients, which scatter the
    parameter's gradient at once: the constraint's own gradient would be one that all
    devices have whole. Left to the partitioner, a weight is gathered for each use.
    """
    mesh = jax.sharding.get_abstract_mesh()
    w = w.astype(dtype)
    if mesh.empty:
        return w
    whole = without_fsdp(parameter_spec(w.shape, axes, mesh))
    return jax.lax.with_sharding_constraint(w, whole)


def map_layers(
    f: Callable[[jax.Array], jax.Array], x: jax.Array, axes: tuple[str | None, ...]
) -> jax.Array:
    """`f` of each layer of a stacked parameter [L, *shape] with these logical axes.

    The devices that share every layer exchange their parts, so that each has whole
    layers instead, L over their number and rounded up: no more than it held before,
    but for the rounding, and nothing is computed twice among them. Replicas (`data`)
    compute the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec() if mesh.empty else parameter_spec(x.shape[1:], axes, mesh)
    # The axis of x and of the mesh, the innermost division of an axis first.
    exchanges = [
        (i, name)
        for i, names in enumerate(spec, 1)
        for name in reversed(names if isinstance(names, tuple) else (names,))
        if name and mesh.shape[name] > 1
    ]
    if not exchanges:
        return jax.lax.map(f, x)

    def on_a_device(x: jax.Array) -> jax.Array:
        for i, name in exchanges:
            x = jax.lax.all_to_all(x, name, 0, i, tiled=True)
        x = jax.lax.map(f, x)
        for i, name in reversed(exchanges):
            x = jax.lax.all_to_all(x, name, i, 0, tiled=True)
        return x

    ways, layers = math.prod(mesh.shape[name] for _, name in exchanges), len(x)
    padded = jnp.pad(x, [(0, -layers % ways)] + [(0, 0)] * (x.ndim - 1))
    divided = PartitionSpec(None, *spec)
    apply = jax.shard_map(on_a_device, in_specs=divided, out_specs=divided)
    return apply(padded)[:layers]


def weight_gradient(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Products of a [B, T, *I] and b [B, T, *O] summed over B and T: [*I, *O].

    In `dtype` from the start: rounded after the sum, a device's part is rounded first.
    """

    def on_cpu(a, b):
        # XLA has no product of bfloat16 with a result in float32 for some layouts.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.tensordot(a, b, ((0, 1), (0, 1))).astype(dtype)

    def product(a, b):
        return jnp.tensordot(a, b, ((0, 1), (0, 1)), preferred_element_type=dtype)

    if a.dtype == dtype:
        return product(a, b)
    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=product)


def constrain_parameter(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """`x` laid out as the parameter with these logical axes; a no-op without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = parameter_spec(x.shape, axes, mesh)
    return jax.lax.with_sharding_constraint(x, spec)
