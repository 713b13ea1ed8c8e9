"""Tasks on a model: what it scores and writes, item by item, and the summary.

What it writes is a result folder (results.py).
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gamayun_jax.config import Config, UserError
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.evaluate import heldout as evaluate
from gamayun_jax.evaluate import task_metrics
from gamayun_jax.evaluate.heldout import HeldoutEvaluator
from gamayun_jax.evaluate.loglikelihood import Request, Scorer
from gamayun_jax.evaluate.results import (
    FORMAT,
    is_result,
    plain_name,
    read_results,
    write_results,
)
from gamayun_jax.evaluate.tasks import (
    Item,
    Task,
    encode_pair,
    load_task,
    prompt_of,
    with_choice,
)
from gamayun_jax.inference.generator import Generator
from gamayun_jax.interop import huggingface
from gamayun_jax.interop.load_model import load_params
from gamayun_jax.model.transformer import Transformer, compute_dtype, parameter_count

PROMPTS = 32  # continued at a time
Progress = Callable[[int], Any]


def run_task(
    task: Task,
    tokenizer: TextCoder,
    scorer: Scorer,
    generator: Generator | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary of a task (see `summary`) and a row for each item, in order.

    Args:
      generator: of the same model; needed for generation tasks only.
      progress: called with numbers of texts that are done.
    """
    items = [item for k in task.languages for item in task.items[k]]
    run = {
        "perplexity": perplexity,
        "multiple_choice": multiple_choice,
        "cloze": cloze,
    }
    aside = {reason: list(names) for reason, names in task.set_aside.items()}
    if task.kind == "generation":
        assert generator is not None, "a generation task needs a generator"
        found = generation(task, items, tokenizer, generator, aside, progress)
    else:
        found = run[task.kind](task, items, tokenizer, scorer, aside, progress)
    return summary(task, found, aside), found


def head_of(item: Item) -> dict[str, Any]:
    return {"id": item["id"], "language": item["language"]}


def request_of(tokenizer: TextCoder, prompt: str, texts: Sequence[str]) -> Request:
    """A request for texts after a prompt; its tokens are the same before all."""
    pairs = [encode_pair(tokenizer, prompt, text) for text in texts]
    return Request(pairs[0][0], [ids for _, ids in pairs])


def keep_scorable(
    items: Sequence[Item],
    requests: Sequence[Request],
    window: int,
    aside: dict[str, list[str]],
) -> tuple[list[Item], list[Request]]:
    """Items whose continuations all fit the model's window; the rest is set aside."""
    kept: tuple[list[Item], list[Request]] = [], []
    for item, request in zip(items, requests, strict=True):
        if max(map(len, request.continuations)) <= window:
            kept[0].append(item)
            kept[1].append(request)
        else:
            name = f"{item['language']}:{item['id']}"
            aside.setdefault("longer than the model's window", []).append(name)
    return kept


def score_again(scorer: Scorer, requests: Sequence[Request]) -> list[np.ndarray]:
    """Log-probabilities of requests that often repeat: each different one once."""

    def key(r: Request) -> tuple[Any, ...]:
        return tuple(r.context), tuple(map(tuple, r.continuations))

    different = {key(r): r for r in requests}
    scores = scorer.score(list(different.values()))
    known = {k: s.logprobs for k, s in zip(different, scores, strict=True)}
    return [known[key(r)] for r in requests]


def multiple_choice(
    task: Task,
    items: Sequence[Item],
    tokenizer: TextCoder,
    scorer: Scorer,
    aside: dict[str, list[str]],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    def ask(prompt: str, item: Item) -> Request:
        texts = [with_choice(task, item, c) for c in item["choices"]]
        return request_of(tokenizer, prompt, texts)

    requests = [ask(prompt_of(task, item), item) for item in items]
    items, requests = keep_scorable(items, requests, scorer.window, aside)
    scores = scorer.score(requests, progress)
    without: list[np.ndarray] | list[None] = [None] * len(items)
    if task.unconditional is not None:
        plain = [ask(task.unconditional.format(**item), item) for item in items]
        without = score_again(scorer, plain)
    rows = []
    for item, request, score, base in zip(
        items, requests, scores, without, strict=True
    ):
        tokens = [len(c) for c in request.continuations]
        sizes = [task_metrics.byte_length(task, item, c) for c in item["choices"]]
        by = task_metrics.choice_scores(score.logprobs, tokens, sizes, base)
        picked = {name: int(values.argmax()) for name, values in by.items()}
        row = {
            **head_of(item),
            "logprobs": score.logprobs.tolist(),
            "tokens": tokens,
            "bytes": sizes,
            "answer": item["answer"],
            "picked": picked,
            "correct": {k: float(v == item["answer"]) for k, v in picked.items()},
            "dropped": score.dropped,
        }
        if base is not None:
            row["unconditional"] = base.tolist()
        rows.append(row)
    return rows


def cloze(
    task: Task,
    items: Sequence[Item],
    tokenizer: TextCoder,
    scorer: Scorer,
    aside: dict[str, list[str]],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Right where every token of the target is the most likely one."""
    requests = [
        request_of(
            tokenizer, prompt_of(task, item), [with_choice(task, item, item["target"])]
        )
        for item in items
    ]
    items, requests = keep_scorable(items, requests, scorer.window, aside)
    scores = scorer.score(requests, progress)
    return [
        {
            **head_of(item),
            "logprobs": score.logprobs.tolist(),
            "tokens": [len(request.continuations[0])],
            "bytes": [task_metrics.byte_length(task, item, item["target"])],
            "correct": {"exact": float(score.greedy[0])},
            "dropped": score.dropped,
        }
        for item, request, score in zip(items, requests, scores, strict=True)
    ]


def perplexity(
    task: Task,
    items: Sequence[Item],
    tokenizer: TextCoder,
    scorer: Scorer,
    aside: dict[str, list[str]],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Bits of the whole text; its end is not scored (see evaluate.py)."""
    texts = [task.prompt.format(**item) for item in items]
    ids = tokenizer.encode_batch(texts)
    found = scorer.rolling(ids, tokenizer.start_id, progress)
    return [
        {
            **head_of(item),
            "bits": -float(value) / math.log(2),
            "bytes": len(text.encode()),
            "tokens": len(row),
        }
        for item, text, row, value in zip(items, texts, ids, found, strict=True)
    ]


def generation(
    task: Task,
    items: Sequence[Item],
    tokenizer: TextCoder,
    generator: Generator,
    aside: dict[str, list[str]],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Greedy continuations up to a stop; the spaces around them do not count."""
    room = generator.cfg.max_seq_len - task.max_tokens
    asked: list[tuple[Item, list[int], int]] = []
    for item in items:
        start = list(tokenizer.prefix_ids)
        # A space at the end belongs to what is written (see tasks.encode_pair).
        ids = start + tokenizer.encode(prompt_of(task, item).rstrip(" "))
        ids = ids or [tokenizer.start_id]
        lost = max(len(ids) - room, 0)
        if room <= len(start):
            name = f"{item['language']}:{item['id']}"
            aside.setdefault("longer than the model's window", []).append(name)
            continue
        asked.append((item, start + ids[len(start) + lost :] if lost else ids, lost))
    texts: dict[int, str] = {}
    # Prompts of like length go together, so that little is padding.
    order = sorted(range(len(asked)), key=lambda n: -len(asked[n][1]))
    for at in range(0, len(order), PROMPTS):
        chosen = order[at : at + PROMPTS]
        made = generator.generate_ids([asked[n][1] for n in chosen], task.max_tokens)
        for n, ids in zip(chosen, made, strict=True):
            text = tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])
            ends = [
                p for s in task.stop if (p := text.find(s, 1 if s == " " else 0)) >= 0
            ]
            texts[n] = text[: min(ends)].strip() if ends else text.strip()
        if progress:
            progress(len(chosen))
    return [
        {
            **head_of(item),
            "text": texts[n],
            "answers": list(item["answers"]),
            "correct": task_metrics.text_scores(
                texts[n], item["answers"], item["language"]
            ),
            "dropped": lost,
        }
        for n, (item, _, lost) in enumerate(asked)
    ]


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


def versions() -> dict[str, str]:
    """What computed the results."""
    names = ("gamayun_jax", "jax", "jaxlib", "flax", "numpy", "sentencepiece")
    found = {"python": platform.python_version()}
    for name in (*names, "tokenizers", "sacrebleu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {**found, "device": f"{jax.device_count()} x {device.device_kind}"}


class TrainingTasks:
    """The tasks of a config, run with a model's changing parameters.

    Raises:
      UserError: a task that cannot be read, or with items in none of the languages.
    """

    def __init__(self, cfg: Config, tokenizer: TextCoder, mesh: Mesh):
        limit = cfg.evaluation.task_items
        self._tasks = [load_task(n, cfg.languages, limit) for n in cfg.evaluation.tasks]
        for task in self._tasks:
            if not task.languages:
                raise UserError(
                    f"evaluation.tasks: {task.name} has no items in the languages of "
                    "the config: leave it out"
                )
        self._cfg, self._tokenizer, self._mesh = cfg, tokenizer, mesh
        self.every_steps = cfg.evaluation.tasks_every_steps
        self._scorer = Scorer(cfg.model, None, mesh, cfg.compute)

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def evaluate(
        self, params: Any
    ) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        """{"tasks": summaries by task}, and the rows of each; see `run_task`."""
        self._scorer.params = params
        generator = None
        if any(t.kind == "generation" for t in self._tasks):
            model = self._cfg.model, params, self._mesh, self._tokenizer
            generator = Generator(*model, self._cfg.compute)
        results, rows = {}, {}
        for t in self._tasks:
            results[t.name], rows[t.name] = run_task(
                t, self._tokenizer, self._scorer, generator
            )
        self._scorer.params = None  # not a second copy while training goes on
        return {"tasks": results}, rows

    def headlines(self, result: Mapping[str, Any]) -> dict[str, float]:
        """Name for TensorBoard -> each task's headline metric by language."""
        return {
            f"tasks/{name}/{task['metric']}/{language}": row[task["metric"]]
            for name, task in result["tasks"].items()
            for language, row in task["languages"].items()
        }

    def lines(self, result: Mapping[str, Any]) -> list[str]:
        """The console's line of each task."""
        return [
            f"{name}: {task['metric']} "
            f"{task['macro'].get(task['metric'], math.nan):.3f} (macro)"
            for name, task in result["tasks"].items()
        ]


def training_evaluators(
    cfg: Config, corpus: Corpus, mesh: Mesh
) -> list[HeldoutEvaluator | TrainingTasks]:
    """What a config evaluates in the course of training: held-out sets and tasks."""
    model = Transformer(cfg.model, cfg.compute)
    heldout = HeldoutEvaluator(cfg, corpus, mesh, model)
    tasks = TrainingTasks(cfg, corpus.tokenizer(), mesh)
    found: list[HeldoutEvaluator | TrainingTasks] = [heldout] if heldout.sets else []
    return [*found, tasks] if tasks else found


def evaluate_model(
    path: Path,
    tasks: Sequence[Task],
    corpus: Path | None = None,
    heldout: bool = True,
    languages: Sequence[str] | None = None,
    batch_size: int | None = None,
    watch: Callable[[str, int], Progress | None] = lambda name, total: None,
    window: int | None = None,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """A model on tasks and on a corpus's held-out sets: eval.json, and the rows of each
    task and set.

    Args:
      path: run folder, checkpoint or Hugging Face folder.
      corpus: for the held-out sets; default: the model's own.
      heldout: whether to run them.
      watch: called with the name of a task and its number of texts, before it runs;
        what it returns is called with numbers of texts that are done.
      window: most tokens that the model sees before a predicted one; default: its
        own, but rows as in training for held-out sets of a model trained here.

    Raises:
      UserError: a model that cannot be read, or without a tokenizer.
    """
    loaded = load_params(path)
    cfg, params, meta, mesh = loaded
    result: dict[str, Any] = {
        "format": FORMAT,
        "model": {
            "path": str(path),
            "run": meta.lineage.get("run"),
            "parameters": parameter_count(cfg.model),
            "bits": meta.bits,
            "tokenizer": meta.tokenizer,
            "dtype": str(compute_dtype(cfg.compute.dtype)),
            "lineage": meta.lineage,
        },
        "label": plain_name(path),
        "step": meta.step,
        "tokens": meta.tokens,
        "window": window,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    if heldout:
        found, rows = evaluate.evaluate_heldout(
            path, corpus, languages, batch_size, loaded, window
        )
        result["sets"] = found["sets"]
    if tasks:
        tokenizer = huggingface.open_tokenizer(path, meta, corpus or cfg.data.corpus)
        scorer = Scorer(cfg.model, params, mesh, cfg.compute, window)
        generator = None
        if any(t.kind == "generation" for t in tasks):
            seen = dataclasses.replace(cfg.model, max_seq_len=scorer.window)
            generator = Generator(seen, params, mesh, tokenizer, cfg.compute)
        result["tasks"] = {}
        for task in tasks:
            progress = watch(task.name, texts_of(task))
            result["tasks"][task.name], rows[task.name] = run_task(
                task, tokenizer, scorer, generator, progress
            )
    return result, rows


def texts_of(task: Task) -> int:
    """How many texts a task scores or writes: what `progress` adds up to, about."""
    items = (i for v in task.items.values() for i in v)
    return sum(len(i["choices"]) if "choices" in i else 1 for i in items)


def evaluate_missing(
    models: Sequence[Path],
    tasks: Sequence[Task],
    out: Path,
    log: Callable[[str], None],
    watch: Callable[[str, int], Progress | None] = lambda name, total: None,
) -> list[Path]:
    """The result folder of each model; a result folder stands for itself.

    Models are evaluated into OUT/<n>-<name>, unless their results are there already, so
    that an interrupted comparison goes on.

    Raises:
      UserError: a result folder of a former version, or a model that cannot be read.
    """
    folders = []
    for number, path in enumerate(models):
        if is_result(path):
            folders.append(path)
            continue
        if (path / "eval.json").is_file():
            raise UserError(
                f"{path} has no items/, written by a former version without tasks: run "
                "`gamayun eval --out` again"
            )
        folder = out / f"{number}-{plain_name(path).replace(' ', '-')}"
        folders.append(folder)
        if is_result(folder):
            result, _ = read_results(folder)
            hashes = {name: task["hash"] for name, task in result["tasks"].items()}
            same_model = result["model"]["path"] == str(path)
            if same_model and hashes == {t.name: t.hash for t in tasks}:
                log(f"{path}: results of before, in {folder}")
                continue
        log(f"{path}: evaluating")
        result, items = evaluate_model(path, tasks, heldout=False, watch=watch)
        write_results(folder, result, items)
    return folders
