"""Training: from a config and a run folder, through the stages, to the last step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from tqdm import tqdm

from gamayun_jax.config import AnyPath, Config
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.data.loader import batches
from gamayun_jax.data.token_weights import build_token_weights
from gamayun_jax.evaluate.run_tasks import training_evaluators
from gamayun_jax.interop.init_from import open_model
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import TokenWeights
from gamayun_jax.storage import as_path
from gamayun_jax.training.checkpoint import Checkpoints, kept_forever
from gamayun_jax.training.compatibility import check_corpus, check_same
from gamayun_jax.training.divergence import (
    Diverged,
    discard_abandoned,
    load_rollbacks,
    roll_back,
)
from gamayun_jax.training.meters import goodput_text
from gamayun_jax.training.profiling import Profile
from gamayun_jax.training.recording import evaluate_if_due, read_metrics, save
from gamayun_jax.training.resume import (
    Run,
    Setting,
    open_run_folder,
    start_or_resume,
)
from gamayun_jax.training.signals import StopSignal
from gamayun_jax.training.step import compile_step, reset_moments
from gamayun_jax.training.trackers import open_trackers

PREEMPTED = 3  # exit status of a run that was told to stop, saved, and can go on


def train(
    cfg: Config,
    workdir: AnyPath,
    init_from: AnyPath | None = None,
    log: Callable[[str], None] = tqdm.write,
    profile: tuple[int, int] | None = None,
    fresh: bool = False,
    own_process: bool = True,
) -> int:
    """Run all the stages of `cfg`, going on where the run folder stands.

    Args:
      init_from: a run folder, checkpoint or Hugging Face folder whose parameters a new
        run begins with.
      profile: the first and last step to trace, on the first process.
      fresh: begin anew in a run folder whose checkpoints are lost; its records are
        moved aside.
      own_process: see StopSignal and RunFolder.

    Returns:
      0 when the run is complete, PREEMPTED if a signal made it save and stop.

    Raises:
      UserError: config, corpus, devices or run folder do not fit.
    """
    workdir = as_path(workdir, "--workdir ")
    init_from = as_path(init_from, "--init-from ") if init_from else None
    check_same(cfg, init_from=init_from and str(init_from), fresh=fresh)
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_divisible(cfg, mesh)
    skip_bad = cfg.data.faults == "set_aside"
    corpus = open_corpus(Path(cfg.data.corpus), skip_bad, cfg.data.verify)
    check_corpus(cfg, corpus)
    first = jax.process_index() == 0
    report = log if first else lambda text: None
    with (
        jax.set_mesh(mesh),
        nn.logical_axis_rules(sharding.RULES),
        contextlib.closing(
            open_run_folder(workdir, first, fresh, report, own_process)
        ) as folder,
        contextlib.closing(
            Checkpoints(folder.path / "checkpoints", cfg.checkpoint, kept_forever(cfg))
        ) as store,
        StopSignal(log, own_process) as stop,
        contextlib.closing(
            Profile(folder.spool.folder / "profile", profile if first else None, log)
        ) as trace,
        open_trackers(cfg, folder, report) as trackers,
    ):
        trace.check(store.latest() or 0, cfg.total_steps)
        setting = Setting(
            cfg, mesh, corpus, folder, store, init_from, report,
            open_model=open_model, trackers=trackers,
        )  # fmt: skip
        rollbacks = [] if fresh else load_rollbacks(folder.path)
        while True:
            discard_abandoned(store, rollbacks)
            run = start_or_resume(setting, rollbacks)
            try:
                return fit(run, stop, trace)
            except Diverged as event:
                decision = roll_back(event, cfg, corpus, folder, store)
                rollbacks = [*event.rollbacks, decision]
                report(f"{event.reason}: going back to step {decision['to']}")


def fit(run: Run, stop: StopSignal, trace: Profile) -> int:
    """Train to the end or a signal; raises Diverged where the run has to go back."""
    cfg, meters, first_step = run.cfg, run.meters, run.step
    batch_sharding = sharding.batch_sharding(run.mesh)
    evaluators = training_evaluators(cfg, run.corpus, run.mesh)
    data = batches(cfg, run.corpus, run.plan, batch_sharding, run.step, run.bad_records)
    compiled: tuple[int, int] | None = None  # the stage, and the updates of a step
    with progress_bar(run) as bar:
        meters.timer.add("start", time.perf_counter() - run.began)
        evaluate_if_due(run, evaluators)
        while run.step < cfg.total_steps:
            now = cfg.stage_at(run.step), cfg.updates_at(run.tokens_at(run.step))
            if compiled != now:
                step_fn, compiled = enter_stage(run, *now), now
            batch = meters.timed_next(data)
            trace.begin(run.step + 1)
            with jax.profiler.StepTraceAnnotation("train", step_num=run.step + 1):
                run.state, metrics = step_fn(run.state, batch)
            run.step += 1
            trace.end(run.step, metrics)
            bar.update()
            meters.push(run.step, metrics)
            read_metrics(run)  # of the step before
            stopping = stop.agreed(run.step)
            if reason := save_reason(run, stopping):
                save(run, reason)
            if stopping and run.step < cfg.total_steps:
                break  # what is to be evaluated here is so when the run goes on
            evaluate_if_due(run, evaluators)
    return finish(run, first_step)


def enter_stage(run: Run, stage: int, updates: int) -> Any:
    """The step compiled for a stage and a number of updates; at the stage's first step,
    its transition is made.

    What of the transition concerns data is in the plan (`cursors`), what concerns the
    learning rate in its schedule (`position`).
    """
    cfg = run.cfg
    reset = cfg.stages[stage].transition.moments == "reset"
    if reset and run.step and run.step == cfg.stage_start(stage):
        run.state = reset_moments(cfg, run.state, run.abstract)
    if cfg.optimizer.first_batch_size:
        size = cfg.data.batch_size // updates
        run.log(f"from step {run.step + 1} on an update has {size} examples")
        total = run.tokens_before + sum(s.tokens for s in cfg.stages)
        if not run.step and total < cfg.optimizer.batch_warmup_tokens:
            run.log(
                f"optimizer.batch_warmup_tokens={cfg.optimizer.batch_warmup_tokens} is "
                f"more than the {total} tokens at the end of this run: its updates "
                f"never have all {cfg.data.batch_size} examples of a step"
            )
    with run.meters.timer.measure("compile"):
        shares = run.plan.language_shares(cfg, stage)
        weights = TokenWeights(*build_token_weights(cfg, run.corpus, shares, stage))
        return compile_step(
            cfg, run.mesh, run.abstract, stage, weights, run.tokens_before, updates
        )


def save_reason(run: Run, stopping: bool) -> str:
    """Why a checkpoint is due after the last step; "" if none is."""
    if run.ends_stage:
        return "stage end"
    if run.step % run.cfg.checkpoint.every_steps == 0:
        return "regular"
    return "signal" if stopping else ""


def progress_bar(run: Run) -> tqdm:
    """Steps done, shown on a terminal by the first process."""
    hidden = None if run.folder.writer else True  # None: shown on a terminal
    total = run.cfg.total_steps
    return tqdm(total=total, initial=run.step, unit="step", disable=hidden)


def finish(run: Run, first_step: int) -> int:
    """Wait for the last checkpoint; the exit status.

    Args:
      first_step: the step from which this process went on.
    """
    with run.meters.timer.measure("checkpoint"):
        run.store.wait()
    if run.step > first_step:
        run.folder.write("lineage.json", run.lineage)
        seconds = run.meters.timer.goodput(run.lineage["started"])
        run.folder.write("goodput.json", seconds, often=True)
        run.log(goodput_text(seconds))
    if run.step < run.cfg.total_steps:
        run.log(
            f"stopped by a signal; saved at step {run.step}; started again, it goes on"
        )
        return PREEMPTED
    return 0
