"""What a run writes between its steps: records, checkpoints, evaluations."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from gamayun_jax.model.weights import flops_per_token
from gamayun_jax.training import cluster
from gamayun_jax.training.chips import chip_of
from gamayun_jax.training.divergence import Diverged, DivergedForGoodError
from gamayun_jax.training.meters import OVERHEADS
from gamayun_jax.training.resume import Run
from gamayun_jax.training.run_meta import RunMeta
from gamayun_jax.training.trackers import Scalars, sample_text

BAD_RECORDS = "records set aside so far"  # an event of the lineage

# --- records of training ---------------------------------------------------------


def read_metrics(run: Run, keep: int = 1) -> None:
    """Read the metrics of all but the newest `keep` steps, and record them.

    The host reads one step late, so that the devices always have the next one queued.

    Raises:
      Diverged: the run has to go back.
      DivergedForGoodError: loss or gradient is not finite, where that is not skipped.
    """
    cfg, meters = run.cfg, run.meters
    while len(meters.in_flight) > keep:
        step, metrics = meters.in_flight.pop(0)
        with meters.timer.measure("wait"):
            metrics = jax.device_get(metrics)
        stage = cfg.stage_at(step - 1)
        if fault := run.detector.observe(step, stage, metrics):
            jax.block_until_ready(meters.in_flight)
            raise Diverged(*fault, run.plan, run.rollbacks)
        if not np.isfinite(metrics["loss_sum"] + metrics["grad_norm"]):
            last = run.store.latest()
            raise DivergedForGoodError(
                f"loss or gradient is not finite at step {step}: lower "
                f"stages.{cfg.stages[stage].name}.schedule.peak or "
                f"optimizer.clip_norm; the last checkpoint is "
                f"{'none' if last is None else f'step {last}'}"
            )
        meters.accumulator.add(metrics)
        run.store.check()
        if cfg.ends_record(step):
            write_record(run, step)
            meters.begin_record()


def train_record(
    run: Run, step: int, times: Mapping[str, float], peak: float | None
) -> dict[str, Any]:
    """The record of the steps that end with `step`.

    Args:
      times: seconds by activity, of the timer's lap.
      peak: FLOP/s of all devices; None where it is not known.
    """
    cfg, accumulator = run.cfg, run.meters.accumulator
    lost = (times.get(f"{k}_s", 0.0) for k in OVERHEADS if k != "input")
    busy = max(times["seconds"] - sum(lost), 1e-9)
    steps = accumulator.sums["steps"]
    flops = flops_per_token(cfg.model, cfg.data.seq_len) * cfg.tokens_per_step
    warming = cfg.data.batch_size // cfg.updates_at(run.tokens_at(step - 1))
    return {
        "kind": "train",
        "step": step,
        "tokens": run.tokens_at(step),
        "stage": cfg.stages[cfg.stage_at(step - 1)].name,
        **({"batch_size": warming} if cfg.optimizer.first_batch_size else {}),
        **accumulator.record(cfg.languages),
        "sources": {
            name: {"tokens": examples * cfg.data.seq_len}
            for name, examples in run.plan.served(step).items()
        },
        "time": {
            **times,
            "tokens_per_s": steps * cfg.tokens_per_step / busy,
            "mfu": flops * steps / busy / peak if peak else None,
            "stalled_steps": run.meters.stalls,
        },
    }


def write_record(run: Run, step: int) -> None:
    """Record the steps that end with `step`: file, trackers, console."""
    timer = run.meters.timer
    times = timer.lap()
    chip = chip_of(jax.devices()[0])
    peak = chip.flops * jax.device_count() if chip else None
    record = train_record(run, step, times, peak)
    if jax.process_count() > 1:
        record["hosts"] = cluster.compare(
            {k: times.get(k, 0.0) for k in ("input_s", "wait_s")}
        )
    run.folder.add(record)
    run.folder.write("goodput.json", timer.goodput(run.lineage["started"]), often=True)
    flat = {k: record[k] for k in ("loss", "nll", "lr", "grad_norm")}
    flat |= {k: record["time"][k] for k in ("tokens_per_s", "mfu")}
    by_language = {k: v["nll"] for k, v in record["languages"].items()}
    known = [x for x in by_language.values() if x is not None]
    flat |= {f"nll/{k}": x for k, x in by_language.items()}
    flat["nll/macro"] = sum(known) / len(known) if known else None
    flat["effective_share"] = record["objective"]["effective_share"]
    weight = record["objective"]["weight"]
    for name, row in record["languages"].items() if weight else ():
        flat[f"objective/{name}"] = row["weight"] / weight
    scalars = {f"train/{k}": v for k, v in flat.items()}
    track(run, step, scalars, {})
    run.log(console_line(run, record))


def track(run: Run, step: int, scalars: Scalars, texts: Mapping[str, str]) -> None:
    """Scalars and texts by tag, to all that the run is watched by."""
    for tracker in run.trackers:
        tracker.write(step, run.tokens_at(step), scalars, texts)


def console_line(run: Run, record: Mapping[str, Any]) -> str:
    """A record on one line."""
    rate, mfu = record["time"]["tokens_per_s"], record["time"]["mfu"]
    effective = record["objective"]["effective_share"]
    left = (run.cfg.total_steps - record["step"]) * run.cfg.tokens_per_step / rate
    return (
        f"{record['stage']:>8} step {record['step']}/{run.cfg.total_steps}  tokens "
        f"{record['tokens'] / 1e6:.2f}M  loss {record['loss'] or math.nan:.4f}  "
        f"lr {record['lr']:.2e}  {rate:,.0f} tokens/s"
        # Where all weights are alike, every target counts.
        + (f"  effective {effective:.1%}" if (effective or 1.0) < 0.9995 else "")
        + (f"  MFU {mfu:.1%}" if mfu is not None else "")
        + f"  left {datetime.timedelta(seconds=round(left))}"
    )


# --- checkpoints -----------------------------------------------------------------


def save(run: Run, reason: str) -> None:
    """Begin to save a checkpoint of the last step that is done."""
    read_metrics(run, keep=0)
    with run.meters.timer.measure("checkpoint"):
        run.lineage["checkpoints"].append(
            {
                "step": run.step,
                "tokens": run.tokens_at(run.step),
                "reason": reason,
                "stage": run.stage_name,
            }
        )
        if counts := run.bad_records.counts:
            others = [e for e in run.lineage["events"] if e["event"] != BAD_RECORDS]
            event = {"event": BAD_RECORDS, "step": run.step, **counts}
            run.lineage["events"] = [*others, event]
        run.folder.sync()
        run.store.save(run.state, run_meta(run))
        # The one before is whole by now; this one is not yet.
        finished = run.lineage["checkpoints"][:-1]
        run.folder.write("lineage.json", {**run.lineage, "checkpoints": finished})


def run_meta(run: Run) -> RunMeta:
    """What a checkpoint of the last step that is done says beside its arrays."""
    plan, step = run.plan, run.step
    return RunMeta(
        step=step,
        config=run.cfg,
        tokens=run.tokens_at(step),
        tokenizer=run.corpus.manifest["tokenizer"]["fingerprint"],
        lineage=run.lineage,
        contents=run.corpus.contents(),
        consumed=plan.consumed(step),
        curricula=plan.curricula(step),
        shares=plan.shares[run.cfg.stage_at(max(step - 1, 0))],
        rest_of=plan.rest_of,
        seed=plan.runs[plan.run_before(step)].curriculum.seed,
        origin=run.origin,
        rollbacks=run.rollbacks,
        interval=run.meters.accumulator.to_json(),
        times=run.meters.timer.to_json(),
        watch=run.detector.to_json(),
    )


# --- evaluations -----------------------------------------------------------------


class Evaluator(Protocol):
    """What is evaluated in the course of training."""

    name: str  # its part of eval/<step>.json: "sets" (held-out ones) or "tasks"
    every_steps: int  # besides the start and the stages' ends; 0: not at all

    def run(
        self, params: Any
    ) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        """Set or task -> its results, and items under the names of their files."""


def evaluate_if_due(run: Run, evaluators: Sequence[Evaluator]) -> None:
    """Run the evaluators that are due at this step, if that is not done yet."""
    label = "" if run.step else "start"
    if run.ends_stage:
        label = f"end of {run.stage_name}"
    due = [
        e
        for e in evaluators
        if label or (e.every_steps and run.step % e.every_steps == 0)
    ]
    if not due or is_evaluated(run, label):
        return
    read_metrics(run, keep=0)
    tokens = run.tokens_at(run.step)
    result: dict[str, Any] = {"step": run.step, "tokens": tokens}
    result |= {"stage": run.stage_name, "label": label, "sets": {}}
    ema = run.state.ema
    if ema and int(ema["updates"]):
        result["ema"] = {"sets": {}}  # the same of the average of the parameters
    items: dict[str, list[dict[str, Any]]] = {}
    with run.meters.timer.measure("evaluate"):
        for evaluator in due:
            result[evaluator.name], its_items = evaluator.run(run.state.params)
            items |= its_items
            if "ema" in result:
                scores, its_items = evaluator.run(ema["params"])
                result["ema"][evaluator.name] = scores
                items |= {f"ema/{name}": rows for name, rows in its_items.items()}
    for name, rows in items.items() if label else ():
        run.folder.write_items(run.step, name, rows)
    run.folder.write(f"eval/{run.step}.json", result)
    for evaluator in due:
        log_scores(run, evaluator.name, result[evaluator.name], items)
        if "ema" in result:
            scores = result["ema"][evaluator.name]
            log_scores(run, evaluator.name, scores, items, "ema/")


def log_scores(
    run: Run,
    evaluator: str,
    scores: Mapping[str, Any],
    items: Mapping[str, Sequence[Mapping[str, Any]]],
    prefix: str = "",
) -> None:
    """Results of an evaluator, and samples of what was written, for trackers; the mean
    on the console.

    Args:
      scores: by set or task.
      items: under the names of their files, which have the prefix, too.
      prefix: of the tags.
    """
    room = prefix + ("eval" if evaluator == "sets" else evaluator)
    for name, part in scores.items():
        metric = part.get("metric", "bits_per_byte")  # a held-out set has this one
        tag = f"{room}/{name}/{metric}"
        scalars = {f"{tag}/{k}": v[metric] for k, v in part["languages"].items()}
        mean = part.get("macro", {}).get(metric)
        texts = {}
        for language in part["languages"] if part.get("kind") == "generation" else ():
            rows = (r for r in items[prefix + name] if r["language"] == language)
            texts[f"{prefix}samples/{name}/{language}"] = sample_text(rows)
        track(run, run.step, {**scalars, f"{tag}/macro": mean}, texts)
        mean = math.nan if mean is None else mean
        run.log(f"{'eval':>8} step {run.step}  {tag} {mean:.3f} (macro)")


def is_evaluated(run: Run, label: str) -> bool:
    """The first process's word: others may see a shared folder with a delay."""
    return bool(cluster.gather(run.folder.has_evaluation(run.step, label))[0])
