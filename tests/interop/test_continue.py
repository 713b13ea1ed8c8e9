"""Published models, made small here with `transformers`, trained on and given back."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch and transformers have their own
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
import imported
from conftest import runs_on, slow_but, small_config, started
from test_hf import assert_close, ours, theirs

from gamayun_jax import cli, train
from gamayun_jax import config as c
from gamayun_jax.config import TokenizerConfig, UserError
from gamayun_jax.data import build
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.interop import huggingface
from gamayun_jax.interop.hf_config import config_from_hf
from gamayun_jax.model import sharding
from gamayun_jax.training.checkpoint import Checkpoints

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

KINDS = {  # (config, writes BOS, tied)
    "llama": (transformers.LlamaConfig, True, False),
    "qwen2": (transformers.Qwen2Config, False, True),
    "qwen3": (transformers.Qwen3Config, False, True),
}


def quiet(_):
    pass


def held_texts(languages):
    for language in languages:
        path = c.DEMO_CORPUS / f"heldout/udhr.{language}.jsonl.zst"
        yield from (t for _, t in read_units(path))


def read_units(path):
    import zstandard

    with zstandard.open(path, "rt", encoding="utf-8") as f:
        for line in f:
            unit = json.loads(line)
            yield unit["id"], unit["text"]


def continued(cfg, model, tokenizer, folder, **transition):
    """The config that goes on with a model, on a corpus of the given tokenizer."""
    data = dataclasses.replace(cfg.data, corpus=str(folder))
    corpus = dataclasses.replace(
        cfg.corpus, tokenizer=TokenizerConfig(model=str(tokenizer))
    )
    first = dataclasses.replace(
        cfg.stages[0], transition=c.TransitionConfig(**transition)
    )
    cfg = dataclasses.replace(
        cfg,
        model=model,
        data=data,
        corpus=corpus,
        stages=(first, *cfg.stages[1:]),
        compute=c.ComputeConfig(dtype="float32"),
        log=c.LogConfig(every_steps=1, tensorboard=False),
    )
    build.build(cfg, folder, workers=1, progress=False)
    return cfg


@pytest.fixture(
    scope="module",
    params=slow_but("llama", of=("llama", "qwen3", "qwen2")),
)
def model(request, tmp_path_factory):
    """(folder that transformers wrote, its model, our config of a run on it)."""
    kind, bos, tied = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    folder = imported.byte_level(
        root / f"small-{request.param}", held_texts(["en", "ru"]), bos=bos
    )
    template = "{% for m in messages %}<|im_end|>{{ m['content'] }}{% endfor %}\n"
    (folder / "chat_template.jinja").write_text(template)
    torch.manual_seed(0)
    shape = kind(
        vocab_size=416,  # padded, as published models are
        hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=256, tie_word_embeddings=tied,
        bos_token_id=1 if bos else None, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_config(shape).float().eval()
    made.save_pretrained(folder)
    ours = config_from_hf(json.loads((folder / "config.json").read_text()))
    cfg = continued(small_config(root), ours, folder, root / "corpus")
    return folder, made, cfg


def check_export(run, cfg, folder, tokenizer, tmp_path):
    """The run's newest checkpoint as transformers loads it: the same logits and ids."""
    out = tmp_path / "exported"
    huggingface.export_hf(run, out)
    found, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys"))
    source = json.loads((folder / "config.json").read_text())
    assert (
        json.loads((out / "config.json").read_text())["architectures"]
        == (source["architectures"])
    )
    store = Checkpoints(run / "checkpoints", read_only=True)
    abstract = sharding.place_abstract(
        huggingface.abstract_params(cfg.model), sharding.make_mesh(c.MeshConfig())
    )
    params = jax.tree.map(np.asarray, store.restore_params(store.latest(), abstract))
    store.close()
    text = "Все люди рождаются free and equal."
    theirs_of = transformers.AutoTokenizer.from_pretrained(out)
    first = transformers.AutoTokenizer.from_pretrained(tokenizer)
    assert theirs_of(text)["input_ids"] == first(text)["input_ids"]
    assert theirs_of.chat_template == first.chat_template
    ids_BT = np.array([first(text)["input_ids"]], np.int32)
    assert_close(theirs(found.eval(), ids_BT), ours(cfg.model, params, ids_BT), 1e-4)
    return params


def records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_goes_on_and_comes_back(model, tmp_path):
    folder, made, cfg = model
    begun = started(cfg, tmp_path / "begun", folder)
    assert any("has a chat template" in text for text in begun.log)
    ids_BT = np.random.default_rng(0).integers(0, 416, (2, 40)).astype("i4")
    params = jax.tree.map(np.asarray, begun.state.params)
    assert_close(ours(cfg.model, params, ids_BT), theirs(made, ids_BT), 1e-4)
    assert not any(np.any(x) for x in jax.tree.leaves(begun.state.opt_state))
    origin = begun.lineage["init_from"]
    assert origin["checkpoint"] == folder.name
    assert origin["lineage"]["imported"]["model_type"] == made.config.model_type

    with runs_on(8):
        assert train.train(cfg, tmp_path / "run", folder, log=quiet) == 0
        # The same command again, and with another model.
        assert train.train(cfg, tmp_path / "run", folder, log=quiet) == 0
    shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(UserError, match=f"began from {folder.name}, not from other"):
        train.train(cfg, tmp_path / "run", tmp_path / "other", log=quiet)
    after = check_export(tmp_path / "run", cfg, folder, folder, tmp_path)
    assert not np.array_equal(after["embedding"], params["embedding"])
    rates = [r["lr"] for r in records(tmp_path / "run")]
    assert rates[0] < max(rates)  # warmed up from nothing

    with runs_on(1):
        assert train.train(cfg, tmp_path / "one", folder, log=quiet) == 0
    for a, b in zip(records(tmp_path / "run"), records(tmp_path / "one"), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


def test_an_imported_run_is_the_same_beginning(model, tmp_path):
    folder, _, cfg = model
    huggingface.import_hf(folder, tmp_path / "imported")
    a = started(cfg, tmp_path / "a", folder)
    b = started(cfg, tmp_path / "b", tmp_path / "imported")
    jax.tree.map(np.testing.assert_array_equal, a.state.params, b.state.params)
    again = dataclasses.replace(
        cfg.corpus, tokenizer=TokenizerConfig(model=str(tmp_path / "imported"))
    )
    same = dataclasses.replace(cfg, corpus=again)
    build.build(same, Path(cfg.data.corpus), workers=1, progress=False)  # is there


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["pieces", "mean"])
def test_with_another_tokenizer(model, scheme, tmp_path):
    folder, _, cfg = model
    other = imported.byte_level(
        tmp_path / "hf", held_texts(["tr", "ru"]), bos=False, size=440
    )
    shape = dataclasses.replace(cfg.model, vocab_size=448)
    new = continued(cfg, shape, other, tmp_path / "corpus", embeddings=scheme)
    with pytest.raises(UserError, match=r"transition.embeddings=\"pieces\""):
        started(
            continued(cfg, shape, other, tmp_path / "corpus"), tmp_path / "no", folder
        )
    with pytest.raises(UserError, match=rf"embeddings='{scheme}' needs.*--init-from"):
        started(new, tmp_path / "none")
    run = started(new, tmp_path / "begun", folder)
    counts = run.lineage["init_from"]["embeddings"]
    assert counts["kept"] + counts["pieces"] + counts["mean"] == 448
    assert counts["kept"] > 256
    assert (counts["pieces"] > 0) == (scheme == "pieces")
    assert any(f"{counts['kept']} kept" in line for line in run.log)
    assert train.train(new, tmp_path / "run", folder, log=quiet) == 0
    check_export(tmp_path / "run", new, folder, other, tmp_path)


def test_more_rows_for_the_same_tokenizer(model, tmp_path):
    folder, made, cfg = model
    shape = dataclasses.replace(cfg.model, vocab_size=512)
    new = continued(cfg, shape, folder, Path(cfg.data.corpus), embeddings="mean")
    run = started(new, tmp_path / "run", folder)
    size = open_corpus(Path(cfg.data.corpus)).tokenizer().vocab_size
    counts = run.lineage["init_from"]["embeddings"]
    assert (counts["kept"], counts["mean"]) == (size, 512 - size)
    ids_BT = np.random.default_rng(0).integers(0, size, (2, 40)).astype("i4")
    params = jax.tree.map(np.asarray, run.state.params)
    found = ours(shape, params, ids_BT)[..., :size]
    assert_close(found, theirs(made, ids_BT)[..., :size], 1e-4)


def test_refuses_another_shape(model, tmp_path):
    folder, _, cfg = model
    shape = dataclasses.replace(cfg.model, d_ff=56)
    with pytest.raises(UserError, match=r"model.d_ff is 48 there and 56 here"):
        started(dataclasses.replace(cfg, model=shape), tmp_path / "run", folder)


def test_the_commands(model, tmp_path, capsys):
    folder, _, cfg = model
    path = tmp_path / "config.py"
    path.write_text(
        "from gamayun_jax import config as c\n"
        f"def get_config():\n    return c.from_json({c.to_json(cfg)!r})\n"
    )
    start = ["curriculum", str(path), "--init-from", str(folder)]
    assert cli.main(start) == 0
    assert "en/help" in capsys.readouterr().out
    assert cli.main(["corpus", "inspect", cfg.data.corpus]) == 0
    assert cli.main(["tokenizer", "report", cfg.data.corpus]) == 0
