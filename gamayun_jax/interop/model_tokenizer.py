"""The tokenizer that belongs to a model, whatever it is stored as."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from gamayun_jax.config import ModelConfig, UserError
from gamayun_jax.data.tokenizer import Tokenizer
from gamayun_jax.interop.hf_tokenizer import HFTokenizer, read_object, to_tokenizers


def open_tokenizer(
    path: Path,
    fingerprint: str | None,
    corpus: str | Path | None = None,
    given: Path | None = None,
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
    path = Path(path).absolute()
    if given is not None:
        places = [Path(given)]
    elif fingerprint is None:
        raise UserError(
            f"{path} was imported without a tokenizer: put its tokenizer.json beside "
            "its config.json and import it again"
        )
    else:
        inside = path.name.isdigit() or path.name == "checkpoints"
        places = [path, *(path.parents[:2] if inside else ())]
        places += [Path(corpus)] if corpus else []
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


def check_vocabulary(
    tokenizer: Tokenizer | HFTokenizer, model: ModelConfig, where: Path
) -> None:
    """Raise UserError if the tokenizer has ids that the model has no row for.

    The other way round is common: tables are padded to a round number.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, but the model has "
            f"vocab_size={model.vocab_size}: they do not belong together"
        )


def fingerprint_of(folder: Path, tokenizer: HFTokenizer | None) -> str | None:
    """What says which tokenizer a folder's model has.

    A folder that `export_hf` wrote has ours twice: it is the SentencePiece model that
    corpora are made with, as long as tokenizer.json still says the same.
    """
    path = folder / "tokenizer.model"
    if tokenizer is None or not path.is_file():
        return None if tokenizer is None else tokenizer.fingerprint
    try:
        ours = Tokenizer(path)
        same = json.loads(to_tokenizers(ours).to_str())
    except UserError:  # another's, which loses text
        return tokenizer.fingerprint
    equal = same == read_object(folder / "tokenizer.json")
    return (ours if equal else tokenizer).fingerprint
