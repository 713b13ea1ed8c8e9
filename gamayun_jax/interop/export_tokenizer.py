"""The export of our own tokenizer, as a tokenizer.json that gives the same ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from gamayun_jax.config import UserError
from gamayun_jax.data import files
from gamayun_jax.data.hf_tokenizer import HFTokenizer
from gamayun_jax.data.tokenizer import FIXED_PIECES, SPACE, Tokenizer


def is_period(piece: str, n: int) -> bool:
    """Whether each character of `piece` comes again `n` characters later."""
    return piece[n:] == piece[: len(piece) - n]


def merges_of(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges that build these (piece, score), best first.

    SentencePiece takes the merge whose result scores best and, of equal ones, the
    leftmost; a merge list ranks pairs. Two pairs with the same result can overlap only
    where a piece repeats itself with a period: the pair whose left part is the period
    is then the left one, so it must come first.
    """
    known = {piece for piece, _ in pieces}
    merges = []
    for piece, _ in sorted(pieces, key=lambda p: -p[1]):
        splits = [n for n in range(1, len(piece)) if {piece[:n], piece[n:]} <= known]
        splits.sort(key=lambda n: (not is_period(piece, n), -n))
        merges += [(piece[:n], piece[n:]) for n in splits]
    return merges


def to_tokenizers(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same pieces as a BPE of the `tokenizers` library; spaces are spaces.

    SentencePiece writes a space as U+2581. Here pieces have real spaces and there is
    no normaliser, so that a literal U+2581 is spelled by its bytes, as our tokenizer
    does it.

    Raises:
      UserError: not a BPE model.
    """
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    vocab: dict[str, int] = {}
    pieces: list[tuple[str, float]] = []
    special: list[str] = []
    for i, piece in enumerate(tokenizer.pieces):
        control = sp.is_control(i) or sp.is_unknown(i)
        if sp.is_unused(i):
            raise UserError("the tokenizer has unused pieces: it cannot be exported")
        if not control and not sp.is_byte(i):
            piece = piece.replace(SPACE, " ")
            if piece not in FIXED_PIECES:
                pieces.append((piece, sp.get_score(i)))
        special += [piece] if control else []
        vocab[piece] = i
    model = models.BPE(
        vocab=vocab,
        merges=merges_of(pieces),
        unk_token=tokenizer.pieces[tokenizer.unk_id],
        byte_fallback=True,
    )
    out = tokenizers.Tokenizer(model)
    out.add_special_tokens([AddedToken(s, normalized=False) for s in special])
    out.add_tokens([AddedToken(s, normalized=False) for s in FIXED_PIECES])
    bos = tokenizer.pieces[tokenizer.start_id]
    out.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A $B",
        special_tokens=[(bos, tokenizer.start_id)],
    )
    out.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return out


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_len: int) -> None:
    """tokenizer.model, tokenizer.json and tokenizer_config.json.

    `AutoTokenizer` begins texts with BOS, as the model was trained; without special
    tokens its ids are ours.
    """
    tokenizer.save(folder / "tokenizer.model")
    files.write_text(folder / "tokenizer.json", to_tokenizers(tokenizer).to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,  # read by llama.cpp's converter
        # A text that spells <s> is not the token <s>.
        "split_special_tokens": True,
        **{
            f"{kind}_token": tokenizer.pieces[getattr(tokenizer, f"{kind}_id")]
            for kind in ("bos", "eos", "pad", "unk")
        },
    }
    files.write_json(folder / "tokenizer_config.json", config)


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
    equal = same == files.read_json(folder / "tokenizer.json")
    return (ours if equal else tokenizer).fingerprint
