"""Runs side by side: several small runs as one program, by `jax.vmap` over runs.

Runs that differ in stages and seed alone (mixtures, learning rates, token weights,
initialisation, order of data) are trained in lockstep by one compiled step. What
differs is passed to it: batches, rates and tables have an axis of runs in front. A
small model leaves most of an accelerator idle; many of them fill it, and there is one
compilation for all. The sums of a vmapped product are in another order, so the last
bits are not those of a run alone.

There is no run folder: a group that is interrupted begins anew. One device is used.

Shape suffixes: N runs, K steps, B batch, T length, G languages, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gamayun_jax.config import Config, MeshConfig, UserError, to_dict
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.loader import LocalBatches
from gamayun_jax.data.plan import DataPlan
from gamayun_jax.data.token_weights import build_token_weights
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import TokenWeights
from gamayun_jax.study.measures import items_of, measured
from gamayun_jax.study.records import Items
from gamayun_jax.training.average import average_weights
from gamayun_jax.training.checkpoint import TrainState
from gamayun_jax.training.optimizer import learning_rate
from gamayun_jax.training.step import init_state, stage_tokens, update

OWN = ("name", "seed", "stages", "corpus")  # fields in which runs of a group may differ


class Member(NamedTuple):
    """A run of a group.

    Attributes:
      average_tokens: as `design.Arm.average_tokens`.
      measures: as `registration.MadeArm.measures`, the same for all runs.
    """

    cfg: Config
    plan: DataPlan
    average_tokens: int = 0
    measures: tuple[str, ...] = ()


class Trained(NamedTuple):
    """What a run of a group ends with.

    Attributes:
      evaluations: items of the last parameters, and of their average
        where the run asks for one; none if these are not finite.
      curve: the means of every log.every_steps steps, as records.py says.
      in_a_row: most steps in a row whose loss or gradient was not finite.
    """

    evaluations: list[Items]
    curve: list[dict[str, Any]]
    in_a_row: int


def group_key(cfg: Config) -> str:
    """Equal for configs that can be trained side by side."""
    plain = to_dict(cfg)
    return repr([plain[k] for k in plain if k not in OWN] + [cfg.total_steps])


def check_members(members: Sequence[Member]) -> None:
    """Raise UserError for what a group cannot do and a run alone can."""
    for cfg in (m.cfg for m in members):
        if cfg.optimizer.first_batch_size:
            raise UserError(
                f"{cfg.name}: optimizer.first_batch_size is not done side by side: run "
                "this study without --side-by-side"
            )
        if cfg.divergence.spike:
            raise UserError(
                f"{cfg.name}: divergence.spike is not looked at side by side: run this "
                "study without --side-by-side, or set it to 0"
            )
        for stage in cfg.stages[1:]:
            if stage.transition.moments == "reset":
                raise UserError(
                    f"{cfg.name}: stages.{stage.name}.transition.moments=reset is not "
                    "done side by side: run this study without --side-by-side"
                )
    if len({group_key(m.cfg) for m in members}) > 1:
        raise ValueError("runs side by side may differ in stages and seed alone")


def train_group(
    members: Sequence[Member], corpus: Corpus, log: Callable[[str], None]
) -> list[Trained]:
    """Train runs side by side to their ends, and evaluate them.

    Args:
      members: of one `group_key`, all on this corpus.
      log: gets a line at every record.
    """
    check_members(members)
    cfg = members[0].cfg
    # Kernels for long sequences do not pay here, and have no axis of runs.
    plain = dataclasses.replace(cfg.compute, attention="xla")
    cfg = dataclasses.replace(cfg, compute=plain)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        ended = run_steps(members, cfg, corpus, log)
        return evaluate_group(members, cfg, corpus, mesh, *ended)


def run_steps(
    members: Sequence[Member], cfg: Config, corpus: Corpus, log: Callable[[str], None]
) -> tuple[Any, Any, list[list[dict[str, Any]]], np.ndarray]:
    """All steps of a group: the last parameters, their averages (None where no run asks
    for one), curves, most skipped steps in a row [N]."""
    seeds = jnp.array([m.cfg.seed for m in members])
    make = jax.jit(jax.vmap(lambda seed: init_state(cfg, jax.random.key(seed))))
    states = make(seeds)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(states, rows_2N, batch, tables, rates_NK, k):
        one = functools.partial(vmapped_update, cfg=cfg)
        rates_N = jnp.take(rates_NK, k, axis=1)
        states, metrics = jax.vmap(one)(states, batch, tables, rates_N)
        return states, count_in_a_row(rows_2N, metrics["skipped"]), metrics

    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    blend = jax.jit(blend_params, donate_argnums=0)
    rates = jnp.stack([rates_of(m.cfg) for m in members])
    shares_NK = average_shares(members)
    averages = None
    curves: list[list[dict[str, Any]]] = [[] for _ in members]
    rows_2N: Any = jnp.zeros((2, len(members)))
    pending: list[Any] = [None] * len(members)
    sums, tables, begun = None, None, [-1] * len(members)
    for k, batch in enumerate(group_batches(members, cfg, corpus)):
        stages = [m.cfg.stage_at(k) for m in members]
        if stages != begun:
            tables, begun = group_tables(members, corpus, stages), stages
        states, rows_2N, metrics = step(states, rows_2N, batch, tables, rates, k)
        metrics.pop("learning_rate")
        sums = metrics if sums is None else add(sums, metrics)
        if shares_NK[:, k].any():
            averages = averages or jax.tree.map(jnp.zeros_like, states.params)
            averages = blend(averages, states.params, shares_NK[:, k])
        due = [m.cfg.ends_record(k + 1) for m in members]
        if not any(due):
            continue
        read = jax.device_get(sums)
        sums = None
        for n, curve in enumerate(curves):
            own = jax.tree.map(operator.itemgetter(n), read)
            pending[n] = jax.tree.map(np.add, pending[n], own) if pending[n] else own
            if due[n]:
                curve.append(curve_point(cfg, k + 1, pending[n]))
                pending[n] = None
        if all(due):
            mean = np.mean([c[-1]["loss"] for c in curves])
            log(f"step {k + 1}/{cfg.total_steps}, mean loss {mean:.4f}")
    return states.params, averages, curves, np.asarray(rows_2N[1])


def count_in_a_row(rows_2N: jax.Array, skipped_N: jax.Array) -> jax.Array:
    """Of each run how many of the last steps in a row were skipped, and the most so
    far, float32 [2, N]; `skipped_N`: 1 where this step was."""
    now_N = (rows_2N[0] + 1) * skipped_N
    return jnp.stack([now_N, jnp.maximum(rows_2N[1], now_N)])


def vmapped_update(
    state: TrainState, batch: Any, tables: TokenWeights, rate: jax.Array, cfg: Config
) -> tuple[TrainState, dict[str, Any]]:
    """`step.update` with its config last, for vmap over the rest."""
    return update(state, batch, cfg, tables, rate)


def rates_of(cfg: Config) -> jax.Array:
    """The learning rate of every step, float32 [K]; as `step.train_step` has it."""
    steps = jnp.arange(cfg.total_steps, dtype=jnp.int32)
    tokens = (steps + 0.5) * float(cfg.tokens_per_step)
    parts = []
    for stage, (spec, count) in enumerate(
        zip(cfg.stages, cfg.stage_steps(), strict=True)
    ):
        first = cfg.stage_start(stage)
        begin, end = stage_tokens(cfg, stage, 0)
        rate = learning_rate(spec.schedule, tokens[first : first + count], begin, end)
        parts.append(jnp.broadcast_to(rate, (count,)))
    return jnp.concatenate(parts)


def average_shares(members: Sequence[Member]) -> np.ndarray:
    """float32 [N, K]: the weight of the parameters after each step in a run's average;
    as `gamayun average --window` weighs the run's checkpoints."""
    shares = np.zeros((len(members), members[0].cfg.total_steps), np.float32)
    for n, (cfg, _, tokens, _) in enumerate(members):
        if not tokens:
            continue
        total, every = cfg.total_steps, cfg.checkpoint.every_steps
        ends = itertools.accumulate(cfg.stage_steps())
        saved = sorted({*range(every, total + 1, every), *ends})
        steps = [s for s in saved if (total - s) * cfg.tokens_per_step <= tokens]
        shares[n, np.array(steps) - 1] = average_weights(steps, "uniform")
    return shares


def blend_params(averages: Any, params: Any, shares_N: jax.Array) -> Any:
    """Adds each run's parameters times its share; 0 leaves a run's sum as it is."""

    def one(total: jax.Array, x: jax.Array) -> jax.Array:
        return total + x * shares_N.reshape(-1, *(1,) * (x.ndim - 1))

    return jax.tree.map(one, averages, params)


def group_tables(
    members: Sequence[Member], corpus: Corpus, stages: Sequence[int]
) -> TokenWeights:
    """Token weights of each run's stage: float32 [N, G] and [N, V]."""
    made = [
        build_token_weights(m.cfg, corpus, m.plan.language_shares(m.cfg, stage), stage)
        for m, stage in zip(members, stages, strict=True)
    ]
    by_language, by_token = zip(*made, strict=True)
    return TokenWeights(np.stack(by_language), np.stack(by_token))


class GroupBatches:
    """The batches of all runs of a group by the step: arrays [N, B, T]."""

    def __init__(self, members: Sequence[Member], cfg: Config, corpus: Corpus):
        held = {name: read_all(corpus, name) for name in members[0].plan.sources}
        rows = np.arange(cfg.data.batch_size)
        self._runs = [
            LocalBatches(
                m.cfg, corpus, m.plan, rows, records=[held[n] for n in m.plan.sources]
            )
            for m in members
        ]

    def __len__(self) -> int:
        return len(self._runs[0])

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        each = [run[step] for run in self._runs]
        return {name: np.stack([b[name] for b in each]) for name in each[0]}


def read_all(corpus: Corpus, source: str) -> np.ndarray:
    """All records of a source, [records, record_tokens + 1]: read once for all runs."""
    records = corpus.records(source)
    return np.stack([records[k] for k in range(len(records))])


def group_batches(
    members: Sequence[Member], cfg: Config, corpus: Corpus
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a group in order, made ahead by threads."""
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    source: Any = GroupBatches(members, cfg, corpus)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def curve_point(cfg: Config, step: int, sums: Any) -> dict[str, Any]:
    """Means of the steps since the last point, of one run."""
    count = np.maximum(sums["languages"]["targets"], 1)
    nll = sums["languages"]["nll"] / count
    return {
        "step": step,
        "tokens": step * cfg.tokens_per_step,
        "loss": float(sums["loss_sum"] / max(sums["target_count"], 1)),
        "languages": {
            name: round(float(nll[g]), 4)
            for g, name in enumerate(cfg.languages)
            if sums["languages"]["targets"][g]
        },
    }


def evaluate_group(
    members: Sequence[Member],
    cfg: Config,
    corpus: Corpus,
    mesh: Mesh,
    params: Any,
    averages: Any,
    curves: list[list[dict[str, Any]]],
    in_a_row: np.ndarray,
) -> list[Trained]:
    """Each run's last parameters on the held-out sets and tasks, and its average's."""
    evaluators = measured(cfg, corpus, mesh, members[0].measures)
    pick = jax.jit(lambda tree, n: jax.tree.map(lambda x: x[n], tree))
    is_finite = jax.jit(
        lambda tree: jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])
    )
    made = []
    for n, member in enumerate(members):
        ends = [pick(params, n)]
        if member.average_tokens:
            ends.append(pick(averages, n))
        evaluations = []
        if all(bool(is_finite(end).all()) for end in ends):
            evaluations = [items_of(evaluators, end) for end in ends]
        made.append(Trained(evaluations, curves[n], int(in_a_row[n])))
    return made
