"""Divergence: noticing it, going back, and leaving out the examples it came with.

A step whose loss or gradient is not finite makes no update (step.py). So many of them
in a row, or a loss far above those before it, end this attempt: what was decided is
written to rollbacks.json, checkpoints made after the chosen one are deleted, and the
run goes on from there as after any interruption. A kill at any moment leaves either
the former decision or this one, so the result is the same.

Data stay a pure function: an example of the steps at fault is left out by its position
in its source's order, and the next ones of that source take the places after it. The
mixture does not change, and no stage begins elsewhere.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax.config import Config, DivergenceConfig, UserError
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.files import read_json, write_json
from gamayun_jax.data.loader import example_order
from gamayun_jax.data.plan import DataPlan
from gamayun_jax.data.records import BadRecordError
from gamayun_jax.training.checkpoint import Checkpoints, DamagedCheckpointError
from gamayun_jax.training.cluster import barrier
from gamayun_jax.training.run_folder import RunFolder
from gamayun_jax.training.run_meta import RunMeta

MAD = 1.4826  # times the median absolute deviation: a normal's standard deviation


class Diverged(Exception):  # noqa: N818  an event, not an error
    """Raised inside the training loop: the run goes back."""

    def __init__(
        self,
        first: int,
        last: int,
        reason: str,
        plan: DataPlan,
        rollbacks: list[dict[str, Any]],
    ):
        """Steps at fault; the plan that they followed and the rollbacks before."""
        super().__init__(reason)
        self.first, self.last, self.reason = first, last, reason
        self.plan, self.rollbacks = plan, rollbacks


class DivergedForGoodError(UserError):
    """A run that stops because it diverges, whatever is tried."""


class DivergenceDetector:
    """Looks at each step's metrics, in order; its state is saved with checkpoints."""

    def __init__(self, cfg: DivergenceConfig, saved: Mapping[str, Any] | None = None):
        saved = saved or {"losses": [], "in_a_row": 0, "stage": -1}
        self._cfg = cfg
        self.losses: list[float] = list(saved["losses"])
        self.in_a_row: int = saved["in_a_row"]
        self.stage: int = saved["stage"]

    def to_json(self) -> dict[str, Any]:
        return {"losses": self.losses, "in_a_row": self.in_a_row, "stage": self.stage}

    def observe(
        self, step: int, stage: int, metrics: Mapping[str, Any]
    ) -> tuple[int, int, str] | None:
        """Take the metrics of step number `step` (from 1); the first and last step at
        fault and the reason, if the run has to go back."""
        cfg = self._cfg
        if stage != self.stage:  # another mixture has another loss
            self.losses, self.stage = [], stage
        if metrics["skipped"]:
            self.in_a_row += 1
            if cfg.nonfinite and self.in_a_row >= cfg.nonfinite:
                first = step - self.in_a_row + 1
                last = f" to {step}" if step > first else ""
                reason = f"loss or gradient is not finite at step {first}{last}"
                return first, step, reason
            return None
        self.in_a_row = 0
        loss = float(metrics["loss_sum"]) / max(float(metrics["target_count"]), 1.0)
        if cfg.spike and len(self.losses) >= cfg.window // 2:
            limit = spike_limit(self.losses, cfg.spike)
            if loss > limit:
                reason = (
                    f"loss {loss:.4g} at step {step} is above {limit:.4g}, from the "
                    f"{len(self.losses)} steps before"
                )
                return step, step, reason
        if cfg.spike:
            self.losses = [*self.losses, loss][-cfg.window :]
        return None


def spike_limit(losses: list[float], spike: float) -> float:
    """Median + `spike` robust standard deviations (at least 0.1 % of the median)."""
    median = float(np.median(losses))
    deviation = MAD * float(np.median(np.abs(np.array(losses) - median)))
    return median + spike * max(deviation, 1e-3 * abs(median))


def load_rollbacks(run: Path) -> list[dict[str, Any]]:
    """What was decided in a run folder so far, oldest first."""
    path = run / "rollbacks.json"
    none: dict[str, Any] = {"rollbacks": []}
    try:
        return list(read_json(path, "restore it from a copy", none)["rollbacks"])
    except (KeyError, TypeError) as e:
        raise UserError(f"{path} lacks {e}: restore it from a copy") from e


def discard_abandoned(store: Checkpoints, rollbacks: list[dict[str, Any]]) -> None:
    """Delete the checkpoints that a rollback went back before.

    A checkpoint knows the rollbacks that came before it; a later one that went back
    to an earlier step has abandoned it.
    """
    lowest = min((r["to"] for r in rollbacks), default=None)
    for step in store.steps():
        if lowest is None or step <= lowest:
            continue
        try:
            known = len(store.meta(step).rollbacks)
        except DamagedCheckpointError:
            known = 0
        if any(r["to"] < step for r in rollbacks[known:]):
            store.delete(step)


def roll_back(
    event: Diverged,
    cfg: Config,
    corpus: Corpus,
    run: RunFolder,
    store: Checkpoints,
) -> dict[str, Any]:
    """Decide where to go back to and what to leave out; durable once it returns.

    Raises:
      UserError: there were enough rollbacks; names the batches' sources and a file
        with their documents.
    """
    plan, rollbacks = event.plan, event.rollbacks
    store.wait()
    path = run.path / "divergence" / f"{event.last}.json"
    rows = describe(corpus, plan, cfg.data.seq_len, event.first, event.last)
    if run.writer:
        write_json(path, {"reason": event.reason, "examples": rows})
    to = max((s for s in store.steps() if s < event.first), default=0)
    limit = cfg.divergence.rollbacks
    if len(rollbacks) >= limit:
        counts = collections.Counter(row["source"] for row in rows)
        sources = ", ".join(f"{n} of {name}" for name, n in counts.most_common(5))
        raise DivergedForGoodError(
            f"training diverges: {event.reason}, after {len(rollbacks)} rollbacks "
            f"(divergence.rollbacks={limit}). The batch: {sources}; its documents are "
            f"in {path}. Lower the stage's schedule.peak or optimizer.clip_norm, or "
            f"look at the data; the last checkpoint before it is step {to}"
        )
    decision = {
        "step": event.last,
        "to": to,
        "reason": event.reason,
        "skipped": plan.positions(event.first, event.last),
    }
    if run.writer:
        data = {"rollbacks": [*rollbacks, decision]}
        write_json(run.path / "rollbacks.json", data)
    barrier(f"roll back {len(rollbacks)}")
    return decision


def describe(
    corpus: Corpus, plan: DataPlan, seq_len: int, first: int, last: int
) -> list[dict[str, Any]]:
    """Where each example of steps `first` to `last` comes from, and how it begins."""
    tokenizer = corpus.tokenizer()
    per_record = corpus.manifest["record_tokens"] // seq_len
    size = plan.batch_size
    examples = np.arange((first - 1) * size, last * size)
    rows = []
    for example, dataset, position in zip(
        examples.tolist(), *(x.tolist() for x in plan.lookup(examples)), strict=True
    ):
        segment, number = divmod(dataset, len(plan.sources))
        name = plan.sources[number]
        records = corpus.records(name)
        seed = plan.runs[segment].curriculum.seed
        order = example_order(seed, name, records, per_record)
        record, part = divmod(order[position], per_record)
        shard, inside = records.locate(record)
        try:
            tokens = records[record][part * seq_len : (part + 1) * seq_len + 1]
        except BadRecordError:  # set aside
            tokens = np.zeros(0, np.int32)
        rows.append(
            {
                "step": example // size + 1,
                "source": name,
                "position": position,
                "shard": shard,
                "record": inside,
                "documents": tokenizer.boundaries.documents(tokens),
                "text": tokenizer.decode(tokens.tolist())[:300],
            }
        )
    return rows


def rollbacks_of(meta: RunMeta, decided: list[dict[str, Any]]) -> list[Any]:
    """The decisions in effect: those of the run folder, or, where its file was lost,
    of the checkpoint."""
    saved = list(meta.rollbacks)
    if decided[: len(saved)] == saved:
        return decided
    if not decided:
        return saved
    raise UserError(
        "rollbacks.json of the run folder contradicts the checkpoint at step "
        f"{meta.step} ({json.dumps(saved)[:200]}): restore it from a copy"
    )
