"""Token weights: how much each token counts in a stage's objective, as two tables.

A token's weight is the product of its language's and its id's, so that a scheme is
G + V numbers, whatever the size of the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gamayun_jax.config import Config, TokenWeightConfig, UserError
from gamayun_jax.data.corpus import Corpus

Tables = tuple[np.ndarray, np.ndarray]


def make_token_weights(
    cfg: TokenWeightConfig,
    languages: Sequence[str],
    vocab_size: int,
    language_shares: Mapping[str, float],
    byte_lengths: np.ndarray | None = None,
    bytes_per_token: Mapping[str, float] | None = None,
) -> Tables:
    """Tables of a scheme: float32 [G] by language, float32 [V] by token id.

    Their product has mean 1 under the mixture, so that the learning rate keeps its
    meaning whatever the scheme. With q_l the share of language l among the tokens:

      none          w = 1
      static        w_l proportional to weights[l]
      bytes         w_v = bytes that id v spells / their mean, so that a language that
                    its tokenizer cuts finely is not over-counted; 1 for EOS
      target_share  w_l = weights[l] / q_l, with `weights` made to sum to 1: the
                    objective follows the given shares while sampling follows q

    Args:
      language_shares: q, language -> share of the tokens of the mixture; sums to 1.
      byte_lengths: int [V], for `bytes`.
      bytes_per_token: language -> mean bytes of the tokens that spell text (so without
        BOS and EOS) in the corpus, for `bytes`.

    Raises:
      UserError: target_share gives weight to a language that is never sampled.
    """
    q = np.array([language_shares.get(name, 0.0) for name in languages], np.float64)
    by_language = np.ones(len(languages))
    by_token = np.ones(vocab_size)
    if cfg.scheme == "static":
        by_language = np.array([cfg.weights[name] for name in languages], np.float64)
        mean = float(q @ by_language)
        if mean <= 0:
            raise UserError(
                "token_weights.weights are 0 for every language of the mixture: no "
                "token would train"
            )
        by_language /= mean
    elif cfg.scheme == "target_share":
        target = np.array([cfg.weights[name] for name in languages], np.float64)
        for name, share, sampled in zip(languages, target, q, strict=True):
            if share > 0 and sampled == 0:
                raise UserError(
                    f"token_weights.weights gives {name!r} {share:g} of the objective, "
                    "but the mixture never samples it: give it a share or weight 0"
                )
        if not target.sum() > 0:
            raise UserError(
                "token_weights.weights are 0 for every language: no token would train"
            )
        sampled = q > 0
        by_language = np.where(sampled, target / np.where(sampled, q, 1.0), 0.0)
        by_language /= float(q @ by_language)
    elif cfg.scheme == "bytes":
        if byte_lengths is None or bytes_per_token is None:
            raise UserError("token_weights.scheme='bytes' needs the corpus's tokenizer")
        mean = sum(
            q_l * bytes_per_token.get(name, 0.0)
            for name, q_l in zip(languages, q, strict=True)
        )
        # EOS spells nothing but must be learnt: it has the mean weight.
        by_token = np.where(byte_lengths > 0, byte_lengths / mean, 1.0)
    return by_language.astype(np.float32), by_token.astype(np.float32)


def objective_shares(
    tables: Tables, cfg: Config, corpus: Corpus, shares: Mapping[str, float]
) -> dict[str, float]:
    """Share of the objective that each language is to have by a stage's weights.

    Args:
      tables: of the stage, by `build_token_weights`.
      shares: source -> share of the tokens of the stage's mixture.

    Returns:
      language -> sum over its sources of share x mean weight of its tokens, of which
      BOS is no target; made to sum to 1.
    """
    by_language, by_token = tables
    weights = np.array(by_token, np.float64)
    start, end, _ = corpus.tokenizer().boundaries
    if start != end:  # else it is a target at the end of each document
        weights[start] = 0.0
    found = dict.fromkeys(cfg.languages, 0.0)
    for name, share in shares.items():
        source = corpus.sources[name]
        if share:
            counts = corpus.token_counts(name)
            mean = float(counts @ weights[: len(counts)]) / source.tokens
            own = by_language[cfg.languages.index(source.language)]
            found[source.language] += share * float(own) * mean
    total = sum(found.values())
    return {k: v / total if total else 0.0 for k, v in found.items()}


def build_token_weights(
    cfg: Config, corpus: Corpus, language_shares: Mapping[str, float], stage: int
) -> Tables:
    """A stage's tables, from the corpus's bytes and the shares of its mixture.

    Raises:
      UserError: see make_token_weights; names the stage.
    """
    size: dict[str, list[int]] = {name: [0, 0] for name in cfg.languages}
    for name, source in corpus.sources.items():
        size[source.language][0] += source.bytes
        # Without what parts documents, which spells nothing.
        size[source.language][1] += corpus.text_tokens(name)
    byte_lengths = np.zeros(cfg.model.vocab_size, np.int32)
    known = corpus.tokenizer().byte_lengths()
    byte_lengths[: len(known)] = known
    try:
        return make_token_weights(
            cfg.stages[stage].token_weights,
            cfg.languages,
            cfg.model.vocab_size,
            language_shares,
            byte_lengths,
            {name: b / t for name, (b, t) in size.items() if t},
        )
    except UserError as e:
        raise UserError(f"stages.{cfg.stages[stage].name}.{e}") from e
