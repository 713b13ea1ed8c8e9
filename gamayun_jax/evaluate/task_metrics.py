"""Numbers from what a model scored or wrote: per item, per language, over languages.

Every metric is a mean over items, so that its standard error is that of a mean and
two models can be compared item by item (compare.py). The exception is bits per byte,
a ratio of sums (standard_errors.ratio).

Shape suffixes: C choices of an item.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gamayun_jax.data.cleaning import normal_form
from gamayun_jax.data.heldout_sets import xz_bytes
from gamayun_jax.evaluate.standard_errors import (
    compression,
    mean_error,
    mean_se,
    ratio,
    ratio_residuals,
    root,
)
from gamayun_jax.evaluate.tasks import METRICS, Item, Task, prompt_of, with_choice

BINS = 10  # of the expected calibration error
CHARACTERS = ("zh", "ja", "ko", "th")  # languages whose words f1 cannot split


# --- one item -------------------------------------------------------------------------


def picks(
    logprobs_C: np.ndarray,
    tokens_C: Sequence[int],
    bytes_C: Sequence[int],
    unconditional_C: np.ndarray | None,
) -> dict[str, int]:
    """Metric -> number of the choice that it makes the likeliest."""
    scores = {
        "raw": logprobs_C,
        "token": logprobs_C / np.array(tokens_C),
        "norm": logprobs_C / np.array(bytes_C),
    }
    if unconditional_C is not None:
        scores["pmi"] = logprobs_C - unconditional_C
    return {name: int(values_C.argmax()) for name, values_C in scores.items()}


def confidence(logprobs_C: np.ndarray) -> float:
    """Probability of the likeliest choice among the choices."""
    shares = np.exp(logprobs_C - logprobs_C.max())
    return float(shares.max() / shares.sum())


def calibration_error(confidences: Sequence[float], correct: Sequence[float]) -> float:
    """Expected calibration error: |accuracy - confidence| over equal-width bins,
    weighted by items (Naeini et al., AAAI 2015; Guo et al., arXiv 1706.04599)."""
    sure, right = np.array(confidences), np.array(correct, np.float64)
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    error = 0.0
    for b in range(BINS):
        mine = place == b
        if mine.any():
            error += mine.mean() * abs(right[mine].mean() - sure[mine].mean())
    return float(error)


def normalised(text: str) -> str:
    """For comparing answers: NFC, case folded, outer spaces and punctuation gone."""
    text = normal_form("NFC", text).casefold()
    end = len(text)
    while end and (
        text[end - 1].isspace() or unicodedata.category(text[end - 1]).startswith("P")
    ):
        end -= 1
    return " ".join(text[:end].split())


def words(text: str, language: str) -> list[str]:
    """What f1 counts: words, or characters where words are not written apart."""
    text = normalised(text)
    return list(text.replace(" ", "")) if language in CHARACTERS else text.split()


def f1(text: str, answer: str, language: str) -> float:
    """Harmonic mean of precision and recall over the multiset of words (SQuAD)."""
    a, b = Counter(words(text, language)), Counter(words(answer, language))
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else 0.0


def text_scores(text: str, answers: Sequence[str], language: str) -> dict[str, float]:
    """exact, f1 and chrf (0 to 1) of a written text against its best answer."""
    from sacrebleu.metrics import CHRF

    # Popović, 2015: character 6-grams, beta 2; sacrebleu's sentence score.
    chrf = max(CHRF().sentence_score(text, [a]).score for a in answers) / 100
    return {
        "exact": float(any(normalised(text) == normalised(a) for a in answers)),
        "f1": max(f1(text, a, language) for a in answers),
        "chrf": chrf,
    }


# --- what needs no model --------------------------------------------------------------


def grams(text: str, n: int = 3) -> Counter[str]:
    text = " ".join(text.casefold().split())
    return Counter(text[i : i + n] for i in range(max(len(text) - n + 1, 1)))


def overlap(task: Task, item: Item) -> np.ndarray:
    """Share of a choice's character trigrams that the prompt has, float64 [C]."""
    seen = grams(prompt_of(task, item))
    found = []
    for choice in item["choices"]:
        mine = grams(choice)
        found.append((mine & seen).total() / max(mine.total(), 1))
    return np.array(found)


def picked_share(scores_C: np.ndarray, answer: int) -> float:
    """1 if the answer scores highest; where several tie, its share among them."""
    best = scores_C >= scores_C.max() - 1e-12
    return float(best[answer]) / best.sum()


def baseline(task: Task, items: Sequence[Item]) -> float | None:
    """What the task's cheap baseline gets, in the units of the headline metric."""
    if task.baseline == "none" or not items:
        return None
    if task.baseline == "xz":
        text = "\n".join(i["text"] for i in items).encode()
        return 8 * xz_bytes(text) / max(len(text), 1)
    if task.kind == "generation":  # copy: the item's field `name`
        copies = [(str(i.get("name", "")), i["answers"], i["language"]) for i in items]
        return float(np.mean([text_scores(*copy)[task.metric] for copy in copies]))
    if task.kind != "multiple_choice" or task.baseline == "copy":
        return None
    shares = []
    for item in items:
        lengths = np.array([len(c) for c in item["choices"]], np.float64)
        scores = overlap(task, item) if task.baseline == "overlap" else lengths
        shares.append(picked_share(scores, item["answer"]))
    return float(np.mean(shares))


# --- a language, and all of them ------------------------------------------------------


def summarise(task: Task, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A language's results from those of its items (see run_tasks.py)."""
    results: dict[str, Any] = {"items": len(items)}
    if task.kind == "perplexity":
        bits = np.array([r["bits"] for r in items])
        sizes = np.array([r["bytes"] for r in items], np.float64)
        return results | compression(bits, sizes)
    for metric in METRICS[task.kind]:
        if metric in items[0]["correct"]:
            values = [r["correct"][metric] for r in items]
            results[metric], results[f"{metric}_se"] = mean_se(values)
    if task.kind == "multiple_choice":
        results["chance"] = float(np.mean([1 / len(r["logprobs"]) for r in items]))
        sure = [confidence(np.array(r["logprobs"])) for r in items]
        results["ece"] = calibration_error(sure, [r["correct"]["raw"] for r in items])
        # Of the right choices as texts: it moves long before the first answer does.
        value, error = ratio(*map(np.array, zip(*map(answer_size, items), strict=True)))
        results |= {"answer_bits_per_byte": value, "answer_bits_per_byte_se": error}
    if "dropped" in items[0]:
        results["truncated"] = sum(r["dropped"] > 0 for r in items)
    return results


def answer_size(item: Mapping[str, Any]) -> tuple[float, float]:
    """Bits and bytes of a multiple-choice item's right choice."""
    n = item["answer"]
    return -item["logprobs"][n] / math.log(2), float(item["bytes"][n])


def macro(
    task: Task, languages: Mapping[str, Mapping[str, Any]], items: Sequence[Any]
) -> dict[str, Any]:
    """Means over languages, each counting the same, with standard errors.

    A standard error is None where it cannot be told: a language of one item.
    """
    if not languages:
        return {}
    results: dict[str, Any] = {}
    for metric in METRICS[task.kind]:
        values = [v[metric] for v in languages.values() if metric in v]
        if len(values) < len(languages):
            continue
        error = mean_error([v.get(f"{metric}_se") for v in languages.values()])
        if task.parallel and error is not None:
            error = shared_error(metric, list(languages), items)
        results |= {metric: float(np.mean(values)), f"{metric}_se": error}
    return results


def shared_error(metric: str, languages: Sequence[str], items: Sequence[Any]) -> float:
    """Standard error of the mean over languages of a parallel task.

    Items of one id are answered alike in all languages, so their errors go together
    and are added before they are squared.
    """
    parts: dict[str, float] = {}
    for language in languages:
        mine = [r for r in items if r["language"] == language]
        if metric == "bits_per_byte":
            pairs = [(r["bits"], r["bytes"]) for r in mine]
        else:
            pairs = [(r["correct"][metric], 1.0) for r in mine]
        values, sizes = np.array(pairs, np.float64).T
        for r, part in zip(mine, ratio_residuals(values, sizes), strict=True):
            key = str(r["id"])
            parts[key] = parts.get(key, 0.0) + float(part) / len(languages)
    return root(np.array(list(parts.values())))


def byte_length(task: Task, item: Item, choice: str) -> int:
    """Bytes of a choice as it is written, without the spaces around it."""
    return max(len(with_choice(task, item, choice).strip().encode()), 1)
