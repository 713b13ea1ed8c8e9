"""Imported models from the command line: evaluation and generation on their own
tokenizers, against `transformers` on the same folder."""

import dataclasses
import functools
import json
import math
import warnings

import jax
import numpy as np
import pytest
from conftest import runs_on

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch and transformers have their own
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
import flax.linen as nn
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gamayun_jax import cli
from gamayun_jax.config import UserError
from gamayun_jax.data.hf_tokenizer import HFTokenizer
from gamayun_jax.data.model_tokenizer import open_tokenizer
from gamayun_jax.data.tokenizer import TextStream, Tokenizer
from gamayun_jax.evaluate import heldout, results, stored_model, tasks
from gamayun_jax.interop import load_model
from gamayun_jax.model import sharding
from gamayun_jax.model.transformer import Transformer

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

KINDS = {
    # (config, has a BOS token)
    "llama": (transformers.LlamaConfig, True),
    "qwen2": (transformers.Qwen2Config, False),
    "qwen3": (transformers.Qwen3Config, False),
}
PROMPT = "Все люди рождаются свободными"


def byte_level(folder, texts, bos):
    """A tokenizer.json as LLaMA-3's and Qwen's are: byte-level BPE, no dummy prefix."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|begin|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.save(str(folder / "tokenizer.json"))
    own = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "bos_token": "<|begin|>" if bos else None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(own))


@pytest.fixture(
    scope="module",
    params=[
        "llama",
        pytest.param("qwen2", marks=pytest.mark.slow),
        pytest.param("qwen3", marks=pytest.mark.slow),
    ],
)
def imported(request, corpus, tmp_path_factory):
    """(folder that transformers wrote, its model) with weights of some size."""
    kind, bos = KINDS[request.param]
    folder = tmp_path_factory.mktemp("hf") / f"random-{request.param}"
    folder.mkdir()
    texts = [t for k in ("en", "ru") for _, t in corpus.heldout("udhr", k)]
    byte_level(folder, texts, bos)
    torch.manual_seed(0)
    config = kind(
        vocab_size=416,  # padded, as published models are
        hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=1 if bos else 0, eos_token_id=[0, 2], initializer_range=0.3,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(folder)
    return folder, model


def bits(model, start, rows):
    """The bits of each row of ids after `start`, by transformers."""
    found = []
    for ids in rows:
        with torch.inference_mode():
            out = model(torch.tensor([[start, *ids]])).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(out, torch.tensor(ids), reduction="sum")
        found.append(float(nll) / math.log(2))
    return np.array(found)


def test_evaluation_runs_on_the_model_s_own_tokenizer(
    imported, corpus, tmp_path, capfd
):
    folder, model = imported
    assert cli.main(["eval", str(folder)]) == 2
    assert "give --corpus" in capfd.readouterr().err
    argv = [
        "--corpus", str(corpus.folder), "--languages", "en", "--out", str(tmp_path)
    ]  # fmt: skip
    assert cli.main(["eval", str(folder), *argv]) == 0
    assert "bits per byte on held-out set 'udhr'" in capfd.readouterr().out
    found = json.loads((tmp_path / "eval.json").read_text())
    row = found["sets"]["udhr"]["languages"]["en"]
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [text for _, text in corpus.heldout("udhr", "en")]
    rows = auto(texts, add_special_tokens=False)["input_ids"]
    start = 1 if auto.bos_token else 0
    expected = bits(model, start, rows)
    assert row["tokens"] == sum(map(len, rows))
    assert row["bytes"] == sum(len(t.encode()) for t in texts)
    assert row["bits"] == pytest.approx(expected.sum(), rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(expected.sum() / row["bytes"], 1e-5)
    # The corpus's frequencies are of other tokens: a gap, not a wrong number.
    assert row["baselines"]["unigram"] is None
    assert row["baselines"]["xz"] > 0


def test_long_texts_are_scored_in_the_model_s_own_window(corpus, config, tmp_path):
    """Of 512 tokens, in rows as long as a text needs; or in one that is asked for."""
    texts = [t for _, t in corpus.heldout("udhr", "en")]
    byte_level(tmp_path, texts, True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=416, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            bos_token_id=1, eos_token_id=0, initializer_range=0.3,
        )
    ).float().eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    cfg, params, _, mesh = load_model.load_params(tmp_path)
    # Rows of 64, so that there are longer ones and full ones.
    data = dataclasses.replace(cfg.data, seq_len=64)
    compute = dataclasses.replace(cfg.compute, loss_chunk=32, dtype="float32")
    cfg = dataclasses.replace(cfg, data=data, compute=compute)
    own = HFTokenizer(tmp_path)
    joined = " ".join(texts)
    long = own.decode(own.encode(joined)[:700]), own.decode(own.encode(joined)[:300])
    units = [("a", long[0]), ("b", long[1]), ("c", texts[0][:60])]

    class Texts:
        def __init__(self):
            self.manifest = {"heldout": {"x": {"parallel": False}}}

        def heldout_sets(self):
            return {"x": ["en"]}

        def heldout(self, name, language):
            return units

        def packed(self, name, language):
            return {}

        def tokenizer(self):
            return corpus.tokenizer()

    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        build = functools.partial(
            heldout.HeldoutEvaluator, cfg, Texts(), mesh,
            Transformer(cfg.model, cfg.compute), None, own,
        )  # fmt: skip
        for window in (None, 128):
            evaluator = build(window=window)
            shapes = {b["inputs"].shape[1] for b in evaluator._batches}
            assert shapes == ({64, 512} if window is None else {64, 128})
            sums = evaluator.unit_sums(params)
            n = window or 512
            for (_, text), (found, _) in zip(units, sums, strict=True):
                expected, ids, done = 0.0, own.encode(text), 0
                while done < len(ids):
                    at = 0 if not done else done - n // 2
                    end = min(at + n, len(ids))
                    part = [1, *ids][at : end + 1]
                    with torch.inference_mode():
                        out = model(torch.tensor([part])).logits[0, :-1].double()
                    nll = -torch.log_softmax(out, -1)[range(len(part) - 1), part[1:]]
                    expected += float(nll[done - at :].sum())
                    done = end
                assert found == pytest.approx(expected, rel=1e-4)
        with pytest.raises(UserError, match="513 tokens is beyond"):
            build(window=513)
    # Tasks have the same window, what is written included.
    task = tasks.load_task("cldr_names", ["en"], 1)
    evaluate = stored_model.evaluate_model
    run = functools.partial(evaluate, tmp_path, [task], heldout=False)
    result, rows = run(window=16)
    assert rows == {"cldr_names": []}
    aside = result["tasks"]["cldr_names"]["set_aside"]
    assert list(aside) == ["longer than the model's window"]
    with pytest.raises(UserError, match="513 tokens is beyond"):
        run(window=513)


@pytest.mark.slow
def test_generation_from_folder_run_and_quantised(imported, corpus, tmp_path, capfd):
    folder, model = imported
    run, small = tmp_path / "run", tmp_path / "int8"
    assert cli.main(["import-hf", str(folder), str(run)]) == 0
    # Neither corpus nor original folder is needed any more.
    assert cli.main(["quantize", str(run), str(small), "--no-eval"]) == 0
    capfd.readouterr()
    texts = []
    for place in (folder, run, run / "checkpoints" / "0", small):
        argv = ["generate", str(place), "--prompt", PROMPT, "--max-tokens", "24"]
        argv += ["--temperature", "0"]
        assert cli.main(argv) == 0
        texts.append(capfd.readouterr().out.removesuffix("\n"))
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    ids = auto(PROMPT)["input_ids"]  # BOS is named there, but not written
    with torch.inference_mode():
        made = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=24, do_sample=False, pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
    tokenizer = HFTokenizer(folder)
    known = [i for i in made if i < tokenizer.vocab_size]
    assert texts[0] == PROMPT + tokenizer.decode(known)
    assert texts[1] == texts[2] == texts[0]
    assert texts[3].startswith(PROMPT)
    argv = ["eval", str(small), "--corpus", str(corpus.folder), "--languages", "ru"]
    assert cli.main(argv) == 0
    if folder.name == "random-qwen3":  # int8 costs little
        say = [
            stored_model.evaluate_heldout(x, corpus.folder, ["ru"])[0]["sets"]["udhr"]
            for x in (folder, small)
        ]
        a, b = (s["macro"]["bits_per_byte"] for s in say)
        assert abs(a - b) < 0.01 * a


def test_a_folder_is_read_straight_onto_the_mesh(imported):
    folder, model = imported
    with runs_on(8):
        cfg, params, meta, mesh = load_model.load_params(folder)
    assert mesh.size == jax.device_count() == 8
    table = params["embedding"]
    np.testing.assert_array_equal(table, model.get_input_embeddings().weight.detach())
    for leaf in (table, params["layers"]["mlp"]["gate"]):
        assert leaf.addressable_shards[0].data.size == leaf.size // 8
    assert (cfg.model.vocab_size, meta.step) == (416, 0)
    assert meta.lineage["imported"]["folder"] == folder.name


def test_the_door(imported, corpus, tmp_path):
    """One interface, whatever the model is; only the right tokenizer is handed out."""
    folder, _ = imported
    fingerprint = HFTokenizer(folder).fingerprint
    own = corpus.tokenizer()
    found = open_tokenizer(folder, fingerprint)
    assert isinstance(found, HFTokenizer)
    where = corpus.folder
    ours = open_tokenizer(folder, own.fingerprint, where)
    assert isinstance(ours, Tokenizer)
    for tokenizer in (found, ours):
        text = "дом 日本 \U0001f468\u200d\U0001f469 e\u0301"
        ids = tokenizer.encode(text)
        assert tokenizer.byte_lengths()[ids].sum() == len(
            tokenizer.decode(ids).encode()
        )
        stream = TextStream(tokenizer)
        pieces = [stream([i]) for i in ids] + [stream([], last=True)]
        assert "".join(pieces) == tokenizer.decode(ids)
        assert tokenizer.eos_id in tokenizer.stop_ids
        assert tokenizer.start_id == (
            tokenizer.stop_ids[0] if tokenizer.bos_id is None else tokenizer.bos_id
        )
        # What it writes is itself.
        out = tmp_path / type(tokenizer).__name__
        out.mkdir()
        tokenizer.write(out)
        again = open_tokenizer(out, tokenizer.fingerprint)
        assert again.encode(text) == ids
        assert (again.stop_ids, again.bos_id) == (tokenizer.stop_ids, tokenizer.bos_id)
    with pytest.raises(UserError, match="imported without a tokenizer"):
        open_tokenizer(folder, None)
    with pytest.raises(UserError, match="another tokenizer"):
        open_tokenizer(folder, "0" * 64, where)


@pytest.mark.slow
def test_eval_runs_tasks(imported, tmp_path, capsys):
    """`gamayun eval HF-DIR --tasks`: JSON that can be reproduced, items, a page."""
    folder, _ = imported
    out = tmp_path / "out"
    args = ["--tasks", "udhr", "cldr_facts", "cldr_names", "--languages", "en", "tr"]
    command = ["eval", str(folder), *args, "--limit", "4", "--out", str(out)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "eval.json").read_text())
    assert list(result["tasks"]) == ["udhr", "cldr_facts", "cldr_names"]
    assert result["model"]["path"] == str(folder)
    assert result["versions"]["jax"] == jax.__version__
    for name, task in result["tasks"].items():
        rows = results.read_items(out / "items", name)
        assert [r["language"] for r in rows] == ["en"] * 4 + ["tr"] * 4
        assert set(task["languages"]) == {"en", "tr"}
        assert task["languages"]["tr"]["items"] == 4
        assert len(task["hash"]) == 64
        assert name in printed
    page = (out / "index.html").read_text()
    assert "cldr_facts" in page
    assert "<svg" in page
    assert cli.main(["eval", str(folder), "--tasks", "udhr", "--languages", "xx"]) == 2
    assert "no task has items in language 'xx'; there are: de, en" in (
        capsys.readouterr().err
    )
    assert cli.main(["eval", str(folder)]) == 2
    assert "or --tasks" in capsys.readouterr().err
