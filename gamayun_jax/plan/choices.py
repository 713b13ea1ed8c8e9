"""Meshes, microbatches, remat policies: ranked by a roofline, the best compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gamayun_jax.config import Config, MeshConfig, UserError
from gamayun_jax.plan import aot, roofline
from gamayun_jax.plan.roofline import Assumptions
from gamayun_jax.plan.topology import chip_name, dimensions
from gamayun_jax.training.chips import CHIPS


def is_asked_for(mesh: MeshConfig, asked: MeshConfig) -> bool:
    """Whether a mesh is what a config asks for, which may leave an axis open (-1)."""
    sizes, wanted = dataclasses.astuple(mesh), dataclasses.astuple(asked)
    return all(w in (-1, n) for n, w in zip(sizes, wanted, strict=True))


def candidates(
    cfg: Config, devices: int, slices: int, hbm: float, meshes: bool = True
) -> list[Config]:
    """Configs of the same batch that may fit: microbatches, remat policy, and meshes.

    Without `meshes`, only the config's own mesh. A slice of a weight of fewer than 16
    rows is less than a tile of bfloat16, and then whole gradients are all-reduced.
    """
    made = []
    powers = [2**n for n in range(devices.bit_length())]
    for tensor, fsdp, microbatches, remat in itertools.product(
        (1, 2, 4), powers, (1, 2, 4, 8), ("minimal", "attention", "full")
    ):
        data, rest = divmod(devices, fsdp * tensor)
        if rest or data < slices or data % slices:
            continue
        mesh = MeshConfig(data, fsdp, tensor)
        if meshes and fsdp > 1 and cfg.model.d_model // fsdp < 16:
            continue
        if not meshes and not is_asked_for(mesh, cfg.mesh):
            continue
        if cfg.data.batch_size % (data * fsdp * microbatches):
            continue
        changes: dict[str, Any] = dict(microbatches=microbatches, remat=remat)
        compute = dataclasses.replace(cfg.compute, **changes)
        new = dataclasses.replace(cfg, compute=compute, mesh=mesh)
        if roofline.memory_estimate(new, dataclasses.asdict(mesh)) < hbm:
            made.append(new)
    return made


def least_seconds(
    cfg: Config, topology: str, slices: int, assume: Assumptions
) -> tuple[float, float]:
    """Seconds of a step by the roofline with the least traffic, and of all resources.

    By the second, of equal times, the one with less of everything else comes first.
    """
    name, shape = chip_name(topology), dataclasses.asdict(cfg.mesh)
    least = roofline.least_moved_bytes(cfg, shape)
    times = roofline.step_seconds(
        cfg, shape, CHIPS[name], least, dimensions(name), slices, assume
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
    cfg = dataclasses.replace(aot.for_tpu(cfg), mesh=MeshConfig(**made["mesh"]))
    topology, slices = made["topology"], made["slices"]
    step, own = made["seconds"]["step"], least_seconds(cfg, topology, slices, assume)[0]
    devices, known = math.prod(made["mesh"].values()), []
    for c in candidates(cfg, devices, slices, made["hbm_bytes"], meshes=False):
        seconds = least_seconds(c, topology, slices, assume)[0]
        compiled = bool(cache and aot.cache_file(c, topology, slices, cache).exists())
        if compiled:
            try:
                plan = aot.plan_topology(
                    c, topology, slices, assume=assume, cache=cache
                )
            except aot.OutOfMemoryError:
                continue
            seconds = plan["seconds"]["step"]
        elif step > 1.01 * own:
            continue
        if seconds < 0.99 * step:
            how = (c.compute.microbatches, c.compute.remat)
            known.append((not compiled, seconds, *how))
    if not known:
        return None
    estimated, seconds, microbatches, remat = min(known)  # first the compiled ones
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
    cfg = aot.for_tpu(cfg)
    hbm = CHIPS[chip_name(topology)].hbm_bytes
    devices = len(aot.topology_devices(topology, slices))
    left = [
        (least_seconds(c, topology, slices, assume), c)
        for c in candidates(cfg, devices, slices, hbm, meshes)
    ]

    def rank(entry: tuple[tuple[float, float], Config]) -> Any:
        seconds, c = entry
        own = c.compute == cfg.compute and is_asked_for(c.mesh, cfg.mesh)
        return not own, seconds

    left.sort(key=rank)
    count = len(left)
    plans: list[dict[str, Any]] = []
    best, refused = math.inf, ""
    while left and count - len(left) < 2 * compiled + 2:
        if len(plans) >= compiled and min(seconds for (seconds, _), _ in left) >= best:
            break
        _, c = left.pop(0)
        try:
            plans.append(
                aot.plan_topology(c, topology, slices, price, assume, cache, log)
            )
            seconds = plans[-1]["seconds"]["step"]
            best, text = min(best, seconds), f"{seconds:.3f} s a step"
        except UserError as e:
            refused = text = str(e)
        if log:
            log(f"{topology}, {aot.label(c)}: {text}")
    if not plans:
        raise UserError(
            f"nothing of {count} candidates fits {slices} x {topology}"
            + (f": {refused}" if refused else f" with batch_size={cfg.data.batch_size}")
        )
    plans.sort(key=lambda p: p["seconds"]["step"])
    plans[0]["not_compiled"] = sum(seconds < best for (seconds, _), _ in left)
    return plans


def table(
    cfg: Config,
    names: Sequence[str],
    log: Callable[[str], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """The best plan of the config's own mesh for each of "[SLICES*]TOPOLOGY".

    The fastest of what `search` compiles, so never slower than the config's own.

    Raises:
      UserError: an unknown topology, no compiler, or nothing fits any of them.
    """
    wanted = []
    for name in names:
        m = re.fullmatch(r"(?:([1-9]\d*)\*)?(.*)", name)
        assert m  # it matches anything
        wanted.append((m[2], int(m[1] or 1)))
        aot.topology_devices(*wanted[-1])  # no compiler, or none of its topologies
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
