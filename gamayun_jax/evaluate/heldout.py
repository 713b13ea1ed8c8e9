"""Held-out evaluation by language: loss, bits per byte, parity, token accuracy.

A unit (paragraph, clause) is scored as the tokens of its text after BOS; the end of
the text is not scored, so that bits are the length of a code of exactly these bytes,
whatever a model's convention for ends. Units are packed into rows, each its own
segment; what is longer than a window is cut into windows that overlap by half, every
token scored once. A window is a row as in training, with one compiled shape for all
sets and languages; or of a given length, that of the model for one that was not trained
here, with rows no longer than they need to be.

Shape suffixes: B rows, T length, D model, V vocabulary, U units of a set in a language;
N units of all sets and languages.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gamayun_jax.config import Config, UserError
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.heldout_sets import subsample_units, text_key, xz_bytes
from gamayun_jax.data.model_tokenizer import check_vocabulary
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.evaluate.scoring import (
    Window,
    batches,
    check_window,
    pack,
    sum_over_batches,
    token_scores,
    windows,
)
from gamayun_jax.evaluate.standard_errors import (
    compression,
    mean_error,
    pooled_ratio,
    ratio_residuals,
    root,
)
from gamayun_jax.model.transformer import Transformer, unembedding

Items = dict[str, list[dict[str, Any]]]  # file's name -> its items


@dataclass(frozen=True)
class HeldoutTexts:
    """The units of a set in one language."""

    ids: list[str]
    place: slice  # among the units of all sets and languages
    sizes: np.ndarray  # int64 [U], bytes
    tokens: np.ndarray  # int64 [U]
    truncated: int  # units longer than a window
    baselines: dict[str, float | None]


class HeldoutEvaluator:
    """Evaluates parameters on all held-out sets of a corpus (recording.Evaluator).

    Must be used inside `jax.set_mesh(mesh)` and the logical-axis rules. Everything is
    tokenised and packed once.

    Args:
      languages: evaluate these only.
      tokenizer: the model's; default: the corpus's.
      window: most tokens that the model sees before a predicted one; default: rows as
        in training, or the model's own window where it was not trained here.

    Raises:
      UserError: a language that no held-out set has, a corpus's tokenizer with more
        ids than the model, a window that the model does not have, a parallel set whose
        languages have different units.
    """

    name = "sets"

    def __init__(
        self,
        cfg: Config,
        corpus: Corpus,
        mesh: Mesh,
        model: Transformer,
        languages: Sequence[str] | None = None,
        tokenizer: TextCoder | None = None,
        window: int | None = None,
    ):
        self.every_steps = cfg.evaluation.every_steps
        self._mesh = mesh
        if tokenizer is None:
            tokenizer = corpus.tokenizer()
            check_vocabulary(tokenizer, cfg.model, corpus.folder)
        sets = languages_of_sets(corpus, languages)
        if window is None and not cfg.data.corpus:
            window = cfg.model.max_seq_len
        check_window(window, cfg.model)
        self.texts, parts = read_texts(
            cfg, corpus, sets, tokenizer, window or cfg.data.seq_len
        )
        self.parallel = {k: corpus.manifest["heldout"][k]["parallel"] for k in sets}
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batches = packed_batches(cfg, parts, window, ways)
        self._count = sum(
            len(texts.ids) for by_k in self.texts.values() for texts in by_k.values()
        )
        self._add_scores = functools.partial(add_scores, model, cfg.compute.loss_chunk)

    def unit_sums(self, params: Any) -> np.ndarray:
        """float64 [N, 2]: nats and right tokens of each unit."""
        shape = (self._count, 2)
        sums = sum_over_batches(
            self._add_scores, params, self._batches, shape, self._mesh
        )
        return sums.astype(np.float64)

    def run(self, params: Any) -> tuple[dict[str, Any], Items]:
        """Set -> its results (see `set_results`), and the units of each set under the
        name of their file, "heldout-NAME"."""
        sums = self.unit_sums(params)
        results = {
            name: set_results(texts, sums, self.parallel[name])
            for name, texts in self.texts.items()
        }
        items = {
            f"heldout-{name}": [
                item for k, of in texts.items() for item in text_items(k, of, sums)
            ]
            for name, texts in self.texts.items()
        }
        return results, items


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def add_scores(model, loss_chunk, params, sums_N2, batch):
    """Adds the nats and right tokens of a batch to the sums of its units.

    All evaluators of a process share the program.
    """
    x_BTD = model.apply(
        {"params": params}, batch["inputs"], batch["positions"], batch["segment_ids"]
    )
    scores = token_scores(x_BTD, unembedding(params), batch["targets"], loss_chunk)
    flat = (jnp.stack(scores, axis=-1) * batch["loss_mask"][..., None]).reshape(-1, 2)
    units = batch["unit"].reshape(-1)
    sums_N2 += jax.ops.segment_sum(flat, units, len(sums_N2))
    return jax.lax.with_sharding_constraint(sums_N2, PartitionSpec())


# --- texts ------------------------------------------------------------------------


def languages_of_sets(
    corpus: Corpus, languages: Sequence[str] | None
) -> dict[str, list[str]]:
    """Set -> its languages, of the wanted ones; UserError for one that no set has."""
    sets = corpus.heldout_sets()
    known = {k for of_set in sets.values() for k in of_set}
    for name in languages or ():
        if name not in known:
            raise UserError(
                f"no held-out set has language {name!r}; there are: "
                f"{', '.join(sorted(known)) or 'none'}"
            )
    return {
        name: [k for k in of_set if not languages or k in languages]
        for name, of_set in sets.items()
    }


def read_texts(
    cfg: Config,
    corpus: Corpus,
    sets: Mapping[str, Sequence[str]],
    tokenizer: TextCoder,
    length: int,
) -> tuple[dict[str, dict[str, HeldoutTexts]], list[Window]]:
    """Set -> language -> its units, and all units as windows of at most `length`."""
    # The frequencies of a corpus are of its own tokens.
    same = tokenizer.fingerprint == corpus.tokenizer().fingerprint
    unigram = unigram_bits(corpus) if same else {}
    texts_of: dict[str, dict[str, HeldoutTexts]] = {name: {} for name in sets}
    parts: list[Window] = []
    first = 0
    for name, languages in sets.items():
        parallel = corpus.manifest["heldout"][name]["parallel"]
        expected: list[str] = []
        for language in languages:
            units = corpus.heldout(name, language)
            units = subsample_units(units, cfg.evaluation.max_units)
            ids, texts = [i for i, _ in units], [text for _, text in units]
            expected = expected or ids
            if parallel and ids != expected:
                raise UserError(
                    f"held-out set {name!r} is parallel, but {language} and "
                    f"{languages[0]} have different units: build the corpus again"
                )
            tokens = [tokenizer.encode(text) for text in texts]
            for n, unit in enumerate(tokens, first):
                parts += windows(n, unit, tokenizer.start_id, length)
            texts_of[name][language] = HeldoutTexts(
                ids,
                slice(first, first + len(ids)),
                np.array([len(text.encode()) for text in texts], np.int64),
                np.array([len(unit) for unit in tokens], np.int64),
                sum(len(unit) > length for unit in tokens),
                baselines(
                    texts,
                    tokens,
                    cfg.model.vocab_size,
                    unigram.get(language),
                    corpus.packed(name, language),
                ),
            )
            first += len(ids)
    return texts_of, parts


def packed_batches(
    cfg: Config, parts: Sequence[Window], window: int | None, ways: int
) -> list[dict[str, np.ndarray]]:
    """Batches of rows as in training; with a window, rows as long as a part needs.

    Args:
      ways: devices that the rows of a batch are divided over.
    """
    by_length: dict[int, list[Window]] = {}
    for part in parts:
        T = cfg.data.seq_len
        while window and len(part.inputs) > T:
            T *= 2
        by_length.setdefault(T, []).append(part)
    made = []
    for T, group in sorted(by_length.items()):
        rows = pack(group, T)
        B = max(cfg.evaluation.batch_size * cfg.data.seq_len // T, 1)
        if window:
            B = min(B, len(rows["inputs"]))
        made += batches(rows, -(-B // ways) * ways)
    return made


# --- results ----------------------------------------------------------------------


def text_items(
    language: str, texts: HeldoutTexts, sums: np.ndarray
) -> list[dict[str, Any]]:
    """The units of a set in a language: id, language, bits, bytes and tokens of each.

    Args:
      sums: what `unit_sums` gives.
    """
    bits_U = sums[texts.place, 0] / math.log(2)
    each = zip(texts.ids, bits_U, texts.sizes, texts.tokens, strict=True)
    return [
        {
            "id": key,
            "language": language,
            "bits": float(bits),
            "bytes": int(size),
            "tokens": int(tokens),
        }
        for key, bits, size, tokens in each
    ]


def language_results(texts: HeldoutTexts, sums: np.ndarray) -> dict[str, Any]:
    """A language's part of `set_results`."""
    bits_U, hits_U = sums[texts.place, 0] / math.log(2), sums[texts.place, 1]
    units, tokens = len(texts.ids), int(texts.tokens.sum())
    several = units > 1
    return {
        "units": units,
        "tokens": tokens,
        **compression(bits_U, texts.sizes),
        "bits_se": float(bits_U.std(ddof=1) * math.sqrt(units)) if several else None,
        "parity": None,
        "nll": float(sums[texts.place, 0].sum() / tokens),
        "accuracy": float(hits_U.sum() / tokens),
        "truncated": texts.truncated,
        "baselines": texts.baselines,
    }


def set_results(
    texts: Mapping[str, HeldoutTexts], sums: np.ndarray, parallel: bool
) -> dict[str, Any]:
    """{"parallel", "languages": {...}, "micro", "macro"} of a set.

    Per language: units, tokens, bytes, bits, bits_per_byte, bits_per_unit, parity (bits
    per parallel unit over English's), nll (nats per token), accuracy, standard errors
    `*_se` (None where one unit tells none), `truncated`, baselines.

    Args:
      sums: what `unit_sums` gives.
    """
    # A language without a token to score is a gap, not a zero.
    texts = {k: of for k, of in texts.items() if of.tokens.any()}
    languages = {k: language_results(of, sums) for k, of in texts.items()}
    if parallel and "en" in languages:
        english = languages["en"]["bits_per_unit"]
        for row in languages.values():
            row["parity"] = row["bits_per_unit"] / english
    result = {"parallel": parallel, "languages": languages}
    if not languages:
        return result
    bits = [sums[of.place, 0] / math.log(2) for of in texts.values()]
    sizes = [of.sizes for of in texts.values()]
    rows = list(languages.values())
    if parallel:  # one sample of units, each in all languages
        value, error = pooled_ratio([np.sum(bits, 0)], [np.sum(sizes, 0)])
        # Parallel units are correlated across languages: add residuals, then square.
        residuals = [ratio_residuals(b, s) for b, s in zip(bits, sizes, strict=True)]
        several = len(residuals[0]) > 1
        macro_error = root(np.mean(residuals, axis=0)) if several else None
    else:
        value, error = pooled_ratio(bits, sizes)
        macro_error = mean_error([r["bits_per_byte_se"] for r in rows])
    hits = sum(float(sums[of.place, 1].sum()) for of in texts.values())
    result["micro"] = {
        "bits_per_byte": value,
        "bits_per_byte_se": error,
        "accuracy": hits / sum(r["tokens"] for r in rows),
    }
    result["macro"] = {
        "bits_per_byte": float(np.mean([r["bits_per_byte"] for r in rows])),
        "bits_per_byte_se": macro_error,
        "accuracy": float(np.mean([r["accuracy"] for r in rows])),
    }
    return result


# --- what needs no network --------------------------------------------------------


def unigram_bits(corpus: Corpus) -> dict[str, np.ndarray]:
    """Language -> bits of each id by its add-one smoothed frequency, float64 [V]."""
    totals: dict[str, np.ndarray] = {}
    tokenizer = corpus.tokenizer()
    special = [*tokenizer.boundaries]
    for name, source in corpus.sources.items():
        counts = corpus.token_counts(name).astype(np.float64)
        # What parts documents is never a target here.
        counts[special] = 0
        totals[source.language] = totals.get(source.language, 0) + counts
    return {
        k: -np.log2((counts + 1) / (counts.sum() + len(counts)))
        for k, counts in totals.items()
    }


def baselines(
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    vocab_size: int,
    unigram: np.ndarray | None,
    packed: Mapping[str, int],
) -> dict[str, float | None]:
    """Bits per byte of what needs no network: uniform tokens, the training corpus's
    token frequencies, and `xz -9e` of the held-out units joined by newlines.

    Args:
      packed: what `xz` makes of some texts, as a corpus's manifest has it.
    """
    text = "\n".join(texts).encode()
    size = sum(len(t.encode()) for t in texts)
    if not size:
        return dict(uniform=None, unigram=None, xz=None)
    tokens = sum(map(len, ids))
    bits = None
    if unigram is not None:
        bits = float(sum(unigram[np.array(i, np.int64)].sum() for i in ids)) / size
    return {
        "uniform": tokens * math.log2(vocab_size) / size,
        "unigram": bits,
        "xz": 8 * (packed.get(text_key(text)) or xz_bytes(text)) / len(text),
    }
