"""Comparisons: pairing, tables, pages, the command; the rule is in test_paired.py."""

import json

import numpy as np
import pytest

from gamayun_jax import cli
from gamayun_jax.config import UserError
from gamayun_jax.evaluate import results, stored_model
from gamayun_jax.evaluate.tasks import METRICS
from gamayun_jax.report import compare

LANGUAGES = ("en", "ru", "tr")


def task(kind="multiple_choice", parallel=True, **more):
    return {
        "kind": kind, "metric": METRICS[kind][0], "parallel": parallel,
        "description": "d", "hash": "h", "prompt_hash": "p", "baseline": "none",
        "shots": 0, "set_aside": {}, "gaps": [], **more,
    }  # fmt: skip


def choice_rows(right, languages=LANGUAGES):
    return [
        {"id": i, "language": k, "correct": {"norm": float(r)}}
        for k in languages
        for i, r in enumerate(right)
    ]


def result(label, rows, kind="multiple_choice", **more):
    metric = METRICS[kind][0]
    languages = {
        k: {metric: float(np.mean([r["correct"][metric] for r in rows
                                   if r["language"] == k])), f"{metric}_se": 0.01}
        for k in LANGUAGES
    }  # fmt: skip
    mean = {metric: float(np.mean([v[metric] for v in languages.values()]))}
    found = {
        "format": results.FORMAT,
        "label": label,
        "model": {"path": f"/{label}", "parameters": 10, "tokenizer": "t"},
        "tasks": {"t": {**task(kind, **more), "languages": languages, "macro": mean}},
    }
    return found, {"t": rows}


def test_items_are_paired_by_language_and_id():
    a = choice_rows([1, 1, 0, 0])
    b = list(reversed(choice_rows([1, 1, 0, 0])))[1:]
    found = compare.compare([result("a", a), result("b", b)]).changes[0]["t"]
    assert all(c.estimate.value == 0 and c.estimate.p == 1 for c in found.values())
    assert all(c.paired for c in found.values())
    assert found["tr"].estimate.items == 3


def test_means_of_other_languages_do_not_compare(tmp_path):
    few = result("few", choice_rows([1, 0, 1, 1]))
    del few[0]["tasks"]["t"]["languages"]["tr"]
    few[1]["t"][:] = [r for r in few[1]["t"] if r["language"] != "tr"]
    few[0]["window"] = 77
    found = compare.compare([few, result("all", choice_rows([0, 0, 0, 0]))])
    told = compare.to_json(found)["tasks"]["t"]
    assert told["differences"][1].keys() == {"en", "ru"}
    assert "macro" in compare.comparison_text(found)
    page = compare.write_comparison(found, tmp_path).read_text()
    assert page.count(">77<") == page.count(">default<") == 1  # windows


def test_tables_and_page(tmp_path):
    rng = np.random.default_rng(3)
    good, bad = np.ones(60), rng.integers(0, 2, 60)
    found = compare.compare(
        [
            result("<b>one</b>", choice_rows(bad)),
            result("two", choice_rows(good)),
            result("three", choice_rows(bad)),
        ]
    )
    text = compare.comparison_text(found)
    # Two is better in three languages and on the whole.
    assert text.count(" +\n") + text.count(" +  ") == 4
    assert "t: accuracy (norm), %; differences" in text
    page = compare.write_comparison(found, tmp_path).read_text()
    assert "d: accuracy (norm)." in page
    assert "<b>one" not in page
    assert page.count('class="better"') == 4
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert saved["tasks"]["t"]["differences"][2]["en"]["difference"] == 0.0


def test_refuses_what_does_not_compare(tmp_path):
    rows = choice_rows([1, 0, 1])
    one = result("one", rows)
    with pytest.raises(UserError, match="at least two"):
        compare.compare([one])
    with pytest.raises(UserError, match="was not the same for all models"):
        compare.compare([one, result("two", rows, hash="other")])
    other = result("two", rows)
    other[0]["tasks"]["u"] = other[0]["tasks"].pop("t")
    with pytest.raises(UserError, match="no task in common"):
        compare.compare([one, other])
    (tmp_path / "items").mkdir()
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        results.read_results(tmp_path)
    results.write_results(tmp_path, one[0], {"t": [*rows, {"id": 1}]})
    with pytest.raises(UserError, match="line 10 has no id or language"):
        results.read_results(tmp_path)


def test_a_model_that_is_not_there_is_met_before_others_are_evaluated(
    tmp_path, monkeypatch, capsys
):
    def evaluate_model(*_, **__):
        raise AssertionError("evaluated")

    monkeypatch.setattr(stored_model, "evaluate_model", evaluate_model)
    (tmp_path / "run/checkpoints/1/meta").mkdir(parents=True)
    models, out = ["compare", str(tmp_path / "run")], ["--out", str(tmp_path / "out")]
    for more, message in ([], "at least two"), (["nowhere"], "nowhere does not exist"):
        assert cli.main([*models, *more, *out]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_held_out_sets_alone_compare(tmp_path):
    """What `gamayun eval --out` writes without tasks: sets and their units."""
    rng = np.random.default_rng(0)

    def write(name, gain, size=100):
        rows = [
            {"id": str(i), "language": k, "bytes": size, "tokens": 9,
             "bits": size * (2 - gain * (k == "ru")) + rng.normal()}
            for k in LANGUAGES for i in range(40)
        ]  # fmt: skip
        part = {"parallel": True, "macro": {"bits_per_byte": 2.0}, "languages": {
            k: {"bits_per_byte": 2.0, "bits_per_byte_se": 0.1} for k in LANGUAGES
        }}  # fmt: skip
        found, _ = result(name, choice_rows([1.0]))
        del found["tasks"]
        found["sets"] = {"help": part}
        results.write_results(tmp_path / name, found, {"heldout-help": rows})
        return tmp_path / name

    folders = [write("one", 0), write("two", 0.1), write("other", 0, 101)]
    out = tmp_path / "out"
    assert cli.main(["compare", *map(str, folders[:2]), "--out", str(out)]) == 0
    told = json.loads((out / "compare.json").read_text())["tasks"]["heldout-help"]
    marks = {k: v["verdict"] for k, v in told["differences"][1].items()}
    assert marks == {"en": "same", "ru": "better", "tr": "same", "macro": "better"}
    different = [results.read_results(f) for f in (folders[0], folders[2])]
    with pytest.raises(UserError, match="en text '0' was not the same"):
        compare.compare(different)
    (folders[0] / "items/heldout-help.jsonl").unlink()
    (folders[0] / "items").rmdir()
    with pytest.raises(UserError, match="has no items/"):
        stored_model.evaluate_each(folders[:1], [], out, print)


@pytest.mark.slow
def test_the_command_on_three_architectures(tmp_path, capsys):
    """Random models of the three architectures: imported, evaluated, compared; what
    is there already is not evaluated again."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from test_imported import KINDS, byte_level

    torch.manual_seed(0)
    folders = []
    for name, (kind, bos) in KINDS.items():
        folder = tmp_path / name
        folder.mkdir()
        byte_level(folder, ["Все люди рождаются", "all human beings"] * 20, bos)
        config = kind(
            vocab_size=416, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=1 if bos else 0, eos_token_id=0, initializer_range=0.3,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
        folders.append(str(folder))
    out = tmp_path / "out"
    command = ["compare", *folders, "--tasks", "udhr", "cldr_facts", "--limit", "5"]
    command += ["--languages", "en", "tr", "--out", str(out)]
    assert cli.main(command) == 0
    first = capsys.readouterr()
    for name in ("udhr", "cldr_facts", "llama", "qwen2", "qwen3", "macro"):
        assert name in first.out
    results = sorted(p.name for p in out.iterdir())
    assert results == ["0-llama", "1-qwen2", "2-qwen3", "compare.json", "index.html"]
    assert cli.main(command) == 0
    again = capsys.readouterr()
    assert again.err.count("results of before") == 3
    assert again.out == first.out
    assert cli.main(["compare", *(str(out / r) for r in results[:3]), "--out",
                     str(tmp_path / "again")]) == 0  # fmt: skip
    assert capsys.readouterr().out.startswith(first.out.split("\n/")[0])
