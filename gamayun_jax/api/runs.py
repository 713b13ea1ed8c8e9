"""Corpora, training, and the records of a run as an object that shows itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gamayun_jax.api.columns import Columns
from gamayun_jax.api.configs import check_config
from gamayun_jax.config import AnyPath, Config, UserError, from_json
from gamayun_jax.data import build
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.report import figures
from gamayun_jax.report import read_run as records
from gamayun_jax.report.changes import MACRO, stage_text, tests_of
from gamayun_jax.report.curves import late_limits, loss_points, losses
from gamayun_jax.report.html import block, fragment, section
from gamayun_jax.report.read_run import entries, get, num
from gamayun_jax.report.report import bpb_points, facts, loss_sections, write_report
from gamayun_jax.report.scores import Column, language_text, score_table
from gamayun_jax.report.story import summary_section
from gamayun_jax.storage import as_path
from gamayun_jax.tables import Table
from gamayun_jax.train import PREEMPTED
from gamayun_jax.train import train as run_stages
from gamayun_jax.training import xla

if TYPE_CHECKING:
    from markupsafe import Markup

TRAINING = ("step", "tokens", "stage", "loss", "nll", "lr", "grad_norm", "skipped")
TIMES = ("seconds", "tokens_per_s", "mfu")
SCORES = ("step", "tokens", "label", "test", "language", "metric", "value", "error")


@dataclass(frozen=True)
class Run:
    """The records of a run folder, finished or under way; a path to it everywhere.

    A notebook shows the loss and the scores by language.

    Example:
      >>> run
      <Run 'small' in runs/tiny: finished, 13 steps, 6,656 tokens>
      >>> run.tokens_by_language
      {'en': 3264, 'ru': 2304, 'tr': 1088}
    """

    records: records.Run

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.records.folder

    def __fspath__(self) -> str:
        return str(self.folder)

    @functools.cached_property
    def config(self) -> Config:
        """The config of its last start."""
        path = self.folder / "config.json"
        return from_json(path.read_text(encoding="utf-8"), str(path))

    @property
    def languages(self) -> list[str]:
        """All languages, in the order of the config."""
        return self.records.languages

    @property
    def step(self) -> int:
        """The last step that is recorded; 0 before any."""
        return int(max([0, *self.history["step"]]))

    @property
    def finished(self) -> bool:
        """Whether all steps of its config are done."""
        return self.step == self.config.total_steps

    @functools.cached_property
    def history(self) -> Columns:
        """The records of training as columns: step, tokens, stage, loss, nll, lr,
        grad_norm, skipped, seconds, tokens_per_s, mfu, and nll/<language>."""
        rows = [
            {
                **row,
                **entries(row, "time"),
                **{f"nll/{k}": num(row, "languages", k, "nll") for k in self.languages},
            }
            for row in self.records.metrics
        ]
        by_language = [f"nll/{k}" for k in self.languages]
        return Columns.of(rows, [*TRAINING, *TIMES, *by_language])

    @functools.cached_property
    def scores(self) -> Columns:
        """All evaluations as columns: step, tokens, label, test (a held-out set or a
        task), language (macro: the mean of them), metric, value, error."""
        rows = []
        for e in self.records.evals:
            head = {k: get(e, k) for k in ("step", "tokens", "label")}
            for test in tests_of(e).values():
                for language, scored in {**test.languages, MACRO: test.macro}.items():
                    value = num(scored, test.metric)
                    error = num(scored, f"{test.metric}_se")
                    name = test.file.removeprefix("heldout-")
                    of_test = dict(test=name, language=language, metric=test.metric)
                    rows.append({**head, **of_test, "value": value, "error": error})
        return Columns.of(rows, SCORES)

    @property
    def tokens_by_language(self) -> dict[str, int]:
        """Language -> tokens that the run was trained on."""
        last = self.records.metrics[-1] if self.records.metrics else {}
        tokens = dict.fromkeys(self.languages, 0)
        for source, served in entries(last, "sources").items():
            tokens[source.split("/")[0]] += int(num(served, "tokens") or 0)
        return tokens

    @property
    def heldout_sets(self) -> list[str]:
        """Names of the held-out sets that it was evaluated on."""
        return records.sets_of(self.records.evals)

    def table(self, name: str | None = None) -> Table:
        """Bits per byte by language before training and after each stage, beside what
        needs no network.

        Args:
          name: the held-out set; default: the first.
        """
        name = self._set(name)
        columns = [Column(records.label_of(e), e) for e in self.records.tests(name)]
        return score_table(columns, name, self.languages, ("unigram", "xz"))

    def curves(self, of: str = "loss", languages: Sequence[str] | None = None) -> Any:
        """A matplotlib figure over tokens, a line for each language.

        Example:
          >>> run.curves(languages=["ru", "tr"]).axes[0].get_ylabel()
          'bits per byte'

        Args:
          of: "loss" (of training, by language, smoothed), the name of a held-out set
            (bits per byte), or a column of `history`.
          languages: default: all; of a held-out set also "macro", their mean.

        Raises:
          UserError: none of these.
        """
        shown = [languages] if isinstance(languages, str) else languages
        shown = list(shown or self.languages)
        allowed = list(self.languages)
        if of in self.heldout_sets:
            allowed.append("macro")
        if unknown := [k for k in shown if k not in allowed]:
            raise UserError(
                f"languages: {unknown[0]!r} is not among {', '.join(allowed)}"
            )
        if of == "loss":
            loss, label = losses(self.records)
            lines = {k: loss_points(self.records, k, of=loss)[1] for k in shown}
        elif of in self.heldout_sets:
            lines = {k: bpb_points(self.records, k, of) for k in shown}
            label = f"bits per byte, {of}"
        elif of in self.history:
            label = of
            tokens, values = self.history["tokens"], self.history[of]
            lines = {"": list(zip(tokens, values, strict=True))}
        else:
            known = ", ".join(["loss", *self.heldout_sets, *TRAINING[4:], *TIMES])
            raise UserError(f"{self.folder} has no curves of {of!r}: choose of {known}")
        limits = late_limits(list(lines.values())) if of == "loss" else None
        stages = self.records.stages
        return figures.lines_figure(lines, label, self.languages, stages, limits)

    def write_report(self, out: AnyPath | None = None) -> Path:
        """Write the HTML report, into RUN/report by default; the page's path."""
        return write_report([self.folder], out or self.folder / "report")

    def _set(self, name: str | None) -> str:
        known = self.heldout_sets
        name = name or next(iter(known), "")
        if name not in known:
            told = ", ".join(known) or "none"
            raise UserError(
                f"{self.folder} was not evaluated on held-out set {name!r}, only on "
                f"{told}"
            )
        return name

    def _parts(self) -> Iterable[Markup]:
        run, languages = self.records, self.languages
        yield block("cards", {"run": self._status(), **facts(run)})
        yield from summary_section(run, "")
        yield from loss_sections([run] if run.metrics else [], languages)
        for name in self.heldout_sets:
            text = "Bits per byte ± standard error; lower is better."
            table = block("table", self.table(name))
            yield section(f"Held-out set “{name}”", text, table)

    def _repr_html_(self) -> str:
        return fragment(self._parts())

    def _status(self) -> str:
        total = self.config.total_steps
        if self.finished:
            return f"finished, {total:,} steps"
        return f"at step {self.step:,} of {total:,}"

    def __repr__(self) -> str:
        tokens = self.history["tokens"]
        return (
            f"<Run {self.config.name!r} in {self.folder}: {self._status()}, "
            f"{tokens[-1] if len(tokens) else 0:,} tokens>"
        )

    def __str__(self) -> str:
        """The tables that `gamayun demo` and `gamayun report` print."""
        parts = (
            repr(self),
            language_text(self.records.stage_evals, self.languages),
            stage_text(self.records),
        )
        return "\n\n".join(filter(None, parts))


def build_corpus(
    cfg: Config, out: AnyPath | None = None, workers: int | None = None
) -> Corpus:
    """Make the corpus of a config: clean, deduplicate and tokenise its documents.

    Run again, it goes on where it was interrupted, and does nothing where the corpus
    is there. Its processes import the script that calls it, so a script, not a
    notebook, does that under `if __name__ == "__main__":`.

    Example:
      >>> gx.build_corpus(cfg)
      <Corpus build/demo-corpus: 3 sources in 3 languages, ... tokens>

    Args:
      out: folder; default: `cfg.data.corpus`, where training looks for it.
      workers: processes; default: one per core.

    Raises:
      UserError: bad config or input, a folder that holds another corpus, a full disk.
    """
    check_config(cfg)
    if not (out or cfg.data.corpus):
        raise UserError("data.corpus is empty and no folder is given: name one")
    return build.build(cfg, out or cfg.data.corpus, workers)


def train(
    cfg: Config,
    workdir: AnyPath,
    *,
    init_from: AnyPath | None = None,
    fresh: bool = False,
    profile: tuple[int, int] | None = None,
    log: Callable[[str], None] = print,
) -> Run:
    """Train all stages of a config; go on where the run folder stands.

    The same call again goes on from the last checkpoint, and says so where the run was
    finished before. Interrupted (a notebook's stop button, Ctrl-C), it saves a
    checkpoint after the step under way, and raises KeyboardInterrupt.

    Example:
      >>> run = gx.train(cfg, "runs/tiny")
      runs/tiny was finished before: all 13 steps are done
      >>> run.finished
      True

    Args:
      workdir: run folder.
      init_from: a run, checkpoint or Hugging Face folder whose parameters a new run
        begins with.
      fresh: begin anew in a run folder whose checkpoints are lost.
      profile: the first and last step to trace into WORKDIR/profile.
      log: takes the lines about the course of the run.

    Raises:
      UserError: config, corpus, devices or run folder do not fit.
      KeyboardInterrupt: stopped by a signal, after a checkpoint was saved.
    """
    check_config(cfg)
    workdir = as_path(workdir)
    xla.keep_compilations(workdir / "compiled")
    status = run_stages(cfg, workdir, init_from, log, profile, fresh, own_process=False)
    if status == PREEMPTED:
        raise KeyboardInterrupt(
            f"{workdir}: stopped and saved; the same call again goes on"
        )
    return read_run(workdir)


def read_run(path: AnyPath) -> Run:
    """The records of a run folder, as `train` returns them; also of a run under way.

    Example:
      >>> gx.read_run("runs/tiny").history["step"]
      array([ 4,  7, 11, 13])

    Raises:
      UserError: no run folder, or a record that is not JSON.
    """
    return Run(records.read_run(path))
