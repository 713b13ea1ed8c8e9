"""Consistency of answers: how often two languages pick the same choice of an item."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax.config import UserError
from gamayun_jax.evaluate.results import read_items
from gamayun_jax.fields import check_there


def consistency(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """How often two languages pick the same choice of the same item.

    Args:
      rows: of an items file of `gamayun eval`, of a parallel multiple-choice task.
      metric: whose pick counts: raw, token, norm or pmi.

    Returns:
      {"pairs": {"en-ru": {"items", "same", "expected": if right answers were spread
      over the items independently and wrong ones evenly over the choices, "chance": of
      random answers, "both_wrong", "same_wrong": share of the items that both get wrong
      with the same choice, None without such items, "chance_wrong"}}, "mean": ...}.
    """
    picks: dict[str, dict[str, tuple[int, int, int]]] = {}
    for row in rows:
        told = (row["picked"][metric], row["answer"], len(row["logprobs"]))
        picks.setdefault(row["language"], {})[row["id"]] = told
    pairs: dict[str, dict[str, Any]] = {}
    for a, b in itertools.combinations(picks, 2):
        ids = [i for i in picks[a] if i in picks[b]]
        if not ids:
            continue
        p, answer, sizes = np.array([picks[a][i] for i in ids]).T
        q, other, _ = np.array([picks[b][i] for i in ids]).T
        if (answer != other).any():
            raise UserError(
                f"languages {a} and {b} have different answers to the same items: the "
                "task is not parallel"
            )
        same, wrong = p == q, (p != answer) & (q != answer)
        right_a, right_b = (p == answer).mean(), (q == answer).mean()
        even = (1 / np.maximum(1, sizes - 1)).mean()
        pairs[f"{a}-{b}"] = {
            "items": len(ids),
            "same": float(same.mean()),
            "expected": float(right_a * right_b + (1 - right_a) * (1 - right_b) * even),
            "chance": float((1 / sizes).mean()),
            "both_wrong": int(wrong.sum()),
            "same_wrong": float(same[wrong].mean()) if wrong.any() else None,
            "chance_wrong": float(even),
        }
    mean: dict[str, float | None] = {}
    for key in ("same", "expected", "chance", "same_wrong", "chance_wrong"):
        values = [pair[key] for pair in pairs.values() if pair[key] is not None]
        mean[key] = float(np.mean(values)) if values else None
    return {"metric": metric, "pairs": pairs, "mean": mean}


def consistency_of(folder: Path) -> dict[str, Any]:
    """Task -> `consistency`, of the parallel multiple-choice tasks in the folder that
    `gamayun eval` wrote.

    Raises:
      UserError: it has no eval.json, or items that cannot be read.
    """
    advice = "give the OUT of `gamayun eval MODEL --tasks ... --out OUT`"
    check_there(folder, "", advice)
    try:
        result = json.loads((folder / "eval.json").read_text("utf-8"))
        found = {}
        for name, told in result.get("tasks", {}).items():
            if told["kind"] == "multiple_choice" and told["parallel"]:
                rows = read_items(folder / "items", name)
                found[name] = consistency(rows, told["metric"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            f"{folder} is no folder of answers ({type(e).__name__}: {e}): {advice}"
        ) from e
    return found
