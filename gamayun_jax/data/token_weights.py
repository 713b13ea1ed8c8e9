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
    content_bytes: Mapping[str, float] | None = None,
) -> Tables:
    """Tables of a scheme: float32 [G] by language, float32 [V] by token id.

    Their product has mean 1 under the mixture, so that the learning rate keeps its
    meaning whatever the scheme. With q_l the share of language l among the tokens:

      none          w = 1
      static        w_l proportional to weights[l]
      bytes         w_v = bytes that id v spells / their mean, so that a language that
                    its tokenizer cuts finely is not over-counted; 1 for EOS
      parity        bytes, with w_l proportional to 1 / content_bytes[l], so that a
                    language's share of the objective is its share of what is said, and
                    not of the bytes of its script; w_l for EOS
      target_share  w_l = weights[l] / q_l, with `weights` made to sum to 1: the
                    objective follows the given shares while sampling follows q

    Args:
      language_shares: q, language -> share of the tokens of the mixture; sums to 1.
      byte_lengths: int [V], for `bytes`.
      bytes_per_token: language -> mean bytes of the tokens that spell text (so without
        BOS and EOS) in the corpus, for `bytes` and `parity`.
      content_bytes: language -> bytes that it takes to say what one of a language of
        reference says, for `parity`.

    Raises:
      UserError: target_share gives weight to a language that is never sampled; parity
        lacks the content of one that is.
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
    elif cfg.scheme in ("bytes", "parity"):
        if byte_lengths is None or bytes_per_token is None:
            raise UserError(
                f"token_weights.scheme={cfg.scheme!r} needs the corpus's tokenizer"
            )
        if cfg.scheme == "parity":
            by_language = parity_weights(languages, q, content_bytes or {})
        sizes = np.array([bytes_per_token.get(name, 0.0) for name in languages])
        mean = float(q @ (by_language * sizes))
        # EOS spells nothing but must be learnt: it has the mean weight.
        by_token = np.where(byte_lengths > 0, byte_lengths / mean, 1.0)
    return by_language.astype(np.float32), by_token.astype(np.float32)


def parity_weights(
    languages: Sequence[str], q: np.ndarray, content_bytes: Mapping[str, float]
) -> np.ndarray:
    """float64 [G], proportional to 1 / content_bytes, of mean 1 under the shares q.

    Raises:
      UserError: the content of a language with a share is not known.
    """
    sampled = [k for k, q_l in zip(languages, q, strict=True) if q_l]
    if lacking := [k for k in sampled if k not in content_bytes]:
        raise UserError(
            "token_weights.scheme='parity' needs parallel text, of which there is none "
            f"for {', '.join(lacking)}: add these languages to a held-out set whose "
            "units are parallel (corpus.heldout), or choose another scheme"
        )
    weights = np.array([1.0 / content_bytes.get(k, np.inf) for k in languages])
    return weights / float(q @ weights)


def content_bytes_of(corpus: Corpus, languages: Sequence[str]) -> dict[str, float]:
    """Language -> bytes of its parallel held-out units, over those of the same units in
    English (or, where no set has English, in the first language that one has).

    Only languages with parallel units; of all sets whose units are parallel, as the
    manifest has their sizes.
    """
    sets = [
        h["languages"] for h in corpus.manifest["heldout"].values() if h["parallel"]
    ]
    known = [name for name in ("en", *languages) if any(name in s for s in sets)]
    found = {}
    for name in languages:
        both = [s for s in sets if name in s and known[0] in s]
        if both:
            own, same = (sum(s[k]["bytes"] for s in both) for k in (name, known[0]))
            found[name] = own / same
    return found


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
            content_bytes_of(corpus, cfg.languages),
        )
    except UserError as e:
        raise UserError(f"stages.{cfg.stages[stage].name}.{e}") from e
