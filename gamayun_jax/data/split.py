"""Documents held out by a hash of their ids."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import zstandard

from gamayun_jax.config import SourceConfig, UserError
from gamayun_jax.data.documents import BadDocument, Document
from gamayun_jax.data.files import new_folder
from gamayun_jax.data.inputs import read_documents


def is_held_out(key: str, share: float, seed: int) -> bool:
    """Whether the document of an id is held out: of so large a share of all ids."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(source: SourceConfig, out: Path, share: float, seed: int) -> dict[str, int]:
    """Write OUT/train.jsonl.zst and OUT/heldout.jsonl, each line an id and a text.

    A document without an id is known by the hash of its text.

    Returns:
      The number of documents for training, held out, and those that cannot be read by
      their reasons.

    Raises:
      UserError: OUT exists already, no such file, nothing was held out, or everything.
    """
    counts = {"training": 0, "held out": 0}
    with new_folder(out) as folder:
        with (
            open(folder / "train.jsonl.zst", "wb") as f,
            zstandard.ZstdCompressor(level=6).stream_writer(f) as packed,
            io.TextIOWrapper(packed, encoding="utf-8") as train,
            open(folder / "heldout.jsonl", "w", encoding="utf-8") as heldout,
        ):
            for document in read_documents(source):
                if isinstance(document, BadDocument):
                    reason = f"left out, {document.reason}"
                    counts[reason] = counts.get(reason, 0) + 1
                    continue
                held = is_held_out(key := key_of(document), share, seed)
                line = {"id": key, "text": document.text}
                print(
                    json.dumps(line, ensure_ascii=False),
                    file=heldout if held else train,
                )
                counts["held out" if held else "training"] += 1
        usable = counts["training"] + counts["held out"]
        if not usable:
            told = "; ".join(f"{n:,} {k}" for k, n in counts.items() if n)
            raise UserError(
                f"{', '.join(source.files)}: no document can be used "
                f"({told or 'empty'}): name the text's field by --text-field, or give "
                "other files"
            )
        if usable in counts.values():
            raise UserError(
                f"--share {share:g} of {usable} documents leaves "
                f"{counts['training']} to train on and {counts['held out']} held out: "
                "give another share, or more documents"
            )
    return counts


def key_of(document: Document) -> str:
    """A document's id; else the hash of its text."""
    if document.id is not None:
        return document.id
    return hashlib.sha256(document.text.encode("utf-8", "replace")).hexdigest()[:16]
