"""The tokenizer of a folder or a model, whatever it is stored as."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gamayun_jax.config import AnyPath, ModelConfig, UserError
from gamayun_jax.data.hf_tokenizer import SETTINGS, HFTokenizer
from gamayun_jax.data.tokenizer import TextCoder, Tokenizer
from gamayun_jax.storage import as_path


def open_tokenizer(
    path: AnyPath,
    fingerprint: str | None,
    corpus: AnyPath | None = None,
    given: AnyPath | None = None,
) -> Tokenizer | HFTokenizer:
    """The tokenizer that a model was trained with, ours or an imported one.

    Args:
      path: the model: run folder, one checkpoint, or a Hugging Face folder.
      fingerprint: of the tokenizer, from the checkpoint's meta.
      corpus: the corpus it was trained on, which is looked into last.
      given: look only here: a folder or a .model file.

    Raises:
      UserError: it cannot be found, or only others are there.
    """
    path = as_path(path).absolute()
    if given is not None:
        places = [as_path(given)]
    elif fingerprint is None:
        raise UserError(
            f"{path} was imported without a tokenizer: put its tokenizer.json beside "
            "its config.json and import it again"
        )
    else:
        inside = path.name.isdigit() or path.name == "checkpoints"
        places = [path, *(path.parents[:2] if inside else ())]
        places += [as_path(corpus)] if corpus else []
    other = None
    for place in places:
        for tokenizer in tokenizers_in(place):
            if fingerprint in (None, tokenizer.fingerprint):
                return tokenizer
            other = other or (place, tokenizer.fingerprint)
    if other and fingerprint:
        raise UserError(
            f"{other[0]} has another tokenizer ({other[1][:12]}) than {path} was "
            f"trained with ({fingerprint[:12]}): give the right one"
        )
    raise UserError(
        f"there is no tokenizer in {' or '.join(map(str, places))}: copy the run's "
        "tokenizer.model (or tokenizer.json) there"
    )


def tokenizers_in(path: Path) -> Iterator[Tokenizer | HFTokenizer]:
    """Those of a folder (tokenizer.json first), or the one of a .model file."""
    if path.is_file():
        yield Tokenizer(path)
    if (path / "tokenizer.json").is_file():
        yield HFTokenizer(path)
    if (path / "tokenizer.model").is_file():
        yield Tokenizer(path / "tokenizer.model")


def check_vocabulary(tokenizer: TextCoder, model: ModelConfig, where: Path) -> None:
    """Raise UserError if the tokenizer has ids that the model has no row for.

    The other way round is common: tables are padded to a round number.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, but the model has "
            f"vocab_size={model.vocab_size}: they do not belong together"
        )


def given_tokenizer(path: Path) -> Tokenizer | HFTokenizer:
    """The tokenizer that `corpus.tokenizer.model` names: a .model file, or a folder
    with a tokenizer.json or one of our tokenizer.model.

    An exported folder of ours has both; the SentencePiece model is the one that
    corpora are made with.

    Raises:
      UserError: there is none, or it cannot part documents.
    """
    try:
        return Tokenizer(model_file(path))
    except UserError:  # none, or another's, which loses text
        if not (path / "tokenizer.json").is_file():
            raise
    tokenizer = HFTokenizer(path)
    if len(tokenizer.prefix_ids) > 1:
        raise UserError(
            f"{path}: its tokenizer writes {len(tokenizer.prefix_ids)} tokens before a "
            "text, documents of a corpus begin with one: correct the post-processor "
            "of tokenizer.json"
        )
    for i in {*tokenizer.boundaries}:
        name = tokenizer.token_text(i)
        if i in tokenizer.encode(name):
            raise UserError(
                f"{path}: a text that has {name!r} in it is read as that token, which "
                'parts documents: set its "special" to true in tokenizer.json'
            )
    return tokenizer


def model_file(path: Path) -> Path:
    """The SentencePiece model that a path is or, being a folder, may have."""
    return path / "tokenizer.model" if path.is_dir() else path


def folder_tokenizer(folder: Path) -> Tokenizer | HFTokenizer:
    """The tokenizer of a corpus folder, made once of the same files in this process
    and shared."""
    names = ("tokenizer.json", *SETTINGS)
    if (folder / names[0]).is_file():
        paths = [folder / name for name in names if (folder / name).is_file()]
        return _made(HFTokenizer, folder, *(path.read_bytes() for path in paths))
    path = folder / "tokenizer.model"
    try:
        return _made(Tokenizer, path, path.read_bytes())
    except OSError:
        return Tokenizer(path)  # raises the error that says why


@functools.lru_cache(maxsize=4)
def _made(kind: Callable[[Path], Any], path: Path, *contents: bytes) -> Any:
    return kind(path)
