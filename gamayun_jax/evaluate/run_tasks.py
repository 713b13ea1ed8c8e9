"""Tasks on a model: what it scores and writes, item by item, and the summary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gamayun_jax.config import ComputeConfig, Config, UserError
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.evaluate import task_metrics
from gamayun_jax.evaluate.heldout import HeldoutEvaluator
from gamayun_jax.evaluate.loglikelihood import Request, Scorer
from gamayun_jax.evaluate.tasks import (
    Item,
    Task,
    answers_of,
    encode_pair,
    load_task,
    prompt_of,
    with_choice,
)
from gamayun_jax.inference.generator import Generator
from gamayun_jax.model.transformer import Transformer
from gamayun_jax.training.recording import Evaluator

PROMPTS = 32  # continued at a time
ItemResult = dict[str, Any]  # "id", "language", and what the kind of task tells
Progress = Callable[[int], Any]
Watch = Callable[[str, int], Progress | None]


def run_task(
    task: Task,
    tokenizer: TextCoder,
    scorer: Scorer,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[ItemResult]]:
    """The summary of a task (see `summary`) and the result of each item, in order.

    Args:
      generator: of the same model; needed for generation tasks only.
      progress: called with numbers of texts that are done.
    """
    items = [item for k in task.languages for item in task.items[k]]
    aside = {reason: list(names) for reason, names in task.set_aside.items()}
    if task.kind == "perplexity":
        results = perplexity(task, items, tokenizer, scorer, progress)
    elif task.kind == "generation":
        assert generator is not None, "a generation task needs a generator"
        results = generation(task, items, tokenizer, generator, aside, progress)
    else:
        results = continuations(task, items, tokenizer, scorer, aside, progress)
    return summary(task, results, aside), results


def set_aside(item: Item, aside: dict[str, list[str]]) -> None:
    """Name an item that the model's window cannot hold."""
    name = f"{item['language']}:{item['id']}"
    aside.setdefault("longer than the model's window", []).append(name)


def perplexity(
    task: Task,
    items: Sequence[Item],
    tokenizer: TextCoder,
    scorer: Scorer,
    progress: Progress | None,
) -> list[ItemResult]:
    """Bits of the whole text; its end is not scored (see heldout.py)."""
    texts = [task.prompt.format(**item) for item in items]
    ids = tokenizer.encode_batch(texts)
    logprobs = scorer.rolling(ids, tokenizer.start_id, progress)
    return [
        {
            "id": item["id"],
            "language": item["language"],
            "bits": -float(logprob) / math.log(2),
            "bytes": len(text.encode()),
            "tokens": len(tokens),
        }
        for item, text, tokens, logprob in zip(items, texts, ids, logprobs, strict=True)
    ]


def continuations(
    task: Task,
    items: Sequence[Item],
    tokenizer: TextCoder,
    scorer: Scorer,
    aside: dict[str, list[str]],
    progress: Progress | None,
) -> list[ItemResult]:
    """Multiple choice and cloze: log-probabilities of texts after the prompt.

    A cloze is right where every token of its target is the most likely one.
    """

    def ask(prompt: str, item: Item) -> Request:
        texts = [with_choice(task, item, text) for text in answers_of(task, item)]
        pairs = [encode_pair(tokenizer, prompt, text) for text in texts]
        return Request(pairs[0][0], [ids for _, ids in pairs])

    asked: list[tuple[Item, Request]] = []
    for item in items:
        request = ask(prompt_of(task, item), item)
        if max(map(len, request.continuations)) <= scorer.window:
            asked.append((item, request))
        else:
            set_aside(item, aside)
    scores = scorer.score([request for _, request in asked], progress)
    plain: list[np.ndarray] | list[None] = [None] * len(asked)
    if task.unconditional is not None:
        without = [ask(task.unconditional.format(**item), item) for item, _ in asked]
        plain = score_once(scorer, without)
    results = []
    for (item, request), score, base in zip(asked, scores, plain, strict=True):
        texts = answers_of(task, item)
        result: ItemResult = {
            "id": item["id"],
            "language": item["language"],
            "logprobs": score.logprobs.tolist(),
            "tokens": [len(ids) for ids in request.continuations],
            "bytes": [task_metrics.byte_length(task, item, text) for text in texts],
        }
        if task.kind == "cloze":
            result["correct"] = {"exact": float(score.greedy[0])}
        else:
            picked = task_metrics.picks(
                score.logprobs, result["tokens"], result["bytes"], base
            )
            answer = item["answer"]
            correct = {k: float(v == answer) for k, v in picked.items()}
            result |= {"answer": answer, "picked": picked, "correct": correct}
        result["dropped"] = score.dropped
        if base is not None:
            result["unconditional"] = base.tolist()
        results.append(result)
    return results


def score_once(scorer: Scorer, requests: Sequence[Request]) -> list[np.ndarray]:
    """Log-probabilities of requests that often repeat: each different one once."""

    def key(r: Request) -> tuple[Any, ...]:
        return tuple(r.context), tuple(map(tuple, r.continuations))

    different = {key(r): r for r in requests}
    scores = scorer.score(list(different.values()))
    known = {k: s.logprobs for k, s in zip(different, scores, strict=True)}
    return [known[key(r)] for r in requests]


def generation(
    task: Task,
    items: Sequence[Item],
    tokenizer: TextCoder,
    generator: Generator,
    aside: dict[str, list[str]],
    progress: Progress | None,
) -> list[ItemResult]:
    """Greedy continuations up to a stop; the spaces around them do not count."""
    room = generator.cfg.max_seq_len - task.max_tokens
    start = list(tokenizer.prefix_ids)
    asked: list[tuple[Item, list[int], int]] = []
    for item in items:
        if room <= len(start):
            set_aside(item, aside)
            continue
        # A space at the end belongs to what is written (see tasks.encode_pair).
        ids = start + tokenizer.encode(prompt_of(task, item).rstrip(" "))
        ids = ids or [tokenizer.start_id]
        lost = max(len(ids) - room, 0)
        asked.append((item, start + ids[len(start) + lost :] if lost else ids, lost))
    texts: dict[int, str] = {}
    # Prompts of like length go together, so that little is padding.
    order = sorted(range(len(asked)), key=lambda n: -len(asked[n][1]))
    for at in range(0, len(order), PROMPTS):
        chosen = order[at : at + PROMPTS]
        made = generator.generate_ids([asked[n][1] for n in chosen], task.max_tokens)
        for n, ids in zip(chosen, made, strict=True):
            text = tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])
            texts[n] = until_stop(text, task.stop)
        if progress:
            progress(len(chosen))
    return [
        {
            "id": item["id"],
            "language": item["language"],
            "prompt": task.prompt.format(**item),
            "text": texts[n],
            "answers": list(item["answers"]),
            "correct": task_metrics.text_scores(
                texts[n], item["answers"], item["language"]
            ),
            "dropped": lost,
        }
        for n, (item, _, lost) in enumerate(asked)
    ]


def until_stop(text: str, stops: Sequence[str]) -> str:
    """A text up to the first stop; a space that begins it ends nothing."""
    ends = [text.find(stop, 1 if stop == " " else 0) for stop in stops]
    return text[: min([end for end in ends if end >= 0], default=None)].strip()


def run_all(
    tasks: Sequence[Task],
    tokenizer: TextCoder,
    scorer: Scorer,
    compute: ComputeConfig,
    watch: Watch = lambda name, total: None,
) -> tuple[dict[str, Any], dict[str, list[ItemResult]]]:
    """Task -> its summary, and task -> the results of its items; see `run_task`.

    Args:
      watch: called with the name of a task and its number of texts, before it runs;
        what it returns is called with numbers of texts that are done.
    """
    generator = None
    if any(t.kind == "generation" for t in tasks):
        seen = dataclasses.replace(scorer.cfg, max_seq_len=scorer.window)
        generator = Generator(seen, scorer.params, scorer.mesh, tokenizer, compute)
    summaries, items = {}, {}
    for task in tasks:
        progress = watch(task.name, text_count(task))
        summaries[task.name], items[task.name] = run_task(
            task, tokenizer, scorer, generator, progress
        )
    return summaries, items


def text_count(task: Task) -> int:
    """How many texts a task scores or writes: what `progress` adds up to, about."""
    items = (i for v in task.items.values() for i in v)
    return sum(len(i["choices"]) if "choices" in i else 1 for i in items)


# --- results --------------------------------------------------------------------------


def summary(
    task: Task, rows: Sequence[Mapping[str, Any]], aside: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """All about a task's results but the items; see the module."""
    languages: dict[str, Any] = {}
    for language, items in task.items.items():
        mine = [r for r in rows if r["language"] == language]
        if mine:  # otherwise a gap, not a zero
            languages[language] = task_metrics.summarise(task, mine)
            done = {r["id"] for r in mine}
            same = [i for i in items if i["id"] in done]
            languages[language]["baseline"] = task_metrics.baseline(task, same)
    english = languages.get("en", {}).get("bits_per_unit")
    if task.parallel and english:
        for row in languages.values():
            row["parity"] = row["bits_per_unit"] / english
    return {
        "kind": task.kind,
        "description": task.description,
        "metric": task.metric,
        "parallel": task.parallel,
        "shots": task.shots,
        "seed": task.seed,
        "hash": task.hash,
        "prompt_hash": task.prompt_hash,
        "baseline": task.baseline,
        "languages": languages,
        "macro": task_metrics.macro(task, languages, rows),
        "gaps": [k for k in task.items if k not in languages],
        "set_aside": {
            reason: {"count": len(names), "first": list(names[:5])}
            for reason, names in aside.items()
        },
    }


# --- in the course of training ------------------------------------------------------


class TaskEvaluator:
    """The tasks of a config, run with changing parameters (recording.Evaluator).

    Raises:
      UserError: a task that cannot be read, or with items in none of the languages.
    """

    name = "tasks"

    def __init__(self, cfg: Config, tokenizer: TextCoder, mesh: Mesh):
        limit = cfg.evaluation.task_items
        self.tasks = [load_task(n, cfg.languages, limit) for n in cfg.evaluation.tasks]
        for task in self.tasks:
            if not task.languages:
                raise UserError(
                    f"evaluation.tasks: {task.name} has no items in the languages of "
                    "the config: leave it out"
                )
        self.every_steps = cfg.evaluation.tasks_every_steps
        self._tokenizer = tokenizer
        self._scorer = Scorer(cfg.model, None, mesh, cfg.compute)
        self._compute = cfg.compute

    def run(self, params: Any) -> tuple[dict[str, Any], dict[str, list[ItemResult]]]:
        """Task -> its summary, and the results of its items; see `run_task`."""
        self._scorer.params = params
        made = run_all(self.tasks, self._tokenizer, self._scorer, self._compute)
        self._scorer.params = None  # not a second copy while training goes on
        return made


def training_evaluators(cfg: Config, corpus: Corpus, mesh: Mesh) -> list[Evaluator]:
    """What a config evaluates in the course of training: held-out sets and tasks."""
    model = Transformer(cfg.model, cfg.compute)
    heldout = HeldoutEvaluator(cfg, corpus, mesh, model)
    tasks = TaskEvaluator(cfg, corpus.tokenizer(), mesh)
    evaluators: list[Evaluator] = [heldout] if heldout.texts else []
    return [*evaluators, tasks] if tasks.tasks else evaluators
