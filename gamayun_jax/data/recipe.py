"""The recipe of a corpus: checks of its config, and all that decides its bytes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures.thread import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gamayun_jax.config import Config, CorpusConfig, UserError
from gamayun_jax.data.cleaning import CLEANING
from gamayun_jax.data.documents import Input
from gamayun_jax.data.files import file_sha256
from gamayun_jax.data.heldout_sets import HeldoutSet
from gamayun_jax.data.hf_tokenizer import HFTokenizer
from gamayun_jax.data.model_tokenizer import given_tokenizer, model_file

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def check_recipe(cfg: Config) -> None:
    """Raise UserError for a corpus config that no corpus can be built from."""
    corpus = cfg.corpus
    names = [s.name for s in corpus.sources]
    if not names:
        raise UserError("corpus.sources is empty: a corpus needs at least one source")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"corpus.sources has {twice!r} twice: give all files in one")
    for name in names:
        parts = name.split("/")
        if len(parts) != 2 or not all(NAME.fullmatch(p) for p in parts):
            raise UserError(
                f"corpus.sources: {name!r} is not <language>/<domain> in letters, "
                "digits, - and _"
            )
    heldout = {h.name: h for h in corpus.heldout}
    if len(heldout) < len(corpus.heldout):
        raise UserError(
            "corpus.heldout: two sets have the same name; give each its own"
        )
    for name in heldout:
        if not NAME.fullmatch(name):
            raise UserError(f"corpus.heldout: {name!r} is not letters, digits, - and _")
    used = {n.split("/")[0] for n in names}
    for language in sorted(used | {k for h in corpus.heldout for k in h.files}):
        if language not in cfg.languages:
            raise UserError(
                f"corpus has language {language!r}, which is not in languages "
                f"({', '.join(cfg.languages)}): add it there"
            )
    if corpus.record_tokens % cfg.data.seq_len:
        raise UserError(
            f"corpus.record_tokens={corpus.record_tokens} is not a multiple of "
            f"data.seq_len={cfg.data.seq_len}: make it one"
        )


def check_model(cfg: CorpusConfig) -> None:
    """Raise UserError if a ready tokenizer is not one that the config describes."""
    if not cfg.tokenizer.model:
        return
    size = given_tokenizer(Path(cfg.tokenizer.model)).vocab_size
    if cfg.tokenizer.vocab_size not in (0, size):
        raise UserError(
            f"tokenizer {cfg.tokenizer.model} has {size} pieces, but "
            f"corpus.tokenizer.vocab_size={cfg.tokenizer.vocab_size}: set it to that, "
            "or leave it out"
        )


def describe_inputs(files: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Name, hash and size of each (name, path), for recipe and manifest."""

    def describe(file: tuple[str, str]) -> dict[str, Any]:
        name, path = file
        try:
            size, sha = os.path.getsize(path), file_sha256(path)
        except OSError as e:
            raise UserError(f"input {path} cannot be read: {e.strerror or e}") from e
        return {"file": name, "sha256": sha, "bytes": size}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(describe, files))


def recipe_of(
    cfg: Config, inputs: Sequence[Input], heldout: Sequence[HeldoutSet]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that decides the bytes of the corpus, and the description of its inputs.

    Names of folders are not part of it: a copied corpus is the same corpus. Neither
    are `max_bad_share` and `on_damaged_file`: they decide if there is a corpus, not
    which.
    """
    corpus, model = cfg.corpus, cfg.corpus.tokenizer.model
    files = [
        (f"{item.name}/{Path(path).name}" if item.kind == "tfds" else item.name, path)
        for item in inputs
        for path in item.files
    ]
    others = [path for spec in corpus.heldout for path in spec.files.values()]
    imported = given_tokenizer(Path(model)) if model else None
    if isinstance(imported, HFTokenizer):
        # What is written of it, so that a folder and its import make one corpus.
        written = {k: text.encode() for k, text in imported.contents().items()}
    else:
        written = {}
        others += [str(model_file(Path(model)))] if model else []
    files += [(Path(path).name, path) for path in others]
    described = describe_inputs(files)
    described += [
        {"file": k, "sha256": hashlib.sha256(v).hexdigest(), "bytes": len(v)}
        for k, v in written.items()
    ]
    recipe = {
        "format": 1,  # of this recipe, whatever shards look like
        "cleaning": CLEANING,
        "languages": list(cfg.languages),
        "sources": [
            [i.source, i.text_field, i.kind, i.split, i.name, len(i.files)]
            for i in inputs
        ],
        "heldout": [[h.name, h.parallel, list(h.units)] for h in heldout],
        "held_out_copies": corpus.held_out_copies,
        "tokenizer": [
            corpus.tokenizer.vocab_size,
            None if model else sorted(corpus.tokenizer.shares.items()),
            None if model else corpus.tokenizer.sample_bytes,
        ],
        "record_tokens": corpus.record_tokens,
        "shard_bytes": corpus.shard_bytes,
        "min_chars": corpus.min_chars,
        "inputs": described,
    }
    if corpus.tokenizer.parity_set:
        search = corpus.tokenizer.parity_set, corpus.tokenizer.parity_rounds
        recipe["parity"] = list(search)
    if corpus.parallel_documents != "keep":  # else a recipe of a former release stays
        fields = [[s.name, s.id_field] for s in corpus.sources]
        recipe["disjoint"] = [corpus.disjoint_seed, fields]
    return recipe, described
