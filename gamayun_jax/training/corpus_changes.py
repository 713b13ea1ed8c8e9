"""What has changed in a corpus since a checkpoint was written, and was it served."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gamayun_jax.config import UserError
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.loader import example_order
from gamayun_jax.data.plan import DataPlan, past_plan
from gamayun_jax.training.run_meta import RunMeta

MOST_LOOKED_UP = 20_000  # served examples of a changed source that are counted


@dataclass(frozen=True)
class CorpusChange:
    """What is not as it was at a checkpoint: a source's texts, or something else."""

    source: str  # "" for what is no source
    served: bool  # whether examples before the checkpoint are among it
    text: str


def corpus_changes(meta: RunMeta, corpus: Corpus, where: str) -> list[CorpusChange]:
    """What has changed in a corpus since a checkpoint was written.

    Which examples were served is exact. A hash covers a shard, so what is known of
    their texts is whether the shard that they lie in is the same; of that an example
    of another text cannot escape, one of the same text may be counted.
    """
    if not meta.curricula:  # imported: it has no past here
        return []
    recipe, former = corpus.manifest["recipe"], meta.lineage["corpus"]["recipe"]
    found = []
    if recipe != former:
        text = f"its recipe was {former[:12]} and is {recipe[:12]}"
        found.append(CorpusChange("", False, text))
    if meta.contents is None:
        text = (
            f"{where} has no hashes of its corpus's shards, since a former release "
            "wrote it: whether the texts that were served are the same cannot be "
            "verified; the next checkpoint has them"
        )
        return [*found, CorpusChange("", False, text)]
    old, new = meta.contents, corpus.contents()
    if old == new:
        return found
    plan = past_plan(
        meta.step, meta.config.data.batch_size, meta.curricula, meta.rollbacks
    )
    for name in {**old["sources"], **new["sources"]}:
        if old["sources"].get(name) == new["sources"].get(name):
            continue
        if name not in old["sources"]:
            text, served = f"source {name} is new", False
        else:
            shards = new["sources"].get(name, [])
            text, served = source_changes(
                plan, meta.step, name, old["sources"][name], shards
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
    total, size = starts[-1], plan.runs[0].curriculum.sources[name]
    after = begins(new)[-1]
    # The order is of all the records: of another number, a cursor means nothing any
    # more, be it a former run's. Of a source that is gone nothing comes again.
    moved = bool(new) and total != after and plan.consumed(step)[name] > 0
    if not (changed and size):
        return f"source {name} had {total} records and has {after}", moved
    per_record = size // total
    orders = [
        example_order(r.curriculum.seed, name, range(total), per_record)
        for r in plan.runs
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


def check_contents(meta: RunMeta, corpus: Corpus, where: str) -> None:
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
    meta: RunMeta,
    corpus: Corpus,
    where: str,
    log: Callable[[str], None],
) -> None:
    """Say and record how the corpus differs from the one at a checkpoint."""
    texts = [c.text for c in corpus_changes(meta, corpus, where)]
    for text in texts:
        log(f"corpus: {text}")
    if texts:
        recipe = meta.lineage["corpus"]["recipe"]
        lineage["events"].append(
            {
                "event": "corpus",
                "step": meta.step,
                "old": recipe,
                "new": corpus.manifest["recipe"],
                "changes": texts,
            }
        )
