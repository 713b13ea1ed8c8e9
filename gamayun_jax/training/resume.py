"""A run, and where it begins: its own checkpoint, another run's, or nowhere."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clu.parameter_overview import get_parameter_overview
from jax.sharding import Mesh

from gamayun_jax.config import Config, UserError, to_dict, to_json
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.model_tokenizer import open_tokenizer
from gamayun_jax.data.plan import DataPlan, make_data_plan, mixture_notes
from gamayun_jax.data.token_weights import build_token_weights
from gamayun_jax.training import cluster
from gamayun_jax.training.checkpoint import Checkpoints, TrainState
from gamayun_jax.training.cluster import barrier
from gamayun_jax.training.compatibility import (
    check_checkpoints,
    check_origin,
    check_past,
    check_schedules,
    lost_checkpoints,
)
from gamayun_jax.training.corpus_changes import check_contents, note_corpus
from gamayun_jax.training.divergence import (
    DivergenceDetector,
    load_rollbacks,
    rollbacks_of,
)
from gamayun_jax.training.embeddings import exchange, former_abstract, plan_rows
from gamayun_jax.training.lineage import (
    ModelStore,
    OpenModel,
    load_origin,
    new_lineage,
    note_ema,
    note_versions,
    open_checkpoint,
)
from gamayun_jax.training.meters import Meters
from gamayun_jax.training.run_folder import (
    RunFolder,
    config_changes,
    differences,
    has_chat_template,
)
from gamayun_jax.training.run_meta import RunMeta
from gamayun_jax.training.spool import BadRecordLog
from gamayun_jax.training.step import (
    abstract_state,
    begin_ema,
    new_state,
    reset_moments,
)
from gamayun_jax.training.trackers import Tracker

Log = Callable[[str], None]


@dataclass
class Setting:
    """What a run is given and keeps: its config, devices, data and folder."""

    cfg: Config
    mesh: Mesh
    corpus: Corpus
    folder: RunFolder
    store: Checkpoints
    init_from: Path | None  # where a run without a checkpoint of its own begins
    log: Log
    open_model: OpenModel = field(default=open_checkpoint, kw_only=True)
    trackers: Sequence[Tracker] = field(default=(), kw_only=True)


class Start(NamedTuple):
    """Where a run stands before its next step."""

    step: int
    state: TrainState
    plan: DataPlan
    origin: Mapping[str, Any] | None
    lineage: dict[str, Any]
    rollbacks: list[dict[str, Any]]
    meta: RunMeta | None  # of the checkpoint that it goes on from


@dataclass
class Run(Setting):
    """A run under way in its setting; `state`, `step` and `lineage` change."""

    plan: DataPlan
    abstract: TrainState
    state: TrainState
    step: int  # optimiser steps that are done
    origin: Mapping[str, Any] | None  # of a run that began from another's checkpoint
    lineage: dict[str, Any]
    rollbacks: list[dict[str, Any]]
    meters: Meters
    detector: DivergenceDetector
    bad_records: BadRecordLog
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


def open_run_folder(
    workdir: Path, writer: bool, fresh: bool, log: Log, own_process: bool = False
) -> RunFolder:
    """The run folder, which has the checkpoints that its lineage lists.

    Args:
      writer: whether this process writes into it.
      fresh: begin anew; the records of the former start are moved aside.
      own_process: see RunFolder.
    """
    folder = RunFolder(workdir, writer, log, own_process)
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


def start_or_resume(setting: Setting, rollbacks: list[dict[str, Any]]) -> Run:
    """The run, at the step where its folder stands; its records go on from there.

    Args:
      rollbacks: what was decided in this folder so far.

    Raises:
      UserError: the config or the corpus does not fit what was done so far.
    """
    began, now = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    cfg, folder, corpus = setting.cfg, setting.folder, setting.corpus
    abstract = abstract_state(cfg, setting.mesh)
    found = setting.store.newest(
        abstract,
        partial(check_resumable, setting),
        folder.path / "damaged",
        setting.log,
    )
    if found is None:
        begin = begin_run(setting, abstract, rollbacks, now)
    else:
        begin = go_on(setting, rollbacks, *found)
    begin.lineage["rollbacks"] = begin.rollbacks
    for text in mixture_notes(cfg, corpus, begin.plan):
        setting.log(text)
    meta = begin.meta
    sums, times, losses = (
        (meta.interval, meta.times, meta.watch) if meta else (None, None, None)
    )
    meters = Meters(len(cfg.languages), began, sums, times)
    if meta and meta.step == meta.config.total_steps:
        meters.timer.leave_out_rest(begin.lineage["started"], folder.wall_seconds())
    run = Run(
        **vars(setting),
        plan=begin.plan,
        abstract=abstract,
        state=begin_ema(begin.state, abstract),
        step=begin.step,
        origin=begin.origin,
        lineage=begin.lineage,
        rollbacks=begin.rollbacks,
        meters=meters,
        detector=DivergenceDetector(cfg.divergence, losses),
        bad_records=BadRecordLog(folder.spool, jax.process_index()),
        began=began,
    )
    begin_records(run)
    return run


def check_resumable(setting: Setting, meta: RunMeta, where: str) -> None:
    """Raise UserError if the run cannot go on from its own checkpoint."""
    cfg, corpus = setting.cfg, setting.corpus
    if meta.params_alone:
        raise UserError(
            f"{where} has parameters alone, which no run goes on from: begin a new run "
            f"with --init-from {where} and another --workdir"
        )
    config_changes(meta.config, cfg)
    check_origin(setting.init_from, meta.origin, None, setting.folder.path)
    plan = make_data_plan(cfg, corpus, meta.origin, rest_of=meta.rest_of)
    check_past(cfg, plan, corpus, meta, where)
    check_contents(meta, corpus, where)
    check_stages(cfg, corpus, plan, meta.tokens_before)


def go_on(
    setting: Setting,
    rollbacks: list[dict[str, Any]],
    meta: RunMeta,
    state: TrainState,
    events: list[dict[str, Any]],
) -> Start:
    """A run that goes on from its newest checkpoint that is whole.

    Args:
      events: of the lineage, about newer checkpoints that were damaged.
    """
    cfg, corpus, folder, log = (
        setting.cfg, setting.corpus, setting.folder, setting.log,
    )  # fmt: skip
    step = meta.step
    changes = config_changes(meta.config, cfg)
    rollbacks = rollbacks_of(meta, rollbacks)
    plan = make_data_plan(cfg, corpus, meta.origin, rollbacks, meta.rest_of)
    moved = {e["step"] for e in events}
    for lost in lost_checkpoints(folder.lineage(), rollbacks, step):
        if lost not in moved:
            log(f"checkpoint {lost} is gone: what came after {step} is made again")
            events.append({"event": "gone", "step": lost})
    lineage = new_lineage(cfg, corpus, plan, meta.origin)
    # What is to come may have changed; what has happened stays.
    lineage |= {k: meta.lineage[k] for k in ("started", "events", "checkpoints")}
    resumed = {"event": "resumed", "step": step}
    lineage["events"] = [*lineage["events"], *events, resumed]
    note_versions(lineage, meta.lineage.get("versions", {}), step, log)
    note_corpus(lineage, meta, corpus, f"{setting.store.folder}/{step}", log)
    if step < cfg.total_steps:
        log(f"going on from step {step} of {cfg.total_steps} in {folder.path}")
    else:
        log(f"{folder.path} was finished before: all {step} steps are done")
    for name, (old, new) in changes.items():
        log(f"config change since the checkpoint: {name}: {change_text(old, new)}")
        lineage["events"].append(
            {"event": "config", "step": step, "field": name, "old": old, "new": new}
        )
    note_ema(lineage, cfg, meta, step, log)
    if step == cfg.total_steps:
        # They tell what the steps were made with, and nothing of this start made any.
        past = meta.lineage
        folder.write("lineage.json", {**past, "events": [*past["events"], *events]})
        folder.write("config.json", to_json(meta.config))
        if changes:
            log("the run is complete: config.json and lineage.json stay as they were")
    return Start(step, state, plan, meta.origin, lineage, rollbacks, meta)


def begin_run(
    setting: Setting,
    abstract: TrainState,
    rollbacks: list[dict[str, Any]],
    now: datetime.datetime,
) -> Start:
    """A run that has no checkpoint yet, from nothing or from another's checkpoint."""
    cfg, corpus, log = setting.cfg, setting.corpus, setting.log
    former = setting.folder.lineage()  # of an attempt that left no checkpoint
    origin = None
    if setting.init_from is None:
        check_origin(None, None, former.get("init_from"), setting.folder.path)
    else:
        source, meta, origin = load_origin(
            setting.init_from, cfg, corpus, setting.open_model
        )
        if not meta.params_alone and meta.step < meta.config.total_steps:
            log(
                f"--init-from {source.folder}: its run is not complete, at step "
                f"{meta.step} of {meta.config.total_steps}"
            )
        for text in origin["corpus_changes"]:
            log(f"corpus: {text}")
        for name in origin["restarted"]:
            log(f"source {name} is not what it was: its data begin anew")
    plan = make_data_plan(cfg, corpus, origin, rollbacks)
    check_stages(cfg, corpus, plan, origin["tokens"] if origin else 0)
    if origin is None:
        first = cfg.stages[0]
        if first.transition.embeddings != "keep":
            raise UserError(
                f"stages.{first.name}.transition.embeddings="
                f"{first.transition.embeddings!r} needs the model whose tokenizer is "
                "exchanged: give --init-from"
            )
        state = new_state(cfg, setting.mesh)
    else:
        if has_chat_template(setting.init_from or ""):
            log(
                f"--init-from {setting.init_from} has a chat template: if it was "
                "trained to answer in turns (Instruct), training on plain text takes "
                "that from it, and its base model is the usual beginning"
            )
        if cfg.stages[0].transition.embeddings == "keep":
            state = start_from(cfg, abstract, source, meta)
        else:
            state, counts = start_exchanged(cfg, abstract, source, meta, corpus)
            origin["embeddings"] = counts
            log(
                f"rows of the embeddings: {counts['kept']:,} kept, "
                f"{counts['pieces']:,} made of former pieces, {counts['mean']:,} the "
                "mean of all"
            )
        source.close()
    lineage = new_lineage(cfg, corpus, plan, origin)
    if origin is not None:
        note_ema(lineage, cfg, meta, 0, log)
    started = now.isoformat("T", "milliseconds")
    lineage["started"] = former.get("started") or started
    return Start(0, state, plan, origin, lineage, rollbacks, None)


def start_from(
    cfg: Config, abstract: TrainState, store: ModelStore, meta: RunMeta
) -> TrainState:
    """First state of a run that begins from another's checkpoint: with its parameters,
    not with the average of them, which goes on where both have one.

    The optimiser's moments of an imported model or of an average of checkpoints begin
    anew, whatever the config says.
    """
    check_model(cfg, store, meta)
    if meta.params_alone or cfg.stages[0].transition.moments == "reset":
        params = store.restore_params(meta.step, abstract.params)
        state = state_with(cfg, params, abstract)
        if abstract.ema is not None and meta.has_ema:
            state = state.replace(ema=store.restore_ema(meta.step, abstract.ema))
        return state
    former, kind = meta.config.optimizer.kind, cfg.optimizer.kind
    if former != kind:
        raise UserError(
            f"--init-from {store.folder}/{meta.step} has the moments of optimizer.kind="
            f"{former!r}, and the config has {kind!r}: set stages."
            f"{cfg.stages[0].name}.transition.moments=reset to begin with new ones"
        )
    state = store.restore(meta.step, abstract)
    return state.replace(step=jnp.zeros_like(state.step))


def start_exchanged(
    cfg: Config, abstract: TrainState, store: ModelStore, meta: RunMeta, corpus: Corpus
) -> tuple[TrainState, dict[str, Any]]:
    """First state of a run with another tokenizer than the model that it begins from,
    with new moments; and how many rows of its embeddings come from where."""
    check_model(cfg, store, meta, {"model.vocab_size"})
    old = open_tokenizer(store.folder, meta.tokenizer, meta.config.data.corpus)
    scheme = cfg.stages[0].transition.embeddings
    rows = plan_rows(old, corpus.tokenizer(), cfg.model.vocab_size, scheme == "pieces")
    former = former_abstract(abstract.params, meta.config.model)
    params = exchange(store.restore_params(meta.step, former), rows, abstract.params)
    counts = {"scheme": scheme, "former_tokenizer": old.fingerprint, **rows.counts}
    return state_with(cfg, params, abstract), counts


def state_with(cfg: Config, params: Any, abstract: TrainState) -> TrainState:
    """The state at step 0 of parameters on their devices, with new moments."""
    first = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
    return reset_moments(cfg, TrainState(first, params, None), abstract)


def check_model(
    cfg: Config, store: ModelStore, meta: RunMeta, but: Collection[str] = ()
) -> None:
    """Raise UserError unless a run of `cfg` can begin with a model's parameters.

    Args:
      but: fields of the model that may differ; `init_std` always may.
    """
    step = f"/{meta.step}" if meta.step else ""  # a published model has none
    where = f"--init-from {store.folder}{step}"
    other = differences(to_dict(meta.config.model), to_dict(cfg.model), "model")
    told = "; ".join(
        f"{k} is {a!r} there and {b!r}"
        for k, (a, b) in other.items()
        if k not in {"model.init_std", *but}
    )
    if told:
        raise UserError(f"{where} is another model than the config's: {told} here")
    if meta.bits:
        raise UserError(
            f"{where} is quantised to {meta.bits} bits, which no run begins from: give "
            "the checkpoint that it was made from"
        )


def begin_records(run: Run) -> None:
    """Open the run folder's records at the run's step."""
    cfg, folder = run.cfg, run.folder
    if run.step < cfg.total_steps:
        folder.write("lineage.json", run.lineage)
        folder.write("config.json", to_json(cfg))
        folder.write_tokenizer(run.corpus.tokenizer())
    overview = get_parameter_overview(run.abstract.params, include_stats=False)
    folder.write("parameters.txt", overview + "\n")
    for tracker in run.trackers:
        tracker.start(run.step, run.tokens_at(run.step))
    for number in folder.start_metrics(run.step):
        run.log(
            f"{folder.path}/metrics.jsonl: line {number} is damaged and stays as it is"
        )


def change_text(old: Any, new: Any) -> str:
    """A changed value; of lists of named parts, such as stages, which came and went."""
    lists = isinstance(old, list) and isinstance(new, list)
    if not lists or not all(isinstance(x, dict) and "name" in x for x in old + new):
        return f"{old!r} -> {new!r}"
    names = [[x["name"] for x in part] for part in (old, new)]
    return f"{', '.join(names[0])} -> {', '.join(names[1])}"
