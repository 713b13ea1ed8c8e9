"""Log-likelihoods of continuations given contexts: what multiple choice is scored by.

A context is computed once for all its continuations: they lie behind it in one row,
each seeing the context and itself only, its positions going on from the context's
end. Rows hold several items. Lengths and numbers of rows come from short lists, so that
little is padding, and what is compiled, once each, depends on sizes only, never on
languages or tasks. The output head is applied only where a scored token is predicted.

Shape suffixes: B rows, T length, P predictions of a row, D model, V vocabulary.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gamayun_jax.config import ComputeConfig, ModelConfig, UserError
from gamayun_jax.evaluate.scoring import (
    check_window,
    on_devices,
    token_scores,
    window_spans,
)
from gamayun_jax.inference.generator import SHORTEST, row_length
from gamayun_jax.inference.quantize import map_leaves
from gamayun_jax.model import sharding
from gamayun_jax.model.transformer import Transformer, compute_dtype, unembedding

LEAST = 32  # length of the only row; where several items share one, it is SHORTEST
LOGITS = 1 << 24  # most logits that exist at a time on a device, about


@dataclass(frozen=True)
class Request:
    """One item as token ids: a context and what may follow it.

    Attributes:
      context: at least one token; BOS (or EOS) where there is no text.
      continuations: the texts to score after it, each of at least one token.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Score:
    """What a request's continuations got.

    Attributes:
      logprobs: float64 [choices], summed natural-log probability of each.
      greedy: bool [choices], whether every token was the most likely one.
      dropped: context tokens cut from the left, in the choice that lost most.
    """

    logprobs: np.ndarray
    greedy: np.ndarray
    dropped: int


@dataclass(frozen=True)
class Part:
    """A context with some of its continuations, as it lies in a row."""

    context: np.ndarray
    continuations: list[np.ndarray]
    targets: list[int]  # number of each continuation among those of all requests

    @property
    def predictions(self) -> int:
        return sum(map(len, self.continuations))

    @property
    def size(self) -> int:
        """What it takes of a row, which has as many places as predictions at most."""
        # The last token of a continuation predicts nothing, so it needs no place.
        places = len(self.context) + self.predictions - len(self.continuations)
        return max(places, self.predictions)


def batch_size(rows: int, most: int) -> int:
    """Rows of each batch for so many in all: a power of two that holds them, or `most`.

    One size for all batches of a length, so that scoring many texts costs one program
    for each length, and the last batch is filled up with padding: less than half of
    all is.
    """
    return min(most, 1 << (rows - 1).bit_length())


class Scorer:
    """Scores requests with one model; rows are divided over the mesh's devices.

    Args:
      cfg: the architecture.
      params: parameters on `mesh`, or as NumPy arrays; None until `params` is set.
      mesh: rows are divided over data and fsdp, also those of other processes.
      compute: its dtype, scan_layers and attention are used.
      window: most tokens that the model sees before a predicted one; default:
        cfg.max_seq_len.
      batch_tokens: tokens of a batch on each device, about.

    Raises:
      UserError: a window that the model does not have.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Any,
        mesh: Mesh,
        compute: ComputeConfig = ComputeConfig(),
        window: int | None = None,
        batch_tokens: int = 4096,
    ):
        self.cfg, self.mesh = cfg, mesh
        self._dtype = compute_dtype(compute.dtype)
        self.params = params
        check_window(window, cfg)
        self.window = window or cfg.max_seq_len
        self.compilations = 0
        self._batch_tokens = batch_tokens
        self._ways = mesh.shape["data"] * mesh.shape["fsdp"]
        model = Transformer(cfg, compute)

        def step(params, batch):
            self.compilations += 1  # runs when it is traced
            x_BTD: Any = model.apply(
                {"params": params},
                batch["tokens"],
                batch["positions"],
                batch["segments"],
                contexts_BT=batch["contexts"],
            )
            x_BPD = jnp.take_along_axis(x_BTD, batch["places"][..., None], axis=1)
            P = x_BPD.shape[1]
            rows = x_BPD.shape[0] // self._ways
            chunk = P
            while chunk > 1 and rows * chunk * cfg.vocab_size > LOGITS:
                chunk //= 2
            return token_scores(x_BPD, unembedding(params), batch["targets"], chunk)

        # Whole on every device, or a process could not fetch what others hold.
        self._step = jax.jit(step, out_shardings=sharding.replicated(mesh))

    @property
    def params(self) -> Any:
        """The parameters on the devices, in the dtype of computation: cast, and copied
        from NumPy, once, not in every batch. Norms stay float32."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        def cast(name: str, leaf: jax.Array) -> jax.Array:
            return leaf if name == "scale" else leaf.astype(self._dtype)

        if params is not None:
            params = sharding.params_on_devices(params, self.mesh)
            if self._dtype != jnp.float32:
                with jax.set_mesh(self.mesh):
                    params = jax.jit(functools.partial(map_leaves, cast))(params)
        self._params = params

    def score(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], Any] | None = None,
    ) -> list[Score]:
        """Scores in the order of the requests.

        Deterministic for the same requests; what else is scored with one changes it
        by rounding at most. A context that leaves no room for a continuation in the
        window is cut from the left, for that continuation alone.

        Args:
          progress: called with the number of continuations scored since the last call.

        Raises:
          UserError: an empty context or continuation, a continuation beyond the
            window, an id that the model does not have.
        """
        parts: list[Part] = []
        dropped = np.zeros(len(requests), np.int64)
        first = np.zeros(len(requests) + 1, np.int64)
        for i, request in enumerate(requests):
            first[i + 1] = first[i] + len(request.continuations)
            made, dropped[i] = self._parts(i, request, int(first[i]))
            parts += made
        nats = np.zeros(first[-1], np.float64)
        misses = np.zeros(first[-1], np.int64)
        in_flight: list[tuple[np.ndarray, Any]] = []

        def collect(keep: int) -> None:
            while len(in_flight) > keep:
                owner_BP, result = in_flight.pop(0)
                nll_BP, hit_BP = (np.asarray(x) for x in result)
                used = owner_BP >= 0
                np.add.at(nats, owner_BP[used], nll_BP[used].astype(np.float64))
                np.add.at(misses, owner_BP[used], hit_BP[used] == 0)
                if progress:
                    progress(len(np.unique(owner_BP[used])))

        with jax.set_mesh(self.mesh), nn.logical_axis_rules(sharding.RULES):
            for group in self._batches(parts):
                batch, owner_BP = lay_out(*group)
                result = self._step(self.params, on_devices(batch, self.mesh))
                in_flight.append((owner_BP, result))
                collect(keep=1)  # the devices always have the next batch queued
            collect(keep=0)
        return [
            Score(-nats[a:b], misses[a:b] == 0, int(lost))
            for a, b, lost in zip(first, first[1:], dropped, strict=False)
        ]

    def rolling(
        self,
        texts: Sequence[Sequence[int]],
        prefix: int,
        progress: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """Summed log-probability of whole texts after `prefix`, float64 [n].

        Each token is scored once; texts beyond the window are cut into windows, each
        after the first with half a window of context. An empty text scores 0.
        """
        requests: list[Request] = []
        owner: list[int] = []
        overlap = max(self.window // 2, 1) - 1
        for number, ids in enumerate(texts):
            stream = [prefix, *ids]
            for begin, scored, end in window_spans(len(ids), self.window, overlap):
                context, rest = stream[begin : scored + 1], stream[scored + 1 : end + 1]
                requests.append(Request(context, [rest]))
                owner.append(number)
        totals = np.zeros(len(texts), np.float64)
        for number, score in zip(owner, self.score(requests, progress), strict=True):
            totals[number] += score.logprobs[0]
        return totals

    def _parts(
        self, number: int, request: Request, first: int
    ) -> tuple[list[Part], int]:
        """A request as parts that fit a row, and the context tokens it lost."""
        context = np.array(request.context, np.int32)
        choices = [np.array(c, np.int32) for c in request.continuations]
        if not len(context) or not choices or not all(map(len, choices)):
            raise UserError(
                f"request {number} has an empty context, no continuation or an empty "
                "one: there is nothing to score"
            )
        low = min(int(x.min()) for x in (context, *choices))
        high = max(int(x.max()) for x in (context, *choices))
        if low < 0 or high >= self.cfg.vocab_size:
            raise UserError(
                f"request {number} has token {high if low >= 0 else low}, beyond the "
                f"model's {self.cfg.vocab_size}: it was made with another tokenizer"
            )
        longest = max(map(len, choices))
        if longest > self.window:
            raise UserError(
                f"request {number} has a continuation of {longest} tokens, more than "
                f"the window of {self.window}: shorten it"
            )
        targets = range(first, first + len(choices))
        if len(context) + longest - 1 > self.window:
            # Not the same context for all, so each is alone, as if it were the only.
            parts = []
            for choice, target in zip(choices, targets, strict=True):
                room = self.window + 1 - len(choice)
                parts.append(Part(context[-room:], [choice], [target]))
            return parts, len(context) - (self.window + 1 - longest)
        parts = []
        limit = row_length(max(self.window, SHORTEST))
        for choice, target in zip(choices, targets, strict=True):
            if not parts or parts[-1].size + len(choice) > limit:
                parts.append(Part(context, [], []))
            parts[-1].continuations.append(choice)
            parts[-1].targets.append(target)
        return parts, 0

    def _batches(
        self, parts: Sequence[Part]
    ) -> Iterator[tuple[list[list[Part]], int, int, int]]:
        """Rows of each batch, and its sizes B, T and P: what `lay_out` takes."""
        by_length: dict[int, list[list[Part]]] = {}
        filled = fill_rows(parts)
        least = LEAST if len(filled) == 1 else SHORTEST
        for row in filled:
            length = row_length(sum(p.size for p in row), least)
            by_length.setdefault(length, []).append(row)
        for T, rows in sorted(by_length.items(), reverse=True):
            most = max(sum(p.predictions for p in row) for row in rows)
            P = next(P for P in (T // 8, T // 4, T // 2, T) if most <= P)
            each = -(-len(rows) // self._ways)
            B = self._ways * batch_size(each, max(self._batch_tokens // T, 1))
            for at in range(0, len(rows), B):
                yield rows[at : at + B], B, T, P


def fill_rows(parts: Sequence[Part]) -> list[list[Part]]:
    """Rows of parts, best fit in order of decreasing size.

    A row is as long as its first part needs, and smaller parts fill what is left. The
    order of equal parts is that of the requests, so the rows are deterministic.
    """
    rows: list[list[Part]] = []
    free: list[tuple[int, int]] = []  # places left and number of the row, ascending
    for part in sorted(parts, key=lambda p: -p.size):
        at = bisect.bisect_left(free, (part.size, 0))
        if at < len(free):
            left, r = free.pop(at)
        else:
            left, r = row_length(part.size), len(rows)
            rows.append([])
        rows[r].append(part)
        bisect.insort(free, (left - part.size, r))
    return rows


def lay_out(
    rows: Sequence[Sequence[Part]], B: int, T: int, P: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows as int32 arrays, and int32 [B, P] the owner of each prediction, or -1.

    tokens, positions, segments, contexts [B, T]: a token sees its own segment, and
    the segment `contexts` names. places, targets [B, P]: where a scored token is
    predicted, and which it is.
    """
    names = ("tokens", "positions", "segments", "contexts")
    batch = {name: np.zeros((B, T), np.int32) for name in names}
    batch |= {name: np.zeros((B, P), np.int32) for name in ("places", "targets")}
    owner_BP = np.full((B, P), -1, np.int32)
    for r, row in enumerate(rows):
        at = n = segment = 0

        def put(tokens: np.ndarray, position: int, context: int, r: int = r) -> int:
            """Write a new segment; returns its number."""
            nonlocal at, segment
            segment += 1
            span = slice(at, at + len(tokens))
            batch["tokens"][r, span] = tokens
            batch["positions"][r, span] = np.arange(len(tokens)) + position
            batch["segments"][r, span] = segment
            batch["contexts"][r, span] = context or segment
            at += len(tokens)
            return segment

        for part in row:
            context = put(part.context, 0, 0)
            last = at - 1  # predicts the first token of each continuation
            for choice, target in zip(part.continuations, part.targets, strict=True):
                begin = at
                if len(choice) > 1:
                    put(choice[:-1], len(part.context), context)
                span = slice(n, n + len(choice))
                batch["places"][r, span] = [last, *range(begin, at)]
                batch["targets"][r, span] = choice
                owner_BP[r, span] = target
                n += len(choice)
    return batch, owner_BP
