"""Training a tokenizer on a share of each language's text."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece

from gamayun_jax.config import TokenizerConfig, UserError
from gamayun_jax.data.tokenizer import FIXED_PIECES, Tokenizer

PAD, BOS, EOS, UNK = 0, 1, 2, 3
RESERVED = 4 + 256 + len(FIXED_PIECES) + 1  # ids that no text has to earn (1: space)
# What a piece may not cross: fixed pieces, and characters that SentencePiece keeps
# for itself (it would skip the whole sentence without a word).
BREAKS = re.compile("[\0\n\t\u2047\u2581\u2585]")
# Characters in one training sentence. Positions are 16 bits in the BPE trainer.
MAX_SENTENCE = 1000
CHARACTER_COVERAGE = 0.9995
MAX_REPEATS = 4  # of a language that has too little text for its share


def shares_of(cfg: TokenizerConfig, languages: Sequence[str]) -> dict[str, float]:
    """Language -> share of the training bytes, adding up to 1."""
    shares = dict(cfg.shares) or dict.fromkeys(languages, 1.0)
    for what, names in (
        ("names {!r}, of which there is no text", sorted(set(shares) - set(languages))),
        ("lacks {!r} (0 leaves it out)", sorted(set(languages) - set(shares))),
    ):
        if names:
            raise UserError(
                f"corpus.tokenizer.shares {what.format(names[0])}: give the languages "
                f"{', '.join(languages)}"
            )
    total = sum(shares.values())
    if not total:
        raise UserError("corpus.tokenizer.shares are all 0: there is no text to take")
    return {language: shares[language] / total for language in languages}


def train(
    texts_by_language: Mapping[str, Iterable[str]],
    cfg: TokenizerConfig,
    out: Path | None = None,
) -> Tokenizer:
    """Train on the beginning of each language's texts; write the model to `out`.

    Each language gives its share of `cfg.sample_bytes`. If there is less text than
    that, the shares are kept, by repeating the short ones at most MAX_REPEATS times.
    The same input gives the same model, byte for byte, on any machine.

    Raises:
      UserError: no text, or a vocabulary too small or too large for it.
    """
    shares = shares_of(cfg, list(texts_by_language))
    samples: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for language, texts in texts_by_language.items():
        budget = int(shares[language] * cfg.sample_bytes)
        samples[language], sizes[language] = take_bytes(texts, budget)
    total = min(cfg.sample_bytes, sum(sizes.values()))
    repeated: list[str] = []
    for language, sample in samples.items():
        left = min(int(shares[language] * total), MAX_REPEATS * sizes[language])
        while left > 0:
            part, size = take_bytes(sample, left)
            repeated += part
            left -= max(size, 1)
    sentences = [s for text in repeated for s in BREAKS.split(text) if s]
    if cfg.vocab_size <= RESERVED:
        raise UserError(
            f"corpus.tokenizer.vocab_size={cfg.vocab_size} is too small: {RESERVED} "
            "pieces are bytes and control tokens; give at least a few hundred more"
        )
    if not sentences:
        raise UserError("the tokenizer has no text to learn from: check the sources")
    room = cfg.vocab_size - RESERVED
    model = fit(sentences, cfg.vocab_size, max(room // 4, 1), CHARACTER_COVERAGE)
    if isinstance(model, int):  # little text: its rare characters have a place too
        model = fit(sentences, cfg.vocab_size, room, 1.0)
    if isinstance(model, int):
        raise UserError(
            f"corpus.tokenizer.vocab_size={cfg.vocab_size} is too large for the text "
            f"({sum(map(len, sentences)):,} characters): at most {model}, or give "
            "more text"
        )
    tokenizer = Tokenizer(model)
    if out is not None:
        tokenizer.save(out)
    return tokenizer


def fit(
    sentences: Sequence[str], vocab_size: int, characters: int, coverage: float
) -> bytes | int:
    """The trained model's bytes, or the largest vocabulary that the sentences allow."""
    rare = rare_characters(sentences, characters, coverage)
    if rare:
        drop = str.maketrans(dict.fromkeys(rare, "\n"))
        sentences = [s for x in sentences for s in x.translate(drop).split("\n") if s]
    # One space, so that the space is a piece even if no text has one.
    pieces = [" ", *(s for x in sentences for s in cut_sentence(x))]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,  # runs of spaces: indented code
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=1.0,  # rare characters are gone already
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            user_defined_symbols=list(FIXED_PIECES),
            max_sentence_length=8 * MAX_SENTENCE,  # bytes; nothing is longer
            # Stored in the model, so not the machine's own number. It has no
            # measurable effect on the time of BPE training.
            num_threads=16,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as e:
        limit = re.search(r"too high .*<= (\d+)", str(e))
        if limit and RESERVED <= int(limit[1]) < vocab_size:
            return int(limit[1])
        raise UserError(f"the tokenizer could not be trained: {e}") from e
    return model.getvalue()


def take_bytes(texts: Iterable[str], budget: int) -> tuple[list[str], int]:
    """The beginning of `texts`, at most `budget` bytes of it, and its size in bytes."""
    taken: list[str] = []
    size = 0
    if budget > 0:
        for text in texts:
            encoded = text.encode()
            if size + len(encoded) >= budget:
                text = encoded[: budget - size].decode("utf-8", "ignore")
                return [*taken, text], size + len(text.encode())
            taken.append(text)
            size += len(encoded)
    return taken, size


def rare_characters(
    sentences: Iterable[str], characters: int, coverage: float
) -> list[str]:
    """Characters left to byte fallback: beyond the coverage, or too many.

    `train` gives at most a quarter of the pieces to single characters. In a small
    vocabulary for Chinese, Japanese and Korean the coverage alone would spend half of
    it on characters seen a few times (5 % more tokens over 12 languages at 4,096).
    """
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence)
    ordered = sorted(counts, key=lambda c: (-counts[c], c))
    limit = coverage * counts.total()
    covered = kept = 0
    while kept < len(ordered) and covered < limit:
        covered += counts[ordered[kept]]
        kept += 1
    return ordered[min(kept, characters) :]


def cut_sentence(sentence: str) -> Iterable[str]:
    """Parts of at most MAX_SENTENCE characters, cut before a space if there is one."""
    begin = 0
    while len(sentence) - begin > MAX_SENTENCE:
        end = sentence.rfind(" ", begin + 1, begin + MAX_SENTENCE)
        end = end if end > begin else begin + MAX_SENTENCE
        yield sentence[begin:end]
        begin = end
    yield sentence[begin:]
