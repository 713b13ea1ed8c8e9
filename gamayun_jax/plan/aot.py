"""The real train step, compiled ahead of time for TPUs that are not there.

The TPU compiler (libtpu, the extra `tpu`) runs on any Linux machine and knows each
chip's memory: what it compiles fits, and what it rejects does not. Nothing is executed;
times are a roofline (roofline.py) with its assumptions named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from gamayun_jax.config import Config, MeshConfig, UserError, to_json
from gamayun_jax.data.files import write_text
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import TokenWeights
from gamayun_jax.model.weights import flops_per_token, parameter_count
from gamayun_jax.plan import hlo, roofline
from gamayun_jax.plan.roofline import Assumptions
from gamayun_jax.plan.text import mesh_name
from gamayun_jax.plan.topology import chip_name, dimensions, topology_devices
from gamayun_jax.training import step
from gamayun_jax.training.chips import CHIPS, GIB, Chip
from gamayun_jax.training.ticker import ticker

TICK_SECONDS = 30.0
UNITS = {"": 1.0, "B": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


class OutOfMemoryError(UserError):
    """The compiler rejects the step: it needs more than the chip's memory."""

    def __init__(self, message: str, used: float, limit: float):
        super().__init__(message)
        self.used, self.limit = used, limit


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
    if roofline.rows_per_device(cfg, mesh) > 1:
        knobs.append(f"compute.microbatches={2 * cfg.compute.microbatches}")
    if cfg.compute.remat != "full":
        last = cfg.compute.remat in ("attention", "offload")
        knobs.append(f"compute.remat={'full' if last else 'attention'}")
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
        shapes = ((x.sharding.shard_shape(x.shape), x) for x in jax.tree.leaves(tree))
        return float(sum(math.prod(shape) * x.dtype.itemsize for shape, x in shapes))

    by_kind = compiled.memory_analysis()
    total = (
        by_kind.argument_size_in_bytes
        + by_kind.temp_size_in_bytes
        + by_kind.output_size_in_bytes
        - by_kind.alias_size_in_bytes
    )
    return {
        "parameters": local(abstract.params),
        "optimiser": local(abstract.opt_state),
        "average": local(abstract.ema),
        "temporary": float(by_kind.temp_size_in_bytes),
        "program": float(by_kind.generated_code_size_in_bytes),
        "host": float(by_kind.host_temp_size_in_bytes),
        "total": float(total),
        "peak": float(by_kind.peak_memory_in_bytes),
    }


def read_program(text: str, mesh: Mapping[str, int]) -> dict[str, Any]:
    """What the text of a compiled step says: `collectives`, `cycles`, and `unknown`.

    The text is the compiler's own and differs between its versions: what cannot be
    read is None and named in `unknown`, so that what is known is not lost with it.
    """
    known: dict[str, Any] = {"collectives": None, "cycles": None, "unknown": []}
    try:
        program = hlo.Program(text)
        known["unknown"] = [
            f"how often the loop {name} runs: its traffic and cycles count once"
            for name in sorted(program.unknown)
        ]
        known["cycles"] = hlo.estimated_cycles(program)
        known["collectives"] = hlo.summarise(hlo.collectives(program, mesh))
    except Exception as e:  # whatever a text that nobody foresaw gives rise to
        names = {"cycles": "the compiler's estimates", "collectives": "the traffic"}
        lost = " and ".join(names[k] for k in names if known[k] is None)
        known["unknown"].append(f"{lost} ({type(e).__name__}: {e})")
    return known


@contextlib.contextmanager
def progress(log: Callable[[str], None] | None, what: str) -> Iterator[None]:
    """Say what is being compiled, and every half minute that it still is."""
    if log is None:
        yield
        return
    log(f"{what}: compiling, which takes minutes")
    start = time.monotonic()

    def tell() -> None:
        log(f"{what}: still compiling after {time.monotonic() - start:.0f} s")

    with ticker(TICK_SECONDS, tell):
        yield


# --- the plan ---------------------------------------------------------------------


def plan_topology(
    cfg: Config,
    topology: str,
    slices: int = 1,
    price: float = 0.0,
    assume: Assumptions = Assumptions(),
    cache: Path | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compile the step for a topology and say what it takes; plain JSON data.

    For GPUs nothing is compiled: memory and traffic are roofline.py's, and `unknown`
    says so. What could not be read from the compiled program is None or counted in
    part, and named in `unknown`; its time is then no less than that of the least
    traffic.

    Args:
      price: of a chip-hour, in whatever currency; 0: no cost is given.
      cache: folder of former compilations' results.
      log: takes lines about the progress.

    Raises:
      UserError: unknown topology, sizes that do not divide, a step that does not fit.
    """
    if slices < 1:
        raise UserError(f"--slices {slices}: at least 1")
    cfg = for_tpu(cfg)
    chip = CHIPS[chip_name(topology)]
    devices = topology_devices(topology, slices)
    mesh = described_mesh(cfg.mesh, devices, slices)
    shape = {k: int(v) for k, v in mesh.shape.items()}
    # Said in full, so that -1 and its size are one compilation.
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(**shape))
    sharding.check_divisible(cfg, mesh)
    if isinstance(mesh, Mesh):
        measured = compile_and_measure(cfg, mesh, topology, slices, cache, log)
    else:
        measured = estimate(cfg, shape)
    least = roofline.least_moved_bytes(cfg, shape)
    counted = moved_bytes(measured["collectives"])
    moved = least if counted is None else counted
    if measured["unknown"]:  # too little is counted: nothing gets faster by that
        moved = {k: max(n, least[k]) for k, n in moved.items()}
    torus = dimensions(chip_name(topology))
    seconds = roofline.step_seconds(cfg, shape, chip, moved, torus, slices, assume)
    # The compiler's estimates of its operations, without kernels and without waiting
    # for collectives: less than this it cannot be either.
    if measured["cycles"] is not None:
        seconds["compiler"] = measured["cycles"] / chip.clock
    seconds["step"] = max(seconds.values())
    return {
        "config": cfg.name,
        "topology": topology,
        "slices": slices,
        "chips": len(devices) // chip.devices,
        "devices": len(devices),
        "mesh": shape,
        "rows_per_device": roofline.rows_per_device(cfg, shape),
        "microbatches": cfg.compute.microbatches,
        "remat": cfg.compute.remat,
        "parameters": parameter_count(cfg.model),
        "memory": measured["memory"],
        "hbm_bytes": chip.hbm_bytes,
        "recomputed_flops_per_token": roofline.recomputed_flops_per_token(cfg),
        "reduce_dtype": cfg.compute.reduce_dtype,
        "unknown": measured["unknown"],
        "collectives": measured["collectives"],
        "moved_bytes": None if counted is None else sum(counted.values()),
        "least_moved_bytes": least,
        "seconds": seconds,
        "assumptions": dataclasses.asdict(assume),
        **budget(cfg, seconds["step"], len(devices), chip, price),
    }


def described_mesh(
    cfg: MeshConfig, devices: Sequence[Any], slices: int
) -> Mesh | AbstractMesh:
    """The mesh of described devices; of GPUs, which are None, its sizes alone."""
    if devices[0] is not None:
        return sharding.make_mesh(cfg, devices)
    sizes = sharding.mesh_sizes(cfg, len(devices))
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} is not a multiple of the {slices} hosts, which only "
            "data crosses: set mesh.data=-1 and mesh.fsdp to a divisor of the "
            f"{len(devices) // slices} GPUs of a host"
        )
    return AbstractMesh(tuple(sizes), sharding.AXES)


def estimate(cfg: Config, mesh: Mapping[str, int]) -> dict[str, Any]:
    """What stands in for `compile_and_measure` where there is no compiler."""
    unknown = [
        "memory: no compiler for these GPUs is here; the peak is a rough estimate",
        "traffic: not compiled; the time is that of the least",
    ]
    peak = roofline.memory_estimate(cfg, mesh)
    unread = {"collectives": None, "cycles": None, "unknown": unknown}
    return {"memory": {"peak": peak}, **unread}


def moved_bytes(collectives: Sequence[Mapping[str, Any]] | None) -> Any:
    """Mesh axis -> bytes that a device sends along it; None if they are not known."""
    if collectives is None:
        return None
    moved = dict.fromkeys(("data", "fsdp", "tensor"), 0.0)
    for row in collectives:
        # Over several axes at once: the slowest one counts, which is the first.
        moved[row["axes"][0]] += row["bytes"]
    return moved


def budget(
    cfg: Config, step_seconds: float, devices: int, chip: Chip, price: float
) -> dict[str, Any]:
    """What the whole run takes at so many seconds a step."""
    tokens = sum(s.tokens for s in cfg.stages)
    flops = flops_per_token(cfg.model, cfg.data.seq_len)
    rate = cfg.tokens_per_step / step_seconds
    hours, chips = tokens / rate / 3600, devices / chip.devices
    return {
        "flops_per_token": flops,
        "tokens_per_s": rate,
        "tokens_per_s_per_chip": rate / chips,
        "mfu": rate * flops / devices / chip.flops,
        "tokens": tokens,
        "days": hours / 24,
        "chip_hours": hours * chips,
        "cost": hours * chips * price if price else None,
    }


def cache_file(cfg: Config, topology: str, slices: int, cache: Path) -> Path:
    """Where the result of a compilation is kept: by all that it depends on."""
    package = Path(__file__).parents[1]
    others = ("plan/hlo", "training/ema", "training/optimizer", "training/step")
    files = sorted((package / "model").glob("*.py"))
    files += [package / f"{name}.py" for name in others]
    sources = b"".join(file.read_bytes() for file in files)
    parts = (to_json(cfg), topology, str(slices), jax.__version__)
    key = hashlib.sha256("\n".join(parts).encode() + sources).hexdigest()[:24]
    return cache / f"{key}.json"


def compile_and_measure(
    cfg: Config,
    mesh: Mesh,
    topology: str,
    slices: int,
    cache: Path | None,
    log: Callable[[str], None] | None,
) -> dict[str, Any]:
    """What a compilation shows: memory, and `read_program`; cached if it can be."""
    path = cache_file(cfg, topology, slices, cache) if cache else None
    if path and path.exists():
        result = json.loads(path.read_text())
        if "refused" in result:
            raise OutOfMemoryError(*result["refused"])
        return result
    try:
        with progress(log, f"{topology}, {label(cfg)}"):
            abstract, compiled = compile_for(cfg, mesh)
        program = read_program(compiled.as_text(), dict(mesh.shape))
        result = {"memory": memory(abstract, compiled), **program}
    except OutOfMemoryError as e:
        if path:
            write_text(path, json.dumps({"refused": [str(e), e.used, e.limit]}))
        raise
    if path:
        write_text(path, json.dumps(result))
    return result


def label(cfg: Config) -> str:
    """ "data 16 x fsdp 16, remat minimal, microbatches 1": what `search` chooses."""
    return (
        f"{mesh_name(dataclasses.asdict(cfg.mesh))}, remat {cfg.compute.remat}, "
        f"microbatches {cfg.compute.microbatches}"
    )
