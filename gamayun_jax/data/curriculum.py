"""The curriculum: training data as a pure function of one integer.

Global example number i maps to (source, position in that source) by the phases'
weights alone. Exact counts, random access, no state. NumPy only.

How counts are exact. Weights are whole numbers over 2**30. A phase is cut into
blocks; I[b, s], the integral of source s's weight up to block boundary b, is an exact
int64 over 2**30. The realised count C[b, s] is chosen by earliest-deadline-first
scheduling: the j-th example of a source may not come before its integral exceeds
j - 1 and is due when it reaches j. A fractional schedule exists (the weights
themselves), so by total unimodularity a whole one does, and for unit jobs earliest
deadline first finds it (Tijdeman, "The chairman assignment problem", 1980; Baruah et
al., "Proportionate progress", 1996). Hence, at every block boundary of a phase, counts
since the phase began are within 1 of the integral, add up exactly, and never go back.

Prolonging a phase re-maps nothing but its last block, if that was a short one:
deadlines are exact examples, not blocks, and look beyond the end as if the phase went
on. (A ramp that reaches into a short last block has another mean in the whole one, so
there earlier blocks may move too.) Every phase starts afresh from whole counts, because
a decision must not depend on phases that may still be edited, and without that
knowledge nobody stays within 1 across changes. Take four sources at 1/4: after two
examples two of them lag by 1/2. If the next phase is those two at 1/2, one of them lags
by a whole 1 after its first example. Eight sources and one more halving make it 3/2.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from gamayun_jax.config import UserError
from gamayun_jax.data import shuffle

ONE = 1 << 30  # weights are whole multiples of 1 / ONE
NEVER = np.int64(1) << 62
LONGEST = 1 << 32  # examples in a phase: times ONE, their integral fits in int64
PART = 1 << 14  # blocks whose counts are computed together
VERSION = 2  # of the mapping; part of the fingerprint


@dataclass(frozen=True)
class Phase:
    """`examples` long; weights: source -> share. The first `ramp_examples` move from
    the former phase's weights to these (the first phase has none to move from).

    `order` of its examples: "interleaved", the counts of blocks following the weights,
    or "shuffled", as many of each source at random places of the phase (shuffle.py).
    """

    name: str
    examples: int
    weights: Mapping[str, float]
    ramp: str = "step"
    ramp_examples: int = 0
    order: str = "interleaved"


@dataclass(frozen=True)
class Blocks:
    """Realised counts of a phase at its block boundaries."""

    start: int  # first global example of the phase
    ends: np.ndarray  # int64 [b + 1]: examples of the phase before boundary b
    even: np.ndarray  # int64 [b + 1, S]: since the phase began, by the weights
    before: np.ndarray  # int64 [S]: examples of each source in the phases before
    key: int | None = None  # of a shuffled phase's order

    @property
    def totals(self) -> np.ndarray:
        """int64 [S]: examples of each source in the phase, in any order."""
        return self.even[-1]

    @property
    def shuffle(self) -> tuple[tuple[int, ...], int]:
        """What decides a shuffled phase's order: its totals and the key."""
        assert self.key is not None
        return tuple(self.totals.tolist()), self.key

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [b + 1, S]: since the phase began. Of a shuffled one they take time,
        so what only plans asks for `totals`."""
        if self.key is None:
            return self.even
        return shuffle.turn_counts(*self.shuffle, int(self.ends[1]))


def to_fixed_point(weights: np.ndarray) -> np.ndarray:
    """float [..., S] that sum to 1 -> int64 over ONE that sum to ONE; 0 stays 0."""
    exact = weights * ONE
    whole = np.floor(exact).astype(np.int64)
    short = ONE - whole.sum(axis=-1, keepdims=True)
    # Largest remainders first; a weight of 0 never gets one.
    remainder = np.where(weights > 0, exact - whole, -1.0)
    rank = np.argsort(np.argsort(-remainder, axis=-1, kind="stable"), axis=-1)
    whole += rank < short
    # Float sums may leave more than one a source: the largest takes it.
    rest = ONE - whole.sum(axis=-1)
    largest = np.argmax(whole, axis=-1)
    np.put_along_axis(
        whole,
        largest[..., None],
        np.take_along_axis(whole, largest[..., None], axis=-1) + rest[..., None],
        axis=-1,
    )
    return whole


def ramp_integral(kind: str, x: np.ndarray) -> np.ndarray:
    """Integral from 0 to x of the ramp from 0 to 1 over [0, 1]; linear beyond."""
    inside = np.clip(x, 0.0, 1.0)
    if kind == "linear":
        area = inside**2 / 2
    else:  # cosine: (1 - cos(pi t)) / 2
        area = inside / 2 - np.sin(np.pi * inside) / (2 * np.pi)
    return area + np.maximum(x - 1.0, 0.0)


def earliest_deadline_counts(
    weights: np.ndarray, lengths: np.ndarray, final: np.ndarray
) -> np.ndarray:
    """Whole counts within 1 of the integrals of the weights, at block boundaries.

    Args:
      weights: int64 [b, S] over ONE, constant in each block.
      lengths: int64 [b], examples per block.
      final: int64 [S] over ONE, weights with which the phase would go on.

    Returns:
      int64 [b + 1, S], beginning with zeros; row b sums to lengths[:b].sum().
    """
    blocks, sources = weights.shape
    integral = np.empty((sources, blocks), np.int64)
    for s in range(sources):
        np.cumsum(weights[:, s] * lengths, out=integral[s])
    total = np.cumsum(lengths)
    counts = np.zeros((blocks + 1, sources), np.int64)
    places = np.arange(sources)
    ahead = np.zeros(sources, bool)  # in the block before
    # In parts that fit a processor's cache: a phase may have a million blocks.
    for part in range(0, blocks, PART):
        blocks_of = slice(part, min(part + PART, blocks))
        due = due_examples(integral, total, weights, final, blocks_of)
        floor = (integral[:, blocks_of] >> 30).T
        spare = total[blocks_of] - floor.sum(axis=1)
        # A count is the integral rounded down, or one ahead of that. First as if
        # nothing came from the block before.
        now = np.zeros((len(due) + 1, sources), bool)
        now[0] = ahead
        order = np.argsort(due, axis=1, kind="stable")
        np.put_along_axis(now[1:], order, places < spare[:, None], axis=1)
        # A source that was ahead stays so until its integral passes a whole number,
        # even if others are due before: these blocks, and what follows from them, one
        # by one.
        kept = floor == np.vstack([counts[part] - ahead, floor[:-1]])
        done = 0
        for b in np.flatnonzero((now[:-1] & kept & ~now[1:]).any(axis=1)).tolist():
            while done <= b < len(due):
                done = b + 1
                stay = now[b] & kept[b]
                order = np.argsort(np.where(stay, NEVER + 1, due[b]), kind="stable")
                stay[order[: int(spare[b] - stay.sum())]] = True
                if (stay == now[b + 1]).all():
                    break
                now[b + 1] = stay
                b += 1
        np.add(floor, now[1:], out=counts[blocks_of.start + 1 : blocks_of.stop + 1])
        ahead = now[-1]
    return counts


def due_examples(
    integral: np.ndarray,
    total: np.ndarray,
    weights: np.ndarray,
    final: np.ndarray,
    blocks_of: slice,
) -> np.ndarray:
    """When the next example of each source is due, int64 [len(blocks_of), S]: earliest
    first. A source whose integral is a whole number has to wait.

    Args:
      integral: int64 [S, b] over ONE, at the ends of all blocks.
      total: int64 [b], examples up to there.
      weights, final: see earliest_deadline_counts.
    """
    sources, blocks = integral.shape
    due = np.empty((blocks_of.stop - blocks_of.start, sources), np.int64)
    for s in range(sources):
        column = integral[s]
        here = column[blocks_of]
        need = ((here >> 30) + 1) << 30
        block = np.searchsorted(column, need, side="left")
        # The first example by which the integral reaches `need`. Blocks alone would
        # not do: a short last one would move the deadlines just beyond it, and ties
        # with them, when the phase is prolonged.
        late = block == blocks
        block[late] = blocks - 1
        rate = np.where(late, final[s], weights[block, s])
        earlier = np.where(late, block, block - 1)  # block that ends before it
        reached = np.where(earlier < 0, 0, column[earlier])
        begin = np.where(earlier < 0, 0, total[earlier])
        due[:, s] = begin - (reached - need) // np.maximum(rate, 1)  # rounds up
        due[rate == 0, s] = NEVER
        due[here & (ONE - 1) == 0, s] = NEVER + 1
    return due


@functools.lru_cache(maxsize=8)  # a run makes the same plan several times
def phase_counts(
    phase: tuple[int, str, int],
    size: int,
    final: tuple[float, ...],
    former: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Ends int64 [b + 1] and counts int64 [b + 1, S] of a phase; see Blocks.

    Args:
      phase: its examples, its ramp and the examples of the ramp.
      size: of a block, in examples.
      final, former: shares of the sources in it and before it, each adding up to 1;
        `former` is () where nothing came before.
    """
    examples, ramp, ramp_examples = phase
    ends = np.append(np.arange(0, examples, size, dtype=np.int64), examples)
    lengths = np.diff(ends)
    rates = to_fixed_point(np.array(final))
    weights = np.broadcast_to(rates, (len(lengths), len(final)))
    if ramp != "step" and ramp_examples and former:
        area = ramp_integral(ramp, ends / ramp_examples) * ramp_examples
        # Rounding must not leave [0, 1]: it would make weights negative.
        done = np.clip(np.diff(area) / lengths, 0.0, 1.0)[:, None]
        ramped = ends[:-1] < ramp_examples
        mixed = (1 - done[ramped]) * np.array(former) + done[ramped] * np.array(final)
        weights = weights.copy()
        weights[ramped] = to_fixed_point(mixed)
    counts = earliest_deadline_counts(weights, lengths, rates)
    ends.flags.writeable = counts.flags.writeable = False  # many plans share them
    return ends, counts


@dataclass(frozen=True)
class Curriculum:
    """Global example -> (source, position).

    Attributes:
      sources: name -> examples in one epoch; the order numbers the sources.
      seed: of the interleaving inside blocks.
      block_examples: length of a block; counts are exact at its ends.
      start: name -> position at which a former run left the source.
      before: weights at the end of that run, from which a first phase's ramp starts.
    """

    phases: tuple[Phase, ...]
    sources: Mapping[str, int]
    seed: int = 0
    block_examples: int = 1024
    start: Mapping[str, int] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sources)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [S]: position at which each source starts."""
        return np.array([self.start.get(n, 0) for n in self.names], np.int64)

    @cached_property
    def total(self) -> int:
        return sum(p.examples for p in self.phases)

    def _shares(self, weights: Mapping[str, float]) -> tuple[float, ...]:
        """Weights in the order of the sources, adding up to 1; () if all are 0."""
        all_weights = np.array([weights.get(n, 0.0) for n in self.names], np.float64)
        total = all_weights.sum()
        return tuple((all_weights / total).tolist()) if total > 0 else ()

    @cached_property
    def blocks(self) -> tuple[Blocks, ...]:
        """The realised counts of each phase."""
        blocks = []
        start, before = 0, np.zeros(len(self.names), np.int64)
        former = self._shares(self.before)
        for p in self.phases:
            final = self._shares(p.weights)
            rule = p.examples, p.ramp, p.ramp_examples
            ends, counts = phase_counts(rule, self.block_examples, final, former)
            mixed = p.order == "shuffled"
            key = shuffle.make_key(self.seed, start, p.order) if mixed else None
            blocks.append(Blocks(start, ends, counts, before, key))
            start, before, former = start + p.examples, before + counts[-1], final
        return tuple(blocks)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([b.start for b in self.blocks], np.int64)

    @cached_property
    def _orders(self) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
        return {}

    def _order(self, phase: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources int32 [n] of a block's examples, and each one's number among those
        of its source in the block, int64 [n]."""
        key = (phase, block)
        if (known := self._orders.get(key)) is not None:
            return known
        b = self.blocks[phase]
        n = b.counts[block + 1] - b.counts[block]
        source = np.repeat(np.arange(len(n), dtype=np.int32), n)
        number = np.arange(len(source)) - np.repeat(np.cumsum(n) - n, n)
        if b.key is not None:
            turns = shuffle.turns(*b.shuffle, *b.ends[block : block + 2].tolist())
            order = np.argsort(np.argsort(turns, kind="stable"))
        else:
            # Source s takes places (number + u_s) / n_s: evenly spread, so that any
            # part of a block is near the weights. u_s is a hash, so that sources do
            # not begin together.
            shift = [unit_hash(self.seed, b.start, block, s) for s in self.names]
            place = (number + np.array(shift)[source]) / n[source]
            order = np.argsort(place, kind="stable")
        if len(self._orders) > 16:
            self._orders.clear()
        self._orders[key] = source[order], number[order]
        return self._orders[key]

    def lookup(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global examples int64 [n] -> (source int32 [n], position int64 [n]).

        `position` counts from 0 for the source's first example ever, `start` included;
        epoch = position // sources[name].

        Raises:
          IndexError: an example outside of the curriculum.
        """
        examples = np.asarray(examples, np.int64)
        if examples.size and not 0 <= examples.min() <= examples.max() < self.total:
            raise IndexError(f"example outside of 0..{self.total - 1}")
        source = np.empty(examples.shape, np.int32)
        position = np.empty(examples.shape, np.int64)
        phases = np.searchsorted(self._starts, examples, side="right") - 1
        blocks = (examples - self._starts[phases]) // self.block_examples
        for phase, block in set(zip(phases.tolist(), blocks.tolist(), strict=True)):
            mine = (phases == phase) & (blocks == block)
            b = self.blocks[phase]
            sources, number = self._order(phase, block)
            inside = examples[mine] - b.start - block * self.block_examples
            source[mine] = which = sources[inside]
            before = b.before + b.counts[block] + self.offsets
            position[mine] = before[which] + number[inside]
        return source, position

    def counts_at(self, example: int) -> np.ndarray:
        """int64 [S]: examples of each source among the global examples [0, example)."""
        if not 0 <= example <= self.total:
            raise IndexError(f"example {example} outside of 0..{self.total}")
        phase = int(np.searchsorted(self._starts, example, side="right")) - 1
        b = self.blocks[phase]
        inside = example - b.start
        if inside == b.ends[-1]:  # the last block may be a short one
            return b.before + b.totals
        block, rest = divmod(inside, self.block_examples)
        counts = b.before + b.counts[block]
        if rest:
            first = self._order(phase, block)[0][:rest]
            counts += np.bincount(first, minlength=len(self.names))
        return counts

    def consumed(self, example: int) -> dict[str, int]:
        """Position of each source before global example `example`, `start` included."""
        positions = self.counts_at(example) + self.offsets
        return dict(zip(self.names, positions.tolist(), strict=True))

    def epochs(self) -> dict[str, float]:
        """Passes over each source at the end, `start` included."""
        used = self.consumed(self.total)
        sizes = self.sources
        return {n: c / sizes[n] if sizes[n] else 0.0 for n, c in used.items()}

    def table(self) -> list[dict[str, Any]]:
        """One row per phase and source: share, examples, epochs in it and in all."""
        return [
            {
                "phase": p.name,
                "source": name,
                "share": p.weights.get(name, 0.0),
                "examples": int(b.totals[s]),
                "epochs": float(b.totals[s] / max(self.sources[name], 1)),
                "epochs_total": float(
                    (b.before + b.totals + self.offsets)[s] / max(self.sources[name], 1)
                ),
            }
            for p, b in zip(self.phases, self.blocks, strict=True)
            for s, name in enumerate(self.names)
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON; `from_json` is the inverse."""
        return {
            "version": VERSION,
            "phases": [dataclasses.asdict(p) for p in self.phases],
            "sources": dict(self.sources),
            "seed": self.seed,
            "block_examples": self.block_examples,
            "start": dict(self.start),
            "before": dict(self.before),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curriculum:
        """Inverse of `to_json`. UserError if another version of the mapping wrote it:
        the examples that it served cannot be computed here, nor compared."""
        if (version := data.get("version", 1)) != VERSION:
            raise UserError(
                f"a curriculum of mapping version {version}, but this program has "
                f"{VERSION}: go on with the release of gamayun_jax that wrote it, or "
                "start another run with --init-from"
            )
        rest = {k: v for k, v in data.items() if k not in ("version", "phases")}
        return cls(tuple(Phase(**p) for p in data["phases"]), **rest)


def unit_hash(*parts: Any) -> float:
    """A number in (0, 1) from any printable parts; the same everywhere."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=6).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**48


def near(name: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)", or the list of known names."""
    close = difflib.get_close_matches(name, list(known), n=2)
    if close:
        return f" (did you mean {' or '.join(map(repr, close))}?)"
    return f" (there are: {', '.join(sorted(known))})"
