"""Continuity: examples that were served may not be mapped anew.

A fingerprint is the hash of all that determines the examples before a certain one.
Where two differ, `diff_past` says from which example on, and why.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from gamayun_jax.data.curriculum import VERSION, Curriculum


def past(curriculum: Curriculum, example: int) -> dict[str, Any]:
    """Everything that determines the examples before `example`, as named parts.

    Only sources used by then count, in their order, which breaks ties; other sources
    of the same block come after `example` in it.
    """
    if not example:
        return {}
    c = curriculum
    touched = np.flatnonzero(c.counts_at(example)).tolist()
    parts: dict[str, Any] = {
        "order of sources": [c.names[s] for s in touched],
        "version of the mapping": VERSION,
        "seed": c.seed,
        "block_examples": c.block_examples,
    }
    for s in touched:
        parts[f"size of {c.names[s]}"] = c.sources[c.names[s]]
        parts[f"start of {c.names[s]}"] = int(c.offsets[s])
    for k, b in enumerate(c.blocks):
        if b.start >= example:
            break
        last = min(-(-(example - b.start) // c.block_examples), len(b.ends) - 1)
        counts = b.counts[: last + 1][:, touched]
        digest = hashlib.sha256(b.ends[: last + 1].tobytes() + counts.tobytes())
        if b.key is not None:
            # Where a turn is depends on all of the phase, also on what comes later.
            totals = zip(c.names, b.totals.tolist(), strict=True)
            digest.update(repr([turns for turns in totals if turns[1]]).encode())
        # By number: a phase's name determines nothing.
        parts[f"mapping of phase {k}"] = digest.hexdigest()
    return parts


def fingerprint(curriculum: Curriculum, example: int) -> str:
    """Hash of all that determines the examples before `example`, and of nothing else:
    later phases, and sources not yet used, may change."""
    data = json.dumps(list(past(curriculum, example).items()))
    return hashlib.sha256(data.encode()).hexdigest()


def diff_past(old: Curriculum, new: Curriculum, example: int) -> list[str]:
    """How `new` would re-map examples before `example`, in words; empty if not."""
    if example > new.total:
        return [f"it ends at example {new.total}, but {example} were trained on"]

    def differ(at: int) -> bool:
        return fingerprint(old, at) != fingerprint(new, at)

    if not differ(example):
        return []
    # What differs early differs later too, so the first such example can be bisected.
    same = bisect.bisect_left(range(1, example), True, key=differ)
    lines = [f"examples from number {same} on would be re-mapped"]
    before, after = past(old, example), past(new, example)
    lines += [
        f"{key} was {before[key]} and is {after[key]}"
        for key in before
        # A source that only one side has used is told by its count below.
        if key in after
        and not key.startswith(("mapping", "order"))
        and before[key] != after[key]
    ]

    def shares(where: str, a: Mapping[str, float], b: Mapping[str, float]) -> None:
        for name in {**a, **b}:
            x, y = a.get(name, 0.0), b.get(name, 0.0)
            if x != y:
                lines.append(f"share of {name} {where} was {x:.9g} and is {y:.9g}")

    for a, b, begin in zip(old.phases, new.phases, old.blocks, strict=False):
        if begin.start >= example:  # the future may change
            break
        for key in ("examples", "ramp", "ramp_examples", "order"):
            x, y = getattr(a, key), getattr(b, key)
            if x != y:
                lines.append(f"{key} of {a.name} was {x} and is {y}")
        shares(f"in {a.name}", a.weights, b.weights)
    shares("before the run", old.before, new.before)
    was = dict(zip(old.names, old.counts_at(example).tolist(), strict=True))
    would = dict(zip(new.names, new.counts_at(example).tolist(), strict=True))
    for name in {**was, **would}:
        if was.get(name, 0) != would.get(name, 0):
            lines.append(
                f"{name}: {was.get(name, 0)} examples were served, "
                f"{would.get(name, 0)} would have been"
            )
    # The longest line is the last. Sources that only one side used are told above.
    both = {n for n in was if was[n] and would.get(n)}
    orders = [[n for n in x.names if n in both] for x in (old, new)]
    if orders[0] != orders[1]:
        lines.append(f"order of sources was {orders[0]} and is {orders[1]}")
    return lines
