"""The real train step, compiled ahead of time for TPUs that are not there.

The TPU compiler (libtpu, the extra `tpu`) runs on any Linux machine and knows each
chip's memory: what it compiles fits, and what it rejects does not. Nothing is executed;
times are a roofline (roofline.py) with its assumptions named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from gamayun_jax.config import Config, MeshConfig, UserError, to_json
from gamayun_jax.data.files import write_text
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import TokenWeights
from gamayun_jax.model.weights import flops_per_token, parameter_count
from gamayun_jax.plan import hlo, roofline
from gamayun_jax.plan.roofline import Assumptions
from gamayun_jax.plan.text import mesh_name
from gamayun_jax.training import step
from gamayun_jax.training.chips import CHIPS, GIB

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


TICK_SECONDS = 30.0
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


def read_program(text: str, mesh: Mapping[str, int]) -> dict[str, Any]:
    """What the text of a compiled step says: `collectives`, `cycles`, and `unknown`.

    The text is the compiler's own and differs between its versions: what cannot be
    read is None and named in `unknown`, so that what is known is not lost with it.
    """
    found: dict[str, Any] = {"collectives": None, "cycles": None, "unknown": []}
    try:
        found["unknown"] = [
            f"how often the loop {name} runs: its traffic and cycles count once"
            for name in hlo.unknown_loops(text)
        ]
        found["cycles"] = hlo.estimated_cycles(text)
        found["collectives"] = hlo.summarise(hlo.collectives(text, mesh))
    except Exception as e:  # whatever a text that nobody foresaw gives rise to
        names = {"cycles": "the compiler's estimates", "collectives": "the traffic"}
        lost = " and ".join(names[k] for k in names if found[k] is None)
        found["unknown"].append(f"{lost} ({type(e).__name__}: {e})")
    return found


@contextlib.contextmanager
def progress(log: Callable[[str], None] | None, what: str) -> Iterator[None]:
    """Say what is being compiled, and every half minute that it still is."""
    if log is None:
        yield
        return
    log(f"{what}: compiling, which takes minutes")
    done, start = threading.Event(), time.monotonic()

    def tick() -> None:
        while not done.wait(TICK_SECONDS):
            log(f"{what}: still compiling after {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


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

    What could not be read from the compiled program is None or counted in part, and
    named in `unknown`; its time is then no less than that of the least traffic.

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
    chip = chip_name(topology)
    devices = topology_devices(topology, slices)
    mesh = sharding.make_mesh(cfg.mesh, devices)
    shape = {k: int(v) for k, v in mesh.shape.items()}
    # Said in full, so that -1 and its size are one compilation.
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(**shape))
    sharding.check_divisible(cfg, mesh)
    measured = _compiled(cfg, mesh, topology, slices, cache, log)
    least = roofline.least_moved_bytes(cfg, shape)
    moved, counted = least, None
    if measured["collectives"] is not None:
        moved = dict.fromkeys(shape, 0.0)
        for row in measured["collectives"]:
            # Over several axes at once: the slowest one counts, which is the first.
            moved[row["axes"][0]] += row["bytes"]
        counted = sum(moved.values())
        if measured["unknown"]:  # too little is counted: nothing gets faster by that
            moved = {k: max(n, least[k]) for k, n in moved.items()}
    seconds = roofline.step_seconds(
        cfg, shape, CHIPS[chip], moved, TOPOLOGIES[chip][0], slices, assume
    )
    # The compiler's estimates of its operations, without kernels and without waiting
    # for collectives: less than this it cannot be either.
    if measured["cycles"] is not None:
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
        "reduce_dtype": cfg.compute.reduce_dtype,
        "unknown": measured["unknown"],
        "collectives": measured["collectives"],
        "moved_bytes": counted,
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


def cache_file(cfg: Config, topology: str, slices: int, cache: Path) -> Path:
    """Where the result of a compilation is kept: by all that it depends on."""
    package = Path(__file__).parents[1]
    sources = b"".join(
        (package / f"{name}.py").read_bytes()
        for name in (
            *("model/attention", "model/loss", "model/sharding", "model/transformer"),
            *("plan/hlo", "training/optimizer", "training/step"),
        )
    )
    parts = (to_json(cfg), topology, str(slices), jax.__version__)
    key = hashlib.sha256("\n".join(parts).encode() + sources).hexdigest()[:24]
    return cache / f"{key}.json"


def _compiled(
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
        found = json.loads(path.read_text())
        if "refused" in found:
            raise OutOfMemoryError(*found["refused"])
        return found
    try:
        shape = {k: int(v) for k, v in mesh.shape.items()}
        with progress(log, f"{topology}, {label(cfg, shape)}"):
            abstract, compiled = compile_for(cfg, mesh)
        result = {
            "memory": memory(abstract, compiled),
            **read_program(compiled.as_text(), shape),
        }
    except OutOfMemoryError as e:
        if path:
            write_text(path, json.dumps({"refused": [str(e), e.used, e.limit]}))
        raise
    if path:
        write_text(path, json.dumps(result))
    return result


def label(cfg: Config, mesh: Mapping[str, int]) -> str:
    """ "data 16 x fsdp 16, remat minimal, microbatches 1": what `search` chooses."""
    return (
        f"{mesh_name(mesh)}, remat {cfg.compute.remat}, "
        f"microbatches {cfg.compute.microbatches}"
    )


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


def least_seconds(
    cfg: Config, topology: str, slices: int, assume: Assumptions
) -> tuple[float, float]:
    """Seconds of a step by the roofline with the least traffic, and of all resources.

    By the second, of equal times, the one with less of everything else comes first.
    """
    name, shape = chip_name(topology), dataclasses.asdict(cfg.mesh)
    times = roofline.step_seconds(
        cfg,
        shape,
        CHIPS[name],
        roofline.least_moved_bytes(cfg, shape),
        TOPOLOGIES[name][0],
        slices,
        assume,
    )
    return times["step"], sum(times.values())


def faster(
    cfg: Config,
    made: Mapping[str, Any],
    assume: Assumptions = Assumptions(),
    cache: Path | None = None,
) -> dict[str, Any] | None:
    """A faster remat policy or number of microbatches for the config of a plan.

    Nothing is compiled: what was compiled before is in the cache, and of other settings
    the roofline is known alone, which is not asked where the plan takes longer than
    its own.

    Returns:
      `set` (as on the command line), `seconds`, and whether it was `compiled`; None
      where nothing is known to be faster.
    """
    mesh = MeshConfig(**made["mesh"])
    cfg = dataclasses.replace(for_tpu(cfg), mesh=mesh)
    topology, slices = made["topology"], made["slices"]
    step, own = made["seconds"]["step"], least_seconds(cfg, topology, slices, assume)[0]
    found = []
    for c in candidates(cfg, made["chips"], slices, made["hbm_bytes"], meshes=False):
        seconds = least_seconds(c, topology, slices, assume)[0]
        compiled = bool(cache and cache_file(c, topology, slices, cache).exists())
        if compiled:
            try:
                p = plan_topology(c, topology, slices, assume=assume, cache=cache)
            except OutOfMemoryError:
                continue
            seconds = p["seconds"]["step"]
        elif step > 1.01 * own:
            continue
        if seconds < 0.99 * step:
            how = (c.compute.microbatches, c.compute.remat)
            found.append((not compiled, seconds, *how))
    if not found:
        return None
    estimated, seconds, microbatches, remat = min(found)  # first what is known
    changed = {"remat": remat, "microbatches": microbatches}
    text = " ".join(
        f"compute.{k}={v}" for k, v in changed.items() if getattr(cfg.compute, k) != v
    )
    return {"set": text, "seconds": seconds, "compiled": not estimated}


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

    All are ranked by the roofline with the least traffic. The config's own choice is
    compiled first, then the others in that order until `compiled` of them fit and no
    estimate is below the best plan's time: a plan may take longer than its estimate,
    not less. At most twice as many and two are compiled; how many could be faster yet
    and were not is the first plan's `not_compiled`.

    Raises:
      UserError: nothing fits.
    """
    cfg = for_tpu(cfg)
    chip = CHIPS[chip_name(topology)]
    chips = len(topology_devices(topology, slices))

    def estimate(c: Config) -> tuple[float, float]:
        return least_seconds(c, topology, slices, assume)

    found = candidates(cfg, chips, slices, chip.hbm_bytes, meshes)
    asked = dataclasses.asdict(cfg.mesh)
    ranked = sorted(found, key=estimate)
    ranked.sort(  # a stable sort
        key=lambda c: (
            not (
                c.compute == cfg.compute
                and all(
                    asked[k] in (-1, n) for k, n in dataclasses.asdict(c.mesh).items()
                )
            )
        )
    )
    plans: list[dict[str, Any]] = []
    refused = ""
    left = [(estimate(c)[0], c) for c in ranked]
    while left and len(ranked) - len(left) < 2 * compiled + 2:
        best = min((p["seconds"]["step"] for p in plans), default=math.inf)
        if len(plans) >= compiled and min(seconds for seconds, _ in left) >= best:
            break
        _, c = left.pop(0)
        try:
            plans.append(plan_topology(c, topology, slices, price, assume, cache, log))
            text = f"{plans[-1]['seconds']['step']:.3f} s a step"
        except UserError as e:
            refused = text = str(e)
        if log:
            log(f"{topology}, {label(c, dataclasses.asdict(c.mesh))}: {text}")
    if not plans:
        raise UserError(
            f"nothing of {len(ranked)} candidates fits {slices} x {topology}"
            + (f": {refused}" if refused else f" with batch_size={cfg.data.batch_size}")
        )
    plans.sort(key=lambda p: p["seconds"]["step"])
    best = plans[0]["seconds"]["step"]
    plans[0]["not_compiled"] = sum(seconds < best for seconds, _ in left)
    return plans


def table(
    cfg: Config,
    names: Sequence[str],
    log: Callable[[str], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """The best plan of the config's own mesh for each of "[SLICES*]TOPOLOGY".

    The fastest of what `search` compiles, so never slower than the config's own.
    """
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
            )[:1]
        except UserError as e:
            if log:
                log(str(e))
    if not plans:
        raise UserError(f"nothing fits any of {', '.join(names)}")
    return plans
