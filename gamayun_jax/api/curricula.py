"""A config's curriculum before it is trained on: shares, rates, weights, epochs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gamayun_jax.api.columns import Columns
from gamayun_jax.api.configs import check_config
from gamayun_jax.config import AnyPath, Config
from gamayun_jax.data.corpus import Corpus, open_corpus
from gamayun_jax.data.plan import (
    DataPlan,
    make_data_plan,
    mixture_notes,
    unbuilt_plan,
)
from gamayun_jax.interop.init_from import open_model
from gamayun_jax.report import figures
from gamayun_jax.report import read_run as records
from gamayun_jax.report.colours import language_cell
from gamayun_jax.report.curves import curriculum_chart, rate_chart, sources_chart
from gamayun_jax.report.html import block, fragment, section
from gamayun_jax.report.provenance import curriculum_table
from gamayun_jax.storage import as_path
from gamayun_jax.tables import Cell, Table
from gamayun_jax.training import compatibility, lineage, resume

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class CurriculumPreview:
    """What a config's stages train on; a notebook shows it as figures and tables.

    Example:
      >>> preview = gx.curriculum(cfg)
      >>> preview
      <Curriculum of 'small': align 7 + enrich 6 steps on 3 sources>
      >>> round(preview.weights["enrich"]["ru"], 3)  # a token's, in the objective
      1.0

    Args:
      rows: of each stage and source: share, examples, epochs.
      notes: what may surprise, one line each.
      corpus: the built one, or None: sizes are assumed.
      origin: of a former run that it is to begin from.
    """

    cfg: Config
    plan: DataPlan
    rows: list[dict[str, Any]]
    notes: list[str]
    corpus: Corpus | None
    origin: Mapping[str, Any] | None = None

    @property
    def tokens_before(self) -> int:
        """Tokens that a former run was trained on."""
        return self.origin["tokens"] if self.origin else 0

    @property
    def table(self) -> Table:
        """Share, tokens and epochs by stage and source."""
        return curriculum_table(self.rows, self.cfg.data.seq_len)

    @functools.cached_property
    def objective(self) -> dict[str, dict[str, float]]:
        """Stage -> language -> share of the loss; empty before there is a corpus."""
        if self.corpus is None:
            return {}
        planned = (self.cfg, self.corpus, self.plan)
        return {
            stage.name: lineage.planned_objective(*planned, k)
            for k, stage in enumerate(self.cfg.stages)
        }

    @property
    def weights(self) -> dict[str, dict[str, float]]:
        """Stage -> language -> mean weight of a token in the loss: the language's share
        of the objective over its share of the tokens; empty as `objective` is."""
        weights: dict[str, dict[str, float]] = {}
        for k, stage in enumerate(self.cfg.stages):
            shares = self.plan.language_shares(self.cfg, k)
            for name, part in self.objective.get(stage.name, {}).items():
                if shares[name]:
                    weights.setdefault(stage.name, {})[name] = part / shares[name]
        return weights

    @property
    def weight_table(self) -> Table:
        """By language and stage: share of the tokens, mean weight of a token, and share
        of the objective, their product."""
        heads = ["language"]
        rows = [[language_cell(n, k)] for n, k in enumerate(self.cfg.languages)]
        for k, stage in enumerate(self.cfg.stages):
            heads += [f"{stage.name}: tokens", "weight", "objective"]
            shares = self.plan.language_shares(self.cfg, k)
            for row, name in zip(rows, self.cfg.languages, strict=True):
                weight = self.weights.get(stage.name, {}).get(name)
                row.append(Cell(f"{shares[name]:.2%}"))
                if weight is None:
                    row += [Cell(), Cell()]
                else:
                    of_loss = f"{shares[name] * weight:.2%}"
                    row += [Cell(f"{weight:.3f}"), Cell(of_loss)]
        return Table(heads, rows)

    @property
    def rates(self) -> Columns:
        """The learning rate over tokens."""
        points = lineage.rate_points(self.cfg, self.tokens_before, each=240)
        return Columns.of([dict(tokens=x, lr=y) for x, y in points], ("tokens", "lr"))

    def figure(self) -> Any:
        """Shares of the sources over tokens, stacked: a matplotlib figure."""
        points = lineage.share_points(self.cfg, self.plan, self.tokens_before)
        stages = lineage.stage_spans(self.cfg, self.tokens_before)
        return figures.curriculum_figure(points, self.cfg.languages, stages)

    def _parts(self) -> Iterable[Markup]:
        planned: dict[str, Any] = {
            "curriculum": {
                "table": [
                    {**row, "tokens": row["examples"] * self.cfg.data.seq_len}
                    for row in self.rows
                ],
                "shares": lineage.share_points(self.cfg, self.plan, self.tokens_before),
            },
            "stages": lineage.stage_spans(self.cfg, self.tokens_before),
        }
        languages = self.cfg.languages
        run = records.Run(Path(), self.cfg.name, {}, planned, [], [], [], {})
        title = "Shares of tokens"
        yield section(title, "", curriculum_chart(title, run, languages))
        title, rates = "Learning rate", list(zip(*self.rates.values(), strict=True))
        yield section(title, "", rate_chart(title, rates, run))
        if self.weights:
            text = "Share of the tokens × mean weight of a token."
            table = block("table", self.weight_table)
            yield section("Share of the objective", text, table)
        title, text = "Tokens and epochs", "The stages in order from dark to light."
        chart = sources_chart(title, run, languages)
        yield section(title, text, chart, block("table", self.table))
        if self.notes:
            yield block("notes", self.notes)

    def _repr_html_(self) -> str:
        return fragment(self._parts())

    def __repr__(self) -> str:
        steps = " + ".join(
            f"{stage.name} {n:,}"
            for stage, n in zip(self.cfg.stages, self.cfg.stage_steps(), strict=True)
        )
        return (
            f"<Curriculum of {self.cfg.name!r}: {steps} steps on "
            f"{len(self.plan.sources)} sources>"
        )


def curriculum(cfg: Config, init_from: AnyPath | None = None) -> CurriculumPreview:
    """Preview what a config trains on; refuses what training would refuse.

    Before there is a corpus, it is planned with the `tokens` that the config gives for
    its sources, or with sources of equal size, which `notes` says.

    Example:
      >>> print(gx.curriculum(cfg).table)
      stage   source    share  tokens  epochs  in all
      align   en/help  40.00%  ...

    Args:
      cfg: the config.
      init_from: a run or checkpoint that the run is to begin from.

    Raises:
      UserError: a mixture, schedule or epoch cap that does not fit.
    """
    check_config(cfg)
    folder = as_path(cfg.data.corpus)
    origin = None
    if not (folder / "manifest.json").exists() and not init_from and cfg.corpus.sources:
        expected, plan, rows = unbuilt_plan(cfg)
        compatibility.check_schedules(cfg)
        notes = [
            f"there is no corpus in {folder} yet: planned with {assumed_sizes(cfg)}",
            *mixture_notes(cfg, expected, plan),
        ]
        return CurriculumPreview(cfg, plan, rows, notes, None)
    corpus = open_corpus(folder)
    if init_from:
        store, _, origin = lineage.load_origin(
            as_path(init_from), cfg, corpus, open_model
        )
        store.close()
    plan = make_data_plan(cfg, corpus, origin)
    compatibility.check_corpus(cfg, corpus)
    resume.check_stages(cfg, corpus, plan, origin["tokens"] if origin else 0)
    notes = mixture_notes(cfg, corpus, plan)
    return CurriculumPreview(cfg, plan, plan.table(), notes, corpus, origin)


def assumed_sizes(cfg: Config) -> str:
    """The sizes of sources that a plan without a corpus assumes, as a note says it."""
    unknown = [s.name for s in cfg.corpus.sources if not s.tokens]
    if not unknown:
        return "the `tokens` that corpus.sources gives"
    return (
        f"sources of equal size, since {unknown[0]} (and {len(unknown) - 1} more) "
        "gives no `tokens` in corpus.sources; ~ depends on sizes"
    )
