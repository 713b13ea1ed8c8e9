"""The real train step, compiled ahead of time for TPUs that are not there.

The TPU compiler (libtpu, the extra `tpu`) runs on any Linux machine and knows each
chip's memory: what it compiles fits, and what it rejects does not. Nothing is executed;
times are a roofline (roofline.py) with its assumptions named.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from gamayun_jax import hlo, roofline, sharding, step
from gamayun_jax.chips import CHIPS, GIB
from gamayun_jax.config import Config, UserError, to_json
from gamayun_jax.losses import TokenWeights
from gamayun_jax.model import flops_per_token, parameter_count
from gamayun_jax.plan_text import mesh_name
from gamayun_jax.roofline import Assumptions

# Chip -> number of dimensions of its slices, and an example.
TOPOLOGIES = {
    "v4": (3, "v4:4x4x8"),
    "v5e": (2, "v5e:16x16"),
    "v5p": (3, "v5p:4x4x8"),
    "v6e": (2, "v6e:16x16"),
}


class OutOfMemoryError(UserError):
    """The compiler rejects the step: it needs more than the chip's memory."""

    def __init__(self, message: str, used: float, limit: float):
        super().__init__(message)
        self.used, self.limit = used, limit


# --- topologies -------------------------------------------------------------------


def chip_name(topology: str) -> str:
    """The chip of a topology's name; UserError where the name is none."""
    known = ", ".join(example for _, example in TOPOLOGIES.values())
    m = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", topology)
    if not m or m[1] not in TOPOLOGIES:
        raise UserError(
            f"--topology {topology!r} is unknown: write CHIP:AxB or CHIP:AxBxC; the "
            f"chips are {', '.join(TOPOLOGIES)}, for example {known}"
        )
    dimensions, example = TOPOLOGIES[m[1]]
    if m[2].count("x") + 1 != dimensions or 0 in map(int, m[2].split("x")):
        raise UserError(
            f"--topology {topology!r}: slices of {m[1]} have {dimensions} sizes of at "
            f"least 1, for example {example}"
        )
    return m[1]


@functools.cache
def topology_devices(topology: str, slices: int = 1) -> tuple[Any, ...]:
    """The devices of slices that are only described.

    Raises:
      UserError: unknown topology, or no libtpu.
    """
    chip = chip_name(topology)
    # libtpu asks the cloud's metadata server for the machine it runs on, and logs.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it locks a file
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
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
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except Exception as e:  # whatever libtpu raises for shapes that are not built
        raise UserError(
            f"--topology {topology!r} is not one that the TPU compiler knows "
            f"({str(e).splitlines()[0][:160]}): for example "
            f"{TOPOLOGIES[chip][1]}"
        ) from e
    return tuple(found.devices)


def for_tpu(cfg: Config) -> Config:
    """The config with what "auto" means on a TPU, said."""
    compute = cfg.compute
    if compute.dtype == "auto":
        compute = dataclasses.replace(compute, dtype="bfloat16")
    if compute.attention == "auto":
        compute = dataclasses.replace(compute, attention="splash")
    return dataclasses.replace(cfg, compute=compute)


# --- compiling --------------------------------------------------------------------


def compile_for(cfg: Config, mesh: Mesh) -> tuple[Any, Any]:
    """The abstract state and the compiled step of the first stage on a mesh.

    Raises:
      OutOfMemoryError: the step does not fit the chips.
      UserError: batch or model do not divide over the mesh.
    """
    sharding.check_divisible(cfg, mesh)
    # The values of the tables do not matter, only their sizes.
    tables = TokenWeights(
        np.ones(len(cfg.languages), np.float32), np.ones(cfg.model.vocab_size, "f4")
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        abstract = step.abstract_state(cfg, mesh)
        try:
            return abstract, step.compile_step(cfg, mesh, abstract, 0, tables, 0)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            raise out_of_memory(cfg, dict(mesh.shape), str(e)) from e


UNITS = {"": 1.0, "B": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def out_of_memory(
    cfg: Config, mesh: Mapping[str, int], message: str
) -> OutOfMemoryError:
    """The compiler's refusal as one line: by how much, and what would help."""
    m = re.search(r"Used ([\d.]+)(\w?) of ([\d.]+)(\w?) hbm", message) or re.search(
        r"\(([\d.]+)(\w?)\) exceeds available HBM \(([\d.]+)(\w?)\)", message
    )
    used = float(m[1]) * UNITS[m[2]] if m else math.nan
    limit = float(m[3]) * UNITS[m[4]] if m else math.nan
    knobs = []
    if roofline.rows(cfg, mesh) > 1:
        knobs.append(f"compute.microbatches={2 * cfg.compute.microbatches}")
    if cfg.compute.remat != "full":
        better = (
            "full" if cfg.compute.remat in ("attention", "offload") else "attention"
        )
        knobs.append(f"compute.remat={better}")
    if not cfg.compute.loss_chunk:
        knobs.append("compute.loss_chunk=512")
    if mesh["data"] > 1:
        knobs.append(f"mesh.fsdp={2 * mesh['fsdp']}")
    if not knobs:
        knobs.append("more chips, or a larger mesh.tensor")
    amount = (
        f"the step needs {used / GIB:.2f} GiB of a chip's {limit / GIB:.2f} GiB, "
        f"{(used - limit) / GIB:.2f} GiB too much"
        if m
        else "the step needs more memory than a chip has"
    )
    return OutOfMemoryError(f"{amount}; what helps: {', or '.join(knobs)}", used, limit)


def memory(abstract: Any, compiled: Any) -> dict[str, float]:
    """Bytes of one device: what the state takes, the rest, and the peak."""

    def local(tree: Any) -> float:
        return float(
            sum(
                math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                for x in jax.tree.leaves(tree)
            )
        )

    found = compiled.memory_analysis()
    total = (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
    return {
        "parameters": local(abstract.params),
        "optimiser": local(abstract.opt_state),
        "temporary": float(found.temp_size_in_bytes),
        "program": float(found.generated_code_size_in_bytes),
        "host": float(found.host_temp_size_in_bytes),
        "total": float(total),
        "peak": float(found.peak_memory_in_bytes),
    }


# --- the plan ---------------------------------------------------------------------


def make_plan(
    cfg: Config,
    topology: str,
    slices: int = 1,
    price: float = 0.0,
    assume: Assumptions = Assumptions(),
    cache: Path | None = None,
) -> dict[str, Any]:
    """Compile the step for a topology and say what it takes; plain JSON data.

    Args:
      price: of a chip-hour, in whatever currency; 0: no cost is given.
      cache: folder of former compilations' results.

    Raises:
      UserError: unknown topology, sizes that do not divide, a step that does not fit.
    """
    if slices < 1:
        raise UserError(f"--slices {slices}: at least 1")
    cfg = for_tpu(cfg)
    chip = chip_name(topology)
    devices = topology_devices(topology, slices)
    mesh = sharding.make_mesh(cfg.mesh, devices)
    shape = {k: int(v) for k, v in mesh.shape.items()}
    sharding.check_divisible(cfg, mesh)
    measured = _compiled(cfg, mesh, topology, slices, cache)
    moved: dict[str, float] = dict.fromkeys(shape, 0.0)
    for row in measured["collectives"]:
        # Over several axes at once: the slowest one counts, which is the first.
        moved[row["axes"][0]] += row["bytes"]
    least = roofline.least_moved_bytes(cfg, shape)
    seconds = roofline.step_seconds(
        cfg, shape, CHIPS[chip], moved, TOPOLOGIES[chip][0], slices, assume
    )
    # The compiler's estimates of its operations, without kernels and without waiting
    # for collectives: less than this it cannot be either.
    seconds["compiler"] = measured["cycles"] / CHIPS[chip].clock
    seconds["step"] = max(seconds.values())
    chips = len(devices)
    tokens = sum(s.tokens for s in cfg.stages)
    flops = flops_per_token(cfg.model, cfg.data.seq_len)
    rate = cfg.tokens_per_step / seconds["step"]
    hours = tokens / rate / 3600
    return {
        "config": cfg.name,
        "topology": topology,
        "slices": slices,
        "chips": chips,
        "mesh": shape,
        "rows_per_device": roofline.rows(cfg, shape),
        "microbatches": cfg.compute.microbatches,
        "remat": cfg.compute.remat,
        "parameters": parameter_count(cfg.model),
        "memory": measured["memory"],
        "hbm_bytes": CHIPS[chip].hbm_bytes,
        "flops_per_token": flops,
        "recomputed_flops_per_token": roofline.recomputed_flops_per_token(cfg),
        "collectives": measured["collectives"],
        "moved_bytes": sum(moved.values()),
        "least_moved_bytes": least,
        "seconds": seconds,
        "assumptions": dataclasses.asdict(assume),
        "tokens_per_s": rate,
        "tokens_per_s_per_chip": rate / chips,
        "mfu": rate * flops / chips / CHIPS[chip].flops,
        "tokens": tokens,
        "days": hours / 24,
        "chip_hours": hours * chips,
        "cost": hours * chips * price if price else None,
    }


def _compiled(
    cfg: Config, mesh: Mesh, topology: str, slices: int, cache: Path | None
) -> dict[str, Any]:
    """What a compilation shows: memory, collectives, cycles; cached if it can be."""
    here = Path(__file__).parent
    sources = b"".join(
        (here / f"{name}.py").read_bytes()
        for name in ("attention", "hlo", "losses", "model", "optim", "sharding", "step")
    )
    parts = (to_json(cfg), topology, str(slices), jax.__version__)
    key = hashlib.sha256("\n".join(parts).encode() + sources).hexdigest()[:24]
    path = cache / f"{key}.json" if cache else None
    if path and path.exists():
        found = json.loads(path.read_text())
        if "refused" in found:
            raise OutOfMemoryError(*found["refused"])
        return found
    try:
        abstract, compiled = compile_for(cfg, mesh)
        text = compiled.as_text()
        shape = {k: int(v) for k, v in mesh.shape.items()}
        result = {
            "memory": memory(abstract, compiled),
            "collectives": hlo.summarise(hlo.collectives(text, shape)),
            "cycles": hlo.estimated_cycles(text),
        }
    except OutOfMemoryError as e:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"refused": [str(e), e.used, e.limit]}))
        raise
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    return result


# --- search -----------------------------------------------------------------------


def candidates(
    cfg: Config, chips: int, slices: int, hbm: float, meshes: bool = True
) -> list[Config]:
    """Configs of the same batch that may fit: microbatches, remat policy, and meshes.

    Without `meshes`, only the config's own mesh. A slice of a weight of fewer than 16
    rows is less than a tile of bfloat16, and then whole gradients are all-reduced.
    """
    found = []
    own = cfg.mesh
    powers = [2**n for n in range(chips.bit_length()) if chips % 2**n == 0]
    for tensor in (1, 2, 4):
        for fsdp in powers:
            data, rest = divmod(chips, fsdp * tensor)
            if rest or data < slices or data % slices:
                continue
            shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
            asked = (own.data, own.fsdp, own.tensor)
            if meshes:
                if fsdp > 1 and cfg.model.d_model // fsdp < 16:
                    continue
            elif any(
                n not in (-1, shape[k]) for k, n in zip(shape, asked, strict=True)
            ):
                continue
            for microbatches in (1, 2, 4, 8):
                if cfg.data.batch_size % (data * fsdp * microbatches):
                    continue
                for remat in ("minimal", "attention", "full"):
                    compute = dataclasses.replace(
                        cfg.compute, microbatches=microbatches, remat=remat
                    )
                    mesh = dataclasses.replace(
                        cfg.mesh, data=data, fsdp=fsdp, tensor=tensor
                    )
                    new = dataclasses.replace(cfg, compute=compute, mesh=mesh)
                    if roofline.memory_estimate(new, shape) < hbm:
                        found.append(new)
    return found


def search(
    cfg: Config,
    topology: str,
    slices: int = 1,
    price: float = 0.0,
    assume: Assumptions = Assumptions(),
    cache: Path | None = None,
    compiled: int = 6,
    meshes: bool = True,
    log: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rank meshes, microbatches and remat policies by time; compile the best ones.

    All are ranked by the roofline with the least traffic; in that order they are
    compiled until `compiled` of them fit (of at most twice as many and two).

    Raises:
      UserError: nothing fits.
    """
    cfg = for_tpu(cfg)
    name = chip_name(topology)
    chip, dimensions = CHIPS[name], TOPOLOGIES[name][0]
    chips = len(topology_devices(topology, slices))

    def estimate(c: Config) -> tuple[float, float]:
        shape = {"data": c.mesh.data, "fsdp": c.mesh.fsdp, "tensor": c.mesh.tensor}
        least = roofline.least_moved_bytes(c, shape)
        times = roofline.step_seconds(c, shape, chip, least, dimensions, slices, assume)
        # Of equal times, the one with less of everything else beside it.
        return times["step"], sum(times.values())

    found = candidates(cfg, chips, slices, chip.hbm_bytes, meshes)
    ranked = sorted(found, key=estimate)
    plans: list[dict[str, Any]] = []
    refused = ""
    for c in ranked[: 2 * compiled + 2]:
        if len(plans) == compiled:
            break
        label = f"{mesh_name(dataclasses.asdict(c.mesh))} remat {c.compute.remat} "
        label += f"microbatches {c.compute.microbatches}"
        try:
            plans.append(make_plan(c, topology, slices, price, assume, cache))
            text = f"{plans[-1]['seconds']['step']:.3f} s a step"
        except UserError as e:
            refused = text = str(e)
        if log:
            log(f"{label}: {text}")
    if not plans:
        raise UserError(
            f"nothing of {len(ranked)} candidates fits {slices} x {topology}"
            + (f": {refused}" if refused else f" with batch_size={cfg.data.batch_size}")
        )
    return sorted(plans, key=lambda p: p["seconds"]["step"])


def table(
    cfg: Config,
    names: Sequence[str],
    log: Callable[[str], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """The best plan of the config's own mesh for each of "[SLICES*]TOPOLOGY"."""
    wanted = []
    for name in names:
        m = re.fullmatch(r"(?:([1-9]\d*)\*)?(.*)", name)
        assert m  # it matches anything
        chip_name(m[2])
        wanted.append((m[2], int(m[1] or 1)))
    plans: list[dict[str, Any]] = []
    for topology, slices in wanted:
        try:
            plans += search(
                cfg, topology, slices, log=log, compiled=1, meshes=False, **options
            )
        except UserError as e:
            if log:
                log(str(e))
    if not plans:
        raise UserError(f"nothing fits any of {', '.join(names)}")
    return plans
