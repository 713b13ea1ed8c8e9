"""Input files of a corpus's sources: finding them, and reading their documents."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator

from gamayun_jax.config import SourceConfig, UserError
from gamayun_jax.data.documents import BadDocument, Document, Input, label
from gamayun_jax.data.table_files import expand_tfds, read_parquet, read_tfds
from gamayun_jax.data.text_files import read_lines


def read_documents(source: SourceConfig) -> Iterator[Document | BadDocument]:
    """All documents of a source, uncleaned, with bad ones and damage among them.

    Raises:
      UserError: a path or glob without files, an unknown kind of file, no permission.
    """
    for item in expand(source):
        yield from read_input(item)


def expand(source: SourceConfig) -> list[Input]:
    """The input files of a source, globs in sorted order, each file once."""
    at = label(source.name)
    kinds: dict[str, str] = {}  # by path
    inputs: list[Input] = []
    for pattern in source.files:
        if pattern.startswith("tfds:"):
            inputs.append(expand_tfds(source, pattern))
            continue
        paths = sorted(glob.glob(pattern, recursive=True))
        if os.path.exists(pattern):  # a name may hold glob characters
            paths = [pattern]
        if not paths:
            here = at == source.name  # the name of a field in the config
            where = at if here else f"corpus.sources[{source.name!r}].files"
            raise UserError(f"{at}: no file matches {pattern!r}: correct {where}")
        for path in paths:
            match = re.search(r"\.(jsonl|json|ndjson|txt|parquet)(\.gz|\.zst)?$", path)
            if not match or (match[1] == "parquet" and match[2]):
                raise UserError(
                    f"{at}: {path} is of no kind that is read: give .jsonl, .json or "
                    ".ndjson (an object a line), .txt (all of them .gz and .zst too), "
                    ".parquet, or tfds:FOLDER:SPLIT"
                )
            if not os.path.isfile(path):
                raise UserError(f"{at}: {path} is not a file: give {path}/*")
            if re.search("[\ud800-\udfff]", path):  # the manifest lists it
                raise UserError(f"{at}: the name of {path!a} is not UTF-8: rename it")
            kinds[path] = match[1] if match[1] in ("txt", "parquet") else "jsonl"
    if not kinds and not inputs:
        raise UserError(f"{at} has no files: give at least one")
    whole = {path: os.path.abspath(path) for path in kinds}
    shared = os.path.commonpath([*map(os.path.dirname, whole.values())] or ["."])
    for path, kind in kinds.items():
        name = os.path.relpath(whole[path], shared)
        files = (path,)
        inputs.append(
            Input(
                source.name, source.text_field, name, kind, path, files,
                id_field=source.id_field,
            )
        )  # fmt: skip
    return inputs


def read_input(item: Input) -> Iterator[Document | BadDocument]:
    """The documents of one input file, in its order.

    The unreadable part of a damaged file is one `Damage`, after all other documents.
    """
    if item.kind == "parquet":
        return read_parquet(item)
    return read_tfds(item) if item.kind == "tfds" else read_lines(item)
