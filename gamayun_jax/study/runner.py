"""Running a study: every arm with every seed, until each has its record.

Runs are ordinary ones, in FOLDER/runs/ARM/SEED, so a study can be stopped at any moment
and goes on; several processes given the same folder share the work, each taking runs
that no other has (the lock of the run's folder says so). Small runs can be trained side
by side instead (side_by_side.py), a group at a time. What is done is known by its
record alone (records.py): run folders may be deleted.
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from gamayun_jax.config import UserError
from gamayun_jax.data.files import lock, read_json_lines
from gamayun_jax.model import sharding
from gamayun_jax.model.transformer import compute_dtype
from gamayun_jax.model.weights import abstract_params, flops_per_token
from gamayun_jax.storage import InUseError
from gamayun_jax.study.curricula import write_curricula
from gamayun_jax.study.design import Study, with_seed
from gamayun_jax.study.measures import (
    items_of,
    measured,
    retrieval_evaluators,
    with_answers,
)
from gamayun_jax.study.records import (
    Items,
    bits_of,
    means_of,
    read_records,
    record_path,
    write_record,
    write_units,
)
from gamayun_jax.study.registration import MadeArm, digest, make_arms, register
from gamayun_jax.study.side_by_side import (
    Member,
    Trained,
    group_key,
    train_group,
)
from gamayun_jax.train import PREEMPTED, train
from gamayun_jax.training.average import average_meta, average_of
from gamayun_jax.training.checkpoint import Checkpoints
from gamayun_jax.training.divergence import DivergedForGoodError
from gamayun_jax.training.lineage import versions
from gamayun_jax.training.spool import metric_lines

Log = Callable[[str], None]
Todo = list[tuple[MadeArm, int]]
POLL_SECONDS = 10.0  # between looks at runs that other processes make


class Progress:
    """How much of a study is done, and when the rest will be."""

    def __init__(self, study: Study, folder: Path, made: dict[str, MadeArm], log: Log):
        self._folder, self._log, self._began = folder, log, time.monotonic()
        self._tokens = {
            (arm.name, seed): cost(made[arm.name]) for arm, seed in study.runs()
        }
        self._before = self._done()

    def _done(self) -> float:
        return sum(
            tokens
            for (arm, seed), tokens in self._tokens.items()
            if record_path(self._folder, arm, seed).exists()
        )

    def say(self, text: str) -> None:
        """A line with the share that is done and the time that the rest will take, at
        the pace of all processes since this one began."""
        done, total = self._done(), sum(self._tokens.values())
        seconds = time.monotonic() - self._began
        left = ""
        if done > self._before and done < total:
            rest = (total - done) * seconds / (done - self._before)
            left = f", left {datetime.timedelta(seconds=round(rest))}"
        self._log(f"{text}  [{done / total:.1%} of the study{left}]")


def cost(made: MadeArm) -> float:
    """FLOPs of a run: runs of several sizes are weighed by them."""
    cfg = made.cfg
    each = flops_per_token(cfg.model, cfg.data.seq_len)
    return cfg.total_steps * cfg.tokens_per_step * each


def run_study(
    study: Study,
    folder: Path,
    side_by_side: int = 0,
    keep_runs: bool = False,
    arms: str = "*",
    log: Log = print,
) -> int:
    """Make every run of a study that has no record yet.

    Args:
      side_by_side: train up to so many runs in one program; 0: one after the other.
      arms: glob; only runs of the arms whose names match.
      keep_runs: keep the folders of finished runs, with their checkpoints.

    Returns:
      0 when all runs have records, `train.PREEMPTED` if a signal stopped it.

    Raises:
      UserError: a study that does not fit its corpora or its registration.
    """
    made = make_arms(study)
    runs = [
        (made[arm.name], seed)
        for arm, seed in study.runs()
        if fnmatch.fnmatchcase(arm.name, arms)
    ]
    if not runs:
        raise UserError(
            f"no arm is like {arms!r} (--arms); there are "
            f"{', '.join(a.name for a in study.arms)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    read_records(folder, register(folder, study, made, write=False))
    sha256 = register(folder, study, made)
    write_curricula(folder, made)
    log(f"study {study.name}, registered as {sha256[:16]}: {len(study.runs())} runs")
    progress = Progress(study, folder, made, log)
    while todo := [
        r for r in runs if not record_path(folder, r[0].name, r[1]).exists()
    ]:
        taken = False
        for group in groups_of(todo) if side_by_side else [[run] for run in todo]:
            with claimed(folder, group, side_by_side or 1) as mine:
                if not mine:
                    continue
                if side_by_side:
                    run_group(folder, sha256, mine, progress.say)
                else:
                    arm, seed = mine[0]
                    try:
                        if run_alone(folder, sha256, arm, seed, keep_runs, log):
                            return PREEMPTED
                    except InUseError:
                        continue  # by a command on that run alone
                    progress.say(f"{arm.name}, seed {seed}")
                taken = True
        if not taken:
            time.sleep(POLL_SECONDS)  # other processes make what is left
    return 0


def run_alone(
    folder: Path, sha256: str, made: MadeArm, seed: int, keep: bool, log: Log
) -> int:
    """An ordinary run and its record; another status than 0 if a signal stopped it."""
    workdir = folder / "runs" / made.name / str(seed)
    cfg = with_seed(made.cfg, made.name, seed)
    begun = time.monotonic()
    try:
        if status := train(cfg, workdir, log=lambda text: None):
            return status
    except DivergedForGoodError as e:
        record = head(made, seed, sha256) | {"status": "diverged", "why": str(e)}
        write_record(folder, record)
        log(f"{made.name}, seed {seed}: DIVERGED, {e}")
        return 0
    seconds = time.monotonic() - begun
    lines = metric_lines(workdir)
    metrics = [r for _, r in lines if r and r["kind"] == "train"]
    served = {
        name: row["tokens"] // cfg.data.seq_len
        for name, row in metrics[-1]["sources"].items()
    }
    folder_of_items = workdir / "eval" / f"{cfg.total_steps}.items"
    items = {
        p.stem: read_json_lines(p) for p in sorted(folder_of_items.glob("*.jsonl"))
    }
    evaluations: list[Items] = [{**items, **retrieval_items(made, seed, workdir)}]
    if made.arm.average_tokens:
        evaluations.append(evaluate_average(made, seed, workdir))
    curve = [
        {
            "step": r["step"],
            "tokens": r["tokens"],
            "loss": r["loss"],
            "languages": {
                k: round(v["nll"], 4)
                for k, v in r["languages"].items()
                if v["nll"] is not None
            },
        }
        for r in metrics
    ]
    finish(folder, sha256, made, seed, evaluations, curve, served, seconds, 0)
    if not keep:
        shutil.rmtree(workdir)
    return 0


def retrieval_items(made: MadeArm, seed: int, workdir: Path) -> Items:
    """What is not evaluated in the course of training, by a run's last checkpoint."""
    cfg = with_seed(made.cfg, made.name, seed)
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        evaluators = retrieval_evaluators(cfg, made.corpus, mesh, made.measures)
        if not evaluators:
            return {}
        abstract = sharding.place_abstract(abstract_params(cfg.model), mesh)
        store = Checkpoints(workdir / "checkpoints", read_only=True)
        with contextlib.closing(store):
            params = store.restore_params(cfg.total_steps, abstract)
        return items_of(evaluators, params)


def evaluate_average(made: MadeArm, seed: int, workdir: Path) -> Items:
    """The same and all else by the mean of a run's last checkpoints."""
    cfg = with_seed(made.cfg, made.name, seed)
    meta = average_meta(workdir, window=made.arm.average_tokens)
    params = average_of(workdir, meta)
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        evaluators = measured(cfg, made.corpus, mesh, made.measures)
        placed = jax.device_put(params, sharding.replicated(mesh))
        return items_of(evaluators, placed)


# --- side by side -----------------------------------------------------------------


def groups_of(todo: Todo) -> list[Todo]:
    """Runs that can be trained as one program, together."""
    groups: dict[tuple[str, Path], Todo] = {}
    for run in todo:
        key = group_key(run[0].cfg), run[0].corpus.folder
        groups.setdefault(key, []).append(run)
    return list(groups.values())


@contextlib.contextmanager
def claimed(folder: Path, runs: Todo, limit: int) -> Iterator[Todo]:
    """The first of the runs that have no record and no other process at work on them.

    They are this process's until it has written their records.
    """
    with contextlib.ExitStack() as held:
        mine: Todo = []
        for made, seed in runs:
            path = folder / "runs" / made.name / f"{seed}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            try:
                held.enter_context(lock(path, InUseError(f"{path} is in use")))
            except InUseError:
                continue
            if not record_path(folder, made.name, seed).exists():
                mine.append((made, seed))
            if len(mine) == limit:
                break
        yield mine


def run_group(folder: Path, sha256: str, group: Todo, log: Log) -> None:
    """Train runs side by side and write their records."""
    members = [
        Member(
            with_seed(m.cfg, m.name, seed), m.plan_of(seed), m.arm.average_tokens,
            m.measures,
        )
        for m, seed in group
    ]  # fmt: skip
    log(f"{len(group)} runs side by side: {group[0][0].name} and others")
    begun = time.monotonic()
    trained = train_group(members, group[0][0].corpus, log)
    seconds = (time.monotonic() - begun) / len(group)
    for (made, seed), member, result in zip(group, members, trained, strict=True):
        served = member.plan.served(member.plan.total_steps)
        if why := divergence_of(made, result):
            record = head(made, seed, sha256) | {"status": "diverged", "why": why}
            write_record(folder, record)
            log(f"{made.name}, seed {seed}: DIVERGED, {why}")
            continue
        ends = result.evaluations
        finish(
            *(folder, sha256, made, seed, ends, result.curve, served, seconds),
            len(group),
        )


def divergence_of(made: MadeArm, result: Trained) -> str:
    """Why a run of a group counts as diverged, by the rule of runs alone; "" if it
    does not."""
    limit = made.cfg.divergence.nonfinite
    if limit and result.in_a_row >= limit:
        return f"loss or gradient of {result.in_a_row} steps in a row was not finite"
    if not all(math.isfinite(point["loss"]) for point in result.curve):
        return "the training loss is not finite"
    return "" if result.evaluations else "its last parameters are not finite"


# --- records ----------------------------------------------------------------------


def head(made: MadeArm, seed: int, sha256: str) -> dict[str, Any]:
    """The first fields of a record."""
    return {"arm": made.name, "seed": seed, "sha256": sha256}


def finish(
    folder: Path,
    sha256: str,
    made: MadeArm,
    seed: int,
    evaluations: Sequence[Items],
    curve: list[dict[str, Any]],
    served: dict[str, int],
    seconds: float,
    side_by_side: int,
) -> None:
    """Write the record of a run that came to its end.

    Args:
      evaluations: of the last parameters, and of their average where the arm has one.
    """
    cfg = made.cfg
    evaluations = [with_answers(items, made.measures) for items in evaluations]
    items = evaluations[-1]
    corpus = digest(made.corpus.contents())
    write_units(folder, corpus, items)
    record = head(made, seed, sha256) | {
        "status": "done",
        "corpus": corpus,
        "steps": cfg.total_steps,
        "tokens": cfg.total_steps * cfg.tokens_per_step,
        "served": served,
        "sets": means_of(items),
        "bits": bits_of(items),
        "curve": curve,
        "made_with": {
            "device": jax.devices()[0].device_kind,
            "dtype": str(compute_dtype(cfg.compute.dtype)),
            "side_by_side": side_by_side,
            "seconds": round(seconds, 1),
            "versions": versions(),
        },
    }
    if len(evaluations) > 1:
        record["raw"] = means_of(evaluations[0])
    write_record(folder, record)
