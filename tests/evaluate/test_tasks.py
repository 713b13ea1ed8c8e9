"""Tasks: descriptions, items that must be set aside, prompts, and the numbers."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import yaml
from conftest import mesh_of

from gamayun_jax.config import ComputeConfig, ModelConfig, UserError
from gamayun_jax.evaluate import run_tasks, task_metrics, tasks
from gamayun_jax.evaluate.loglikelihood import Request, Scorer
from gamayun_jax.evaluate.tasks import encode_pair, load_task, prompt_of
from gamayun_jax.inference.generator import Generator
from gamayun_jax.report import task_scores

FLOAT32 = ComputeConfig(dtype="float32")
MODEL = ModelConfig(
    vocab_size=258, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8,
    d_ff=64, max_seq_len=128,
)  # fmt: skip


class Bytes:
    """Byte b is id 2 + b; 0 is BOS, 1 is EOS."""

    vocab_size, prefix_ids, start_id, eos_id, stop_ids = 258, (0,), 0, 1, (1,)

    def encode(self, text):
        return [2 + b for b in text.encode()]

    def encode_batch(self, texts):
        return [self.encode(t) for t in texts]

    def spell(self, ids):
        return bytes(i - 2 for i in ids if i > 1)

    def decode(self, ids):
        return self.spell(ids).decode("utf-8", "replace")


@functools.cache
def model():
    from test_generate import weights

    params, mesh = weights(MODEL), mesh_of((1, 1, 1))
    scorer = Scorer(MODEL, params, mesh, FLOAT32, batch_tokens=1024)
    return scorer, Generator(MODEL, params, mesh, Bytes(), FLOAT32)


def write(folder, items, raw=None, **fields):
    fields = {
        "name": "t", "kind": "multiple_choice", "data": "t.jsonl",
        "prompt": "{question}", "choice": " {choice}", "description": "d", **fields,
    }  # fmt: skip
    (folder / "t.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    text = "".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items)
    (folder / "t.jsonl").write_bytes(text.encode() if raw is None else raw)
    return folder / "t.yaml"


def questions(count=12, languages=("en", "ru"), seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for language in languages:
        for i in range(count):
            text = "".join(rng.choice(list("abcdefghij "), rng.integers(3, 30)))
            choices = ["".join(rng.choice(list("klmno"), n)) for n in (2, 3, 5, 9)]
            answer = int(rng.integers(4))
            item = {"id": i, "language": language, "question": text + ":"}
            found.append({**item, "choices": choices, "answer": answer})
    return found


def test_multiple_choice_by_hand(tmp_path):
    scorer, _ = model()
    path = write(tmp_path, questions(), unconditional="", parallel=True, metric="pmi")
    task = load_task(path)
    result, rows = run_tasks.run_task(task, Bytes(), scorer)
    items = [i for k in ("en", "ru") for i in task.items[k]]
    assert [(r["language"], r["id"]) for r in rows] == [
        (i["language"], i["id"]) for i in items
    ]
    alone = [
        encode_pair(Bytes(), prompt, " " + choice)
        for item in items
        for prompt in (item["question"], "")
        for choice in item["choices"]
    ]
    scores = scorer.score([Request(context, [ids]) for context, ids in alone])
    by_hand = np.reshape([s.logprobs[0] for s in scores], (len(items), 2, 4))
    for item, row, (lp, plain) in zip(items, rows, by_hand, strict=True):
        np.testing.assert_allclose(row["logprobs"], lp, rtol=1e-4)
        sizes = np.array([len(c) for c in item["choices"]])
        expected = {
            "raw": lp, "token": lp / (sizes + 1), "norm": lp / sizes, "pmi": lp - plain,
        }  # fmt: skip
        for name, values in expected.items():
            assert row["picked"][name] == values.argmax(), name
            right = float(values.argmax() == item["answer"])
            assert row["correct"][name] == right
    for language in ("en", "ru"):
        mine = [r["correct"]["norm"] for r in rows if r["language"] == language]
        found = result["languages"][language]
        assert found["norm"] == pytest.approx(np.mean(mine))
        assert found["norm_se"] == pytest.approx(np.std(mine, ddof=1) / math.sqrt(12))
        assert found["chance"] == 0.25
        assert found["items"] == 12
    both = np.mean([v["pmi"] for v in result["languages"].values()])
    assert result["macro"]["pmi"] == pytest.approx(both)
    assert set(run_tasks.summary(task, rows, {})) == set(result)


def test_cloze_is_greedy_decoding(tmp_path):
    """A target is right exactly if greedy generation writes it."""
    scorer, generator = model()
    prompts = ["abc", "def g", "héllo", "мир"]
    ids = [[0, *Bytes().encode(p)] for p in prompts]
    made = [Bytes().decode(m) for m in generator.generate_ids(ids, 3)]
    items = []
    for n, (prompt, text) in enumerate(zip(prompts, made, strict=True)):
        if text.isascii() and text.strip() == text and text:
            items.append(
                {"id": n, "language": "en", "question": prompt, "target": text}
            )
        wrong = {"id": n + 10, "language": "en", "question": prompt, "target": "zq!"}
        items.append(wrong)
    path = write(tmp_path, items, kind="cloze", choice="{target}")
    _, rows = run_tasks.run_task(load_task(path), Bytes(), scorer)
    for row in rows:
        assert row["correct"]["exact"] == float(row["id"] < 10)


def test_generation_and_shots(tmp_path):
    _, generator = model()
    items = [
        {"id": i, "language": "en", "question": f"q{i}", "answers": [f"a{i}"]}
        for i in range(40)
    ]
    shots = [
        {**i, "id": f"s{i['id']}", "split": "shots", "question": f"Q{i['id']}"}
        for i in items[:5]
    ]
    path = write(
        tmp_path, items + shots, kind="generation", shots=2, max_tokens=8, stop=["\n"],
        shot_separator="|",
    )  # fmt: skip
    task = load_task(path)
    prompt = prompt_of(task, task.items["en"][0])
    assert prompt.endswith("|q0")
    assert prompt.count("|") == 2
    assert prompt_of(task, task.items["en"][1])[:-2] == prompt[:-2]
    result, rows = run_tasks.run_task(task, Bytes(), model()[0], generator)
    assert [r["id"] for r in rows] == list(range(40))
    ids = [0, *Bytes().encode(prompt)]
    text = Bytes().decode(generator.generate_ids([ids], 8)[0])
    assert rows[0]["text"] == text.split("\n")[0].strip()
    assert result["languages"]["en"]["items"] == 40
    with pytest.raises(UserError, match="wants 6 shots, but en has 5"):
        load_task(write(tmp_path, items + shots, kind="generation", shots=6))


def test_perplexity_counts_every_byte_once(tmp_path):
    scorer, _ = model()
    texts = ["a" * 300, "hello", "привет"]
    items = [{"id": i, "language": "en", "text": t} for i, t in enumerate(texts)]
    path = write(tmp_path, items, kind="perplexity", prompt="{text}", baseline="xz")
    result, rows = run_tasks.run_task(load_task(path), Bytes(), scorer)
    assert [r["bytes"] for r in rows] == [300, 5, 12]
    found = result["languages"]["en"]
    total = sum(r["bits"] for r in rows)
    assert found["bits_per_byte"] == pytest.approx(total / 317)
    one = scorer.score([Request([0], [Bytes().encode("hello")])])[0].logprobs[0]
    assert rows[1]["bits"] == pytest.approx(-one / math.log(2), rel=1e-5)
    assert found["baseline"] > 0


def test_languages_cost_no_compilation(tmp_path):
    scorer = Scorer(*[MODEL, model()[0].params, mesh_of((1, 1, 1)), FLOAT32])
    one = load_task(write(tmp_path, questions(languages=["en"])))
    run_tasks.run_task(one, Bytes(), scorer)
    before = scorer.compilations
    languages = ("en", "ru", "de", "fr", "es", "it", "pt", "pl", "zh", "ja", "ko", "tr")
    many = load_task(write(tmp_path, questions(languages=languages, seed=1)))
    result, _ = run_tasks.run_task(many, Bytes(), scorer)
    assert len(result["languages"]) == 12
    assert scorer.compilations <= before + 1  # the rows are full now


def test_what_cannot_be_used_is_set_aside_and_counted(tmp_path):
    good = questions(3, ["en"])
    bad = [
        ({**good[0]}, "duplicate id"),
        ({**good[0], "id": 10, "choices": []}, "no choices"),
        ({**good[0], "id": 11, "choices": ["a", " "]}, "empty text in choices"),
        ({**good[0], "id": 12, "choices": ["a", "a"]},
         "fewer than two different choices"),
        ({**good[0], "id": 13, "answer": 4}, "answer is not the number of a choice"),
        ({**good[0], "id": 14, "answer": True},
         "answer is not the number of a choice"),
        ({k: v for k, v in good[0].items() if k != "question"} | {"id": 15},
         "no field question"),
        ({k: v for k, v in good[0].items() if k != "id"}, "no id"),
        ({k: v for k, v in good[0].items() if k != "language"}, "no language"),
    ]  # fmt: skip
    lines = [json.dumps(i).encode() for i in [*good, *(b for b, _ in bad)]]
    lines += [b'{"id": 1, "question": "\xff"}', b"{nonsense", b"[" * 5000]
    path = write(tmp_path, [], raw=b"\n".join(lines))
    task = load_task(path)
    assert len(task.items["en"]) == 3
    reasons = {reason: len(names) for reason, names in task.set_aside.items()}
    for _, reason in bad:
        assert reason in reasons, reason
    assert reasons["not UTF-8"] == 1
    assert reasons["not JSON"] == 2
    assert sum(reasons.values()) == len(bad) + 3
    scorer, _ = model()
    result, rows = run_tasks.run_task(task, Bytes(), scorer)
    assert len(rows) == 3
    assert result["set_aside"]["duplicate id"] == {"count": 1, "first": ["en:0"]}
    table = task_scores.task_text({"t": result})
    assert "set aside, duplicate id: 1 (en:0)" in table


def test_a_language_without_items_is_a_gap(tmp_path):
    task = load_task(write(tmp_path, questions(3, ["en"])), ["en", "tr"])
    result, _ = run_tasks.run_task(task, Bytes(), model()[0])
    assert result["gaps"] == ["tr"]
    assert list(result["languages"]) == ["en"]
    assert result["macro"]["norm"] == result["languages"]["en"]["norm"]
    assert "no items: tr" in task_scores.task_text({"t": result})


def test_too_long_is_cut_or_set_aside(tmp_path):
    items = questions(3, ["en"])
    items[0]["question"] = "x" * 500
    items[1]["choices"][2] = "y" * 200
    result, rows = run_tasks.run_task(
        load_task(write(tmp_path, items)), Bytes(), model()[0]
    )
    assert [r["id"] for r in rows] == [0, 2]
    assert rows[0]["dropped"] > 300
    assert result["languages"]["en"]["truncated"] == 1
    reason = "longer than the model's window"
    assert result["set_aside"][reason] == {"count": 1, "first": ["en:1"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "essay"}, "kind='essay' is unknown: choose one of"),
        ({"shot": 3}, "no field 'shot'. Did you mean 'shots'"),
        ({"shots": "3"}, "shots: expected int, got '3'"),
        ({"metric": "f1"}, "metric 'f1' is not one of multiple_choice's"),
        ({"metric": "pmi"}, "pmi needs the field unconditional"),
        ({"baseline": "magic"}, "baseline='magic' is unknown"),
        ({"prompt": "{question.__class__}"}, "plain field names only"),
        ({"prompt": "{question!r}"}, "plain field names only"),
        ({"prompt": "{question"}, "is not a template"),
        ({"data": "/etc/passwd"}, "relative to this file"),
        ({"data": "other.jsonl"}, "other.jsonl cannot be read"),
    ],
)
def test_bad_descriptions(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_task(write(tmp_path, questions(1), **change))


def test_no_such_task(tmp_path):
    with pytest.raises(UserError, match="there is no task 'nonsense'"):
        load_task("nonsense")
    with pytest.raises(UserError, match="no task file"):
        load_task(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match="not a YAML file"):
        load_task(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(UserError, match="holds no fields"):
        load_task(tmp_path / "a.yaml")


def test_the_hash_covers_description_and_data(tmp_path):
    base = load_task(write(tmp_path, questions(3)))
    again = load_task(write(tmp_path, questions(3)))
    prompt = load_task(write(tmp_path, questions(3), prompt="Q: {question}"))
    data = load_task(write(tmp_path, questions(3, seed=1)))
    assert base.hash == again.hash
    assert len({base.hash, prompt.hash, data.hash}) == 3
    assert base.prompt_hash == data.prompt_hash != prompt.prompt_hash


def test_limit_takes_the_same_ids_in_every_language(tmp_path):
    task = load_task(write(tmp_path, questions(12)), limit=5)
    ids = [[i["id"] for i in items] for items in task.items.values()]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 5


def test_encode_pair_moves_spaces():
    assert encode_pair(Bytes(), "ab ", "c") == ([0, 99, 100], [34, 101])
    assert encode_pair(Bytes(), "", "c") == ([0], [101])

    class Merging(Bytes):
        def encode(self, text):
            return [200] if text == "ab" else super().encode(text)

    assert encode_pair(Merging(), "a", "b") == ([0, 99], [100])

    class NoBos(Bytes):
        prefix_ids, start_id = (), 1

    assert encode_pair(NoBos(), "", "c") == ([1], [101])
    assert encode_pair(NoBos(), "a", "c") == ([99], [101])


def test_metrics_by_hand():
    assert task_metrics.normalised("  Foo  Bar. ") == "foo bar"
    assert task_metrics.f1("the cat sat", "the cat", "en") == pytest.approx(0.8)
    assert task_metrics.f1("東京都", "東京", "ja") == pytest.approx(0.8)
    assert task_metrics.f1("x", "y", "en") == 0.0
    scores = task_metrics.text_scores("Paris", ["London", "paris"], "fr")
    assert scores["exact"] == scores["f1"] == 1.0
    assert 0.5 < scores["chrf"] < 1.0
    assert task_metrics.text_scores("a b c", ["a b c"], "en")["chrf"] == pytest.approx(
        1.0
    )
    # Two bins: sure 0.95 and right half the time, sure 0.55 and always right.
    sure, right = [0.95, 0.95, 0.55, 0.55], [1, 0, 1, 1]
    assert task_metrics.calibration_error(sure, right) == pytest.approx(0.45)
    assert task_metrics.confidence(np.log([0.2, 0.6])) == pytest.approx(0.75)
    assert task_metrics.picked_share(np.array([1.0, 1.0, 0.0]), 0) == 0.5
    assert task_metrics.mean_se([1.0]) == (1.0, None)


def test_the_error_of_a_parallel_mean_is_that_of_its_ids(tmp_path):
    """Languages that always agree bring no independent items."""
    task = tasks.Task("t", "multiple_choice", "t.jsonl", metric="raw", parallel=True)
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 50).astype(float)
    rows = [
        {"id": i, "language": k, "logprobs": [0.0, -i - 1.0], "dropped": 0,
         "answer": 1, "bytes": [9, 4], "correct": {"raw": r, "norm": r, "token": r}}
        for k in ("en", "ru", "de")
        for i, r in enumerate(right)
    ]  # fmt: skip
    languages = {
        k: task_metrics.summarise(task, [r for r in rows if r["language"] == k])
        for k in ("en", "ru", "de")
    }
    # Bits of the right choices over their bytes: 1 to 50 nats, 4 bytes each.
    assert languages["en"]["answer_bits_per_byte"] == pytest.approx(
        25.5 / 4 / math.log(2)
    )
    found = task_metrics.macro(task, languages, rows)
    assert found["raw_se"] == pytest.approx(languages["en"]["raw_se"])
    apart = tasks.Task("t", "multiple_choice", "t.jsonl", metric="raw", parallel=False)
    found = task_metrics.macro(apart, languages, rows)
    assert found["raw_se"] == pytest.approx(languages["en"]["raw_se"] / math.sqrt(3))


def test_one_item_has_no_standard_error():
    """Of a language with one item, and so of a mean over such languages."""
    for parallel in (True, False):
        task = tasks.Task("t", "cloze", "t.jsonl", metric="exact", parallel=parallel)
        rows = [
            {"id": k, "language": k, "correct": {"exact": float(i)}, "dropped": 0}
            for i, k in enumerate(("en", "ru"))
        ]
        one = {r["language"]: task_metrics.summarise(task, [r]) for r in rows}
        found = task_metrics.macro(task, one, rows)
        assert (found["exact"], found["exact_se"]) == (0.5, None)
        rows.append({**rows[1], "id": "b", "language": "en"})
        more = {**one, "en": task_metrics.summarise(task, [rows[0], rows[2]])}
        assert task_metrics.macro(task, more, rows)["exact_se"] is None
    texts = tasks.Task("t", "perplexity", "t.jsonl", metric="bits_per_byte")
    rows = [{"id": 1, "language": "en", "bits": 8.0, "bytes": 5, "tokens": 2}]
    assert task_metrics.summarise(texts, rows)["bits_per_byte_se"] is None


def test_items_that_are_all_alike_show_no_error():
    """Right answers only have a spread of 0, which is no error of 0; intervals of
    shares stay between 0 and 100 %."""
    task = tasks.Task("t", "cloze", "t.jsonl", metric="exact")
    rows = [
        {"id": i, "language": k, "correct": {"exact": float(k == "en" or i == 0)}}
        for k in ("en", "ru")
        for i in range(6)
    ]
    found = run_tasks.summary(
        dataclasses.replace(task, items={k: [] for k in ("en", "ru")}), rows, {}
    )
    text = task_scores.task_text({"t": found})
    html = task_scores.tasks_section({"t": found}, ["en", "ru"], "T")
    assert "100.0 %" in text
    assert "16.7 % ±16.7" in text
    assert "±0.0" not in text + html
    panel = task_scores.task_panel("t", found)
    assert [d.low for dots in panel.dots.values() for d in dots] == [None, 0.0]
    assert panel.form(0.25) == "25 %"


def test_bits_per_byte_of_parallel_texts_err_together():
    rng = np.random.default_rng(1)
    task = tasks.Task("t", "perplexity", "t.jsonl", metric="bits_per_byte")
    rows = [
        {"id": i, "language": "en", "bits": b * 100, "bytes": 100}
        for i, b in enumerate(rng.normal(2, 0.3, 40))
    ]
    rows += [{**r, "language": k} for k in ("ru", "de") for r in rows[:40]]
    languages = {
        k: task_metrics.summarise(task, [r for r in rows if r["language"] == k])
        for k in ("en", "ru", "de")
    }
    one = languages["en"]["bits_per_byte_se"]
    for parallel, error in ((True, one), (False, one / math.sqrt(3))):
        of = dataclasses.replace(task, parallel=parallel)
        found = task_metrics.macro(of, languages, rows)
        assert found["bits_per_byte_se"] == pytest.approx(error)


def test_better_than_the_baseline_is_no_matter_of_few_items():
    def marked(items, value, error):
        row = {"norm": value, "norm_se": error, "baseline": 0.3, "items": items}
        task = {"kind": "multiple_choice", "metric": "norm", "languages": {"en": row}}
        return bool(task_scores.beyond_baseline({"t": task}))

    assert not marked(1, 1.0, None)
    assert not marked(1, 1.0, 0.0)  # as records of before say it
    assert not marked(2, 1.0, 0.0)
    assert marked(50, 1.0, 0.0)
    assert marked(400, 0.4, 0.0245)
