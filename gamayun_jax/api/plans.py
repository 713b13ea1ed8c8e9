"""What a config's training step takes on TPUs that need not be there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from gamayun_jax.api.configs import check_config
from gamayun_jax.config import AnyPath, Config, UserError
from gamayun_jax.plan import aot, choices, preemption, roofline
from gamayun_jax.plan import text as plan_text
from gamayun_jax.storage import as_path


class Plans(list[dict[str, Any]]):
    """Plans as plain data, the best one first; a notebook shows them as text, or as a
    table where there are several.

    Example:
      >>> plans = gx.plan(cfg, "v5e:2x2")  # doctest: +SKIP
      >>> plans[0]["seconds"]["step"], plans[0]["memory"]["peak"]  # doctest: +SKIP
      (0.0016, 15728640.0)
    """

    def __str__(self) -> str:
        if len(self) == 1:
            return plan_text.format_plan(self[0])
        return self.table()

    def table(self) -> str:
        """One plan a row, in Markdown; and what is not known of them."""
        return plan_text.format_table(self)

    def __repr__(self) -> str:
        where = ", ".join(f"{p['slices']} x {p['topology']}" for p in self)
        return f"<Plans for {where}>"

    def _repr_markdown_(self) -> str:
        return f"```\n{self}\n```" if len(self) == 1 else str(self)


def plan(
    cfg: Config,
    topology: str | Sequence[str],
    *,
    slices: int = 1,
    search: bool = False,
    price: float = 0.0,
    currency: str = "",
    efficiency: float = 0.6,
    spot: preemption.Preemptions | float = 0.0,
    cache: AnyPath = "build/plan",
    log: Callable[[str], None] | None = print,
) -> Plans:
    """Compile the training step for TPUs that need not be there: memory, time, cost.

    For TPUs it needs the extra `tpu` (libtpu), on Linux: `pip install -e '.[tpu]'`, and
    takes one to five minutes per topology; what was compiled before is read from
    `cache`. For GPUs ("h100:8": those of one host) nothing is compiled; what is then a
    rough estimate or a bound is said in `unknown`.

    Example:
      >>> gx.plan(cfg, "v5e:2x2")  # doctest: +SKIP
      <Plans for 1 x v5e:2x2>

    Args:
      topology: "CHIP:AxB", such as "v5e:16x16"; or several, with "N*" before one for N
        slices: a row of a table for each.
      slices: of one topology, joined by the data center's network.
      search: rank meshes, microbatches and remat policies of the config's batch.
      price: of a chip-hour; 0: no costs are given.
      currency: of the price, for the text.
      efficiency: share of the dense peak that the step reaches when compute binds.
      spot: preemptions of the run a day, or `Preemptions` with the times of a restart,
        a save and a queue; the plan's `spot` then has days, cost and the best
        interval between checkpoints, by simulation.
      cache: folder of compilations' results.
      log: takes lines about the progress; None: none.

    Raises:
      UserError: no compiler, unknown topology, sizes that do not divide, or a step
        that does not fit.
    """
    check_config(cfg)
    names = [] if isinstance(topology, str) else list(topology)
    if not isinstance(spot, preemption.Preemptions):
        spot = preemption.Preemptions(spot)
    if names and (search or slices > 1):
        raise UserError("search and slices go with one topology (N*CHIP:AxB: slices)")
    assume, cache = roofline.Assumptions(compute=efficiency), as_path(cache)
    options: dict[str, Any] = dict(price=price, assume=assume, cache=cache, log=log)
    with without_compilation_cache():
        if not isinstance(topology, str):
            plans = choices.table(cfg, names, **options)
        elif search:
            plans = choices.search(cfg, topology, slices, **options)
        else:
            plans = [aot.plan_topology(cfg, topology, slices, **options)]
            plans[0]["faster"] = choices.faster(cfg, plans[0], assume, cache)
    for made in plans:
        made["currency"] = currency
        if spot.per_day:
            made["spot"] = preemption.on_spot(made, spot, cfg.checkpoint.every_steps)
    return Plans(plans)


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """JAX's own cache cannot read back what was compiled for absent devices."""
    former = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", former)
