"""Whether a run may start, or go on from a checkpoint: each check says why not."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax.config import Config, UserError, to_dict
from gamayun_jax.data.continuity import diff_past
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.curriculum import Curriculum
from gamayun_jax.data.plan import DataPlan
from gamayun_jax.training import cluster, optimizer
from gamayun_jax.training.run_folder import (
    checkpoint_steps,
    differences,
    model_name,
)
from gamayun_jax.training.run_meta import RunMeta
from gamayun_jax.training.step import stage_tokens


def check_same(cfg: Config, **options: Any) -> None:
    """Raise UserError unless the first process has the same config and options.

    Others would train on other data, or break the first collective that differs.
    """
    mine = to_dict(cfg) | {f"--{k.replace('_', '-')}": v for k, v in options.items()}
    other = differences(cluster.from_first(mine), mine)
    told = "; ".join(
        f"{k} is {a!r} there and {b!r} here" for k, (a, b) in other.items()
    )
    if told:
        raise UserError(
            f"the first process was started with another config: {told}: start all "
            "with the same"
        )


def check_schedules(cfg: Config, tokens_before: int = 0) -> None:
    """Raise UserError if a stage's warm-up and decay do not fit, or if it would take
    another tokenizer on the way; `tokens_before`: tokens that were trained on before
    this run."""
    for k, stage in enumerate(cfg.stages):
        begin, end = stage_tokens(cfg, k, tokens_before)
        where = f"stages.{stage.name}.schedule"
        optimizer.check_schedule(stage.schedule, where, begin, end)
        if k and stage.transition.embeddings != "keep":
            raise UserError(
                f"stages.{stage.name}.transition.embeddings="
                f"{stage.transition.embeddings!r}: only where a run begins, in its "
                "first stage; set it there"
            )


def check_corpus(cfg: Config, corpus: Corpus) -> None:
    """Raise UserError where the corpus does not fit the config, or is not of the same
    texts on all processes, each of which may read a copy of its own."""
    texts = json.dumps(corpus.contents(), sort_keys=True).encode()
    crc_P = cluster.gather(np.uint32(zlib.crc32(texts)))
    if (crc_P != crc_P[0]).any():
        raise UserError(
            f"processes {np.flatnonzero(crc_P != crc_P[0]).tolist()} have other texts "
            f"in corpus {corpus.folder} than the first process: copy it anew, or put "
            "it on a file system that they share"
        )
    size = corpus.manifest["tokenizer"]["vocab_size"]
    if size > cfg.model.vocab_size:
        raise UserError(
            f"corpus {corpus.folder} has a tokenizer of {size} pieces, but "
            f"model.vocab_size={cfg.model.vocab_size}: use the tokenizer that the "
            "config was made for, or raise model.vocab_size"
        )
    if cfg.corpus.tokenizer.vocab_size not in (0, size):
        raise UserError(
            f"corpus {corpus.folder} was made with another tokenizer ({size} pieces) "
            f"than the config's (corpus.tokenizer.vocab_size="
            f"{cfg.corpus.tokenizer.vocab_size}): build it again with `gamayun corpus "
            "build`, or give data.corpus the right folder"
        )


def lost_checkpoints(
    recorded: Mapping[str, Any], rollbacks: Sequence[Mapping[str, Any]], after: int = -1
) -> list[int]:
    """Steps of the checkpoints beyond step `after` that a run folder's lineage lists
    and that no rollback has abandoned since it was written."""
    later = rollbacks[len(recorded.get("rollbacks", ())) :]
    steps = (c["step"] for c in recorded.get("checkpoints", ()))
    return [s for s in steps if s > after and all(r["to"] >= s for r in later)]


def check_checkpoints(run: Path, lost: Sequence[int]) -> None:
    """Raise UserError if a run folder has none of the checkpoints that it lists: a
    start would take it for a new run, and do away with its records."""
    if lost and not checkpoint_steps(run):
        raise UserError(
            f"the run in {run} saved checkpoints up to step {max(lost)} (lineage.json) "
            f"and {run / 'checkpoints'} has none: put that folder back to go on, or "
            "give --fresh to begin anew; the records then move to "
            f"{run / 'former'}"
        )


def check_tokenizer(meta: RunMeta, corpus: Corpus, where: str) -> None:
    """Raise UserError if a checkpoint's tokenizer is not the corpus's."""
    tokenizer = corpus.manifest["tokenizer"]["fingerprint"]
    if meta.tokenizer is None:
        raise UserError(
            f"{where} was imported without a tokenizer, so nothing says that its ids "
            f"mean what those of corpus {corpus.folder} mean: import it again from a "
            "folder with the tokenizer.json and tokenizer.model of that corpus"
        )
    if meta.tokenizer != tokenizer:
        raise UserError(
            f"{where} was trained with another tokenizer ({meta.tokenizer[:12]}) "
            f"than corpus {corpus.folder} has ({tokenizer[:12]}): use the corpus it "
            "was trained on, or one built with its tokenizer "
            "(corpus.tokenizer.model); or begin a run with the embeddings exchanged "
            '(transition.embeddings="pieces" of its first stage)'
        )


def check_past(
    cfg: Config, plan: DataPlan, corpus: Corpus, meta: RunMeta, where: str
) -> None:
    """Raise UserError if the config would re-map examples that were trained on."""
    check_tokenizer(meta, corpus, where)
    end = meta.step * cfg.data.batch_size
    for k, former in enumerate(meta.curricula):
        first = former["first_example"]
        if first >= end:
            break
        if k >= len(plan.runs) or plan.runs[k].first_example != first:
            changed = [f"the cursors began anew at example {first}"]
        else:
            old = Curriculum.from_json(former["curriculum"])
            new = plan.runs[k].curriculum
            changed = diff_past(old, new, min(end - first, old.total))
        if changed:
            begun, causes = changed_fields(cfg, meta, where), changed[1:]
            details = changed[:1]
            if begun:  # the rest follows from it, but for what is the corpus's
                details += [c for c in causes if c.startswith("size of")]
                causes = begun
            elif not causes:
                causes, details = changed, []
            also = f" ({'; '.join(details)})" if details else ""
            raise UserError(
                f"{'; '.join(causes)}: what was trained on before step {meta.step} "
                f"of {where} cannot be re-mapped; set it back (later stages may "
                f"change), or start another run with --init-from{also}"
            )


def changed_fields(cfg: Config, meta: RunMeta, where: str) -> list[str]:
    """Fields of the stages that a checkpoint has begun and of the data, by which the
    examples before it are mapped, where their values are not the same any more."""
    former = meta.config
    mapping = {"block_examples": former.data.block_examples}
    current = {"block_examples": cfg.data.block_examples}
    found = differences(mapping, current, "data")
    for k in range(former.stage_at(max(meta.step - 1, 0)) + 1):
        old = former.stages[k]
        if k >= len(cfg.stages):
            return [*_told(found), f"stages.{old.name} is not in the config any more"]
        parts = []
        for stage in (old, cfg.stages[k]):
            part = {"tokens": stage.tokens, "mixture": to_dict(stage.mixture)}
            if k or meta.origin:
                part["transition"] = {"cursors": stage.transition.cursors}
            parts.append(part)
        found |= differences(parts[0], parts[1], f"stages.{cfg.stages[k].name}")
    return _told(found)


def _told(found: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"{name} was {old!r} and is {new!r}" for name, (old, new) in found.items()]


def check_origin(
    path: Path | None, origin: Mapping[str, Any] | None, recorded: Any, where: Path
) -> None:
    """Raise UserError if --init-from does not say where the run folder's run began.

    Args:
      origin: of the run's checkpoint; None if it has none, or began from nothing.
      recorded: `init_from` in the run folder's lineage, for a run that was killed
        before its first checkpoint.
    """
    began = origin or recorded
    if path is None:
        if origin is None and recorded:
            raise UserError(
                f"the run in {where} began from {recorded['checkpoint']} and has no "
                "checkpoint of its own yet: give the same --init-from again, or "
                "another --workdir"
            )
        return
    asked = model_name(path)
    if began is None:
        raise UserError(
            f"the run in {where} began from nothing and has checkpoints: --init-from "
            f"{asked} begins a new run, give it another --workdir"
        )
    # A run folder stands for its newest checkpoint, which may have moved on since.
    same_run = asked.rsplit("/", 1)[0] == began["checkpoint"].rsplit("/", 1)[0]
    newest = path.name != asked.rsplit("/", 1)[-1]
    if asked != began["checkpoint"] and not (same_run and newest):
        raise UserError(
            f"the run in {where} began from {began['checkpoint']}, not from {asked}: "
            "leave --init-from out, or give another --workdir"
        )
