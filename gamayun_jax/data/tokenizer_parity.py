"""Shares of a tokenizer's training text that even out what languages cost it.

Of a held-out set whose units are parallel, half is tokenised after each training, and
the languages that take more tokens get more of the next training's text. The other
half is for reports (`gamayun tokenizer report`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gamayun_jax.config import TokenizerConfig, UserError
from gamayun_jax.data.fertility import gini
from gamayun_jax.data.heldout_sets import HeldoutSet, halves
from gamayun_jax.data.tokenizer import Tokenizer
from gamayun_jax.data.tokenizer_training import shares_of

POWER = 2.0  # of a language's cost, by which its share is multiplied


def tuning_texts(
    cfg: TokenizerConfig, heldout: Sequence[HeldoutSet], languages: Sequence[str]
) -> dict[str, list[str]]:
    """Language -> texts of the half of `cfg.parity_set` to tune on; none without one.

    Args:
      languages: that the tokenizer is trained on.

    Raises:
      UserError: no such set, or it is not parallel or lacks a language.
    """
    if not cfg.parity_set:
        return {}
    sets = {held.name: held for held in heldout}
    at = f"corpus.tokenizer.parity_set={cfg.parity_set!r}"
    if cfg.parity_set not in sets:
        raise UserError(
            f"{at} is none of corpus.heldout ({', '.join(sets) or 'empty'})"
        )
    held = sets[cfg.parity_set]
    if not held.parallel:
        raise UserError(f"{at} is not parallel ({held.unlike_ids}): choose one that is")
    if lacking := [k for k in languages if k not in held.units]:
        raise UserError(
            f"{at} has no {', '.join(lacking)}, and corpus.sources has: add units in "
            "these languages, or choose another set"
        )
    texts = {k: [t for _, t in halves(held.units[k])[0]] for k in languages}
    if not all(texts.values()):
        raise UserError(f"{at} has too few units to leave half of them: choose another")
    return texts


def even_out(
    train: Callable[[TokenizerConfig], Tokenizer],
    cfg: TokenizerConfig,
    texts: Mapping[str, Sequence[str]],
) -> tuple[Tokenizer, dict[str, Any]]:
    """The most even tokenizer of `cfg.parity_rounds` after the first, and the record.

    A round multiplies each language's share by the square of its tokens over the
    geometric mean of all. Nothing in it is random.

    Args:
      train: a tokenizer by a config, which differs from `cfg` in its shares.
      texts: by `tuning_texts`.

    Returns:
      The tokenizer with the least Gini coefficient of the languages' tokens on `texts`,
      and what the manifest keeps: the set, each round's shares, tokens and coefficient,
      and the round that was taken.
    """
    shares = shares_of(cfg, list(texts))
    rounds: list[dict[str, Any]] = []
    made: list[Tokenizer] = []
    taken = 0
    for number in range(cfg.parity_rounds + 1):
        tokenizer = train(replace(cfg, shares=shares) if number else cfg)
        tokens = {k: sum(map(len, map(tokenizer.encode, v))) for k, v in texts.items()}
        uneven = gini(list(tokens.values()))
        rounds.append({"shares": dict(shares), "tokens": tokens, "gini": uneven})
        if not made or uneven < rounds[taken]["gini"]:
            made, taken = [tokenizer], number
        mean = float(np.exp(np.mean(np.log(list(tokens.values())))))
        new = {k: share * (tokens[k] / mean) ** POWER for k, share in shares.items()}
        shares = {k: share / sum(new.values()) for k, share in new.items()}
    record = {"set": cfg.parity_set, "rounds": rounds, "taken": taken}
    return made[0], record
