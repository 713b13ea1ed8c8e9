"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, penalty.

Shape suffixes: B rows, V vocabulary (sorted, where a name says so).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gamayun_jax.fields import DrawSeed, Finite, Mass, Part, Share, Whole, settle


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; applied in this order, as `transformers` does.

    Raises:
      UserError: a value out of its range.
    """

    repetition_penalty: Finite = 1.0  # above 1: seen tokens lose (arXiv 1909.05858)
    temperature: Share = 0.0  # 0: the most likely token, nothing is drawn
    top_k: Whole = 0  # only the k most likely; 0: all
    # only the fewest that reach this mass (arXiv 1904.09751)
    top_p: Mass = 1.0
    min_p: Part = 0.0  # only those above this share of the most likely's probability
    seed: DrawSeed = 0

    def __post_init__(self):
        settle(self, "sampling")

    @property
    def program(self) -> tuple[bool, bool, bool]:
        """What the compiled program depends on: (drawn, filtered, penalised)."""
        drawn = self.temperature > 0
        filtered = drawn and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
        return drawn, filtered, self.repetition_penalty != 1

    def values(self) -> dict[str, np.generic]:
        """The parameters as arguments of a compiled program."""
        return dict(
            penalty=np.float32(self.repetition_penalty),
            temperature=np.float32(self.temperature or 1.0),
            top_k=np.int32(self.top_k or 2**31 - 1),
            top_p=np.float32(self.top_p),
            min_p=np.float32(self.min_p),
            seed=np.uint32(self.seed),
        )


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: Any) -> jax.Array:
    """Logits of seen tokens divided by the penalty, or multiplied if negative."""
    lower = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lower, logits_BV)


def kept(sorted_BV: jax.Array, top_k: Any, top_p: Any, min_p: Any) -> jax.Array:
    """How many of the most likely tokens remain, int32 [B], at least 1.

    Args:
      sorted_BV: logits in descending order, already divided by the temperature.
    """
    rank_1V = jnp.arange(sorted_BV.shape[-1], dtype=jnp.int32)[None]
    in_k_BV = jnp.broadcast_to(rank_1V < top_k, sorted_BV.shape)
    probs_BV = jax.nn.softmax(jnp.where(in_k_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    keep_BV = in_k_BV & (before_BV < top_p) & (probs_BV >= min_p * probs_BV[:, :1])
    return jnp.maximum(keep_BV.sum(axis=-1), 1)


def sample_token(
    logits_BV: jax.Array,
    seen_BV: jax.Array,
    values: dict[str, Any],
    step: Any,
    program: tuple[bool, bool, bool],
) -> jax.Array:
    """The next token of each row, int32 [B].

    A draw depends on the seed, the row and the number of the token in its row alone.
    """
    drawn, filtered, penalise = program
    if penalise:
        logits_BV = penalised(logits_BV, seen_BV, values["penalty"])
    if not drawn:
        # The first of the largest: two plain reductions, several times as fast on CPU
        # as argmax, which reduces pairs.
        peak_B1 = logits_BV.max(axis=-1, keepdims=True)
        ids_1V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)[None]
        return jnp.where(logits_BV == peak_B1, ids_1V, logits_BV.shape[-1]).min(axis=-1)
    logits_BV = logits_BV / values["temperature"]
    key = jax.random.fold_in(jax.random.key(values["seed"]), step)
    rows = jnp.arange(len(logits_BV), dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    draw = jax.vmap(jax.random.categorical)
    if not filtered:
        return draw(keys, logits_BV).astype(jnp.int32)
    sorted_BV, ids_BV = jax.lax.top_k(logits_BV, logits_BV.shape[-1])
    count_B = kept(sorted_BV, values["top_k"], values["top_p"], values["min_p"])
    rank_1V = jnp.arange(sorted_BV.shape[-1], dtype=jnp.int32)[None]
    sorted_BV = jnp.where(rank_1V < count_B[:, None], sorted_BV, -jnp.inf)
    return jnp.take_along_axis(ids_BV, draw(keys, sorted_BV)[:, None], axis=-1)[:, 0]
