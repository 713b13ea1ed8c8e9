"""A stored model on tasks and held-out sets: `gamayun eval` and what builds on it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from gamayun_jax.config import AnyPath, UserError
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.data.model_tokenizer import open_tokenizer
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.evaluate.heldout import HeldoutEvaluator, Items
from gamayun_jax.evaluate.loglikelihood import Scorer
from gamayun_jax.evaluate.results import (
    FORMAT,
    Results,
    is_result,
    plain_name,
    read_results,
    with_sets,
    write_results,
)
from gamayun_jax.evaluate.run_tasks import Watch, run_all
from gamayun_jax.evaluate.tasks import Task
from gamayun_jax.interop.load_model import LoadedModel, load_params
from gamayun_jax.model import sharding
from gamayun_jax.model.transformer import Transformer, compute_dtype
from gamayun_jax.model.weights import parameter_count
from gamayun_jax.storage import as_path
from gamayun_jax.tables import LANGUAGES
from gamayun_jax.training.lineage import versions
from gamayun_jax.training.run_folder import find_checkpoint, is_hf_folder

# What decides an evaluation's numbers.
PACKAGES = (
    "gamayun_jax", "jax", "jaxlib", "flax", "numpy", "sentencepiece", "tokenizers",
    "sacrebleu",
)  # fmt: skip


def evaluate_heldout(
    path: AnyPath,
    corpus_folder: AnyPath | None = None,
    languages: Sequence[str] | None = None,
    batch_size: int | None = None,
    loaded: LoadedModel | None = None,
    window: int | None = None,
    limit: int = 0,
) -> tuple[dict[str, Any], Items]:
    """Evaluate a model on the held-out sets of a corpus, with the model's tokenizer.

    Returns the results, and the units of each set under the name of their file,
    "heldout-NAME".

    Args:
      path: as of `load_params`; without a corpus of its own if it was imported.
      corpus_folder: default: the run's own.
      loaded: what `load_params(path)` returned, if it was called before.
      window: see `HeldoutEvaluator`.
      limit: most units per language and set; 0: as the model's config has it.

    Raises:
      UserError: a model or corpus that cannot be read, no tokenizer of the model.
    """
    path = as_path(path)
    cfg, params, meta, mesh = loaded or load_params(path)
    if not (corpus_folder or cfg.data.corpus):
        raise UserError(
            f"{path} was not trained on a corpus here: give --corpus, a corpus folder "
            "with held-out sets, or --tasks"
        )
    corpus = open_corpus(as_path(corpus_folder or cfg.data.corpus))
    tokenizer: TextCoder = corpus.tokenizer()
    if meta.tokenizer != tokenizer.fingerprint:
        tokenizer = open_tokenizer(path, meta.tokenizer, cfg.data.corpus)
    own = cfg.evaluation
    evaluation = dataclasses.replace(
        own,
        batch_size=batch_size or own.batch_size,
        max_units=limit or own.max_units,
    )
    cfg = dataclasses.replace(cfg, evaluation=evaluation)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        model = Transformer(cfg.model, cfg.compute)
        evaluator = HeldoutEvaluator(
            cfg, corpus, mesh, model, languages, tokenizer, window
        )
        sets, items = evaluator.run(params)
    head = {"model": meta.lineage.get("run"), "step": meta.step, "label": "eval"}
    return {**head, "tokens": meta.tokens, "stage": "", "sets": sets}, items


def evaluate_model(
    path: AnyPath,
    tasks: Sequence[Task],
    corpus: AnyPath | None = None,
    heldout: bool = True,
    languages: Sequence[str] | None = None,
    batch_size: int | None = None,
    watch: Watch = lambda name, total: None,
    window: int | None = None,
    limit: int = 0,
) -> tuple[dict[str, Any], Items]:
    """A model on tasks and on a corpus's held-out sets: eval.json, and the items of
    each task and set.

    Args:
      path: run folder, checkpoint or Hugging Face folder.
      corpus: for the held-out sets; default: the model's own.
      heldout: whether to run them.
      languages: only these; tables list languages in their order, else in that of the
        model's config, else in the usual one.
      watch: see `run_all`.
      limit: most units per language and held-out set; 0: all that are scored.
      window: most tokens that the model sees before a predicted one; default: its
        own, but rows as in training for held-out sets of a model trained here.

    Raises:
      UserError: a model that cannot be read, or without a tokenizer.
    """
    path, corpus = as_path(path), as_path(corpus) if corpus else None
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
        "versions": {
            **versions(PACKAGES),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
    }
    items: Items = {}
    if heldout:
        found, items = evaluate_heldout(
            path, corpus, languages, batch_size, loaded, window, limit
        )
        result["sets"] = found["sets"]
    if tasks:
        tokenizer = open_tokenizer(path, meta.tokenizer, corpus or cfg.data.corpus)
        scorer = Scorer(cfg.model, params, mesh, cfg.compute, window)
        result["tasks"], of_tasks = run_all(
            tasks, tokenizer, scorer, cfg.compute, watch
        )
        items |= of_tasks
    shown = dict.fromkeys((*(languages or ()), *cfg.languages, *LANGUAGES))
    places = {name: n for n, name in enumerate(shown)}
    for part in (*result.get("sets", {}).values(), *result.get("tasks", {}).values()):
        of = part["languages"]
        order = sorted(of, key=lambda k: places.get(k, len(places)))
        part["languages"] = {k: of[k] for k in order}
    return result, items


def evaluate_each(
    models: Sequence[AnyPath],
    tasks: Sequence[Task],
    out: AnyPath | None,
    log: Callable[[str], None],
    watch: Watch = lambda name, total: None,
) -> list[Results]:
    """The results of each model, as `read_results` has them.

    Models are evaluated into OUT/<n>-<name>, unless their results are there already, so
    that an interrupted comparison goes on; without `out` nothing is written. A result
    folder stands for itself.

    Raises:
      UserError: a result folder of a former version, or a model that cannot be read.
    """
    paths, kept = [as_path(m) for m in models], as_path(out) if out else None
    for path in paths:  # before hours of evaluating the others
        if (path / "eval.json").is_file() and not is_result(path):
            raise UserError(
                f"{path} has no items/, written by a former version without tasks: run "
                "`gamayun eval --out` again"
            )
        if not is_result(path) and not is_hf_folder(path):
            find_checkpoint(path)
    read: list[Results] = []
    for number, path in enumerate(paths):
        if is_result(path):
            read.append(read_results(path))
            continue
        name = f"{number}-{plain_name(path).replace(' ', '-')}"
        folder = kept / name if kept else None
        if folder and is_result(folder):
            former = read_results(folder)
            hashes = {name: task["hash"] for name, task in former[0]["tasks"].items()}
            same_model = former[0]["model"]["path"] == str(path)
            if same_model and hashes == {t.name: t.hash for t in tasks}:
                log(f"{path}: results of before, in {folder}")
                read.append(former)
                continue
        log(f"{path}: evaluating")
        result, items = evaluate_model(path, tasks, heldout=False, watch=watch)
        if folder:
            write_results(folder, result, items)
        read.append((with_sets(result), items))
    return read
