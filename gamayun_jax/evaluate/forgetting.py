"""Forgetting: the loss on training examples against how long ago they were served.

A plan says at which step each example was served, so a checkpoint can be asked about a
sample of them, even over the steps at which they were: what a model still knows of an
example shows in its loss, beside that of examples of the same sources that were never
served. Only checkpoints, their meta and the corpus are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gamayun_jax.config import Config, UserError
from gamayun_jax.data.corpus import Corpus, open_corpus
from gamayun_jax.data.files import write_json
from gamayun_jax.data.ledger import by_language
from gamayun_jax.data.loader import LocalBatches
from gamayun_jax.data.plan import DataPlan, past_plan
from gamayun_jax.evaluate.scoring import batches, on_devices, token_scores
from gamayun_jax.interop.load_model import load_params
from gamayun_jax.model import sharding
from gamayun_jax.model.transformer import Transformer, unembedding
from gamayun_jax.training.checkpoint import Checkpoints
from gamayun_jax.training.corpus_changes import check_contents
from gamayun_jax.training.run_folder import checkpoint_steps, find_checkpoint
from gamayun_jax.training.run_meta import RunMeta

FILE = "forgetting.json"


class Probe(NamedTuple):
    """An example to be scored: where it is (DataPlan.lookup), and the step at which it
    was served last; 0: never."""

    dataset: int
    position: int
    step: int


def served_probes(
    plan: DataPlan, order: Sequence[Any], source: str, step: int, count: int
) -> list[Probe]:
    """Up to `count` examples of a source, even over those served up to a step.

    One that was served again after its place in the sample stands for its last time.

    Args:
      order: of each dataset, position -> example; see LocalBatches.
    """
    served = plan.served(step)[source]
    chosen = np.unique((np.arange(count) + 0.5) * served / count).astype(np.int64)
    chosen = np.unique(chosen[chosen < served])
    size = plan.runs[0].curriculum.sources[source]
    if plan.consumed(step)[source] > size or len(plan.runs) > 1:
        ends: dict[int, int] = {}
        for number in range(int(chosen[0]) if len(chosen) else 0, served):
            dataset, position = plan.place(source, number)
            ends[order[dataset][position]] = number
        wanted = {
            ends[order[dataset][position]]
            for dataset, position in (plan.place(source, n) for n in chosen.tolist())
        }
        chosen = np.array(sorted(wanted), np.int64)
    return [
        Probe(*plan.place(source, n), plan.step_of(source, n)) for n in chosen.tolist()
    ]


def unseen_probes(plan: DataPlan, source: str, step: int, count: int) -> list[Probe]:
    """Up to `count` examples of a source that neither this run nor those before it
    served, even over what is left; none where a stage restarted the cursors."""
    if len(plan.runs) > 1:
        return []
    begin = plan.consumed(step)[source]
    left = plan.runs[0].curriculum.sources[source] - begin
    number = plan.sources.index(source)
    if left <= 0:
        return []
    places = np.unique((np.arange(count) + 0.5) * left / count).astype(np.int64)
    return [Probe(number, begin + n, 0) for n in np.unique(places).tolist()]


def shared_out(count: int, amounts: Mapping[str, int]) -> dict[str, int]:
    """A count divided over names by their amounts, at least 1 where there is any."""
    total = max(sum(amounts.values()), 1)
    return {k: max(1, round(count * n / total)) for k, n in amounts.items() if n > 0}


class Losses:
    """Sums of nll and targets of examples. Must be used in the mesh and the rules."""

    def __init__(self, cfg: Config, mesh: Mesh):
        self._mesh = mesh
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-cfg.evaluation.batch_size // ways) * ways
        model = Transformer(cfg.model, cfg.compute)

        def step(params, batch):
            x_BTD: Any = model.apply(
                {"params": params},
                *(batch[k] for k in ("inputs", "positions", "segment_ids")),
            )
            nll_BT, _ = token_scores(
                x_BTD, unembedding(params), batch["targets"], cfg.compute.loss_chunk
            )
            mask_BT = batch["loss_mask"]
            return jnp.stack([(nll_BT * mask_BT).sum(-1), mask_BT.sum(-1)], -1)

        self._step = jax.jit(step, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Any, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [N, 2]: nll (nats) and targets of each of N examples."""
        found = [
            np.asarray(self._step(params, on_devices(batch, self._mesh)))
            for batch in batches(rows, self._batch)
        ]
        return np.concatenate(found)[: len(rows["targets"])]


def plan_of(meta: RunMeta, corpus: Corpus) -> DataPlan:
    """The plan of all that a checkpoint has seen, with the sources' languages."""
    cfg = meta.config
    plan = past_plan(meta.step, cfg.data.batch_size, meta.curricula, meta.rollbacks)
    languages = [cfg.languages.index(corpus.sources[s].language) for s in plan.sources]
    return dataclasses.replace(plan, languages=tuple(languages))


def forgetting_at(
    cfg: Config, params: Any, meta: RunMeta, mesh: Mesh, corpus: Corpus, count: int
) -> dict[str, Any]:
    """Language -> what a checkpoint says of its examples.

    Args:
      count: examples of each language, served and unseen ones each.

    Returns:
      `last_seen`: tokens since the language's last example; `examples`: rows of tokens
      since the example was last served, nll (nats) and targets; `unseen`: the sums of
      nll and targets of examples that were never served, None where there are none.
    """
    plan = plan_of(meta, corpus)
    data = LocalBatches(cfg, corpus, plan, np.arange(1))
    losses, served = Losses(cfg, mesh), plan.served(meta.step)
    found: dict[str, Any] = {}
    for language, sources in by_language(plan.sources).items():
        amounts = {s: served[s] for s in sources}
        if not any(amounts.values()):
            continue
        probes: list[Probe] = []
        for source, n in shared_out(count, amounts).items():
            probes += served_probes(plan, data.order, source, meta.step, n)
            probes += unseen_probes(plan, source, meta.step, n)
        dataset, position, steps = (np.array(x) for x in zip(*probes, strict=True))
        sums = losses(params, data.read(dataset, position)).astype(float)
        since = (meta.step - steps) * cfg.tokens_per_step
        seen = steps > 0
        last = max(plan.step_of(s, n - 1) for s, n in amounts.items() if n)
        found[language] = {
            "last_seen": (meta.step - last) * cfg.tokens_per_step,
            "examples": [
                [int(t), round(nll, 3), int(targets)]
                for t, (nll, targets) in zip(since[seen], sums[seen], strict=True)
            ],
            "unseen": sums[~seen].sum(0).tolist() if (~seen).any() else None,
        }
    return found


def forgetting(
    run: Path,
    count: int = 64,
    steps: Iterable[int] = (),
    corpus_folder: Path | None = None,
) -> dict[str, Any]:
    """What checkpoints of a run still know of the examples they saw; writes
    RUN/forgetting.json.

    Args:
      count: examples of each language.
      steps: of checkpoints; default: those at the stages' ends.
      corpus_folder: default: the run's own.

    Raises:
      UserError: no such checkpoint, a corpus that is gone or another, a model that was
        not trained here.
    """
    find_checkpoint(run)  # says what is missing
    there = checkpoint_steps(run)
    if missing := set(steps) - set(there):
        raise UserError(
            f"{run} has no checkpoint of step {min(missing)}; there are "
            f"{', '.join(map(str, there))}"
        )
    store = Checkpoints(run / "checkpoints", read_only=True)
    with contextlib.closing(store):
        cfg = store.meta(there[-1]).config
    ends = {there[-1], *(cfg.stage_start(k + 1) for k in range(len(cfg.stages)))}
    result: dict[str, Any] = {"format": 1, "examples": count, "checkpoints": []}
    for step in sorted(set(steps)) or sorted(ends & set(there)):
        where = f"{run}/checkpoints/{step}"
        cfg, params, meta, mesh = load_params(run / "checkpoints" / str(step))
        if not meta.curricula or not step:
            raise UserError(f"{where} was not trained here: nothing is known of it")
        corpus = open_corpus(corpus_folder or cfg.data.corpus)
        check_contents(meta, corpus, where)
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            languages = forgetting_at(cfg, params, meta, mesh, corpus, count)
        stage = cfg.stages[cfg.stage_at(step - 1)].name
        told = {"step": step, "stage": stage, "tokens": meta.tokens}
        result["checkpoints"].append({**told, "languages": languages})
    write_json(run / FILE, result)
    return result
