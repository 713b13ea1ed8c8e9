"""Trained models: text from them, their scores, and how they compare."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gamayun_jax.config import AnyPath, Config, UserError
from gamayun_jax.data.model_tokenizer import open_tokenizer
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.evaluate import results, stored_model
from gamayun_jax.evaluate import tasks as known
from gamayun_jax.inference.generator import Generator
from gamayun_jax.inference.sampling import Sampling
from gamayun_jax.interop import load_model as loading
from gamayun_jax.model.weights import parameter_count
from gamayun_jax.report import compare as comparing
from gamayun_jax.report import eval_page, scores, task_scores
from gamayun_jax.report.html import fragment
from gamayun_jax.storage import as_path

Prompt = TypeVar("Prompt", str, list[str])


@dataclass(frozen=True)
class Model:
    """A model on this machine's devices: trained here, imported or quantised.

    Example:
      >>> model = gx.load_model("runs/tiny")
      >>> model
      <Model runs/tiny: 35,008 parameters, step 13>
      >>> len(model.generate(["To open a file,", "Чтобы"], max_tokens=4))
      2
    """

    path: Path
    loaded: loading.LoadedModel

    @property
    def config(self) -> Config:
        """The config that it was trained with; of an imported model, one made of its
        architecture."""
        return self.loaded.cfg

    @functools.cached_property
    def tokenizer(self) -> TextCoder:
        """The tokenizer beside the model, or of its corpus."""
        cfg = self.config
        return open_tokenizer(self.path, self.loaded.meta.tokenizer, cfg.data.corpus)

    @functools.cached_property
    def generator(self) -> Generator:
        """What generates; it keeps a copy of the weights."""
        cfg, params, _, mesh = self.loaded
        return Generator(cfg.model, params, mesh, self.tokenizer, cfg.compute)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        literal: bool = False,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Prompt:
        """Continue a text, or a list of them at once; returns the new text alone.

        Args:
          prompt: what is too long for the model's window is cut on the left, which is
            said.
          max_tokens: most tokens to add.
          temperature: 0 always takes the most likely token.
          top_k: draw from the K most likely tokens only; 0: from all.
          top_p: draw from the fewest tokens that reach this probability.
          min_p: least probability, as a share of the most likely token's.
          repetition_penalty: above 1, tokens that were seen become less likely.
          seed: of the draws: the same one writes the same text.
          literal: control tokens that a prompt spells are text.
          on_text: called with (prompt number, new text) as it comes.

        Raises:
          UserError: numbers out of their range.
        """
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        made = self.generator.generate(
            prompts, max_tokens, sampling, on_text, truncate=True, literal=literal
        )
        return made[0] if isinstance(prompt, str) else made

    def __repr__(self) -> str:
        cfg, _, meta, _ = self.loaded
        bits = f", {meta.bits} bits a weight" if meta.bits else ""
        count = parameter_count(cfg.model)
        return f"<Model {self.path}: {count:,} parameters, step {meta.step:,}{bits}>"


def load_model(path: AnyPath) -> Model:
    """A model with its parameters on this machine's devices.

    Example:
      >>> gx.load_model("runs/tiny").config.languages
      ('en', 'ru', 'tr')

    Args:
      path: run folder (its newest checkpoint), one checkpoint, or a folder in Hugging
        Face's format.

    Raises:
      UserError: none of these, or damaged.
    """
    return Model(as_path(path), loading.load_params(path, quantised=True))


@dataclass(frozen=True)
class Evaluation:
    """A model's scores by language; a notebook shows the tables.

    Example:
      >>> scored = gx.evaluate("runs/tiny", languages=["ru", "tr"])
      >>> sorted(scored.result["sets"]["udhr"]["languages"])
      ['ru', 'tr']

    Args:
      result: as eval.json has it.
      items: of each task, and of each held-out set under "heldout-NAME".
    """

    result: dict[str, Any]
    items: dict[str, list[dict[str, Any]]]

    def pair(self) -> results.Results:
        """What comparisons take: `result` with its held-out sets among the tasks, and
        the items."""
        return results.with_sets(self.result), self.items

    def write(self, out: AnyPath) -> Path:
        """Write OUT/eval.json, OUT/items/ and the page, whose path is returned."""
        results.write_results(out, self.result, self.items)
        return eval_page.write_eval_page(self.result, as_path(out))

    def __str__(self) -> str:
        parts = []
        if "sets" in self.result:
            parts.append(scores.language_text([self.result]))
        if "tasks" in self.result:
            parts.append(task_scores.task_text(self.result["tasks"]))
        return "\n".join(parts)

    def __repr__(self) -> str:
        of = [*self.result.get("sets", {}), *self.result.get("tasks", {})]
        return f"<Evaluation of {self.result['label']}: {', '.join(of)}>"

    def _repr_html_(self) -> str:
        return fragment(eval_page.eval_parts(self.result))


def evaluate(
    model: AnyPath,
    *,
    tasks: Sequence[str] = (),
    limit: int = 0,
    corpus: AnyPath | None = None,
    languages: Sequence[str] | None = None,
    batch_size: int | None = None,
    window: int | None = None,
) -> Evaluation:
    """Evaluate a model by language, on held-out text or on tasks.

    Example:
      >>> gx.evaluate("runs/tiny", tasks=["last_word"], limit=2)
      <Evaluation of tiny: last_word>

    Args:
      model: run (folder), checkpoint or Hugging Face folder.
      tasks: embedded tasks by name, "all" of them, or YAML files (docs/tasks.md); with
        none, and where a corpus is given, the held-out sets are scored.
      limit: most items per language and task, or of a held-out set; 0: all.
      corpus: corpus folder with held-out sets; default: the run's own.
      languages: only these; default: all.
      batch_size: rows per step, of held-out sets; default: as in training.
      window: most that the model sees of a text; default: its own window.

    Raises:
      UserError: a model, task or corpus that cannot be read.
    """
    chosen = load_tasks(tasks, languages, limit)
    with task_bars() as watch:
        found = stored_model.evaluate_model(
            model,
            chosen,
            corpus,
            heldout=bool(corpus) or not tasks,
            languages=languages,
            batch_size=batch_size,
            limit=limit,
            watch=watch,
            window=window,
        )
    return Evaluation(*found)


@dataclass(frozen=True)
class Comparison:
    """Models side by side, by language and test; a notebook shows the page.

    Example:
      >>> same = gx.evaluate("runs/tiny")
      >>> gx.compare(same, same).result.changes[0]["heldout-udhr"]["ru"].verdict
      'same'
    """

    result: comparing.Comparison

    def write(self, out: AnyPath) -> Path:
        """Write OUT/compare.json and the page, whose path is returned."""
        return comparing.write_comparison(self.result, as_path(out))

    def __str__(self) -> str:
        return comparing.comparison_text(self.result)

    def __repr__(self) -> str:
        tests = ", ".join(self.result.tasks)
        return f"<Comparison of {', '.join(self.result.labels)}: {tests}>"

    def _repr_html_(self) -> str:
        return fragment(comparing.comparison_parts(self.result))


def compare(
    *models: AnyPath | Evaluation,
    tasks: Sequence[str] = (),
    limit: int = 0,
    languages: Sequence[str] | None = None,
    out: AnyPath | None = None,
    log: Callable[[str], None] = print,
) -> Comparison:
    """Compare models by language and test, with paired confidence intervals.

    Example:
      >>> print(gx.compare("runs/tiny", "runs/tiny", tasks=["last_word"], limit=2))
      runs/tiny: evaluating
      ...

    Args:
      models: what `evaluate` returned or wrote, or models, which are evaluated on the
        tasks; the others are compared with the first.
      tasks: embedded tasks by name, or YAML files; default: all embedded ones.
      limit: most items per language and task; 0: all.
      languages: only these; default: all.
      out: folder that keeps the models' results, so that an interrupted comparison
        goes on, and gets the page.
      log: takes the lines about the progress.

    Raises:
      UserError: fewer than two, or nothing that all have answered in the same way.
    """
    if len(models) < 2:
        first = ", ".join(str(m) for m in models) or "none"
        raise UserError(f"{first} alone: give at least two models to compare")
    paths = [as_path(m) for m in models if not isinstance(m, Evaluation)]
    chosen = []
    if not all(results.is_result(path) for path in paths):
        chosen = load_tasks(tasks or ["all"], languages, limit)
    with task_bars() as watch:
        read = iter(stored_model.evaluate_each(paths, chosen, out, log, watch))
    pairs = [m.pair() if isinstance(m, Evaluation) else next(read) for m in models]
    comparison = Comparison(comparing.compare(pairs))
    if out:
        comparison.write(out)
    return comparison


def load_tasks(
    names: Sequence[str], languages: Sequence[str] | None, limit: int
) -> list[known.Task]:
    """The tasks named, in order; those embedded first, where `all` is among them."""
    embedded = known.known_tasks() if "all" in names else []
    wanted = [*embedded, *(n for n in names if n != "all")]
    chosen = [known.load_task(name, languages, limit) for name in wanted]
    known.check_languages(chosen, languages)
    return chosen


@contextlib.contextmanager
def task_bars() -> Iterator[Any]:
    """A progress bar for each task that begins, when shown on a terminal."""
    from tqdm import tqdm

    with contextlib.ExitStack() as shown:

        def watch(name: str, total: int) -> Any:
            shown.close()
            bar = tqdm(desc=name, total=total, unit="text", disable=None)
            return shown.enter_context(bar).update

        yield watch
