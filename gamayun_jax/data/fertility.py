"""Fertility: how many tokens a text costs by language, and how unevenly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.heldout_sets import halves
from gamayun_jax.data.tokenizer import TextCoder, whole_characters
from gamayun_jax.tables import Table

# A word, roughly, also where words are not separated: one character of Han or kana,
# or a run of other letters and digits.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u9fff]+")


def report(
    tokenizer: TextCoder, texts_by_language: Mapping[str, Iterable[str]]
) -> list[dict[str, Any]]:
    """One row per language: how much text a token carries, tokens per word, and the
    share of tokens that are parts of a character (`byte_pieces`)."""
    rows = []
    whole = whole_characters(tokenizer)
    for language, texts in texts_by_language.items():
        size = characters = words = tokens = parts = 0
        for text in texts:
            ids = tokenizer.encode(text)
            size += len(text.encode())
            characters += len(text)
            words += len(WORD.findall(text))
            tokens += len(ids)
            parts += len(ids) - int(whole[ids].sum())
        rows.append(
            {
                "language": language,
                "bytes": size,
                "tokens": tokens,
                "bytes_per_token": size / max(tokens, 1),
                "characters_per_token": characters / max(tokens, 1),
                "tokens_per_word": tokens / max(words, 1),
                "byte_pieces": parts / max(tokens, 1),
            }
        )
    return rows


def format_report(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `report` as a table."""
    heads = ("language", "bytes", "tokens", "bytes/token", "chars/token", "tokens/word")
    ratios = ("bytes_per_token", "characters_per_token", "tokens_per_word")
    body = []
    for row in rows:
        sizes = (f"{row[k]:,}" for k in ("bytes", "tokens"))
        cells = [row["language"], *sizes, *(f"{row[k]:.2f}" for k in ratios)]
        body.append([*cells, f"{row['byte_pieces']:.1%}"])
    return Table((*heads, "byte pieces"), body).text()


def gini(costs: Sequence[float]) -> float:
    """Gini coefficient: 0 where all are equal, towards 1 where one has everything.

    The mean absolute difference of all pairs over twice the mean.
    """
    values = np.asarray(costs, np.float64)
    return float(np.abs(values[:, None] - values).mean() / (2 * values.mean()))


def compare(corpus: Corpus, tokenizers: Mapping[str, TextCoder]) -> str:
    """Tables of each tokenizer and of all side by side, on a corpus's held-out sets.

    On a parallel set, where every language says the same, the tokens of the languages
    are what it costs them: their Gini coefficient says how unevenly. Of the set that
    the corpus's tokenizer was made even on, the units that it was not are reported.
    """
    told = []
    tuned_on = corpus.manifest["tokenizer"].get("parity", {}).get("set")
    for name, languages in corpus.heldout_sets().items():
        units = {k: corpus.heldout(name, k) for k in languages}
        part = ""
        if name == tuned_on:
            units = {k: halves(v)[1] for k, v in units.items()}
            part = f", {len(units[languages[0]])} units that no shares were tuned on"
        texts = {k: [text for _, text in v] for k, v in units.items()}
        reports = {k: report(t, texts) for k, t in tokenizers.items()}
        parallel = corpus.manifest["heldout"][name]["parallel"] and len(languages) > 1
        for title, rows in reports.items():
            line = f"held-out set {name}{part}, tokenizer {title}"
            if parallel:
                uneven = gini([row["tokens"] for row in rows])
                line += f": Gini coefficient of the languages' tokens {uneven:.3f}"
            told += [line, format_report(rows)]
        if len(reports) > 1:
            heads = [f"{title}: {what}" for what in ("bytes/token", "byte pieces")
                     for title in reports]  # fmt: skip
            body = [
                [
                    language,
                    *(f"{rows[i]['bytes_per_token']:.2f}" for rows in reports.values()),
                    *(f"{rows[i]['byte_pieces']:.1%}" for rows in reports.values()),
                ]
                for i, language in enumerate(languages)
            ]
            told.append(Table(("language", *heads), body).text(width=1000))
    return "\n".join(told)
