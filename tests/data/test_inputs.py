"""Documents of every kind of file; bad and damaged ones are told, not guessed."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import (
    build,
    documents_of,
    make_config,
    one_source,
    some_texts,
    write_jsonl,
)

from gamayun_jax import config as c
from gamayun_jax.config import UserError
from gamayun_jax.data import build as corpus_build
from gamayun_jax.data import (
    documents,
    inputs,
    inspect_corpus,
    text_files,
)

TEXTS = ["первый", "second\nline", "三", " \t 4 "]


def read(*files, **fields):
    return list(
        inputs.read_documents(
            c.SourceConfig("en/web", tuple(map(str, files)), **fields)
        )
    )


@pytest.mark.parametrize("end", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_jsonl(tmp_path, end):
    rows = [{"id": i, "body": t} for i, t in enumerate(TEXTS)]
    found = read(write_jsonl(tmp_path / f"a.{end}", rows), text_field="body")
    assert [d.text for d in found] == TEXTS
    assert [(d.id, d.line, d.file) for d in found][2] == ("2", 3, f"a.{end}")


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbfa\r\n\r\n b\n", b"a\n\n b"])
def test_txt(tmp_path, raw):
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(raw) + gzip.compress(b"c"))
    frames = zstandard.compress(raw) + zstandard.compress(b"c")
    (tmp_path / "c.txt.zst").write_bytes(frames)
    last = "b" if raw.endswith(b"\n") else "bc"
    tail = ["c"] if raw.endswith(b"\n") else []
    assert [d.text for d in read(tmp_path / "a.txt")] == ["a", " b"]
    for name in ("b.txt.gz", "c.txt.zst"):  # members and frames follow each other
        assert [d.text for d in read(tmp_path / name)] == ["a", f" {last}", *tail]


def test_parquet(tmp_path):
    table = pyarrow.table({"text": [*TEXTS, None], "id": list("abcde"), "x": [1] * 5})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [d.text for d in found[:4]] == TEXTS
    assert found[1].id == "b"
    assert found[4].reason == "no text"
    assert [b.reason for b in read(tmp_path / "a.parquet", text_field="no")] == [
        "no text"
    ] * 5
    (number,) = {b.reason for b in read(tmp_path / "a.parquet", text_field="x")}
    assert number == "text is not a string"


def nested_rows():
    return [
        {"t": {"ru": f"строка {i}", "en": f"row {i}"}, "id": f"u{i}"} for i in range(3)
    ]


@pytest.mark.parametrize("field", ["t.ru", "t/ru"])
@pytest.mark.parametrize("end", ["json", "parquet"])
def test_nested_fields(tmp_path, field, end):
    path = tmp_path / f"a.{end}"
    if end == "json":
        write_jsonl(
            path, [*nested_rows(), {"t": {"en": "alone"}}, {"t": 7, "t.ru": "x"}]
        )
    else:
        rows = [*nested_rows(), {"t": {"en": "alone"}}, {"t": None}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read(path, text_field=field)
    assert [d.text for d in found[:3]] == ["строка 0", "строка 1", "строка 2"]
    assert found[1].id == "u1"
    assert found[3].reason == "no text"
    # A key that has a dot in its own name comes before a path.
    assert getattr(found[4], "text", None) == (
        "x" if (field, end) == ("t.ru", "json") else None
    )


@pytest.mark.parametrize("end", ["json", "parquet"])
def test_a_missing_field_lists_those_there_are(tmp_path, end):
    path = tmp_path / f"a.{end}"
    if end == "json":
        write_jsonl(path, nested_rows())
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested_rows()), path)
    with pytest.raises(
        UserError, match=r"no field 'text'.*: t\.(en|ru), t\.(en|ru), id"
    ):
        build(one_source(path), tmp_path / "out")


def test_any_key_and_any_file_name(tmp_path):
    """Lone surrogates in them, which have no bytes in UTF-8, and line ends."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"\\ud800 a\\nb": "x"}\n')
    with pytest.raises(UserError, match="no field 'text'") as error:
        build(one_source(path), tmp_path / "out")
    assert "there are: \\ud800 a\\nb)" in str(error.value)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.jsonl")).write_text("{}")
    with pytest.raises(UserError, match=r"the name of .*b\\udcff.jsonl.*not UTF-8"):
        read(f"{tmp_path}/b*.jsonl")


@pytest.mark.parametrize("end", ["json.gz", "json.zst", "ndjson", "json"])
def test_names_of_json_lines(tmp_path, end):
    """c4-train.00000-of-01024.json.gz, Dolma's and others' names."""
    path = write_jsonl(tmp_path / f"c4.00000-of-01024.{end}", TEXTS)
    assert [d.text for d in read(path)] == TEXTS


def invalid_utf8(texts, at):
    """A string column of which row `at` is not UTF-8."""
    raw = pyarrow.array([t.encode() for t in texts[:at]] + [b"caf\xe9"] + [
        t.encode() for t in texts[at + 1 :]
    ])  # fmt: skip
    return pyarrow.StringArray.from_buffers(len(raw), *raw.buffers()[1:])


def test_one_bad_row_of_parquet_costs_one_row(tmp_path):
    texts = some_texts("en", 2000)
    table = pyarrow.table({"text": invalid_utf8(texts, 300)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = build(one_source(tmp_path / "a.parquet"), tmp_path / "out")
    row = found.manifest["sources"]["en/web"]
    assert (row["documents_read"], row["documents"]) == (2000, 1999)
    assert row["rejected"] == {"not UTF-8": 1}
    assert row["damaged"] == []
    (rejected,) = (tmp_path / "out/rejected/en.web.jsonl").read_text().splitlines()
    assert json.loads(rejected)["line"] == 301
    # Inside of another column, and beside an id that Python has no value for.
    inner = pyarrow.StructArray.from_arrays([invalid_utf8(TEXTS, 2)], ["ru"])
    ids = pyarrow.array([1, 2**62, 3, 4], pyarrow.timestamp("us"))
    table = pyarrow.table({"t": inner, "id": ids})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", store_schema=False)
    reasons = [
        getattr(d, "reason", "")
        for d in read(tmp_path / "b.parquet", text_field="t.ru")
    ]
    assert reasons == ["", "", "not UTF-8", ""]


def test_two_columns_of_one_name(tmp_path):
    column = pyarrow.array(TEXTS)
    table = pyarrow.Table.from_arrays([column, column], ["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"en/web.*a\.parquet has 2 columns named 'text'"
    ):
        read(tmp_path / "a.parquet")
    table = pyarrow.Table.from_arrays([column] * 3, ["text", "id", "id"])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert [d.text for d in read(tmp_path / "b.parquet")] == TEXTS


def cut_gz(path, texts):
    data = Path(write_jsonl(path.with_suffix(".jsonl.gz"), texts)).read_bytes()
    path.with_suffix(".jsonl.gz").write_bytes(data[: len(data) // 2])
    return path.with_suffix(".jsonl.gz"), None


def damaged_group(path, texts):
    """The second of four groups of rows has other bytes in it."""
    path = path.with_suffix(".parquet")
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=500, use_dictionary=False)
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    begin = chunk.data_page_offset
    data[begin : begin + 400] = bytes(400)
    path.write_bytes(data)
    return path, 500


@pytest.mark.parametrize("damage", [cut_gz, damaged_group])
def test_a_damaged_file_is_no_small_matter(tmp_path, damage, capsys):
    """However little of it is bad documents: it stops the build, or is told."""
    texts = some_texts("en", 2000)
    path, unread = damage(tmp_path / "a", texts)
    whole = write_jsonl(tmp_path / "b.jsonl", some_texts("en", 300, seed=1))
    cfg = one_source(path)
    cfg = make_config((c.SourceConfig("en/web", (str(path), whole)),))
    out = tmp_path / "out"
    says = rf"1 of its files damaged, first {path.name}: .* after document \d+, .*not"
    with pytest.raises(UserError, match=f"{says} read .*on_damaged_file"):
        build(cfg, out)
    assert not (out / "manifest.json").exists()
    fields = dataclasses.replace(cfg.corpus, on_damaged_file="keep_readable")
    found = corpus_build.build(dataclasses.replace(cfg, corpus=fields), out, workers=1)
    row = found.manifest["sources"]["en/web"]
    (told,) = row["damaged"]
    assert (told["file"], told["unread"]) == (path.name, unread)
    kept = documents_of(found, "en/web")
    assert len(kept) == row["documents_read"] == row["documents"]
    first = told["after"]
    assert kept[:first] == texts[:first]
    if unread:  # the groups after the damaged one are there
        assert kept[500:1500] == texts[1000:]
        assert len(kept) == 1500 + 300
    else:
        assert 500 < len(kept) == first + 300
    assert f"DAMAGED: en/web {path.name}" in capsys.readouterr().err
    assert f"DAMAGED: en/web {path.name}" in inspect_corpus.inspect(out)


def test_a_file_system_s_fault_is_no_damage(tmp_path, monkeypatch):
    """It may be gone when the build is run again, so it is not kept as a result."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", fails)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read: Input/output"):
        read(path)


def test_globs_are_sorted_and_files_come_once(tmp_path):
    for name in ("2024/b", "2024/a", "2025/a", "x[1]"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    found = read(f"{tmp_path}/**/a.jsonl", f"{tmp_path}/2024/*.jsonl")
    assert [d.text for d in found] == ["2024/a", "2025/a", "2024/b"]
    assert found[0].file == "2024/a.jsonl"
    assert [d.text for d in read(tmp_path / "x[1].jsonl")] == ["x[1]"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (("{}/none*.jsonl",), "no file matches"),
        (("{}/a.csv",), "of no kind"),
        (("{}/a.parquet.gz",), "of no kind"),
        (("{}/folder.jsonl",), "not a file"),
        ((), "has no files"),
        (("tfds:{}",), "not tfds:FOLDER:SPLIT"),
        (("tfds:{}/none:train",), "cannot be opened"),
    ],
)
def test_bad_paths(tmp_path, files, says):
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.parquet.gz").touch()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=says) as error:
        read(*(f.format(tmp_path) for f in files))
    assert "en/web" in str(error.value)


def test_bad_lines_are_counted_named_and_copied(tmp_path):
    good = some_texts("en", 200)
    bad = {
        b"{not json": "not JSON",
        b'{"text": "cut': "not JSON",
        b"[" * 100_000: "not JSON",
        b'"a string"': "not a JSON object",
        b'{"txt": "no field"}': "no text",
        b'{"text": null}': "no text",
        b'{"text": 7}': "text is not a string",
        b'{"text": ["a"]}': "text is not a string",
        b'{"text": "\\ud800 alone"}': "lone surrogates",
        b'{"text": "\xff\xfe"}': "not UTF-8",
        '{"text": "UTF-16"}'.encode("utf-16"): "not UTF-8",
        b'{"text": " \\n\\u0000"}': "empty",
        b'{"text": "ab"}': "too short",
    }
    with open(write_jsonl(tmp_path / "a.jsonl", good), "ab") as f:
        f.write(b"\n".join(bad) + b"\n")
    cfg = one_source(tmp_path / "a.jsonl", max_bad_share=0.1, min_chars=3)
    found = build(cfg, tmp_path / "out")
    assert documents_of(found, "en/web") == good
    row = found.manifest["sources"]["en/web"]
    expected = {r: list(bad.values()).count(r) for r in sorted(set(bad.values()))}
    assert row["rejected"] == expected
    with open(tmp_path / "out/rejected/en.web.jsonl") as f:
        rejected = [json.loads(line) for line in f]
    assert [r["reason"] for r in rejected] == list(bad.values())
    assert [r["line"] for r in rejected] == list(range(201, 201 + len(bad)))
    assert rejected[0]["file"] == "a.jsonl"
    assert rejected[0]["text"] == "{not json"
    # The same with a smaller limit is an error that names the first.
    strict = dataclasses.replace(
        cfg, corpus=dataclasses.replace(cfg.corpus, max_bad_share=0.01)
    )
    with pytest.raises(UserError, match=r"11 of 213 .*a\.jsonl:201: not JSON") as e:
        build(strict, tmp_path / "strict")
    assert "\n" not in str(e.value)
    assert (tmp_path / "strict/rejected/en.web.jsonl").exists()
    # Short and empty ones are no sign of broken input.
    many = [*some_texts("en", 150), *[" ", "a"] * 40]
    cfg = one_source(write_jsonl(tmp_path / "b.jsonl", many), min_chars=3)
    row = build(cfg, tmp_path / "b").manifest["sources"]["en/web"]
    assert row["rejected"] == {"empty": 40, "too short": 40}


@pytest.mark.parametrize("end", ["gz", "zst"])
def test_truncated_and_corrupt_streams(tmp_path, end):
    path = tmp_path / f"a.jsonl.{end}"
    texts = some_texts("en", 3000, words=200)
    whole = Path(write_jsonl(path, texts)).read_bytes()
    for size in (0, 1, 5, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        *found, last = read(path)
        assert isinstance(last, documents.Damage)
        assert last.reason in ("truncated file", "corrupt file")
        assert [d.text for d in found] == texts[: len(found)]
        assert last.line == len(found) + 1
    assert len(found) > 1500
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(2000) + whole[middle + 2000 :])
    assert read(path)[-1].reason == "corrupt file"
    path.write_bytes(b'{"text": "not compressed"}\n' * 9)
    assert [b.reason for b in read(path)] == ["corrupt file"]
    # A source that is cut in half is not silently half a source.
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match="corrupt file"):
        build(one_source(path), tmp_path / "out")


def test_broken_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    texts = some_texts("en", 2000)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    whole = path.read_bytes()
    for data in (b"", b"PAR1", b'{"text": 1}\n', whole[: len(whole) // 2]):
        path.write_bytes(data)
        assert [b.reason for b in read(path)] == ["corrupt file"]
    path.write_bytes(whole[:50] + bytes(5000) + whole[5050:])
    assert read(path)[-1].reason == "corrupt file"


@pytest.mark.parametrize("end", ["txt", "txt.gz", "txt.zst"])
def test_huge_lines_are_not_held(tmp_path, end, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT", 100_000)
    raw = b"first\n" + b"x" * 30_000_000 + b"\nlast"
    raw = {"txt.gz": gzip.compress, "txt.zst": zstandard.compress}.get(end, bytes)(raw)
    path = tmp_path / f"a.{end}"
    path.write_bytes(raw)
    first, bad, last = read(path)
    assert (first.text, last.text, last.line) == ("first", "last", 3)
    assert (bad.reason, bad.line) == ("too long", 2)
    assert len(bad.excerpt) == documents.EXCERPT


@settings(max_examples=100)
@given(st.binary(max_size=60), st.integers(1, 9))
def test_lines_do_not_depend_on_blocks(raw, size):
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert list(text_files.lines(parts)) == list(text_files.lines([raw]))
    expected = raw.split(b"\n")
    expected = expected if expected[-1] else expected[:-1]
    found = [line for _, line in text_files.lines(parts)]
    assert found == [line.removesuffix(b"\r") for line in expected]


@pytest.mark.filterwarnings("ignore")
def test_tfds(tmp_path):
    """A real array_record data set, written and read by tfds without TensorFlow."""
    import tensorflow_datasets as tfds

    texts = some_texts("ru", 120)

    class Texts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "n": np.int32}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, text in enumerate(texts):
                yield i, {"text": text, "n": i}

    made = Texts(data_dir=tmp_path, file_format="array_record")
    made.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=12)
    )
    folder = str(made.data_path)
    found, most = [], 0
    source = c.SourceConfig("en/web", (f"tfds:{folder}:train",))
    for document in inputs.read_documents(source):
        found.append(document)
        files_open = [os.path.realpath(p) for p in Path("/proc/self/fd").iterdir()]
        most = max(most, sum(p.startswith(folder) for p in files_open))
    assert most == 1  # whatever the limit of open files
    assert sorted(d.text for d in found) == sorted(texts)
    assert [d.line for d in found] == list(range(1, 121))
    assert len(read(f"tfds:{folder}:train[:25%]")) == 30
    wrong = read(f"tfds:{folder}:train", text_field="n")
    assert {b.reason for b in wrong} == {"text is not a string"}
    for split in ("none", "train[:", "train[:x]"):
        with pytest.raises(UserError, match="cannot be opened|not tfds"):
            read(f"tfds:{folder}:{split}")
    cfg = make_config((c.SourceConfig("ru/tfds", (f"tfds:{folder}:train",)),))
    result = build(cfg, tmp_path / "out", workers=2)
    assert documents_of(result, "ru/tfds") == [d.text for d in found]
    shards = sorted(Path(folder).glob("*.array_record*"))
    shards[3].write_bytes(bytes(shards[3].stat().st_size))
    writer = ArrayRecordWriter(str(shards[7]), "group_size:1")
    for _ in range(10):
        writer.write(b"not a tf.Example")
    writer.close()
    *kept, damage = read(f"tfds:{folder}:train")
    assert kept == found[:30] + found[40:70] + found[80:]
    assert (damage.line, damage.unread) == (31, 20)
