"""The part of a configuration that is a corpus's recipe; used through config.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gamayun_jax.fields import (
    Count,
    LocalPath,
    Part,
    Share,
    UserError,
    Whole,
)


@dataclass(frozen=True)
class SourceConfig:
    """One named body of documents in one language and one domain.

    `name` is "<language>/<domain>". `files` are paths or globs of .jsonl, .txt
    (one document a line) or .parquet files, .gz and .zst included, or
    "tfds:<folder of a data set in array_record format>:<split>". .json and .ndjson
    are read as .jsonl is. `text_field` may be inside another: "translation.ru", and so
    may `id_field`, by which translations know each other (`parallel_documents`).
    """

    name: str  # language/domain
    files: tuple[LocalPath, ...]  # paths or globs
    text_field: str = "text"  # of a row
    id_field: str = "id"  # of a row
    tokens: Whole = 0  # about; for `gamayun curriculum` before there is a corpus

    @property
    def language(self) -> str:
        return self.name.split("/")[0]


@dataclass(frozen=True)
class HeldoutConfig:
    """A held-out set: language -> file. If `parallel`, line i means the same in all.

    None: parallel if the units of all files have the same ids in the same order, and
    lengths that go together as those of translations do. Give True for files without
    ids, False for texts that share ids by chance.
    """

    name: str  # of the set
    files: Mapping[str, LocalPath]  # by language
    parallel: bool | None = None  # none: see above


@dataclass(frozen=True)
class TokenizerConfig:
    """SentencePiece training, or a ready tokenizer.

    `model`: a SentencePiece .model of ours, or a folder with the tokenizer of an
    imported model: Hugging Face's, or a run folder. `shares`: language -> share of the
    training bytes. `parity_set`: from there on, shares are looked for with which the
    languages take more nearly the same number of tokens on half of the units of this
    held-out set, which has to be parallel; each round is a training.
    """

    vocab_size: Whole = 0  # 0: the ready tokenizer's
    shares: Mapping[str, Share] = field(default_factory=dict)  # empty: equal shares
    sample_bytes: Count = 200_000_000  # text given to the trainer, all languages
    model: LocalPath = ""  # path of a ready tokenizer: nothing is trained
    parity_set: str = ""  # held-out set to even out costs on; empty: shares stay
    parity_rounds: Count = 6  # trainings of that search, after the first

    def __post_init__(self):
        if self.model and self.parity_set:
            raise UserError(
                f"corpus.tokenizer.parity_set={self.parity_set!r} is for training, and "
                f"corpus.tokenizer.model={self.model!r} is ready: leave one out"
            )
        if not self.vocab_size and not self.model:
            raise UserError(
                "corpus.tokenizer.vocab_size=0: give the size of the vocabulary to "
                "train, or a ready tokenizer (corpus.tokenizer.model)"
            )


@dataclass(frozen=True)
class CorpusConfig:
    """The recipe of a tokenised corpus: what `gamayun corpus build` makes."""

    sources: tuple[SourceConfig, ...] = ()  # training text
    heldout: tuple[HeldoutConfig, ...] = ()  # evaluated, and never trained on
    # Trained on the sources, or a ready one.
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(4096))
    record_tokens: Count = 4096  # tokens per record; a multiple of data.seq_len
    shard_bytes: Count = 256_000_000  # text per input chunk, so per shard
    min_chars: Whole = 1  # of a document
    max_bad_share: Part = 0.01  # a larger share of unreadable documents is an error
    # Documents that hold a held-out text (data/contamination.py): remove, or report.
    # A document that equals one is always removed.
    held_out_copies: Literal["remove", "report"] = "remove"
    # Documents with the same id in several languages: keep, or keep each id in one of
    # them only (disjoint), chosen by a hash with this seed; data/selection.py.
    parallel_documents: Literal["keep", "disjoint"] = "keep"
    disjoint_seed: Whole = 0  # of that choice
    # Files that end early or are damaged within: stop, or keep_readable (the build,
    # `corpus inspect` and the manifest list the losses).
    on_damaged_file: Literal["stop", "keep_readable"] = "stop"
