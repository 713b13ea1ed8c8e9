"""A run, and where it begins: its own checkpoint, another run's, or nowhere."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from clu.parameter_overview import get_parameter_overview
from jax.sharding import Mesh

from gamayun_jax.config import Config, UserError, from_json, to_dict
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.loader import DataPlan, make_data_plan, mixture_notes
from gamayun_jax.data.token_weights import build_token_weights
from gamayun_jax.training import cluster
from gamayun_jax.training.checkpoint import Checkpoints, TrainState, barrier
from gamayun_jax.training.divergence import (
    DivergenceDetector,
    load_rollbacks,
    rollbacks_of,
)
from gamayun_jax.training.lineage import (
    check_checkpoints,
    check_contents,
    check_origin,
    check_past,
    check_schedules,
    load_origin,
    lost_checkpoints,
    new_lineage,
    note_corpus,
    note_versions,
)
from gamayun_jax.training.meters import Meters
from gamayun_jax.training.run_folder import (
    BadRecordLog,
    RunFolder,
    config_changes,
    differences,
)
from gamayun_jax.training.step import abstract_state, new_state, reset_moments

Log = Callable[[str], None]


@dataclass
class Run:
    """A run under way. `state`, `step` and `lineage` change as it goes on."""

    cfg: Config
    mesh: Mesh
    corpus: Corpus
    plan: DataPlan
    folder: RunFolder
    store: Checkpoints
    abstract: TrainState
    state: TrainState
    step: int  # optimiser steps that are done
    origin: Mapping[str, Any] | None  # of a run that began from another's checkpoint
    lineage: dict[str, Any]
    rollbacks: list[dict[str, Any]]
    meters: Meters
    detector: DivergenceDetector
    bad_records: BadRecordLog
    log: Log
    began: float  # time.perf_counter() of this process when the run began to start

    @property
    def tokens_before(self) -> int:
        """Tokens that were trained on before this run."""
        return self.origin["tokens"] if self.origin else 0

    def tokens_at(self, step: int) -> int:
        """Tokens of the whole history after step number `step`."""
        return self.tokens_before + step * self.cfg.tokens_per_step

    @property
    def stage_name(self) -> str:
        """The stage of the last step that is done; before the first, of that one."""
        return self.cfg.stages[self.cfg.stage_at(max(self.step - 1, 0))].name

    @property
    def ends_stage(self) -> bool:
        """Whether the last step that is done is the last of a stage."""
        stages = range(1, len(self.cfg.stages) + 1)
        return self.step in {self.cfg.stage_start(k) for k in stages}


def check_stages(
    cfg: Config, corpus: Corpus, plan: DataPlan, tokens_before: int = 0
) -> None:
    """Raise UserError for whatever of a stage would be refused when it begins.

    Args:
      tokens_before: tokens that were trained on before this run.
    """
    check_schedules(cfg, tokens_before)
    for k in range(len(cfg.stages)):
        build_token_weights(cfg, corpus, plan.language_shares(cfg, k), k)


def open_run_folder(workdir: Path, writer: bool, fresh: bool, log: Log) -> RunFolder:
    """The run folder, which has the checkpoints that its lineage lists.

    Args:
      writer: whether this process writes into it.
      fresh: begin anew; the records of the former start are moved aside.
    """
    folder = RunFolder(workdir, writer)
    try:
        cluster.check_shared(folder.path)
        if fresh:
            if place := folder.begin_afresh():
                log(f"the records of the former start are in {place}")
            barrier("begin afresh")
        else:
            lost = lost_checkpoints(folder.lineage(), load_rollbacks(folder.path))
            check_checkpoints(folder.path, lost)
    except BaseException:
        folder.close()
        raise
    return folder


def start_or_resume(
    cfg: Config,
    mesh: Mesh,
    corpus: Corpus,
    folder: RunFolder,
    store: Checkpoints,
    init_from: Path | None,
    rollbacks: list[dict[str, Any]],
    log: Log,
) -> Run:
    """The run, at the step where its folder stands; its records go on from there.

    Args:
      init_from: begin from another run's checkpoint, if this one has none.
      rollbacks: what was decided in this folder so far.

    Raises:
      UserError: the config or the corpus does not fit what was done so far.
    """
    began, now = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    abstract = abstract_state(cfg, mesh)

    def check(meta: dict[str, Any], where: str) -> None:
        config_changes(from_json(meta["config"], where), cfg)
        check_origin(init_from, meta["origin"], None, folder.path)
        plan = make_data_plan(cfg, corpus, meta["origin"], rest_of=rest_of(meta))
        check_past(cfg, plan, corpus, meta, where)
        check_contents(meta, corpus, where)
        before = meta["origin"]["tokens"] if meta["origin"] else 0
        check_stages(cfg, corpus, plan, before)

    found = store.newest(abstract, check, folder.path / "damaged", log)
    changes: dict[str, tuple[Any, Any]] = {}
    meta: dict[str, Any] = {}
    if found is None:
        step = 0
        recorded = folder.lineage()
        state, plan, origin = start(
            cfg, mesh, corpus, abstract, init_from, rollbacks, log, recorded, folder
        )
        lineage = new_lineage(cfg, corpus, plan, origin)
        # Not of the last attempt, where those before it left no checkpoint.
        known = recorded.get("started")
        lineage["started"] = known or now.isoformat("T", "milliseconds")
    else:
        step, meta, state, events = found
        changes = config_changes(from_json(meta["config"]), cfg)
        origin, rollbacks = meta["origin"], rollbacks_of(meta, rollbacks)
        plan = make_data_plan(cfg, corpus, origin, rollbacks, rest_of(meta))
        moved = {e["step"] for e in events}
        for lost in lost_checkpoints(folder.lineage(), rollbacks, step):
            if lost not in moved:
                log(f"checkpoint {lost} is gone: what came after {step} is made again")
                events.append({"event": "gone", "step": lost})
        lineage = new_lineage(cfg, corpus, plan, origin)
        # What is to come may have changed; what has happened stays.
        kept = ("started", "events", "checkpoints")
        lineage |= {k: meta["lineage"][k] for k in kept}
        resumed_at = {"event": "resumed", "step": step}
        lineage["events"] = [*lineage["events"], *events, resumed_at]
        note_versions(lineage, meta["lineage"].get("versions", {}), step, log)
        note_corpus(lineage, meta, corpus, f"{store.folder}/{step}", log)
        log(f"going on from step {step} of {cfg.total_steps} in {folder.path}")
    lineage["rollbacks"] = rollbacks
    for name, (old, new) in changes.items():
        log(f"config change since the checkpoint: {name}: {old!r} -> {new!r}")
        lineage["events"].append(
            {"event": "config", "step": step, "field": name, "old": old, "new": new}
        )
    for text in mixture_notes(cfg, corpus, plan):
        log(text)
    run = Run(
        cfg=cfg,
        mesh=mesh,
        corpus=corpus,
        plan=plan,
        folder=folder,
        store=store,
        abstract=abstract,
        state=state,
        step=step,
        origin=origin,
        lineage=lineage,
        rollbacks=rollbacks,
        meters=Meters(
            len(cfg.languages), began, meta.get("interval"), meta.get("times")
        ),
        detector=DivergenceDetector(cfg.divergence, meta.get("watch")),
        bad_records=BadRecordLog(folder.path, jax.process_index()),
        log=log,
        began=began,
    )
    if step == cfg.total_steps:
        # They tell what the steps were made with, and nothing of this start made any.
        past = meta["lineage"]
        folder.write_lineage({**past, "events": [*past["events"], *events]})
        folder.write_config(from_json(meta["config"]))
        if changes:
            log("the run is complete: config.json and lineage.json stay as they were")
    begin_records(run)
    return run


def start(
    cfg: Config,
    mesh: Mesh,
    corpus: Corpus,
    abstract: TrainState,
    init_from: Path | None,
    rollbacks: list[dict[str, Any]],
    log: Log,
    recorded: Mapping[str, Any],
    folder: RunFolder,
) -> tuple[TrainState, DataPlan, dict[str, Any] | None]:
    """First state, data plan and origin of a run that has no checkpoint yet.

    Args:
      recorded: the lineage of an earlier attempt in this folder.
    """
    if init_from is None:
        check_origin(None, None, recorded.get("init_from"), folder.path)
        plan = make_data_plan(cfg, corpus, None, rollbacks)
        check_stages(cfg, corpus, plan)
        return new_state(cfg, mesh), plan, None
    source, step, meta, origin = load_origin(init_from, cfg, corpus)
    for text in origin["corpus_changes"]:
        log(f"corpus: {text}")
    for name in origin["restarted"]:
        log(f"source {name} is not what it was: its data begin anew")
    plan = make_data_plan(cfg, corpus, origin, rollbacks)
    check_stages(cfg, corpus, plan, origin["tokens"])
    state = start_from(cfg, abstract, source, step, meta)
    source.close()
    return state, plan, origin


def rest_of(meta: Mapping[str, Any]) -> str:
    """What the shares of a checkpoint's mixture leave to others (see make_data_plan): a
    former release's checkpoint does not say."""
    return meta.get("rest_of", "sources")


def start_from(
    cfg: Config, abstract: TrainState, store: Checkpoints, step: int, meta
) -> TrainState:
    """First state of a run that begins from another's checkpoint.

    The optimiser's moments of an imported model begin anew, whatever the config says.
    """
    where = f"--init-from {store.folder}/{step}"
    former = from_json(meta["config"], where)
    other = differences(to_dict(former.model), to_dict(cfg.model), "model")
    if other:
        told = "; ".join(f"{k} is {a!r} there and {b!r}" for k, (a, b) in other.items())
        raise UserError(f"{where} is another model than the config's: {told} here")
    if meta["lineage"].get("imported"):  # parameters are all that there is
        params = store.restore_params(step, abstract.params)
        first = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
        return reset_moments(cfg, TrainState(first, params, None), abstract)
    state = store.restore(step, abstract)
    state = state.replace(step=jnp.zeros_like(state.step))
    if cfg.stages[0].transition.moments == "reset":
        state = reset_moments(cfg, state, abstract)
    return state


def begin_records(run: Run) -> None:
    """Open the run folder's records at the run's step."""
    cfg, folder = run.cfg, run.folder
    if run.step < cfg.total_steps:
        folder.write_lineage(run.lineage)
        folder.write_config(cfg)
        folder.write_tokenizer(run.corpus.tokenizer())
    overview = get_parameter_overview(run.abstract.params, include_stats=False)
    folder.write_parameters(overview)
    tokens = run.tokens_at(run.step)
    for number in folder.start_metrics(run.step, tokens, cfg.log.tensorboard):
        run.log(
            f"{folder.path}/metrics.jsonl: line {number} is damaged and stays as it is"
        )
