"""The data plan of a run: which example every step serves, over all stages.

Stages that share data cursors make one `Curriculum`. A plan is made from the config and
the corpus (`make_data_plan`), from the config alone before there is a corpus
(`unbuilt_plan`), or from a checkpoint (`past_plan`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gamayun_jax.config import Config, DataConfig, UserError
from gamayun_jax.data.continuity import fingerprint
from gamayun_jax.data.corpus import Corpus, expected_corpus
from gamayun_jax.data.curriculum import LONGEST, Curriculum, Phase, near
from gamayun_jax.data.mixture import stage_shares, unnamed_sources
from gamayun_jax.data.recipe import check_recipe


@dataclass(frozen=True)
class CurriculumRun:
    """Consecutive stages that share data cursors, beginning at a global example."""

    first_example: int
    curriculum: Curriculum


@dataclass(frozen=True)
class Skipped:
    """Positions [begin, end) of a source's order that are left out of a curriculum run.

    Rollbacks and checkpoints have these fields, so their names stay.
    """

    segment: int  # number of the curriculum run
    source: str
    begin: int
    end: int


@dataclass(frozen=True)
class DataPlan:
    """The examples of a run, from its first to its last."""

    sources: tuple[str, ...]
    languages: tuple[int, ...]  # of each source, index into Config.languages
    shares: tuple[dict[str, float], ...]  # per stage: source -> share of its tokens
    runs: tuple[CurriculumRun, ...]
    batch_size: int
    total_steps: int
    skipped: tuple[Skipped, ...] = ()
    rest_of: str = "languages"  # see mixture.mixture_shares

    def run_before(self, step: int) -> int:
        """Number of the curriculum run that served the last example before step `step`;
        at a boundary that is the one that ends there."""
        starts = [r.first_example for r in self.runs]
        last = max(0, step * self.batch_size - 1)
        return int(np.searchsorted(starts, last, side="right")) - 1

    def served_of(self, run: int, step: int) -> int:
        """Number of examples that a curriculum run serves before step `step`."""
        r = self.runs[run]
        return min(max(0, step * self.batch_size - r.first_example), r.curriculum.total)

    def curricula(self, step: int) -> list[dict[str, Any]]:
        """Of each curriculum run, as plain JSON: its first example, its curriculum, and
        the fingerprint of the examples that it served before step `step`."""
        return [
            {
                "first_example": r.first_example,
                "curriculum": r.curriculum.to_json(),
                "fingerprint": fingerprint(r.curriculum, self.served_of(k, step)),
            }
            for k, r in enumerate(self.runs)
        ]

    def table(self) -> list[dict[str, Any]]:
        """The tables of the curricula (Curriculum.table); `epochs_total` counts from
        the first of them, so that it is what the epoch caps bound."""
        rows: list[dict[str, Any]] = []
        before = dict.fromkeys(self.sources, 0.0)
        for r in self.runs:
            for row in r.curriculum.table():
                total = row["epochs_total"] + before[row["source"]]
                rows.append({**row, "epochs_total": total})
            for name, passes in r.curriculum.epochs().items():
                before[name] += passes
        return rows

    def _step_over(self, run: int, source: str, position: np.ndarray) -> np.ndarray:
        """Positions in a source's order, int64 [n], moved beyond skipped spans."""
        # In order, so that each counts with the ones before it already left out.
        for s in sorted(self.skipped, key=lambda s: s.begin):
            if (s.segment, s.source) == (run, source):
                beyond = position + (s.end - s.begin)
                position = np.where(position >= s.begin, beyond, position)
        return position

    def lookup(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(run * num_sources + source, position) of global examples, int64 [n]."""
        dataset = np.empty(len(examples), np.int64)
        position = np.empty(len(examples), np.int64)
        starts = np.array([r.first_example for r in self.runs])
        which = np.searchsorted(starts, examples, side="right") - 1
        for k in np.unique(which):
            mine = which == k
            source, place = self.runs[k].curriculum.lookup(examples[mine] - starts[k])
            dataset[mine] = k * len(self.sources) + source
            position[mine] = place
        for run, name in {(s.segment, s.source) for s in self.skipped}:
            mine = dataset == run * len(self.sources) + self.sources.index(name)
            position[mine] = self._step_over(run, name, position[mine])
        return dataset, position

    def place(self, source: str, number: int) -> tuple[int, int]:
        """(dataset, position), as of `lookup`, of an example by its number among those
        of its source that this run serves, from 0."""
        index = self.sources.index(source)
        for k, r in enumerate(self.runs):
            count = int(r.curriculum.counts_at(r.curriculum.total)[index])
            if number < count:
                at = np.array(int(r.curriculum.offsets[index]) + number)
                dataset = k * len(self.sources) + index
                return dataset, int(self._step_over(k, source, at))
            number -= count
        raise IndexError(f"{source} has not so many examples")

    def step_of(self, source: str, number: int) -> int:
        """The step, from 1, that serves an example; see `place`."""
        low, high = 1, self.total_steps
        while low < high:
            middle = (low + high) // 2
            if self.served(middle)[source] > number:
                high = middle
            else:
                low = middle + 1
        return low

    def behind(self, source: str, step: int) -> Iterator[tuple[int, int]]:
        """(curriculum run, position in its order) of each example of a source that its
        cursors are beyond before step `step`: examples that this run served, and a
        former run's where its cursor went on."""
        for k, r in enumerate(self.runs):
            end = r.curriculum.consumed(self.served_of(k, step))[source]
            for begin in range(0, end, 4096):
                position = np.arange(begin, min(begin + 4096, end))
                for p in self._step_over(k, source, position).tolist():
                    yield k, p

    def positions(self, first: int, last: int) -> list[dict[str, Any]]:
        """The examples of steps `first` to `last` (from 1), as `Skipped` in JSON."""
        examples = np.arange((first - 1) * self.batch_size, last * self.batch_size)
        dataset, position = self.lookup(examples)
        spans = []
        for number in np.unique(dataset).tolist():
            run, source = divmod(number, len(self.sources))
            places = np.sort(position[dataset == number])
            for span in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
                begin, end = int(span[0]), int(span[-1]) + 1
                spans.append(Skipped(run, self.sources[source], begin, end))
        return [dataclasses.asdict(s) for s in spans]

    def consumed(self, step: int) -> dict[str, int]:
        """Data cursor of each source, in examples, before step number `step`; of the
        curriculum run that `run_before` names."""
        k = self.run_before(step)
        cursors = self.runs[k].curriculum.consumed(self.served_of(k, step))
        return {
            name: int(self._step_over(k, name, np.array(cursor)))
            for name, cursor in cursors.items()
        }

    def served(self, step: int) -> dict[str, int]:
        """Examples of each source that this run served before step `step`."""
        total = np.zeros(len(self.sources), np.int64)
        for k, r in enumerate(self.runs):
            total += r.curriculum.counts_at(self.served_of(k, step))
        return dict(zip(self.sources, total.tolist(), strict=True))

    def language_shares(self, cfg: Config, stage: int) -> dict[str, float]:
        """Share of each language among the tokens of a stage's mixture."""
        shares = dict.fromkeys(cfg.languages, 0.0)
        for source, language in zip(self.sources, self.languages, strict=True):
            shares[cfg.languages[language]] += self.shares[stage].get(source, 0.0)
        return shares


def make_data_plan(
    cfg: Config,
    corpus: Corpus,
    origin: Mapping[str, Any] | None = None,
    rollbacks: Sequence[Mapping[str, Any]] = (),
    rest_of: str = "languages",
) -> DataPlan:
    """The plan of a run.

    Args:
      origin: of a run that goes on from a former one: its `cursors` (source ->
        position), `seed` of the shuffling and final `shares`. See lineage.load_origin.
      rollbacks: spans of data to leave out; see divergence.py.
      rest_of: "sources" for a run that a former release began; see
        mixture.mixture_shares.

    Raises:
      UserError: a mixture that does not fit the corpus, a language unknown to the
        config, an epoch cap that the plan would exceed.
    """
    sizes = corpus.examples(cfg.data.seq_len)
    tokens = {name: corpus.sources[name].tokens for name in sizes}
    for name, source in corpus.sources.items():
        if source.language not in cfg.languages:
            raise UserError(
                f"corpus {corpus.folder} has source {name!r} in language "
                f"{source.language!r}, which is not in the config's languages"
            )
    shares = tuple(stage_shares(stage, tokens, rest_of) for stage in cfg.stages)
    phases = [stage_phase(cfg, k, weights) for k, weights in enumerate(shares)]
    restarts = [
        k for k, s in enumerate(cfg.stages) if k and s.transition.cursors == "restart"
    ]
    runs: list[CurriculumRun] = []
    for first, end in itertools.pairwise([0, *restarts, len(phases)]):
        seed = (cfg.seed * 1_000_003 + len(runs)) % 2**31
        start: dict[str, int] = {}
        # The shares at the end of what came before: a ramp begins there.
        before = shares[first - 1] if first else origin["shares"] if origin else {}
        if origin and not first and cfg.stages[0].transition.cursors == "continue":
            # The same order as before, or served examples would come again.
            seed = origin["seed"]
            start = {k: v for k, v in origin["cursors"].items() if k in sizes}
        else:
            # A restart is in another order, or the same examples would begin again.
            used = {r.curriculum.seed for r in runs}
            used |= {origin["seed"]} if origin else set()
            while seed in used:
                seed += 1
        curriculum = Curriculum(
            phases=tuple(phases[first:end]),
            sources=sizes,
            seed=seed,
            block_examples=cfg.data.block_examples,
            start=start,
            before=before,
        )
        first_example = cfg.stage_start(first) * cfg.data.batch_size
        runs.append(CurriculumRun(first_example, curriculum))
    check_epochs(cfg.data, runs)
    return DataPlan(
        sources=tuple(sizes),
        languages=tuple(
            cfg.languages.index(corpus.sources[name].language) for name in sizes
        ),
        shares=shares,
        runs=tuple(runs),
        batch_size=cfg.data.batch_size,
        total_steps=cfg.total_steps,
        skipped=skipped_by(rollbacks),
        rest_of=rest_of,
    )


def stage_phase(cfg: Config, stage: int, weights: Mapping[str, float]) -> Phase:
    """A stage in examples; UserError if it is too long, or its ramp longer than it."""
    spec, seq_len = cfg.stages[stage], cfg.data.seq_len
    mix, examples = spec.mixture, cfg.stage_steps()[stage] * cfg.data.batch_size
    ramp = mix.ramp_tokens // seq_len
    if examples > LONGEST:
        raise UserError(
            f"stages.{spec.name}.tokens={spec.tokens} is more than the "
            f"{LONGEST * seq_len} that fit in one stage: split it into several"
        )
    if ramp > examples:
        raise UserError(
            f"stages.{spec.name}.mixture.ramp_tokens={mix.ramp_tokens} exceeds the "
            f"stage's tokens={spec.tokens}: shorten the ramp"
        )
    if ramp and mix.order == "shuffled":
        raise UserError(
            f"stages.{spec.name}.mixture has order=shuffled and ramp_tokens="
            f"{mix.ramp_tokens}: what is shuffled has no ramp; set ramp_tokens=0, or "
            "order=interleaved"
        )
    return Phase(spec.name, examples, weights, mix.ramp, ramp, mix.order)


def skipped_by(rollbacks: Sequence[Mapping[str, Any]]) -> tuple[Skipped, ...]:
    return tuple(Skipped(**s) for r in rollbacks for s in r["skipped"])


def check_epochs(data: DataConfig, runs: Sequence[CurriculumRun]) -> None:
    """Raise UserError if a source would be passed over more often than its cap."""
    epochs = dict.fromkeys(runs[0].curriculum.names, 0.0)
    for r in runs:
        for name, passes in r.curriculum.epochs().items():
            epochs[name] += passes
    for name in data.max_epochs_of:
        if name not in epochs:
            raise UserError(
                f"data.max_epochs_of names {name!r}, no source{near(name, epochs)}"
            )
    for name, passes in epochs.items():
        cap = data.max_epochs_of.get(name, data.max_epochs)
        if passes > cap + 1e-9:
            raise UserError(
                f"source {name!r} would be seen {passes:.2f} times, over its cap of "
                f"{cap:g} epochs: lower its share, shorten the stages, add text, or "
                "raise data.max_epochs (or data.max_epochs_of for this source)"
            )


def past_plan(
    step: int,
    batch_size: int,
    curricula: Sequence[Mapping[str, Any]],
    rollbacks: Sequence[Mapping[str, Any]],
) -> DataPlan:
    """The plan of the examples before step `step`, by a checkpoint's meta alone.

    Only what its curricula say of the past is there: no shares, no languages.
    """
    runs = tuple(
        CurriculumRun(c["first_example"], Curriculum.from_json(c["curriculum"]))
        for c in curricula
    )
    return DataPlan(
        sources=runs[0].curriculum.names,
        languages=(),
        shares=(),
        runs=runs,
        batch_size=batch_size,
        total_steps=step,
        skipped=skipped_by(rollbacks),
    )


def unbuilt_plan(cfg: Config) -> tuple[Corpus, DataPlan, list[dict[str, Any]]]:
    """A plan before there is a corpus, from `corpus.sources`; and its table.

    Where a source does not say its `tokens`, all are taken to be equally large, and
    large enough: epochs are None in the table, and what depends on sizes is
    "estimated".

    Raises:
      UserError: as `make_data_plan`, or sources that no corpus could be built from.
    """
    check_recipe(cfg)
    sources = cfg.corpus.sources
    known = all(s.tokens for s in sources)
    ample = 1000 * sum(s.tokens for s in cfg.stages)
    if not known:
        caps = dict.fromkeys(cfg.data.max_epochs_of, math.inf)
        data = dataclasses.replace(cfg.data, max_epochs=math.inf, max_epochs_of=caps)
        cfg = dataclasses.replace(cfg, data=data)
    corpus = expected_corpus(
        cfg, {s.name: s.tokens if known else ample for s in sources}
    )
    plan = make_data_plan(cfg, corpus)
    table = plan.table()
    if known:
        return corpus, plan, table
    # Shares that other sizes would change depend on sizes: they are estimates.
    others = {s.name: ample * (k + 1) for k, s in enumerate(sources)}
    shares = {}
    for stage in cfg.stages:
        # Unimax has a limit that these sizes may exceed.
        rest = "natural" if stage.mixture.scheme == "unimax" else stage.mixture.scheme
        mixture = dataclasses.replace(stage.mixture, scheme=rest)
        stage = dataclasses.replace(stage, mixture=mixture)
        shares[stage.name] = stage_shares(stage, others)
    for row in table:
        other = shares[row["phase"]][row["source"]]
        estimated = not math.isclose(row["share"], other, abs_tol=1e-9)
        row |= {"epochs": None, "epochs_total": None, "estimated": estimated}
    return corpus, plan, table


def mixture_notes(cfg: Config, corpus: Corpus, plan: DataPlan) -> list[str]:
    """Surprises in the config's mixtures and weights, one line each."""
    tokens = {name: corpus.sources[name].tokens for name in plan.sources}
    notes = []
    for k, stage in enumerate(cfg.stages):
        mix, at = stage.mixture, f"stages.{stage.name}"
        if mix.scheme != "explicit" and sum(mix.shares.values()) < 1 - 1e-6:
            for language, names in unnamed_sources(tokens, mix.shares).items():
                share = sum(plan.shares[k][n] for n in names)
                what = (
                    "get nothing, since a language that is named has exactly what is "
                    "named (in former releases they took part in the rest)"
                    if plan.rest_of == "languages"
                    else f"have {share:.2%} of the rest: this run began in a release "
                    "where they took part in it, and keeps to that"
                )
                notes.append(
                    f"{at}.mixture.shares names {language!r}, but not all its sources; "
                    f"the others {what}. To be plain, give each a share, or 0: "
                    f"{', '.join(names)}"
                )
        if mix.order == "shuffled":
            notes.append(
                f"{at}.mixture.order=shuffled: each block is a random draw, not "
                "within 1 of the shares; once begun, the stage cannot be prolonged"
            )
        weights = stage.token_weights
        total = sum(weights.weights.values())
        if weights.scheme == "target_share" and abs(total - 1) > 1e-6:
            notes.append(
                f"{at}.token_weights.weights sum to {total:.6g}; they are shares of "
                "the objective and are divided by that, to sum to 1"
            )
    return notes
