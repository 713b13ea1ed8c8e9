"""Batches for training: a pure function of the step number.

Global example number i is (source, position in the source) by the curriculum
alone; Grain reads it, hosts only pick their rows. So the whole state of the loader
is one integer, and it is valid for any number of hosts.

A batch is a dict of arrays [B, T], B rows over all hosts:

  inputs, targets  int32  token ids; targets[t] is the token after inputs[t]
  positions        int32  of each input in its document (0 where a row cuts into one)
  segment_ids      int32  number of the document in the row, from 1; 0 is padding
  language         int32  index into Config.languages
  loss_mask        float32 1 where the target counts: not padding, and not the first
                   token of another document (targets never cross documents)
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from gamayun_jax.config import Config, StageConfig, UserError
from gamayun_jax.data.build import check_recipe
from gamayun_jax.data.corpus import BadRecordError, Corpus, expected_corpus
from gamayun_jax.data.curriculum import (
    LONGEST,
    Curriculum,
    Phase,
    check_epochs,
    mixture_shares,
    unnamed_sources,
)

Aside = Callable[[str, str, int, str], None]  # (source, shard, record, reason)


@dataclass(frozen=True)
class Segment:
    """Consecutive stages that share data cursors, beginning at a global example."""

    first_example: int
    curriculum: Curriculum
    seed: int


@dataclass(frozen=True)
class Skipped:
    """Positions [begin, end) of a source's order that are left out of a segment."""

    segment: int
    source: str
    begin: int
    end: int


@dataclass(frozen=True)
class DataPlan:
    """What a run reads, from its first example to its last."""

    sources: tuple[str, ...]
    languages: tuple[int, ...]  # of each source, index into Config.languages
    shares: tuple[dict[str, float], ...]  # per stage: source -> share of its tokens
    segments: tuple[Segment, ...]
    batch_size: int
    total_steps: int
    skipped: tuple[Skipped, ...] = ()
    rest_of: str = "languages"  # see curriculum.mixture_shares

    def segment_before(self, step: int) -> int:
        """Number of the segment that served the last example before step `step`; at
        the boundary that is the one that ends there."""
        starts = [s.first_example for s in self.segments]
        last = max(0, step * self.batch_size - 1)
        return int(np.searchsorted(starts, last, side="right")) - 1

    def served_of(self, segment: int, step: int) -> int:
        """Examples that a segment serves before step `step`: none of it, to all."""
        s = self.segments[segment]
        return min(max(0, step * self.batch_size - s.first_example), s.curriculum.total)

    def curricula(self, step: int) -> list[dict[str, Any]]:
        """Of each segment, as plain JSON: its first example, its curriculum, and the
        fingerprint of what it served before step `step`."""
        return [
            {
                "first_example": s.first_example,
                "curriculum": s.curriculum.to_json(),
                "fingerprint": s.curriculum.fingerprint(self.served_of(k, step)),
            }
            for k, s in enumerate(self.segments)
        ]

    def table(self) -> list[dict[str, Any]]:
        """The segments' tables (Curriculum.table); `epochs_total` counts from the
        first of them, so that it is what the epoch caps bound."""
        found: list[dict[str, Any]] = []
        before = dict.fromkeys(self.sources, 0.0)
        for s in self.segments:
            for row in s.curriculum.table():
                total = row["epochs_total"] + before[row["source"]]
                found.append({**row, "epochs_total": total})
            for name, passes in s.curriculum.epochs().items():
                before[name] += passes
        return found

    def lookup(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(segment * num_sources + source, position) of global examples, int64 [n]."""
        dataset = np.empty(len(examples), np.int64)
        position = np.empty(len(examples), np.int64)
        starts = np.array([s.first_example for s in self.segments])
        which = np.searchsorted(starts, examples, side="right") - 1
        for k in np.unique(which):
            mine = which == k
            source, place = self.segments[k].curriculum.lookup(
                examples[mine] - starts[k]
            )
            dataset[mine] = k * len(self.sources) + source
            position[mine] = place
        # In order, so that each counts with the ones before it already left out.
        for s in sorted(self.skipped, key=lambda s: s.begin):
            number = s.segment * len(self.sources) + self.sources.index(s.source)
            beyond = (dataset == number) & (position >= s.begin)
            position[beyond] += s.end - s.begin
        return dataset, position

    def behind(self, source: str, step: int) -> Iterator[tuple[int, int]]:
        """(segment, position in its order) of each example of a source that its
        cursors are beyond before step `step`: what this run served, and what a former
        one did where its cursor went on."""
        for k, segment in enumerate(self.segments):
            end = segment.curriculum.consumed(self.served_of(k, step))[source]
            mine = [
                s
                for s in sorted(self.skipped, key=lambda s: s.begin)
                if s.segment == k and s.source == source
            ]
            for begin in range(0, end, 4096):
                position = np.arange(begin, min(begin + 4096, end))
                for s in mine:
                    position[position >= s.begin] += s.end - s.begin
                yield from ((k, p) for p in position.tolist())

    def positions(self, first: int, last: int) -> list[dict[str, Any]]:
        """What steps `first` to `last` (from 1) serve, as `Skipped` in plain JSON."""
        examples = np.arange((first - 1) * self.batch_size, last * self.batch_size)
        dataset, position = self.lookup(examples)
        found = []
        for number in np.unique(dataset).tolist():
            segment, source = divmod(number, len(self.sources))
            places = np.sort(position[dataset == number])
            for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
                begin, end = int(run[0]), int(run[-1]) + 1
                found.append(Skipped(segment, self.sources[source], begin, end))
        return [dataclasses.asdict(s) for s in found]

    def consumed(self, step: int) -> dict[str, int]:
        """Data cursor of each source, in examples, before step number `step`; of the
        segment that `segment_before` names."""
        k = self.segment_before(step)
        cursors = self.segments[k].curriculum.consumed(self.served_of(k, step))
        for s in sorted(self.skipped, key=lambda s: s.begin):
            if s.segment == k and cursors[s.source] >= s.begin:
                cursors[s.source] += s.end - s.begin
        return cursors

    def served(self, step: int) -> dict[str, int]:
        """Examples of each source that this run served before step `step`."""
        total = np.zeros(len(self.sources), np.int64)
        for k, segment in enumerate(self.segments):
            total += segment.curriculum.counts_at(self.served_of(k, step))
        return dict(zip(self.sources, total.tolist(), strict=True))

    def language_shares(self, cfg: Config, stage: int) -> dict[str, float]:
        """Share of each language among the tokens of a stage's mixture."""
        shares = dict.fromkeys(cfg.languages, 0.0)
        for source, language in zip(self.sources, self.languages, strict=True):
            name = cfg.languages[language]
            shares[name] += self.shares[stage].get(source, 0.0)
        return shares


def stage_shares(
    stage: StageConfig, tokens: Mapping[str, int], rest_of: str = "languages"
) -> dict[str, float]:
    """Shares per source of a stage; `tokens`: source -> size of the source."""
    mix = stage.mixture
    rule = (mix.scheme, mix.shares, mix.alpha, mix.max_epochs, stage.tokens, rest_of)
    try:
        return mixture_shares(tokens, *rule)
    except UserError as e:
        raise UserError(f"stages.{stage.name}.mixture: {e}") from e


def mixture_notes(cfg: Config, corpus: Corpus, plan: DataPlan) -> list[str]:
    """What a reader of the config may not expect of its mixtures, one line each."""
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
        weights = stage.token_weights
        total = sum(weights.weights.values())
        if weights.scheme == "target_share" and abs(total - 1) > 1e-6:
            notes.append(
                f"{at}.token_weights.weights sum to {total:.6g}; they are shares of "
                "the objective and are divided by that, to sum to 1"
            )
    return notes


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
    # What is another share with other sizes.
    others = {s.name: ample * (k + 1) for k, s in enumerate(sources)}
    shares = {}
    for stage in cfg.stages:
        # What one size gives by chance, others need not: unimax has a limit.
        rest = "natural" if stage.mixture.scheme == "unimax" else stage.mixture.scheme
        mixture = dataclasses.replace(stage.mixture, scheme=rest)
        stage = dataclasses.replace(stage, mixture=mixture)
        shares[stage.name] = stage_shares(stage, others)
    for row in table:
        other = shares[row["phase"]][row["source"]]
        estimated = not math.isclose(row["share"], other, abs_tol=1e-9)
        row |= {"epochs": None, "epochs_total": None, "estimated": estimated}
    return corpus, plan, table


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
      rollbacks: what was decided to leave out; see divergence.py.
      rest_of: "sources" for a run that a former release began; see
        curriculum.mixture_shares.

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
    segments: list[Segment] = []
    phases: list[Phase] = []
    first_step = 0
    # Shares at the end of what came before a segment: its ramp begins there.
    before: Mapping[str, float] = origin["shares"] if origin is not None else {}

    def close(begin_step: int) -> None:
        first = origin is not None and not segments
        carry_over = first and cfg.stages[0].transition.cursors == "continue"
        seed = (cfg.seed * 1_000_003 + len(segments)) % 2**31
        begins: dict[str, int] = {}
        if origin is not None and carry_over:
            # The same order as before, or what was served would come again.
            seed, begins = origin["seed"], dict(origin["cursors"])
        else:
            # Anew is in another order, or the same examples would begin again.
            used = {s.seed for s in segments}
            used |= {origin["seed"]} if origin is not None else set()
            while seed in used:
                seed += 1
        curriculum = Curriculum(
            phases=tuple(phases),
            sources=sizes,
            seed=seed,
            block_examples=cfg.data.block_examples,
            start={k: v for k, v in begins.items() if k in sizes},
            before=before,
        )
        segments.append(Segment(begin_step * cfg.data.batch_size, curriculum, seed))
        phases.clear()

    steps_done = 0
    batch_size, seq_len = cfg.data.batch_size, cfg.data.seq_len
    for k, (stage, steps) in enumerate(zip(cfg.stages, cfg.stage_steps(), strict=True)):
        at, mix, examples = f"stages.{stage.name}", stage.mixture, steps * batch_size
        if examples > LONGEST:
            raise UserError(
                f"{at}.tokens={stage.tokens} is more than the {LONGEST * seq_len} that "
                "fit in one stage: split it into several"
            )
        if mix.ramp_tokens // seq_len > examples:
            raise UserError(
                f"{at}.mixture.ramp_tokens={mix.ramp_tokens} exceeds the stage's "
                f"tokens={stage.tokens}: shorten the ramp"
            )
        if k and stage.transition.cursors == "restart":
            close(first_step)
            first_step, before = steps_done, shares[k - 1]
        phases.append(
            Phase(
                name=stage.name,
                examples=examples,
                weights=shares[k],
                ramp=mix.ramp,
                ramp_examples=mix.ramp_tokens // seq_len,
            )
        )
        steps_done += steps
    close(first_step)
    caps: dict[str, float] = dict.fromkeys(sizes, cfg.data.max_epochs)
    caps.update(cfg.data.max_epochs_of)
    epochs = dict.fromkeys(sizes, 0.0)
    for segment in segments:
        for name, passes in segment.curriculum.epochs().items():
            epochs[name] += passes
    check_epochs(epochs, caps)
    return DataPlan(
        sources=tuple(sizes),
        languages=tuple(
            cfg.languages.index(corpus.sources[name].language) for name in sizes
        ),
        shares=shares,
        segments=tuple(segments),
        batch_size=cfg.data.batch_size,
        total_steps=cfg.total_steps,
        skipped=tuple(Skipped(**s) for r in rollbacks for s in r["skipped"]),
        rest_of=rest_of,
    )


def past_plan(
    step: int,
    batch_size: int,
    curricula: Sequence[Mapping[str, Any]],
    rollbacks: Sequence[Mapping[str, Any]],
) -> DataPlan:
    """What served the examples before step `step`, by a checkpoint's meta alone.

    Only what the segments say of the past is there: no shares, no languages.
    """
    segments = []
    for s in curricula:
        curriculum = Curriculum.from_json(s["curriculum"])
        segments.append(Segment(s["first_example"], curriculum, curriculum.seed))
    return DataPlan(
        sources=segments[0].curriculum.names,
        languages=(),
        shares=(),
        segments=tuple(segments),
        batch_size=batch_size,
        total_steps=step,
        skipped=tuple(Skipped(**s) for r in rollbacks for s in r["skipped"]),
    )


def example_order(
    seed: int, source: str, records: Sequence[Any], per_record: int
) -> Any:
    """Position in a segment's order of a source -> example, for any number of epochs;
    `seed`: the segment's."""
    # By name, so that another source's coming or going changes nothing.
    seed = (seed * 65_537 + zlib.crc32(source.encode())) % 2**32
    return (
        grain.MapDataset.range(len(records) * per_record).seed(seed).shuffle().repeat()
    )


def make_batch(
    tokens: np.ndarray, language: np.ndarray, bos: int, pad: int
) -> dict[str, np.ndarray]:
    """Records int32 [B, T + 1] and languages int32 [B] to a batch (see the module)."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    B, T = inputs.shape
    # Documents are much longer than a token, so both arrays are written in runs, one
    # per document, instead of by scans over all tokens. A row that cuts into a
    # document begins a run too: segment 1 at position 0, not padding.
    begins = inputs == bos
    begins[:, 0] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=B * T)
    row = starts // T
    first_run = np.searchsorted(row, np.arange(B))
    number = np.arange(1, len(starts) + 1) - first_run[row]
    segment_ids = np.repeat(number.astype(np.int32), lengths).reshape(B, T)
    places = np.arange(B * T, dtype=np.int32)
    positions = (places - np.repeat(starts.astype(np.int32), lengths)).reshape(B, T)
    padding = inputs == pad
    if padding.any():
        positions[padding] = 0
        segment_ids[padding] = 0
    return {
        "inputs": inputs,
        "targets": targets,
        "positions": positions,
        "segment_ids": segment_ids,
        "language": np.repeat(language.astype(np.int32), T).reshape(B, T),
        "loss_mask": ((targets != pad) & (targets != bos)).astype(np.float32),
    }


class LocalBatches:
    """This host's part of each step's batch, by the step: random access, no state.

    The order of a source's examples is Grain's index shuffle, anew in each epoch; it
    is computed for an index at a time, so nothing grows with the corpus. Whole batches
    are read here, instead of examples by Grain, because its cost for each element is
    more than that of reading one (benchmarks/loader.py).
    """

    def __init__(
        self,
        cfg: Config,
        corpus: Corpus,
        plan: DataPlan,
        rows: np.ndarray,
        aside: Aside | None = None,
    ):
        tokenizer = corpus.tokenizer()
        self._bos, self._pad = tokenizer.bos_id, tokenizer.pad_id
        self._plan, self._rows, self._seq_len = plan, rows, cfg.data.seq_len
        self._per_record = corpus.manifest["record_tokens"] // self._seq_len
        self._aside = aside if cfg.data.faults == "set_aside" else None
        self._records = [
            corpus.records(name, cfg.data.retry_seconds) for name in plan.sources
        ]
        self._languages = np.array(plan.languages, np.int32)
        self._order = []
        for segment in plan.segments:
            for name, records in zip(plan.sources, self._records, strict=True):
                self._order.append(
                    example_order(segment.seed, name, records, self._per_record)
                )

    def __len__(self) -> int:
        return self._plan.total_steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        examples = int(step) * self._plan.batch_size + self._rows
        datasets, positions = self._plan.lookup(examples)
        sources = datasets % len(self._records)
        tokens = np.empty((len(examples), self._seq_len + 1), np.int32)
        for row, (dataset, source, position) in enumerate(
            zip(datasets.tolist(), sources.tolist(), positions.tolist(), strict=True)
        ):
            example = self._order[dataset][position]
            record, part = divmod(example, self._per_record)
            at = part * self._seq_len
            try:
                tokens[row] = self._records[source][record][at : at + self._seq_len + 1]
            except BadRecordError as e:
                if self._aside is None:
                    raise
                self._aside(self._plan.sources[source], e.shard, e.record, e.reason)
                tokens[row] = self._pad
        return make_batch(tokens, self._languages[sources], self._bos, self._pad)


def local_batches(
    cfg: Config,
    corpus: Corpus,
    plan: DataPlan,
    rows: np.ndarray,
    first_step: int,
    aside: Aside | None = None,
) -> grain.IterDataset:
    """This host's batches from `first_step` on: dicts of arrays [len(rows), T]."""
    source: Any = LocalBatches(cfg, corpus, plan, rows, aside)
    return grain.MapDataset.source(source)[first_step:].to_iter_dataset(
        grain.ReadOptions(
            num_threads=cfg.data.threads, prefetch_buffer_size=cfg.data.prefetch
        )
    )


def host_rows(batch_size: int, sharding: NamedSharding) -> np.ndarray:
    """Rows of the global batch that this process's devices hold, ascending."""
    rows: set[int] = set()
    for index in sharding.addressable_devices_indices_map((batch_size, 1)).values():
        assert index is not None
        rows.update(range(*index[0].indices(batch_size)))
    return np.array(sorted(rows), np.int64)


def global_batch(
    local: Mapping[str, np.ndarray],
    rows: np.ndarray,
    batch_size: int,
    sharding: NamedSharding,
) -> dict[str, jax.Array]:
    """Assemble global arrays [B, T] from this process's rows."""

    def assemble(values: np.ndarray) -> jax.Array:
        shape = (batch_size, *values.shape[1:])

        def piece(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(batch_size)
            at = int(np.searchsorted(rows, begin))
            return values[at : at + end - begin]

        return jax.make_array_from_callback(shape, sharding, piece)

    return {name: assemble(values) for name, values in local.items()}


def batches(
    cfg: Config,
    corpus: Corpus,
    plan: DataPlan,
    sharding: NamedSharding,
    first_step: int = 0,
    aside: Aside | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Global batches on the devices, from `first_step` to the run's last step."""
    rows = host_rows(cfg.data.batch_size, sharding)
    for local in local_batches(cfg, corpus, plan, rows, first_step, aside):
        yield global_batch(local, rows, cfg.data.batch_size, sharding)
