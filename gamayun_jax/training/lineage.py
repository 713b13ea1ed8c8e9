"""Lineage: what a model comes from, and whether a run may go on from it."""

from __future__ import annotations

import bisect
import datetime
import importlib.metadata
import itertools
import json
import math
import platform
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gamayun_jax.config import Config, UserError, from_json, to_dict
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.curriculum import Curriculum, diff_past
from gamayun_jax.data.loader import DataPlan, example_order, past_plan
from gamayun_jax.model.weights import parameter_count
from gamayun_jax.training import checkpoint, cluster, optimizer
from gamayun_jax.training.checkpoint import Checkpoints
from gamayun_jax.training.run_folder import checkpoint_steps, differences
from gamayun_jax.training.step import stage_tokens

MOST_LOOKED_UP = 20_000  # served examples of a changed source that are counted


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


def new_lineage(cfg: Config, corpus: Corpus, plan: DataPlan, origin) -> dict[str, Any]:
    """What the model comes from: config, corpus, curriculum, versions, parents."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "gamayun_jax")

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed as a package"

    first = origin["tokens"] if origin else 0
    keys = ("documents", "bytes", "tokens")
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
                for name, info in corpus.manifest["sources"].items()
            },
        },
        "curriculum": {
            "table": [
                {**row, "tokens": row["examples"] * cfg.data.seq_len}
                for row in plan.table()
            ],
            "shares": share_points(cfg, plan, first),
        },
        "stages": stage_spans(cfg, first),
        "transitions": {s.name: to_dict(s.transition) for s in cfg.stages},
        "checkpoints": [],
        "events": [],
        "versions": {p: version(p) for p in packages}
        | {"python": platform.python_version()},
    }


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


def stage_spans(cfg: Config, first: int = 0) -> list[dict[str, Any]]:
    """Name, first token and end of each stage; `first`: tokens before this run."""
    spans = []
    for k, stage in enumerate(cfg.stages):
        begin, end = stage_tokens(cfg, k, first)
        spans.append({"name": stage.name, "start_tokens": begin, "end_tokens": end})
    return spans


def share_points(cfg: Config, plan: DataPlan, first: int = 0) -> list[dict[str, Any]]:
    """Points of each source's share over tokens, to draw with straight lines."""
    points = []
    before = [plan.segments[0].curriculum.before, *plan.shares]
    for k, stage in enumerate(cfg.stages):
        begin, end = stage_tokens(cfg, k, first)
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
    if size != cfg.corpus.tokenizer.vocab_size:
        raise UserError(
            f"corpus {corpus.folder} was made with another tokenizer ({size} pieces) "
            f"than the config's (corpus.tokenizer.vocab_size="
            f"{cfg.corpus.tokenizer.vocab_size}): build it again with `gamayun corpus "
            "build`, or give data.corpus the right folder"
        )


def check_past(cfg: Config, plan: DataPlan, corpus: Corpus, meta, where: str) -> None:
    """Raise UserError if the config would re-map examples that were trained on."""
    check_tokenizer(meta, corpus, where)
    end = meta["step"] * cfg.data.batch_size
    for k, former in enumerate(meta["curricula"]):
        first = former["first_example"]
        if first >= end:
            break
        if k >= len(plan.segments) or plan.segments[k].first_example != first:
            changed = [f"the cursors began anew at example {first}"]
        else:
            old = Curriculum.from_json(former["curriculum"])
            new = plan.segments[k].curriculum
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
                f"{'; '.join(causes)}: what was trained on before step {meta['step']} "
                f"of {where} cannot be re-mapped; set it back (later stages may "
                f"change), or start another run with --init-from{also}"
            )


def changed_fields(cfg: Config, meta: Mapping[str, Any], where: str) -> list[str]:
    """Fields of the stages that a checkpoint has begun and of the data, by which the
    examples before it are mapped, where their values are not the same any more."""
    former = from_json(meta["config"], where)
    mapping = {"block_examples": former.data.block_examples}
    current = {"block_examples": cfg.data.block_examples}
    found = differences(mapping, current, "data")
    for k in range(former.stage_at(max(meta["step"] - 1, 0)) + 1):
        old = former.stages[k]
        if k >= len(cfg.stages):
            return [*_told(found), f"stages.{old.name} is not in the config any more"]
        parts = []
        for stage in (old, cfg.stages[k]):
            part = {"tokens": stage.tokens, "mixture": to_dict(stage.mixture)}
            if k or meta["origin"]:
                part["transition"] = {"cursors": stage.transition.cursors}
            parts.append(part)
        found |= differences(parts[0], parts[1], f"stages.{cfg.stages[k].name}")
    return _told(found)


def _told(found: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"{name} was {old!r} and is {new!r}" for name, (old, new) in found.items()]


def check_schedules(cfg: Config, first: int = 0) -> None:
    """Raise UserError if a stage's warm-up and decay do not fit; `first`: tokens before
    this run."""
    for k, stage in enumerate(cfg.stages):
        begin, end = stage_tokens(cfg, k, first)
        where = f"stages.{stage.name}.schedule"
        optimizer.check_schedule(stage.schedule, where, begin, end)


@dataclass(frozen=True)
class CorpusChange:
    """What is not as it was at a checkpoint: a source's texts, or something else."""

    source: str  # "" for what is no source
    served: bool  # whether examples before the checkpoint are among it
    text: str


def corpus_changes(
    meta: Mapping[str, Any], corpus: Corpus, where: str
) -> list[CorpusChange]:
    """What has changed in a corpus since a checkpoint was written.

    Which examples were served is exact. A hash covers a shard, so what is known of
    their texts is whether the shard that they lie in is the same; of that an example
    of another text cannot escape, one of the same text may be counted.
    """
    if not meta["curricula"]:  # imported: it has no past here
        return []
    recipe, former = corpus.manifest["recipe"], meta["lineage"]["corpus"]["recipe"]
    found = []
    if recipe != former:
        text = f"its recipe was {former[:12]} and is {recipe[:12]}"
        found.append(CorpusChange("", False, text))
    if "contents" not in meta:
        text = (
            f"{where} has no hashes of its corpus's shards, since a former release "
            "wrote it: whether the texts that were served are the same cannot be "
            "verified; the next checkpoint has them"
        )
        return [*found, CorpusChange("", False, text)]
    old, new = meta["contents"], corpus.contents()
    if old == new:
        return found
    batch_size = from_json(meta["config"], where).data.batch_size
    plan = past_plan(meta, batch_size)
    for name in {**old["sources"], **new["sources"]}:
        if old["sources"].get(name) == new["sources"].get(name):
            continue
        if name not in old["sources"]:
            text, served = f"source {name} is new", False
        else:
            shards = new["sources"].get(name, [])
            text, served = source_changes(
                plan, meta["step"], name, old["sources"][name], shards
            )
        found.append(CorpusChange(name, served, text))
    for name, digest in old["heldout"].items():
        if (other := new["heldout"].get(name)) != digest:
            what = "has other texts" if other else "is gone"
            text = f"held-out set {name} {what}: its results cannot be compared"
            found.append(CorpusChange("", False, text))
    return found


def source_changes(
    plan: DataPlan,
    step: int,
    name: str,
    old: Sequence[Sequence[Any]],
    new: Sequence[Sequence[Any]],
) -> tuple[str, bool]:
    """What has changed in a source, and whether `plan` served some of it before
    `step`; `old` and `new`: [records, hash] of its shards."""

    def begins(shards: Sequence[Sequence[Any]]) -> list[int]:
        return list(itertools.accumulate((n for n, _ in shards), initial=0))

    starts = begins(old)
    same = {(b, *s) for b, s in zip(begins(new), new, strict=False)}
    changed = [k for k, s in enumerate(old) if (starts[k], *s) not in same]
    total, size = starts[-1], plan.segments[0].curriculum.sources[name]
    after = begins(new)[-1]
    # The order is of all the records: of another number, a cursor means nothing any
    # more, be it a former run's. Of a source that is gone nothing comes again.
    moved = bool(new) and total != after and plan.consumed(step)[name] > 0
    if not (changed and size):
        return f"source {name} had {total} records and has {after}", moved
    per_record = size // total
    orders = [
        example_order(s.seed, name, range(total), per_record) for s in plan.segments
    ]
    looked = hits = 0
    for segment, position in plan.behind(name, step):
        record = orders[segment][position] // per_record
        looked += 1
        hits += bisect.bisect_right(starts, record) - 1 in changed
        if hits and looked >= MOST_LOOKED_UP:
            break
    numbers = ", ".join(map(str, changed[:8])) + (", ..." if changed[8:] else "")
    text = f"source {name}: {len(changed)} of its {len(old)} shards changed ({numbers})"
    if total != after:
        text += f", its records from {total} to {after}"
    first = "first " if looked >= MOST_LOOKED_UP else ""
    text += f", with {hits} of the {first}{looked} examples served"
    return text, bool(hits) or moved


def check_contents(meta: Mapping[str, Any], corpus: Corpus, where: str) -> None:
    """Raise UserError if a text that was served has changed."""
    changed = [c.text for c in corpus_changes(meta, corpus, where) if c.served]
    if changed:
        raise UserError(
            f"corpus {corpus.folder} has other texts than {where} was trained on (by "
            "the hashes of whole shards): give data.corpus the former one, or start "
            f"another run with --init-from. {'; '.join(changed)}"
        )


def note_corpus(
    lineage: dict[str, Any],
    meta: Mapping[str, Any],
    corpus: Corpus,
    where: str,
    log: Callable[[str], None],
) -> None:
    """Say and record how the corpus differs from the one at a checkpoint."""
    texts = [c.text for c in corpus_changes(meta, corpus, where)]
    for text in texts:
        log(f"corpus: {text}")
    if texts:
        recipe = meta["lineage"]["corpus"]["recipe"]
        lineage["events"].append(
            {
                "event": "corpus",
                "step": meta["step"],
                "old": recipe,
                "new": corpus.manifest["recipe"],
                "changes": texts,
            }
        )


def load_origin(
    path: Path, cfg: Config, corpus: Corpus
) -> tuple[Checkpoints, int, dict[str, Any], dict[str, Any]]:
    """The checkpoint to start from: its store, step and meta, and the `origin` that
    the new run keeps: where it came from, and what its data plan goes on with.

    A cursor is carried over only into a source of the same size with the same texts up
    to it, where it means the same; the others are listed under `restarted`, and what is
    known to have changed under `corpus_changes`.

    Raises:
      UserError: no checkpoint there, or one of another tokenizer.
    """
    folder, step = checkpoint.find_checkpoint(path)
    store = Checkpoints(folder, read_only=True)
    meta = store.meta(step)
    where = f"--init-from {folder}/{step}"
    check_tokenizer(meta, corpus, where)
    sizes = corpus.examples(cfg.data.seq_len)
    former: dict[str, int] = {}
    seed, end = meta["seed"], step * from_json(meta["config"], where).data.batch_size
    for k, segment in enumerate(meta["curricula"]):
        former |= segment["curriculum"]["sources"]
        # The segment's that the cursors are of: `seed` was once the last one's.
        if not k or segment["first_example"] < end:
            seed = segment["curriculum"]["seed"]
    cursors = meta["consumed"]
    changes = corpus_changes(meta, corpus, where)
    other = {c.source for c in changes if c.served}
    other |= {k for k in cursors if sizes.get(k) != former[k]}
    origin = {
        "checkpoint": f"{folder.parent.name}/{folder.name}/{step}",
        "run": meta["lineage"].get("run"),
        "step": step,
        "tokens": meta["tokens"],
        "cursors": {k: n for k, n in cursors.items() if k not in other},
        "restarted": sorted(k for k in cursors if k in sizes and k in other),
        "corpus_changes": [c.text for c in changes],
        "seed": seed,
        "shares": meta["shares"],
        "lineage": meta["lineage"],
    }
    return store, step, meta, origin


def check_tokenizer(meta: Mapping[str, Any], corpus: Corpus, where: str) -> None:
    """Raise UserError if a checkpoint's tokenizer is not the corpus's."""
    tokenizer = corpus.manifest["tokenizer"]["fingerprint"]
    if meta["tokenizer"] is None:
        raise UserError(
            f"{where} was imported without a tokenizer, so nothing says that its ids "
            f"mean what those of corpus {corpus.folder} mean: import it again from a "
            "folder with the tokenizer.json and tokenizer.model of that corpus"
        )
    if meta["tokenizer"] != tokenizer:
        raise UserError(
            f"{where} was trained with another tokenizer ({meta['tokenizer'][:12]}) "
            f"than corpus {corpus.folder} has ({tokenizer[:12]}): use the corpus it "
            "was trained on, or one built with its tokenizer.model"
        )


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
    folder, step = checkpoint.find_checkpoint(path)
    asked = f"{folder.parent.name}/{folder.name}/{step}"
    if began is None:
        raise UserError(
            f"the run in {where} began from nothing and has checkpoints: --init-from "
            f"{asked} begins a new run, give it another --workdir"
        )
    # A run folder stands for its newest checkpoint, which may have moved on since.
    same_run = asked.rsplit("/", 1)[0] == began["checkpoint"].rsplit("/", 1)[0]
    if asked != began["checkpoint"] and not (same_run and path.name != str(step)):
        raise UserError(
            f"the run in {where} began from {began['checkpoint']}, not from {asked}: "
            "leave --init-from out, or give another --workdir"
        )
