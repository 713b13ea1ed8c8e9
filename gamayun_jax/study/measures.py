"""What a study measures beyond held-out sets and whole questions.

answer:TASK             bits per byte of the right choice of a multiple-choice task,
                        whatever the other choices get
retrieval:SET:LAYER     share of the translations that are missed among the units of a
                        parallel held-out set, by a layer's hidden states
                        (evaluate/alignment.py); 0: the embedding, "last": the last

They are sets of an outcome like any other, and measured where an outcome names them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from gamayun_jax.config import Config
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.evaluate.alignment import RetrievalEvaluator
from gamayun_jax.evaluate.run_tasks import training_evaluators
from gamayun_jax.evaluate.task_metrics import answer_size
from gamayun_jax.study.design import ANSWER, RETRIEVAL
from gamayun_jax.study.records import Items
from gamayun_jax.training.recording import Evaluator


def retrieval_evaluators(
    cfg: Config, corpus: Corpus, mesh: Mesh, measures: Iterable[str]
) -> list[Evaluator]:
    """What measures retrieval; none where no measure is one."""
    wanted: dict[str, dict[str, int]] = {}
    for measure in measures:
        if measure.startswith(RETRIEVAL):
            name, layer = measure.removeprefix(RETRIEVAL).rsplit(":", 1)
            number = cfg.model.num_layers if layer == "last" else int(layer)
            wanted.setdefault(name, {})[measure] = number
    return [RetrievalEvaluator(cfg, corpus, mesh, wanted)] if wanted else []


def measured(
    cfg: Config, corpus: Corpus, mesh: Mesh, measures: Sequence[str]
) -> list[Evaluator]:
    """All that is evaluated at the end of a run."""
    more = retrieval_evaluators(cfg, corpus, mesh, measures)
    return [*training_evaluators(cfg, corpus, mesh), *more]


def items_of(evaluators: Sequence[Evaluator], params: Any) -> Items:
    """The items of all evaluators."""
    return dict(itertools.chain(*(e.run(params)[1].items() for e in evaluators)))


def with_answers(items: Items, measures: Iterable[str]) -> Items:
    """Items with those of the measures that follow from others."""
    asked = {m: m.removeprefix(ANSWER) for m in measures if m.startswith(ANSWER)}
    return {**items, **{m: answer_items(items[task]) for m, task in asked.items()}}


def answer_items(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The right choices of a task's items, as texts with bits and bytes."""
    return [
        {
            "id": row["id"],
            "language": row["language"],
            **dict(zip(("bits", "bytes"), answer_size(row), strict=True)),
        }
        for row in rows
    ]
