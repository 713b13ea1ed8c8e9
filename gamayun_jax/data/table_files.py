"""Documents in Parquet files and in data sets of TensorFlow Datasets.

Damage costs only the row group or the record that it is in.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gamayun_jax.config import SourceConfig, UserError
from gamayun_jax.data.documents import (
    BadDocument,
    Damage,
    Document,
    Input,
    as_document,
    id_of,
    key_path,
    label,
    no_access,
    no_field,
    value_of,
)
from gamayun_jax.data.files import first_line


def expand_tfds(source: SourceConfig, pattern: str) -> Input:
    """The input that "tfds:FOLDER:SPLIT" stands for."""
    at = label(source.name)
    match = re.fullmatch(r"tfds:(.+):(\w+(?:\[[^\[\]]*\])?)", pattern)
    if not match:
        raise UserError(
            f"{at}: {pattern!r} is not tfds:FOLDER:SPLIT (FOLDER is the one with "
            "dataset_info.json)"
        )
    folder, split = match.groups()
    try:
        info = open_tfds(folder).info
        shards = [str(p) for p in info.splits[split].filepaths]
    except (ValueError, KeyError, OSError) as e:
        raise UserError(f"{at}: {pattern} cannot be opened: {first_line(e)}") from e
    if info.file_format.value != "array_record":
        raise UserError(
            f"{at}: {folder} is a data set in {info.file_format.value} format: convert "
            "it to array_record (tfds convert_format)"
        )
    described = [str(Path(folder, n)) for n in ("dataset_info.json", "features.json")]
    name, files = f"{Path(folder).name}:{split}", (*described, *shards)
    return Input(
        source.name, source.text_field, name, "tfds", folder, files, split,
        source.id_field,
    )  # fmt: skip


def open_tfds(folder: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder)


def read_parquet(item: Input) -> Iterator[Document | BadDocument]:
    """Rows group by group: where one is damaged, the groups after it are read."""
    import pyarrow
    import pyarrow.parquet

    broken = (pyarrow.ArrowException, OSError, ValueError)
    try:
        with open(item.path, "rb") as f:
            f.read(1)
        file = pyarrow.parquet.ParquetFile(item.path)
    except broken as e:
        if isinstance(e, OSError) and e.errno:
            raise no_access(item, e) from e
        yield Damage(item.name, 1, "corrupt file", first_line(e))
        return
    number, lost, damage = 0, 0, None
    with file:
        schema = file.schema_arrow
        names, path = list(schema.names), key_path(item.text_field)
        if item.text_field in names:
            path = (item.text_field,)
        if names.count(path[0]) > 1:
            raise UserError(
                f"{label(item.source)}: {item.path} has {names.count(path[0])} columns "
                f"named {path[0]!r}: rename one of them"
            )
        if not has_path(schema, path):
            columns = {f.name: dict.fromkeys(fields_of(f.type)) for f in schema}
            why = no_field(item.text_field, columns)
            for number in range(1, file.metadata.num_rows + 1):
                yield BadDocument(item.name, number, "no text", why)
            return
        id_path = key_path(item.id_field)
        if item.id_field in names:
            id_path = (item.id_field,)
        has_id = names.count(id_path[0]) == 1 and has_path(schema, id_path)
        wanted = [".".join(path), *([".".join(id_path)] if has_id else [])]
        for group in range(file.num_row_groups):
            begin = number
            end = begin + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(256, [group], wanted):
                    texts = column_values(batch.column(path[0]), path[1:])
                    ids: Iterable[Any] = itertools.repeat(None)
                    if has_id:
                        ids = column_values(batch.column(id_path[0]), id_path[1:])
                    for text, id in zip(texts, ids, strict=False):
                        number += 1
                        yield as_document(item, number, text, id)
                why = "fewer rows than the file says"
            except broken as e:
                if isinstance(e, OSError) and e.errno:  # it may be whole
                    raise no_access(item, e) from e
                why = first_line(e)
            if number < end:
                damage = damage or (number + 1, "corrupt file", why)
                lost += end - number
                number = end
    if damage:
        yield Damage(item.name, *damage, unread=lost)


def fields_of(kind: Any) -> list[str]:
    """Names inside a column's type; none if it is not a struct."""
    import pyarrow

    if not pyarrow.types.is_struct(kind):
        return []
    return [kind.field(i).name for i in range(kind.num_fields)]


def has_path(schema: Any, path: tuple[str, ...]) -> bool:
    if path[0] not in schema.names:
        return False
    kind = schema.field(path[0]).type
    for name in path[1:]:
        if fields_of(kind).count(name) != 1:
            return False
        kind = kind.field(name).type
    return True


def column_values(column: Any, path: tuple[str, ...] = ()) -> list[Any]:
    """A column's values, or those of a field inside of it; strings as their bytes.

    So a string that is not UTF-8 is a fault of its own row alone.
    """
    import pyarrow
    import pyarrow.compute

    if path:
        column = pyarrow.compute.struct_field(column, list(path))
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string(column.type) or types.is_string_view(column.type):
        column = column.cast(pyarrow.binary())
    elif types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException):
        return [scalar_value(scalar) for scalar in column]


def scalar_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return None  # a date, say, that Python has no value for


def read_tfds(item: Input) -> Iterator[Document | BadDocument]:
    """Rows shard by shard, since a data source keeps each shard open that it read."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from google.protobuf.message import DecodeError

    broken = (ValueError, KeyError, OSError, RuntimeError, IndexError, DecodeError)
    try:
        info = open_tfds(item.path).info
        shards = info.splits[item.split].file_instructions
    except broken as e:
        yield Damage(item.name, 1, "corrupt file", first_line(e))
        return
    number, lost, damage = 0, 0, None
    for shard in shards:
        records = ArrayRecordDataSource([shard])  # the one before is let go
        for i in range(shard.take):
            number += 1
            try:
                row = info.features.deserialize_example_np(records[i])
            except broken as e:
                damage = damage or (number, "corrupt file", first_line(e))
                lost += 1
                continue
            try:
                text = value_of(row, item.text_field)
            except KeyError:
                why = no_field(item.text_field, row)
                yield BadDocument(item.name, number, "no text", why)
                continue
            yield as_document(item, number, text, id_of(row, item.id_field))
    if damage:
        yield Damage(item.name, *damage, unread=lost)
