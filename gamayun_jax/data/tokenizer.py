"""SentencePiece BPE that loses nothing, as a picklable wrapper.

Any Unicode text comes back from `decode(encode(text))` as it was, and the bytes
that its tokens spell add up to the text's own. So there is no normalisation, no
dummy prefix, and what has no piece is spelled by bytes. SentencePiece writes a
space as U+2581; a literal U+2581 in a text is therefore spelled by its three bytes.
(A table of the same pieces with real spaces in them and no normaliser, as the
Hugging Face export writes it, gives the same tokens.)
"""

from __future__ import annotations

import abc
import codecs
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from gamayun_jax.config import UserError
from gamayun_jax.data.files import atomic
from gamayun_jax.storage import as_path

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
FIXED_PIECES = ("\n", "\t")  # whole tokens of their own, never part of another
PROBE = "  a b\r\n\n\t\0 e\u0301 \u00e9 日本 \U0001f468\u200d\U0001f469 <s><0x0A> x  "


class Boundaries(NamedTuple):
    """The tokens by which a corpus's stream is parted into documents.

    A document is [start, ..., end] where the tokenizer writes a BOS; where it writes
    none, `start` and `end` are one token, which stands once between two documents:
    the target that ends one, and the context of the other's first token.
    """

    start: int
    end: int
    pad: int  # after the last document; may be `end`

    def pads(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """bool: which targets are padding; no document is empty."""
        padded = targets == self.pad
        return padded & (inputs == self.end) if self.pad == self.end else padded

    def tokens(self, record: np.ndarray) -> int:
        """Number of targets in int[N + 1] that are no padding."""
        inputs, targets = record[:-1], record[1:]
        return len(targets) - int(np.count_nonzero(self.pads(inputs, targets)))

    def documents(self, record: np.ndarray) -> int:
        """Number of documents that begin in the inputs of int[N + 1]."""
        inputs, targets = record[:-1], record[1:]
        begins = (inputs == self.start) & ~self.pads(inputs, targets)
        return int(np.count_nonzero(begins))


class TextCoder(abc.ABC):
    """A tokenizer for corpora, evaluation, generation and export.

    There are two: `Tokenizer` below, and `hf_tokenizer.HFTokenizer` for imported
    models. `model_tokenizer.open_tokenizer` gives the one that belongs to a model.

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
      boundaries: what parts documents in a corpus.
      fingerprint: SHA-256 of the tokenizer's file.
    """

    vocab_size: int
    bos_id: int | None
    prefix_ids: tuple[int, ...]
    start_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    boundaries: Boundaries
    fingerprint: str
    control_texts: tuple[str, ...] = ()  # texts that are control tokens in prompts
    _spelled: list[bytes]  # by each id; nothing by control tokens

    def encode(self, text: str) -> list[int]:
        """Token ids, without BOS and EOS; control tokens in the text are text."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them.

        Raises:
          UserError: a text with lone surrogates, which has no bytes.
        """

    @abc.abstractmethod
    def encode_prompt(self, text: str, literal: bool = False) -> list[int]:
        """Ids of a prompt as `AutoTokenizer` gives them: with what is written before a
        text, and control tokens in it read as such unless it is `literal`."""

    @abc.abstractmethod
    def token_text(self, i: int) -> str:
        """How the vocabulary writes an id, such as "<|endoftext|>"; "" for none."""

    def spell(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids spell; UserError if one is outside the vocabulary."""
        parts = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is outside 0..{self.vocab_size - 1}")
            parts.append(self._spelled[i])
        return b"".join(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these bytes; a character cut in the middle shows as U+FFFD."""
        return self.spell(ids).decode("utf-8", "replace")

    def byte_lengths(self) -> np.ndarray:
        """int32[V]: UTF-8 bytes that each id spells; 0 for control tokens."""
        return np.array([len(s) for s in self._spelled], np.int32)

    @abc.abstractmethod
    def write(self, folder: Path) -> None:
        """Files in `folder` from which the same tokenizer can be read."""


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


class Tokenizer(TextCoder):
    """A SentencePiece model, read from a file or from its bytes. Picklable.

    Raises:
      UserError: no such file, not a SentencePiece model, or one that loses text.
    """

    bos_id: int

    def __init__(self, model: str | Path | bytes):
        if isinstance(model, bytes):
            self.model, name = model, "tokenizer model"
        else:
            name = f"tokenizer {model}"
            try:
                self.model = as_path(model).read_bytes()
            except OSError as e:
                raise UserError(
                    f"{name} cannot be read ({e.strerror}): give a SentencePiece "
                    ".model file, or a folder with a tokenizer.json"
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
        self.prefix_ids, self.stop_ids = (self.bos_id,), (self.eos_id,)
        self.start_id = self.bos_id
        # A model without padding: with byte fallback, no text ever gives unk.
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else self.unk_id
        self.boundaries = Boundaries(self.bos_id, self.eos_id, self.pad_id)
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

    def encode_prompt(self, text: str, literal: bool = False) -> list[int]:
        """Token ids from BOS on. A text that spells a control token is text always, as
        in the folder that `export-hf` writes."""
        return [self.bos_id, *self.encode(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
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

    def token_text(self, i: int) -> str:
        return self.pieces[i]

    def write(self, folder: Path) -> None:
        self.save(folder / "tokenizer.model")

    def save(self, path: str | Path) -> None:
        """Write the model file, whole or not at all."""
        with atomic(Path(path)) as temporary:
            temporary.write_bytes(self.model)


def whole_characters(tokenizer: TextCoder) -> np.ndarray:
    """bool[V]: whether an id spells whole characters, not bytes within one."""

    def is_whole(i: int) -> bool:
        try:
            return bool(tokenizer.spell([i]).decode())
        except UnicodeDecodeError:
            return False

    return np.array([is_whole(i) for i in range(tokenizer.vocab_size)])
