"""Documents held out by their ids."""

import io
import json

import zstandard

from gamayun_jax import cli
from gamayun_jax.data.split import is_held_out


def write(path, ids, language="en"):
    rows = [{"id": i, "text": f"{language} text of {i}"} for i in ids]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def parts(folder):
    with open(folder / "train.jsonl.zst", "rb") as f:
        stream = zstandard.ZstdDecompressor().stream_reader(f)
        train = [json.loads(x) for x in io.TextIOWrapper(stream, "utf-8")]
    lines = (folder / "heldout.jsonl").read_text("utf-8").splitlines()
    return train, [json.loads(x) for x in lines]


def run(*words):
    return cli.main(["corpus", "split", *map(str, words)])


def test_every_document_is_on_one_side_and_translations_on_the_same(tmp_path, capfd):
    ids = [f"page/{i}" for i in range(2000)]
    for k in ("en", "ru"):
        file = write(tmp_path / f"{k}.jsonl", ids, k)
        assert run(file, "--out", tmp_path / k, "--share", "0.1") == 0
    said = capfd.readouterr().out
    sides = {}
    for k in ("en", "ru"):
        train, held = parts(tmp_path / k)
        assert {r["id"] for r in train}.isdisjoint(r["id"] for r in held)
        assert [r["id"] for r in (*train, *held)] != ids  # by hash, not by place
        assert sorted(r["id"] for r in (*train, *held)) == sorted(ids)
        assert all(r["text"] == f"{k} text of {r['id']}" for r in (*train, *held))
        assert f"held out: {len(held):,} documents" in said
        assert 150 < len(held) < 250  # 200 ± 3.7 standard deviations
        sides[k] = [r["id"] for r in held]
    assert sides["en"] == sides["ru"]


def test_more_files_move_no_document(tmp_path):
    first = write(tmp_path / "a.jsonl", range(300))
    more = write(tmp_path / "b.jsonl", range(300, 500))
    assert run(first, "--out", tmp_path / "few", "--share", "0.2") == 0
    assert run(first, more, "--out", tmp_path / "many", "--share", "0.2") == 0
    few, many = (parts(tmp_path / k)[1] for k in ("few", "many"))
    assert many[: len(few)] == few
    assert run(first, "--out", tmp_path / "other", "--share", "0.2", "--seed", 1) == 0
    assert parts(tmp_path / "other")[1] != few
    assert not is_held_out("x", 0.0, 0)
    assert is_held_out("x", 1.0, 0)


def test_what_is_not_split_is_said(tmp_path, capfd):
    file = write(tmp_path / "a.jsonl", range(200))
    with open(file, "a") as f:
        f.write('{"id": 7}\n{"text": "no id"}\n')
    assert run(file, "--out", tmp_path / "out", "--share", "0.3") == 0
    said = capfd.readouterr().out
    assert "left out, no text: 1 documents" in said
    assert run(file, "--out", tmp_path / "out") == 2
    assert "exists already" in capfd.readouterr().err
    assert run(file, "--out", tmp_path / "none", "--share", "0") == 2
    assert "give another share" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()
    assert run(tmp_path / "no.jsonl", "--out", tmp_path / "none") == 2
    assert "no file matches" in capfd.readouterr().err


def test_files_without_a_document_are_not_the_shares_fault(tmp_path, capfd):
    """What is wrong with them is said instead."""
    for name, text, reason in (
        ("other.jsonl", '{"content": "a text"}\n' * 3, "3 left out"),
        ("empty.jsonl", "", "empty"),
    ):
        (tmp_path / name).write_text(text)
        assert run(tmp_path / name, "--out", tmp_path / "out", "--share", "0.5") == 2
        error = capfd.readouterr().err
        assert f"{name}: no document can be used ({reason}" in error
        assert "--share" not in error
    file = write(tmp_path / "few.jsonl", range(3))
    assert run(file, "--out", tmp_path / "out", "--share", "0.0001") == 2
    assert (
        "--share 0.0001 of 3 documents leaves 3 to train on" in capfd.readouterr().err
    )
