"""Lineage: what a model comes from, and what happened to its run."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gamayun_jax.config import Config, to_dict
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.plan import DataPlan
from gamayun_jax.data.token_weights import build_token_weights, objective_shares
from gamayun_jax.model.weights import parameter_count
from gamayun_jax.training.checkpoint import Checkpoints, TrainState
from gamayun_jax.training.compatibility import check_tokenizer
from gamayun_jax.training.corpus_changes import corpus_changes
from gamayun_jax.training.optimizer import learning_rate
from gamayun_jax.training.run_folder import find_checkpoint, model_name
from gamayun_jax.training.run_meta import RunMeta
from gamayun_jax.training.step import stage_tokens

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "gamayun_jax")


def new_lineage(cfg: Config, corpus: Corpus, plan: DataPlan, origin) -> dict[str, Any]:
    """What the model comes from: config, corpus, curriculum, versions, parents."""
    tokens_before = origin["tokens"] if origin else 0
    keys = ("documents", "bytes", "tokens")
    sizes = corpus.examples(cfg.data.seq_len)
    return {
        "run": cfg.name,
        "started": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "parameters": parameter_count(cfg.model),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "init_from": origin,
        "corpus": {
            "recipe": corpus.manifest["recipe"],
            "tokenizer": corpus.manifest["tokenizer"]["fingerprint"],
            "sources": {
                name: {k: info[k] for k in keys}
                | {"examples": sizes[name], "targets": corpus.targets(name)}
                for name, info in corpus.manifest["sources"].items()
            },
        },
        "curriculum": {
            "table": [
                {**row, "tokens": row["examples"] * cfg.data.seq_len}
                for row in plan.table()
            ],
            "shares": share_points(cfg, plan, tokens_before),
            "objective": {
                stage.name: planned_objective(cfg, corpus, plan, k)
                for k, stage in enumerate(cfg.stages)
            },
        },
        "stages": stage_spans(cfg, tokens_before),
        "transitions": {s.name: to_dict(s.transition) for s in cfg.stages},
        "checkpoints": [],
        "events": [],
        "versions": versions(),
    }


def planned_objective(
    cfg: Config, corpus: Corpus, plan: DataPlan, stage: int
) -> dict[str, float]:
    """Share of the objective that each language is to have in a stage."""
    tables = build_token_weights(cfg, corpus, plan.language_shares(cfg, stage), stage)
    return objective_shares(tables, cfg, corpus, plan.shares[stage])


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Package -> its version, by default of those that decide a run; and Python's."""
    known = {"python": platform.python_version()}
    for name in packages:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            known[name] = "not installed as a package"
    return known


def note_versions(
    lineage: dict[str, Any],
    former: Mapping[str, str],
    step: int,
    log: Callable[[str], None],
) -> None:
    """Say and record what is of another version than at the checkpoint."""
    for name, new in lineage["versions"].items():
        old = former.get(name, "unknown")
        if old != new:
            log(f"{name} {new} goes on from a checkpoint of {name} {old}")
            lineage["events"].append(
                {"event": "version", "step": step, "of": name, "old": old, "new": new}
            )


def note_ema(
    lineage: dict[str, Any],
    cfg: Config,
    meta: RunMeta,
    step: int,
    log: Callable[[str], None],
) -> None:
    """Say and record what becomes of the average of the parameters (ema.py).

    Args:
      meta: of the run's own checkpoint, or of the one that it begins from.
      step: of this run; 0: it begins from another's checkpoint.
    """
    wanted, change = bool(cfg.optimizer.ema_tokens), ""
    if wanted != meta.has_ema:
        change = "begins" if wanted else "is dropped"
    elif wanted and not step:
        change = "goes on"
    if not change:
        return
    log(f"the average of the parameters (optimizer.ema_tokens) {change} at step {step}")
    if meta.has_ema and not step:
        log(
            "the run begins with the parameters themselves; to begin with their "
            "average, give --init-from what `gamayun average RUN OUT --ema` writes"
        )
    event = {"event": "ema", "step": step, "average of the parameters": change}
    lineage["events"].append(event)


def stage_spans(cfg: Config, tokens_before: int = 0) -> list[dict[str, Any]]:
    """Name, first token and end of each stage, counted from the first run."""
    spans = []
    for k, stage in enumerate(cfg.stages):
        begin, end = stage_tokens(cfg, k, tokens_before)
        spans.append({"name": stage.name, "start_tokens": begin, "end_tokens": end})
    return spans


def share_points(
    cfg: Config, plan: DataPlan, tokens_before: int = 0
) -> list[dict[str, Any]]:
    """Points of each source's share over tokens, to draw with straight lines."""
    points = []
    before = [plan.runs[0].curriculum.before, *plan.shares]
    for k, stage in enumerate(cfg.stages):
        begin, end = stage_tokens(cfg, k, tokens_before)
        ramp = stage.mixture.ramp_tokens if stage.mixture.ramp != "step" else 0
        if before[k] and ramp:
            for part in np.linspace(0.0, 1.0, 17)[:-1].tolist():
                f = part
                if stage.mixture.ramp == "cosine":
                    f = 0.5 * (1 - math.cos(math.pi * part))
                mixed = {
                    s: (1 - f) * before[k].get(s, 0.0) + f * plan.shares[k].get(s, 0.0)
                    for s in plan.sources
                }
                points.append({"tokens": int(begin + part * ramp), "shares": mixed})
        else:
            ramp = 0
        points.append({"tokens": begin + ramp, "shares": dict(plan.shares[k])})
        points.append({"tokens": end, "shares": dict(plan.shares[k])})
    return points


def rate_points(
    cfg: Config, tokens_before: int = 0, each: int = 60
) -> list[list[float]]:
    """[tokens, learning rate of an update], so many in each stage."""
    points = []
    for stage, span in zip(cfg.stages, stage_spans(cfg, tokens_before), strict=True):
        begin, end = span["start_tokens"], span["end_tokens"]
        at = np.linspace(begin, end, each)
        rates = learning_rate(stage.schedule, jnp.asarray(at), begin, end)
        # A constant rate is a scalar.
        pairs = zip(at, np.broadcast_to(rates, at.shape), strict=True)
        for x, y in pairs:
            rate = y * cfg.updates_at(round(x)) ** -0.5
            points.append([round(x), float(f"{rate:.4g}")])
    return points


class ModelStore(Protocol):
    """Where a model is that a run begins from; `Checkpoints` are one."""

    @property
    def folder(self) -> Path: ...
    def meta(self, step: int) -> RunMeta: ...
    def restore(self, step: int, abstract: TrainState) -> TrainState: ...
    def restore_params(self, step: int, abstract_params: Any) -> Any: ...
    def restore_ema(self, step: int, abstract_ema: Any) -> Any: ...
    def close(self) -> None: ...


OpenModel = Callable[[Path], tuple[ModelStore, int]]


def open_checkpoint(path: Path) -> tuple[ModelStore, int]:
    """The store and step of a run folder's newest checkpoint, or of one checkpoint."""
    folder, step = find_checkpoint(path)
    return Checkpoints(folder, read_only=True), step


def load_origin(
    path: Path, cfg: Config, corpus: Corpus, open_model: OpenModel = open_checkpoint
) -> tuple[ModelStore, RunMeta, dict[str, Any]]:
    """The checkpoint to start from: its store and meta, and the `origin` that the new
    run keeps: where it came from, and what its data plan goes on with.

    A cursor is carried over only into a source of the same size with the same texts up
    to it, where it means the same; the others are listed under `restarted`, and what is
    known to have changed under `corpus_changes`.

    Raises:
      UserError: no checkpoint there, or one of another tokenizer.
    """
    store, step = open_model(path)
    meta = store.meta(step)
    where = f"--init-from {path}"
    if cfg.stages[0].transition.embeddings == "keep":
        check_tokenizer(meta, corpus, where)
    sizes = corpus.examples(cfg.data.seq_len)
    former: dict[str, int] = {}
    seed = meta.seed
    for k, segment in enumerate(meta.curricula):
        former |= segment["curriculum"]["sources"]
        # The segment's that the cursors are of: `seed` was once the last one's.
        if not k or segment["first_example"] < meta.examples:
            seed = segment["curriculum"]["seed"]
    cursors = meta.consumed
    changes = corpus_changes(meta, corpus, where)
    other = {c.source for c in changes if c.served}
    other |= {k for k in cursors if sizes.get(k) != former[k]}
    origin = {
        "checkpoint": model_name(path),
        "run": meta.lineage.get("run"),
        "step": step,
        "tokens": meta.tokens,
        "cursors": {k: n for k, n in cursors.items() if k not in other},
        "restarted": sorted(k for k in cursors if k in sizes and k in other),
        "corpus_changes": [c.text for c in changes],
        "seed": seed,
        "shares": meta.shares,
        "lineage": meta.lineage,
    }
    return store, meta, origin
