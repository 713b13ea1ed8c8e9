"""Models in and out, against `transformers` with random weights on CPU."""

import dataclasses
import functools
import itertools
import json
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch and transformers have their own
    # Reference only, and large: requirements-interop.txt has them.
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

from conftest import meta_of

from gamayun_jax import config as c
from gamayun_jax.config import ComputeConfig, ModelConfig, RopeScaling, UserError
from gamayun_jax.data.hf_tokenizer import HFTokenizer
from gamayun_jax.data.tokenizer import Tokenizer
from gamayun_jax.interop import export_tokenizer, hf_config, hf_weights, huggingface
from gamayun_jax.interop.export_tokenizer import to_tokenizers
from gamayun_jax.model import presets, sharding
from gamayun_jax.model.transformer import Transformer, logits
from gamayun_jax.model.weights import abstract_params, parameter_count, parameter_path
from gamayun_jax.training import checkpoint, lineage, resume, step
from gamayun_jax.training.run_meta import RunMeta

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
torch.set_num_threads(1)  # small matrices: threads would wait for each other
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = ModelConfig(
    vocab_size=61, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, head_dim=10,
    d_ff=40, max_seq_len=64,
)  # fmt: skip
SCALED = RopeScaling(8.0, 1.0, 4.0, 16)
CASES = {
    # LLaMA-3.2: scaled positions far past the original context, head dim D / N
    "llama": dataclasses.replace(SMALL, head_dim=6, rope_theta=100.0,
                                 rope_scaling=SCALED, norm_eps=1e-5),
    "llama_mha_untied": dataclasses.replace(SMALL, num_kv_heads=4,
                                            tie_embeddings=False),
    "qwen2": dataclasses.replace(SMALL, qkv_bias=True, head_dim=6),
    "qwen2_mqa_untied": dataclasses.replace(SMALL, qkv_bias=True, num_kv_heads=1,
                                            tie_embeddings=False, vocab_size=67),
    "qwen3": dataclasses.replace(SMALL, qk_norm=True),
    "qwen3_mqa_untied_scaled": dataclasses.replace(
        SMALL, qk_norm=True, num_kv_heads=1, tie_embeddings=False, rope_scaling=SCALED
    ),
}  # fmt: skip
FLOAT32 = ComputeConfig(dtype="float32")
LENGTH = 48


def random_params(cfg, seed=0):
    """Parameters large enough that attention looks at something."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        middle = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.float32(middle + 0.25 * rng.normal(size=x.shape))

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def write_folder(cfg, params, folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config.config_to_hf(cfg)))
    hf_weights.write_weights(params, cfg, folder, **options)
    return folder


@functools.cache
def forward(cfg):
    def apply(params, tokens_BT, positions_BT, segments_BT):
        x_BTD = Transformer(cfg, FLOAT32).apply(
            {"params": params}, tokens_BT, positions_BT, segments_BT
        )
        return logits(params, x_BTD)

    return jax.jit(apply)


def ours(cfg, params, tokens_BT, positions_BT=None, segments_BT=None):
    B, T = tokens_BT.shape
    if positions_BT is None:
        positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    if segments_BT is None:
        segments_BT = np.ones((B, T), np.int32)
    return np.asarray(forward(cfg)(params, tokens_BT, positions_BT, segments_BT))


def theirs(model, tokens_BT, **kwargs):
    with torch.inference_mode():
        out = model(torch.tensor(tokens_BT, dtype=torch.long), **kwargs)
    return out.logits.numpy()


def assert_close(a, b, tolerance):
    """The greatest difference over the greatest magnitude."""
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


QUICK = ("llama", "qwen2_mqa_untied", "qwen3")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in CASES
    ],
)
def case(request, tmp_path_factory):
    """(cfg, our parameters, the model of transformers that loaded our files)."""
    cfg = CASES[request.param]
    params = random_params(cfg)
    folder = write_folder(cfg, params, tmp_path_factory.mktemp("out") / "model")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys"))
    kind = request.param.split("_")[0]
    assert type(model).__name__ == hf_config.ARCHITECTURES[kind]
    return cfg, params, model.eval()


def some_tokens(cfg, B=3, T=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (B, T)).astype("i4")


def test_logits_out(case):
    cfg, params, model = case
    tokens_BT = some_tokens(cfg)
    assert_close(ours(cfg, params, tokens_BT), theirs(model, tokens_BT), 1e-5)


def test_logits_in(case, tmp_path):
    cfg, params, model = case
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    data = json.loads((tmp_path / "config.json").read_text())
    read = hf_config.config_from_hf(data)
    assert read == dataclasses.replace(cfg, init_std=read.init_std)
    back = hf_weights.read_weights(tmp_path, read)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_left_padding_and_packed_documents(case):
    cfg, params, model = case
    long, short = some_tokens(cfg, 1, 30, 1), some_tokens(cfg, 1, 18, 2)
    alone = theirs(model, long), theirs(model, short)
    # Two rows, the second padded on the left: the same for both libraries.
    tokens_BT = np.stack([long[0], np.pad(short[0], (12, 0))])
    valid_BT = np.stack([np.ones(30, int), np.repeat([0, 1], [12, 18])])
    positions_BT = np.maximum(np.cumsum(valid_BT, 1) - 1, 0)
    padded = ours(
        cfg, params, tokens_BT, positions_BT.astype("i4"), valid_BT.astype("i4")
    )
    their_padded = theirs(
        model,
        tokens_BT,
        attention_mask=torch.tensor(valid_BT),
        position_ids=torch.tensor(positions_BT),
    )
    for found in (padded, their_padded):
        assert_close(found[:1], alone[0], 1e-5)
        assert_close(found[1:, 12:], alone[1], 1e-5)
    # One row, one document after the other.
    packed = np.concatenate([long, short], axis=1)
    positions = np.concatenate([np.arange(30), np.arange(18)])[None].astype("i4")
    segments = np.repeat([[1, 2]], [30, 18], axis=1).astype("i4")
    found = ours(cfg, params, packed, positions, segments)
    assert_close(found[:, :30], alone[0], 1e-5)
    assert_close(found[:, 30:], alone[1], 1e-5)


def test_greedy_text(case):
    cfg, params, model = case
    tokens_BT = some_tokens(cfg, 2, 20, 3)
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor(tokens_BT, dtype=torch.long),
            attention_mask=torch.ones(2, 20, dtype=torch.long),
            max_new_tokens=LENGTH - 20, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        ).numpy()  # fmt: skip
    text = np.pad(tokens_BT, ((0, 0), (0, LENGTH - 20)))
    for t in range(20, LENGTH):
        text[:, t] = ours(cfg, params, text)[:, t - 1].argmax(-1)
    np.testing.assert_array_equal(text, expected)


def test_gradients(case):
    cfg, params, model = case
    tokens_BT = some_tokens(cfg, 2, LENGTH, 4)
    labels = torch.tensor(tokens_BT, dtype=torch.long)
    model.zero_grad()
    model(labels, labels=labels).loss.backward()
    expected = {k: v.grad.numpy() for k, v in model.named_parameters()}

    def loss(params):
        out = forward(cfg)(
            params, tokens_BT, np.broadcast_to(np.arange(LENGTH), (2, LENGTH)),
            np.ones((2, LENGTH), np.int32),
        )[:, :-1]  # fmt: skip
        lse = jax.nn.logsumexp(out, axis=-1)
        target = jnp.take_along_axis(out, jnp.array(tokens_BT)[:, 1:, None], -1)
        return jnp.mean(lse - target[..., 0])

    grads = jax.jit(jax.grad(loss))(params)
    flat = jax.tree_util.tree_flatten_with_path(grads)[0]
    grads = {parameter_path(path): np.asarray(x) for path, x in flat}
    for t in hf_weights.tensors_of(cfg):
        part = grads[t.path] if t.layer is None else grads[t.path][t.layer]
        found = np.empty(t.shape, np.float32)
        hf_weights.convert(found, part, t.transposed)
        assert_close(found, expected.pop(t.name), 1e-4)
    assert not expected


# --- configuration --------------------------------------------------------------

# config.json of the published models, as far as it describes the architecture.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False,
    "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
    "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PUBLISHED = {
    "llama3p2_1b": (LLAMA, 1_235_814_400),
    "qwen2p5_1p5b": (QWEN2, 1_543_714_304),
    "qwen3_1p7b": (QWEN3, 1_720_574_976),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_shapes(name):
    data, count = PUBLISHED[name]
    cfg = getattr(presets, name)()
    assert hf_config.config_from_hf(data) == cfg
    assert parameter_count(cfg) == count
    kind = type(transformers.AutoConfig.for_model(data["model_type"]))
    with torch.device("meta"):
        config = kind.from_dict(dict(data))
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {k: tuple(v.shape) for k, v in model.named_parameters()}
    assert {t.name: t.shape for t in hf_weights.tensors_of(cfg)} == shapes
    # transformers 5 writes the rotary parameters as one field.
    new = json.loads(config.to_json_string())
    assert "rope_parameters" in new
    assert hf_config.config_from_hf(new) == cfg
    assert hf_config.config_from_hf(hf_config.config_to_hf(cfg)) == cfg


def test_json_of_others_has_one_kind_of_number():
    """2048.0 for 2048: written by tools of languages that have no integers."""
    scaling = {**LLAMA["rope_scaling"], "original_max_position_embeddings": 8192.0}
    floats = {"hidden_size": 2048.0, "vocab_size": 128256.0, "rope_scaling": scaling}
    read = hf_config.config_from_hf({**LLAMA, **floats})
    assert read == presets.llama3p2_1b()
    assert type(read.d_model) is type(read.rope_scaling.original_max_len) is int
    with pytest.raises(UserError, match="config.json: hidden_size: expected int"):
        hf_config.config_from_hf({**LLAMA, "hidden_size": 2048.5})


def test_gamayun_is_a_qwen3():
    data = hf_config.config_to_hf(presets.gamayun_1p5b(), "bfloat16")
    assert data["architectures"] == ["Qwen3ForCausalLM"]
    assert hf_config.config_from_hf(data) == presets.gamayun_1p5b()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "architecture.*experts"),
        ({"model_type": "gemma2", "hidden_act": "gelu"}, "architecture.*activation"),
        ({"num_experts": 4}, "mixture of experts"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
         "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
          "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'.*disagree"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0},
          "rope_scaling": {"rope_type": "default"}}, "disagree about 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
         "'full_attention'"),
        ({"is_causal": False}, "is_causal=False"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"model_type": "llama", "architectures": None, "sliding_window": 64,
          "use_sliding_window": None}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Classification"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"model_type": None}, "architecture None"),
        ({"num_key_value_heads": 5}, "num_kv_heads"),
    ],
)  # fmt: skip
def test_refuses_what_it_cannot_do(change, words):
    with pytest.raises(UserError, match=words) as e:
        hf_config.config_from_hf({**QWEN3, **change})
    assert "\n" not in str(e.value)


def test_accepts_what_changes_nothing():
    """Keys that are off, and a window that is not switched on."""
    window = {k: v for k, v in QWEN2.items() if k != "use_sliding_window"}
    expected = hf_config.config_from_hf(QWEN2)
    for change in (
        {**window, "sliding_window": 64, "max_window_layers": 0},
        {**window, "use_sliding_window": False, "max_window_layers": 0},
        {**QWEN2, "is_causal": True, "mlp_bias": None, "pruned_heads": {}},
        {**QWEN2, "attention_bias": True},  # Qwen2 of transformers does not read it
        {**QWEN2, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
         "rope_scaling": None},
    ):  # fmt: skip
        assert hf_config.config_from_hf(change) == expected
        loaded = transformers.Qwen2Config(**change)
        assert set(loaded.layer_types) == {"full_attention"}


def test_every_key_is_used_harmless_or_named():
    for data, _ in PUBLISHED.values():
        assert hf_config.unknown_keys(data) == []
    for kind in ("Llama", "Qwen2", "Qwen3"):  # all that transformers writes
        data = getattr(transformers, f"{kind}Config")().to_diff_dict()
        assert hf_config.unknown_keys(data) == []
        assert hf_config.unknown_keys({**data, "new_trick": 1}) == ["new_trick"]


def test_no_architecture_has_both_features():
    with pytest.raises(UserError, match=r"model\.qkv_bias=True has no place"):
        hf_config.config_to_hf(dataclasses.replace(SMALL, qk_norm=True, qkv_bias=True))


@pytest.mark.parametrize(
    ("name", "value"), [("norm_eps", 0.5), ("init_std", 0.5), ("tie_embeddings", False)]
)
def test_no_field_of_a_model_is_lost_in_an_export(name, value, monkeypatch):
    cfg = dataclasses.replace(CASES["llama"], **{name: value})
    assert hf_config.config_from_hf(hf_config.config_to_hf(cfg)) == cfg
    monkeypatch.delitem(hf_config.FIELDS, name)  # as if it had been forgotten
    default = ModelConfig.__dataclass_fields__[name].default
    hf_config.config_to_hf(dataclasses.replace(cfg, **{name: default}))
    with pytest.raises(UserError, match=rf"model\.{name}={value} has no place"):
        hf_config.config_to_hf(cfg)


# --- weights --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_in_shards(tmp_path, dtype):
    cfg = CASES["qwen3"]
    params = random_params(cfg)
    write_folder(cfg, params, tmp_path, max_shard_bytes=4000, dtype=dtype)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    back = hf_weights.read_weights(tmp_path, cfg)
    jax.tree.map(np.testing.assert_array_equal, back, rounded)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    tokens_BT = some_tokens(cfg)
    assert_close(ours(cfg, rounded, tokens_BT), theirs(model, tokens_BT), 1e-5)


def test_read_onto_a_mesh(tmp_path):
    cfg = dataclasses.replace(CASES["qwen3"], d_model=32, vocab_size=64)
    params = random_params(cfg)
    write_folder(cfg, params, tmp_path)
    mesh = sharding.make_mesh(c.MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = sharding.parameter_shardings(abstract_params(cfg), mesh)
    back = hf_weights.read_weights(tmp_path, cfg, shardings)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert back["layers"]["mlp"]["gate"].sharding == shardings["layers"]["mlp"]["gate"]
    # Each device holds its part only: the table is divided over fsdp and tensor.
    assert back["embedding"].addressable_shards[0].data.size == 64 * 32 // 4


def edit(folder, change):
    """Apply `change` to the tensors of a folder's one file."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_a_tied_head_may_be_stored_too(tmp_path):
    cfg = CASES["qwen3"]
    params = random_params(cfg)
    write_folder(cfg, params, tmp_path)
    table = np.asarray(params["embedding"])
    edit(tmp_path, lambda t: t.update({"lm_head.weight": table}))
    edit(tmp_path, lambda t: t.update({"model.rotary_emb.inv_freq": table[0]}))
    jax.tree.map(
        np.testing.assert_array_equal, hf_weights.read_weights(tmp_path, cfg), params
    )
    edit(tmp_path, lambda t: t.update({"lm_head.weight": table + 1}))
    with pytest.raises(UserError, match=r"lm_head\.weight.*no place"):
        hf_weights.read_weights(tmp_path, cfg)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), f"lacks tensor '{NORM}'"),
        (lambda t: t.update(extra=t[NORM]), "tensor 'extra'"),
        (lambda t: t.update({NORM: t[NORM][:-1]}), r"is \[23\].*needs \[24\]"),
        (lambda t: t.update({NORM: t[NORM] * np.nan}), "not finite"),
        (lambda t: t.update({NORM: t[NORM].astype("f8")}), "dtype F64"),
    ],
)
def test_refuses_other_tensors(tmp_path, change, words):
    write_folder(SMALL, random_params(SMALL), tmp_path / "in")
    edit(tmp_path / "in", change)
    with pytest.raises(UserError, match=words) as e:
        huggingface.import_hf(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def escaping(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {NORM: "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def disagreeing(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {NORM: "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {NORM: "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def enormous(folder, **change):
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **change}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: enormous(folder, intermediate_size=10**9), "the config needs"),
        (lambda folder: enormous(folder, num_hidden_layers=10**9), "1000000000 layers"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps({})),
            "model.safetensors cannot be read",
        ),
        (truncated, "model.safetensors cannot be read"),
        (pickled, "pickle"),
        (escaping, "only safetensors files in the same folder"),
        (disagreeing, "disagree about tensor"),
        (without_shard, "a.safetensors cannot be read"),
        (without_config, "no config.json"),
        (broken_config, "config.json is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetens"),
    ],
)
def test_refuses_damaged_folders(tmp_path, damage, words):
    folder = write_folder(SMALL, random_params(SMALL), tmp_path / "a" / "in")
    damage(folder)
    with pytest.raises(UserError, match=words) as e:
        huggingface.import_hf(folder, tmp_path / "out")
    assert "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_refuses_to_write_what_is_not_finite(tmp_path):
    params = random_params(SMALL)
    params["layers"]["mlp"]["up"] = params["layers"]["mlp"]["up"].at[1, 0, 0].set(1e6)
    with pytest.raises(UserError, match="layers/mlp/up.*float16"):
        hf_weights.write_weights(params, SMALL, tmp_path, dtype="float16")
    assert list(tmp_path.iterdir()) == []


# --- tokenizer ------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(config, tmp_path_factory):
    """Our tokenizer, and the folder that it is exported to."""
    ours = Tokenizer(f"{config.data.corpus}/tokenizer.model")
    folder = tmp_path_factory.mktemp("tokenizer")
    huggingface.write_tokenizer(ours, folder, 64)
    return ours, folder


ADVERSARIAL = [
    "", " ", "   a  b   ", "\n\n\t \n", "a\nb\tc", "\0\x01\x7f", "\u2581", " \u2581 a",
    "<s></s><unk><pad>", "<0x41><0x0A>", "e\u0301 \u00e9", "\U0001f468\u200d\U0001f469",
    "日本語のテキスト", "0123456789", "aaaaaaaaaaaaaaaaa", "abababababa" * 3,
    "\ufeff\u200b\u2047\u2585\ufffd", "Ғ҉҈\u0300\u0301", "\r\n\r\n", " " * 33 + "x",
]  # fmt: skip


def test_exported_tokenizer_gives_the_same_ids(both, corpus):
    ours, folder = both
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    read = HFTokenizer(folder)
    texts = list(ADVERSARIAL)
    for language in ("en", "ru", "tr"):
        texts += [text for _, text in corpus.heldout("udhr", language)]
    rng = np.random.default_rng(0)
    pieces = [p.replace("\u2581", " ") for p in ours.pieces]
    for _ in range(2000):
        repeat = int(rng.integers(1, 4))
        texts.append("".join(str(x) * repeat for x in rng.choice(pieces, 8)))
    expected = ours.encode_batch(texts)
    assert read.encode_batch(texts) == expected
    found = auto(texts, add_special_tokens=False)["input_ids"]
    assert found == expected
    for text, ids in zip(texts, expected, strict=True):
        assert read.decode(ids) == text
        assert auto.decode(ids) == text
    assert auto("a b")["input_ids"] == [ours.bos_id, *ours.encode("a b")]


def test_one_interface(both):
    ours, folder = both
    read = pickle.loads(pickle.dumps(HFTokenizer(folder)))
    assert isinstance(read, HFTokenizer)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        assert getattr(read, name) == getattr(ours, name)
    assert (read.start_id, read.stop_ids) == (ours.bos_id, (ours.eos_id,))
    np.testing.assert_array_equal(read.byte_lengths(), ours.byte_lengths())
    assert read.fingerprint != ours.fingerprint
    with pytest.raises(UserError, match="not valid Unicode"):
        read.encode("\ud800")
    with pytest.raises(UserError, match="outside"):
        read.decode([read.vocab_size])


def byte_level(folder, **config):
    """A tokenizer like Qwen's: byte-level BPE with an end-of-text token."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tok = tokenizers.Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|im|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(["мир и труд, мир и май"] * 9, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tok


def test_byte_level_tokenizer(tmp_path):
    byte_level(tmp_path, eos_token={"content": "<|im|>"}, bos_token=None)
    generation = {"bos_token_id": 0, "eos_token_id": [1, 0]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tok = HFTokenizer(tmp_path)
    assert (tok.bos_id, tok.start_id, tok.eos_id, tok.stop_ids) == (None, 0, 1, (1, 0))
    sizes = tok.byte_lengths()
    assert sizes[:2].tolist() == [0, 0]
    for text in ("мир <|end|> \n \0", "日本 \u2581"):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())


def test_refuses_tokenizers(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        HFTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        HFTokenizer(tmp_path)
    byte_level(tmp_path)
    with pytest.raises(UserError, match="end-of-text"):
        HFTokenizer(tmp_path)


def small_tokenizer(kind):
    """One of each kind that language models have, of a few hundred ids."""
    from tokenizers import Tokenizer as Tok
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    texts = ["the cat sat on the mat, 1999", "мир и труд\n\n12"] * 3
    special = ["<unk>", "<s>", "</s>", "<|im|>"]
    spelled = [f"<0x{b:02X}>" for b in range(256)]
    if kind == "bytes":
        tok = Tok(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet,
            show_progress=False,
        )  # fmt: skip
        tok.train_from_iterator(texts, trainer)
        return json.loads(tok.to_str())
    if kind == "sentencepiece":
        tok = Tok(models.BPE())
        tok.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=[*special, *spelled], show_progress=False
        )
    else:
        tok = Tok(models.Unigram())
        tok.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=special, unk_token="<unk>",
            show_progress=False,
        )  # fmt: skip
    tok.train_from_iterator(texts, trainer)
    tok.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    data = json.loads(tok.to_str())
    data["added_tokens"] = data["added_tokens"][: len(special)]
    data["model"]["byte_fallback"] = True
    if kind == "sentencepiece":
        data["model"] |= {"unk_token": "<unk>", "fuse_unk": True}
    else:
        data["model"]["vocab"] += [[s, -20.0] for s in spelled]
    return data


PROMPTS = [
    "the cat", " the cat", "", "<s>the <|im|>cat</s> on", "мир 1999 ünï <0x41>",
    "a\n\n b  <unk> [PAD] <tool>  x", "<|endoftext|>don't 123",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram"])
def test_prompts_are_encoded_as_by_transformers(kind, tmp_path):
    """BOS named or not, written by the post-processor or not, add_bos_token, settings
    in one file or another, and the classes of transformers that build their own."""
    from tokenizers import Tokenizer as Tok
    from tokenizers import processors

    data = small_tokenizer(kind)
    template = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tok = Tok.from_str(json.dumps(data))
    tok.post_processor = template
    writing = tok.to_str()
    settings = [
        ("llama", {"tokenizer_class": "PreTrainedTokenizerFast", **add})
        for add in ({}, {"add_bos_token": True}, {"add_bos_token": False})
    ]
    # Of other kinds these classes of transformers make nonsense.
    if kind != "unigram":
        settings += [
            ("llama", {"tokenizer_class": "LlamaTokenizerFast"}),
            ("llama", {}),
        ]
    if kind == "bytes":
        names = ("GPT2Tokenizer", "Qwen2TokenizerFast")
        settings += [("llama", {"tokenizer_class": name}) for name in names]
        settings += [("qwen2", {}), ("qwen3", {})]
    written = [data["added_tokens"][i] for i in range(4)]
    table = {str(t["id"]): {k: t[k] for k in t if k != "id"} for t in written}
    seen = set()
    for bos, writes, place, (arch, own) in itertools.product(
        (True, False), (True, False), ("config", "map", "decoder"), settings
    ):
        folder = tmp_path / str(len(seen))
        folder.mkdir(exist_ok=True)
        named = {"eos_token": "</s>", "pad_token": "[PAD]"}
        named |= {"bos_token": "<s>"} if bos else {}
        if place == "map":
            more = {**named, "additional_special_tokens": ["<tool>"]}
            (folder / "special_tokens_map.json").write_text(json.dumps(more))
        elif place == "decoder":
            own = {**own, **named, "added_tokens_decoder": table}
        else:
            own = {**own, **named}
        text = writing if writes else json.dumps(data)
        (folder / "tokenizer.json").write_text(text)
        (folder / "tokenizer_config.json").write_text(json.dumps(own))
        (folder / "config.json").write_text(json.dumps({"model_type": arch}))
        auto = transformers.AutoTokenizer.from_pretrained(folder)
        read = HFTokenizer(folder)
        expected = [auto(p)["input_ids"] for p in PROMPTS]
        where = bos, writes, place, arch, own
        assert [read.encode_prompt(p) for p in PROMPTS] == expected, where
        assert read.prefix_ids == ((1,) if writes else ()), where
        # What it writes, without config.json, is itself.
        out = folder / "out"
        out.mkdir()
        read.write(out)
        again = pickle.loads(pickle.dumps(HFTokenizer(out)))
        assert [again.encode_prompt(p) for p in PROMPTS] == expected, where
        assert (again.bos_id, again.start_id) == (read.bos_id, read.start_id)
        # Documents: no BOS, control tokens are text (to Unigram, pieces of its own).
        ids = read.encode("<s>мир<|im|>")
        if kind != "unigram":
            assert not set(ids) & {1, 2, 3}, where
            assert read.decode(ids).strip(" ") == "<s>мир<|im|>"
            assert read.encode_prompt("<s>мир<|im|>", literal=True)[-len(ids) :] == ids
        seen.add(str(where))
    assert len(seen) == len(settings) * 12


# --- whole folders --------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A run folder with a checkpoint of random weights, as training writes it."""
    run = tmp_path_factory.mktemp("run") / "run"
    params = random_params(config.model)
    store = checkpoint.Checkpoints(run / "checkpoints")
    tokenizer = Tokenizer(f"{config.data.corpus}/tokenizer.model")
    record = {
        "run": "small", "init_from": None, "stages": [
            {"name": "align", "start_tokens": 0, "end_tokens": 3584}],
        "corpus": {"sources": {"ru/help": {"documents": 3, "bytes": 9, "tokens": 4}}},
    }  # fmt: skip
    meta = RunMeta(
        step=7, tokens=3584, config=config, lineage=record,
        tokenizer=tokenizer.fingerprint,
    )  # fmt: skip
    store.save(checkpoint.TrainState(jnp.int32(7), params, {}), meta)
    store.wait()
    store.close()
    (run / "eval").mkdir()
    row = {"bits_per_byte": 2.5, "bits_per_byte_se": 0.1, "accuracy": 0.3}
    result = {"sets": {"udhr": {"languages": {"ru": row}, "macro": row}}}
    (run / "eval" / "7.json").write_text(json.dumps(result))
    return run, params


def test_out_and_in_again(trained, config, corpus, tmp_path):
    run, params = trained
    out = tmp_path / "exported"
    done = huggingface.export_hf(run, out)
    assert done["files"] == ["model.safetensors"]
    assert done["notes"] == []
    card = (out / "README.md").read_text()
    for words in ("3,584 tokens", "- ru", "| ru | 2.5000", "align", "ru/help"):
        assert words in card
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    tokens_BT = np.array([tokenizer("Все люди рождаются")["input_ids"]], np.int32)
    expected = ours(config.model, params, tokens_BT)
    assert_close(theirs(model, tokens_BT), expected, 1e-5)

    back = tmp_path / "imported"
    done = huggingface.import_hf(out, back)
    assert done["parameters"] == parameter_count(config.model)
    assert done["notes"] == []
    store = checkpoint.Checkpoints(back / "checkpoints", read_only=True)
    read = store.restore_params(0, params)
    meta = store.meta(0)
    store.close()
    jax.tree.map(np.testing.assert_array_equal, read, params)
    cfg = meta.config
    assert cfg.model == config.model
    # It goes on with its own corpus.
    assert meta.tokenizer == corpus.tokenizer().fingerprint
    store, meta, origin = lineage.load_origin(back, config, corpus)
    assert (origin["step"], origin["cursors"]) == (0, {})
    abstract = step.abstract_state(config, sharding.make_mesh(c.MeshConfig()))
    state = resume.start_from(config, abstract, store, meta)
    store.close()
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
    text = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(text.replace('"<unk>"', '"<unknown>"'))
    assert (
        export_tokenizer.fingerprint_of(out, HFTokenizer(out))
        == HFTokenizer(out).fingerprint
    )
    (out / "tokenizer.json").write_text(text)

    again = tmp_path / "again"
    huggingface.export_hf(back / "checkpoints" / "0", again)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer.model"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name
    assert json.loads((again / "config.json").read_text()) == json.loads(
        (out / "config.json").read_text()
    )
    assert "Not trained here" in (again / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "again",
        "exported",
        "imported",
    ]


def test_import_without_tokenizer(config, corpus, tmp_path):
    folder = write_folder(SMALL, random_params(SMALL), tmp_path / "in")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "new_trick": 1}))
    mesh = sharding.make_mesh(c.MeshConfig(fsdp=4, tensor=1), jax.devices()[:4])
    done = huggingface.import_hf(folder, tmp_path / "out", mesh)
    assert done["tokenizer"] is None
    assert "new_trick" in done["notes"][0]
    assert "no tokenizer.json" in done["notes"][1]
    assert (
        "no tokenizer"
        in huggingface.export_hf(tmp_path / "out", tmp_path / "b")["notes"][0]
    )
    with pytest.raises(UserError, match="imported without a tokenizer"):
        lineage.load_origin(tmp_path / "out", config, corpus)


def test_refuses_a_tokenizer_that_is_too_large(tmp_path):
    folder = write_folder(SMALL, random_params(SMALL), tmp_path / "in")
    byte_level(folder, eos_token="<|end|>")
    with pytest.raises(UserError, match=r"277 ids.*vocab_size=61"):
        huggingface.import_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_another_tokenizer_and_an_occupied_place(trained, tmp_path):
    run, _ = trained
    byte_level(tmp_path / "tokenizer", eos_token="<|end|>")
    with pytest.raises(UserError, match="another tokenizer"):
        huggingface.export_hf(run, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(UserError, match="exists already"):
        huggingface.export_hf(run, tmp_path / "tokenizer")
    with pytest.raises(UserError, match="dtype 'int8'"):
        huggingface.export_hf(run, tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match="no checkpoint"):
        huggingface.export_hf(tmp_path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]


def test_refuses_a_quantised_checkpoint(tmp_path):
    store = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints")
    state = checkpoint.TrainState(jnp.int32(0), {"embedding": jnp.zeros(3)}, {})
    store.save(state, meta_of(0, bits=4))
    store.wait()
    store.close()
    with pytest.raises(UserError, match="quantised to 4 bits"):
        huggingface.export_hf(tmp_path / "run", tmp_path / "out")


def test_merges_prefer_the_left_of_equal_pairs(both):
    """Of two ways to build a piece, the one that comes first in a text."""
    from gamayun_jax.interop.export_tokenizer import merges_of

    assert merges_of([("a", -1), ("b", -2), ("ab", -3), ("ba", -4), ("aba", -5)]) == [
        ("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba"),
    ]  # fmt: skip
    assert to_tokenizers(both[0]).get_vocab_size() == both[0].vocab_size
