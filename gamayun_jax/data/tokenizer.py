"""SentencePiece BPE that loses nothing: training, a picklable wrapper, fertility.

Any Unicode text comes back from `decode(encode(text))` as it was, and the bytes
that its tokens spell add up to the text's own. So there is no normalisation, no
dummy prefix, and what has no piece is spelled by bytes. SentencePiece writes a
space as U+2581; a literal U+2581 in a text is therefore spelled by its three bytes.
(A table of the same pieces with real spaces in them and no normaliser, as the
Hugging Face export writes it, gives the same tokens.)
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece

from gamayun_jax.config import TokenizerConfig, UserError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
PAD, BOS, EOS, UNK = 0, 1, 2, 3
FIXED_PIECES = ("\n", "\t")  # whole tokens of their own, never part of another
RESERVED = 4 + 256 + len(FIXED_PIECES) + 1  # ids that no text has to earn (1: space)
# What a piece may not cross: fixed pieces, and characters that SentencePiece keeps
# for itself (it would skip the whole sentence without a word).
BREAKS = re.compile("[\0\n\t\u2047\u2581\u2585]")
# Characters in one training sentence. Positions are 16 bits in the BPE trainer.
MAX_SENTENCE = 1000
CHARACTER_COVERAGE = 0.9995
MAX_REPEATS = 4  # of a language that has too little text for its share
PROBE = "  a b\r\n\n\t\0 e\u0301 \u00e9 日本 \U0001f468\u200d\U0001f469 <s><0x0A> x  "


class TextCoder(Protocol):
    """What evaluation, generation and export need of a tokenizer.

    Two classes have it: `Tokenizer` below, and `hf_tokenizer.HFTokenizer` for imported
    models. `hf.open_tokenizer` gives the one that belongs to a model.

    Attributes:
      vocab_size: ids are 0..vocab_size - 1; the model's table may have more rows.
      bos_id: the token named BOS; None where there is no such token (Qwen).
      prefix_ids: what the tokenizer writes before every text: BOS or nothing, as a
        rule. That a token is named BOS does not mean that it is written.
      start_id: context of a text's first token: the last of `prefix_ids`, or else BOS,
        or else what ends a document.
      eos_id: ends a text; the first of `stop_ids`.
      stop_ids: any of them ends a generated text.
      pad_id: what rows are filled up with.
      fingerprint: SHA-256 of the tokenizer's file.
    """

    vocab_size: int
    prefix_ids: tuple[int, ...]
    start_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    fingerprint: str

    @property
    def bos_id(self) -> int | None: ...
    def encode(self, text: str) -> list[int]:
        """Token ids, without BOS and EOS; control tokens in the text are text."""
        ...

    def encode_prompt(self, text: str, literal: bool = False) -> list[int]:
        """Ids of a prompt as `AutoTokenizer` gives them: with what is written before a
        text, and control tokens in it read as such unless it is `literal`."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without BOS and EOS."""
        ...

    def spell(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids spell; control tokens spell nothing."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these bytes; a character cut in the middle shows as U+FFFD."""
        ...

    def byte_lengths(self) -> np.ndarray:
        """int32[V]: UTF-8 bytes that each id spells; 0 for control tokens."""
        ...

    def write(self, folder: Path) -> None:
        """Files in `folder` from which the same tokenizer can be read."""
        ...


class TextStream:
    """Decodes a text whose ids come in parts; a part never ends within a character.

    Ids that only the model's padded table has spell nothing.
    """

    def __init__(self, tokenizer: TextCoder):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, ids: Iterable[int], last: bool = False) -> str:
        """The text that `ids` add; with `last`, also of a character left unfinished."""
        known = [i for i in ids if i < self._tokenizer.vocab_size]
        return self._decoder.decode(self._tokenizer.spell(known), last)


class Tokenizer:
    """A SentencePiece model, read from a file or from its bytes. Picklable.

    Raises:
      UserError: no such file, not a SentencePiece model, or one that loses text.
    """

    def __init__(self, model: str | Path | bytes):
        if isinstance(model, bytes):
            self.model, name = model, "tokenizer model"
        else:
            name = f"tokenizer {model}"
            try:
                self.model = Path(model).read_bytes()
            except OSError as e:
                raise UserError(
                    f"{name} cannot be read ({e.strerror}): give a SentencePiece "
                    ".model file"
                ) from e
        self.fingerprint = hashlib.sha256(self.model).hexdigest()
        self._load(name)

    def _load(self, name: str) -> None:
        broken = UserError(
            f"{name} is not a complete SentencePiece model: make it again with "
            "`gamayun tokenizer train`, or copy it again"
        )
        if not self.model:
            raise broken
        try:
            sp = sentencepiece.SentencePieceProcessor(model_proto=self.model)
            self.vocab_size = sp.vocab_size()
        except (RuntimeError, ValueError, TypeError) as e:
            raise broken from e
        self._sp = sp
        self.bos_id, self.eos_id, self.unk_id = sp.bos_id(), sp.eos_id(), sp.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{name} has no BOS or no EOS piece: both are needed")
        self.prefix_ids: tuple[int, ...] = (self.bos_id,)
        self.start_id: int = self.bos_id
        self.stop_ids: tuple[int, ...] = (self.eos_id,)
        # A model without padding: with byte fallback, no text ever gives unk.
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else self.unk_id
        self.pieces = [sp.id_to_piece(i) for i in range(self.vocab_size)]
        self._spelled = [self._bytes_of(i) for i in range(self.vocab_size)]
        mark = SPACE.encode()
        byte_ids = {s: i for i, s in enumerate(self._spelled) if sp.is_byte(i)}
        lossless = len(byte_ids) == 256
        if lossless:
            self._mark_ids = [byte_ids[mark[i : i + 1]] for i in range(len(mark))]
            ids = self.encode(PROBE)
            spelled = sum(len(self._spelled[i]) for i in ids)
            lossless = self.decode(ids) == PROBE and spelled == len(PROBE.encode())
        if not lossless:
            raise UserError(
                f"{name} does not give back every text: it needs byte_fallback, the "
                "identity normaliser, no dummy prefix and all its spaces, as "
                "`gamayun tokenizer train` makes it"
            )

    def _bytes_of(self, i: int) -> bytes:
        if self._sp.is_byte(i):
            return bytes([int(self.pieces[i][3:5], 16)])
        if self._sp.is_control(i) or self._sp.is_unknown(i) or self._sp.is_unused(i):
            return b""
        return self.pieces[i].replace(SPACE, " ").encode()

    def __getstate__(self) -> bytes:
        return self.model

    def __setstate__(self, model: bytes) -> None:
        Tokenizer.__init__(self, model)

    def encode(self, text: str) -> list[int]:
        """Token ids, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str, literal: bool = False) -> list[int]:
        """Token ids from BOS on. A text that spells a control token is text always, as
        in the folder that `export-hf` writes."""
        return [self.bos_id, *self.encode(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without BOS and EOS.

        Raises:
          UserError: a text with lone surrogates, which has no bytes.
        """
        try:
            if not any(SPACE in text for text in texts):
                return self._sp.encode(list(texts), num_threads=1)
            return [self._encode_marked(text) for text in texts]
        except (UnicodeError, TypeError) as e:
            raise UserError(f"a text to tokenise is not valid Unicode: {e}") from e

    def _encode_marked(self, text: str) -> list[int]:
        parts = self._sp.encode(text.split(SPACE), num_threads=1)
        ids = list(parts[0])
        for part in parts[1:]:
            ids += self._mark_ids
            ids += part
        return ids

    def spell(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids spell; those of no text (BOS, EOS, padding) spell none."""
        return join_bytes(self._spelled, ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these bytes; a character cut in the middle shows as U+FFFD."""
        return self.spell(ids).decode("utf-8", "replace")

    def byte_lengths(self) -> np.ndarray:
        """int32[V]: UTF-8 bytes that each id spells; 0 for BOS, EOS, padding, unk."""
        return np.array([len(s) for s in self._spelled], np.int32)

    def write(self, folder: Path) -> None:
        """Files in `folder` from which the same tokenizer can be read."""
        self.save(folder / "tokenizer.model")

    def save(self, path: str | Path) -> None:
        """Write the model file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as f:
            f.write(self.model)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)


def read_tokenizer(path: Path) -> Tokenizer:
    """`Tokenizer(path)`, made once of the same file in this process and shared."""
    try:
        model = path.read_bytes()
    except OSError:
        return Tokenizer(path)  # which tells what is wrong
    return _made(path, model)


@functools.lru_cache(maxsize=4)
def _made(path: Path, model: bytes) -> Tokenizer:
    return Tokenizer(path)


def join_bytes(spelled: Sequence[bytes], ids: Iterable[int]) -> bytes:
    """What ids spell one after the other; UserError if one is outside the table."""
    parts = []
    for i in ids:
        if not 0 <= i < len(spelled):
            raise UserError(f"token id {i} is outside 0..{len(spelled) - 1}")
        parts.append(spelled[i])
    return b"".join(parts)


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
    if not (math.isfinite(total) and total > 0 and min(shares.values()) >= 0):
        raise UserError(
            f"corpus.tokenizer.shares={shares}: give numbers of at least 0, one of "
            "them greater"
        )
    return {language: shares[language] / total for language in languages}


def train(
    texts_by_language: Mapping[str, Iterable[str]], cfg: TokenizerConfig, out: Path
) -> Tokenizer:
    """Train on the beginning of each language's texts; write the model to `out`.

    Each language gives its share of `cfg.sample_bytes`. If there is less text than
    that, the shares are kept, by repeating the short ones at most MAX_REPEATS times.
    The same input gives the same file, byte for byte, on any machine.

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


# A word, roughly, also where words are not separated: one character of Han or kana,
# or a run of other letters and digits.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u9fff]+")


def report(
    tokenizer: Tokenizer, texts_by_language: Mapping[str, Iterable[str]]
) -> list[dict[str, Any]]:
    """One row per language: how much text a token carries, and tokens per word."""
    rows = []
    for language, texts in texts_by_language.items():
        size = characters = words = tokens = 0
        for text in texts:
            size += len(text.encode())
            characters += len(text)
            words += len(WORD.findall(text))
            tokens += len(tokenizer.encode(text))
        rows.append(
            {
                "language": language,
                "bytes": size,
                "tokens": tokens,
                "bytes_per_token": size / max(tokens, 1),
                "characters_per_token": characters / max(tokens, 1),
                "tokens_per_word": tokens / max(words, 1),
            }
        )
    return rows


def format_report(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `report` as a table."""
    lines = ["language      bytes    tokens  bytes/token  chars/token  tokens/word"]
    for row in rows:
        lines.append(
            f"{row['language']:8} {row['bytes']:10,} {row['tokens']:9,} "
            f"{row['bytes_per_token']:12.2f} {row['characters_per_token']:12.2f} "
            f"{row['tokens_per_word']:12.2f}"
        )
    return "\n".join(lines)
