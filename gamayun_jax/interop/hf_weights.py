"""Configuration and weights of Hugging Face folders, both ways from two tables.

WEIGHTS names every parameter in both worlds, FIELDS every field of the configuration.
Gamayun leaves as Qwen3, which has its norms on queries and keys; LLaMA-3.2, Qwen2.5
and Qwen3 come and leave as themselves. Weights are read and written tensor by tensor,
so that memory holds the parameters once and little else.

Axes of a tensor are written as letters (D model, F mlp, N query heads, K key-value
heads, H head dim, V vocabulary); letters without a space between them are one axis.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import flax.linen as nn
import jax
import numpy as np
import safetensors

from gamayun_jax.config import (
    JSONFloat,
    ModelConfig,
    RopeScaling,
    UserError,
    decode,
)
from gamayun_jax.data import files
from gamayun_jax.data.documents import first_line
from gamayun_jax.interop.hf_tokenizer import read_object
from gamayun_jax.model.transformer import abstract_params
from gamayun_jax.training.optimizer import parameter_path

# --- configuration --------------------------------------------------------------

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Our field -> theirs, and its default there (...: there is none).
FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", ...),
    "num_layers": ("num_hidden_layers", ...),
    "d_model": ("hidden_size", ...),
    "num_heads": ("num_attention_heads", ...),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "d_ff": ("intermediate_size", ...),
    "max_seq_len": ("max_position_embeddings", ...),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", False),
    "init_std": ("initializer_range", 0.02),
}
FLOAT_FIELDS = ("norm_eps", "init_std")
SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_len": "original_max_position_embeddings",
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ROPE_KEYS |= set(SCALING.values())
# Features of other architectures, or of all in transformers: key -> where it is off.
OFF: dict[str, Any] = {
    "is_causal": True,
    "add_cross_attention": False,
    "attention_chunk_size": None,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "embedding_multiplier": 1,
    "final_logit_softcapping": None,
    "is_encoder_decoder": False,
    "logit_scale": 1,
    "logits_scaling": 1,
    "mlp_bias": False,
    "no_rope_layers": None,
    "partial_rotary_factor": 1,
    "per_layer_config": None,
    "pruned_heads": None,
    "qk_layernorm": False,
    "qk_norm": False,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "use_qk_norm": False,
}
USED = {
    *(theirs for theirs, _ in FIELDS.values()), *OFF,
    "architectures", "attention_bias", "auto_map", "bos_token_id", "dtype",
    "eos_token_id", "hidden_act", "layer_types", "max_window_layers", "model_type",
    "original_max_position_embeddings", "pad_token_id", "quantization_config",
    "rope_parameters", "rope_scaling", "rope_theta", "sliding_window",
    "tokenizer_class", "torch_dtype", "use_sliding_window",
}  # fmt: skip
# Keys without a say in what a causal model computes: records, training, tensor
# parallelism, classification, and how texts are drawn.
HARMLESS = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash",
    "_model_name_or_path", "_name_or_path", "attention_dropout",
    "attn_implementation", "bad_words_ids",
    "begin_suppress_tokens", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "embd_pdrop", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "head_dtype",
    "hidden_dropout", "id2label", "is_decoder", "is_llama_config", "label2id",
    "length_penalty", "max_length", "max_new_tokens", "min_length",
    "model_max_length", "name_or_path", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "prefix", "pretraining_tp",
    "problem_type", "remove_invalid_values", "repetition_penalty", "resid_pdrop",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "top_k", "top_p", "torchscript", "transformers.js_config",
    "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
}  # fmt: skip


def unknown_keys(data: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json that are neither used nor known to be harmless.

    The supported architectures of transformers ignore them too; a folder that has some
    may come from a model that is not quite one of these.
    """
    return sorted(set(data) - USED - HARMLESS)


def rope_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters: `rope_parameters` of transformers 5, or 4.x's two fields.

    Where both are, `rope_scaling` has the say in transformers; `unsupported` refuses
    two that differ.
    """
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    rope = dict(rope) if isinstance(rope, Mapping) else {"rope_type": repr(rope)}
    if rope.get("rope_type") is None:
        rope["rope_type"] = rope.get("type") or "default"
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = data.get("rope_theta") or 10_000.0
    if rope["rope_type"] == "llama3" and data.get("original_max_position_embeddings"):
        name = "original_max_position_embeddings"
        rope[name] = data[name]
    return rope


def rope_trouble(data: Mapping[str, Any]) -> Iterator[str]:
    """What in the rotary parameters this project's model cannot do."""
    rope = rope_of(data)
    if rope["rope_type"] not in ("default", "llama3"):
        yield f"rotary scaling {rope['rope_type']!r} (only llama3)"
    if rope.get("partial_rotary_factor") not in (None, 1):
        yield "partial_rotary_factor"
    if odd := sorted(k for k in set(rope) - ROPE_KEYS if rope[k] is not None):
        yield f"rotary parameter {', '.join(map(repr, odd))}"
    if data.get("rope_scaling") and data.get("rope_parameters"):
        other = rope_of({**data, "rope_scaling": None})
        keys = sorted((set(rope) | set(other)) - {"type"})
        if odd := [k for k in keys if rope.get(k) != other.get(k)]:
            yield (
                f"rope_scaling and rope_parameters that disagree about {odd[0]!r} "
                "(delete the one that is not meant)"
            )


def unsupported(data: Mapping[str, Any]) -> list[str]:
    """What in a config.json this project's model cannot do; empty: nothing."""
    kind, found = data.get("model_type"), []
    if kind not in ARCHITECTURES:
        found.append(
            f"architecture {kind!r} ({', '.join(ARCHITECTURES)} are supported)"
        )
    names = data.get("architectures") or [ARCHITECTURES.get(str(kind))]
    if kind in ARCHITECTURES and ARCHITECTURES[str(kind)] not in names:
        found.append(f"{names[0]} (only {ARCHITECTURES[str(kind)]} of this kind)")
    if any("expert" in key and value for key, value in data.items()):
        found.append("mixture of experts")
    activation = data.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        found.append(f"activation {activation!r} (only silu)")
    if layers := data.get("layer_types"):
        sliding = any(x != "full_attention" for x in layers)
    else:
        # Qwen's window is off unless it is switched on; others know no switch.
        on = data.get("use_sliding_window")
        on = data.get("sliding_window") and (kind == "llama" if on is None else on)
        layer = data.get("max_window_layers", 0) if kind != "llama" else 0
        sliding = bool(on) and layer < data.get("num_hidden_layers", 1)
    if sliding:
        found.append("sliding-window attention")
    if data.get("attention_bias") and kind != "qwen2":  # which has its own rule
        found.append("attention_bias (it has one on the output too)")
    for key, off in OFF.items():
        value = data.get(key)
        if value != off and value is not None and value != {} and value != []:
            found.append(f"{key}={value!r}"[:60])
    found += rope_trouble(data)
    if method := data.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, Mapping) else method
        found.append(f"quantised weights ({method})")
    if data.get("auto_map"):
        found.append("code of its own (auto_map)")
    return found


def config_from_hf(data: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture that a config.json describes.

    Raises:
      UserError: one line with everything in it that is unsupported, or the first field
        that is missing or of another type.
    """
    try:
        found = unsupported(data)
    except (TypeError, AttributeError, KeyError, ValueError, IndexError) as e:
        raise UserError(
            f"{where} has a value of a kind that it cannot have ({first_line(e)}): "
            "copy it again"
        ) from e
    if found:
        raise UserError(f"{where}: this model cannot do {'; '.join(found)}")

    def get(source: Mapping[str, Any], name: str, hint: Any, default: Any) -> Any:
        value = source.get(name)
        value = default if value is None else value
        if value is ...:
            raise UserError(f"{where} lacks {name!r}: it is not complete")
        value = JSONFloat(value) if isinstance(value, float) else value
        return value if value is None else decode(value, hint, f"{where}: {name}")

    out: dict[str, Any] = {}
    for ours, (theirs, default) in FIELDS.items():
        hint = float if ours in FLOAT_FIELDS else int
        hint = bool if ours == "tie_embeddings" else hint
        out[ours] = get(data, theirs, hint, default)
    kind = data["model_type"]
    if out["num_kv_heads"] is None:
        out["num_kv_heads"] = out["num_heads"] if kind == "llama" else 32
    if out["head_dim"] is None:
        out["head_dim"] = out["d_model"] // max(out["num_heads"], 1)
        out["head_dim"] = 128 if kind == "qwen3" else out["head_dim"]
    rope, scaling = rope_of(data), None
    if rope["rope_type"] == "llama3":
        kinds = get_type_hints(RopeScaling)
        parts = {k: get(rope, name, kinds[k], ...) for k, name in SCALING.items()}
        scaling = decode(parts, RopeScaling, f"{where}: rope")
    return ModelConfig(
        **out,
        rope_theta=get(rope, "rope_theta", float, ...),
        rope_scaling=scaling,
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
    )


def config_to_hf(cfg: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of the architecture that has the model's features.

    Written as transformers 4.43 and later read it, 5.x included.

    Raises:
      UserError: no supported architecture has both QK-norm and QKV biases.
    """
    if cfg.qk_norm and cfg.qkv_bias:
        raise UserError(
            "model.qk_norm and model.qkv_bias together exist in no architecture of "
            "transformers that could be exported: train with one of them"
        )
    kind = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    data = {theirs: getattr(cfg, ours) for ours, (theirs, _) in FIELDS.items()}
    scaling = cfg.rope_scaling and {
        "rope_type": "llama3",
        **{name: getattr(cfg.rope_scaling, k) for k, name in SCALING.items()},
    }
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **data,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        **({"mlp_bias": False} if kind == "llama" else {"use_sliding_window": False}),
    }


# --- weights --------------------------------------------------------------------


class Weight(NamedTuple):
    """Name and axes in a Hugging Face file, and our axes (without the layers')."""

    name: str
    theirs: str
    ours: str


LAYER = "model.layers.{layer}."
# Our parameter path -> where it is in a Hugging Face file.
WEIGHTS = {
    "embedding": Weight("model.embed_tokens.weight", "V D", "V D"),
    "unembedding": Weight("lm_head.weight", "V D", "V D"),
    "final_norm/scale": Weight("model.norm.weight", "D", "D"),
    **{
        f"layers/{path}": Weight(LAYER + name, theirs, ours)
        for path, name, theirs, ours in (
            ("attention_norm/scale", "input_layernorm.weight", "D", "D"),
            ("attention/q", "self_attn.q_proj.weight", "NH D", "D N H"),
            ("attention/k", "self_attn.k_proj.weight", "KH D", "D K H"),
            ("attention/v", "self_attn.v_proj.weight", "KH D", "D K H"),
            ("attention/o", "self_attn.o_proj.weight", "D NH", "N H D"),
            ("attention/q_bias", "self_attn.q_proj.bias", "NH", "N H"),
            ("attention/k_bias", "self_attn.k_proj.bias", "KH", "K H"),
            ("attention/v_bias", "self_attn.v_proj.bias", "KH", "K H"),
            ("attention/q_norm/scale", "self_attn.q_norm.weight", "H", "H"),
            ("attention/k_norm/scale", "self_attn.k_norm.weight", "H", "H"),
            ("mlp_norm/scale", "post_attention_layernorm.weight", "D", "D"),
            ("mlp/gate", "mlp.gate_proj.weight", "F D", "D F"),
            ("mlp/up", "mlp.up_proj.weight", "F D", "D F"),
            ("mlp/down", "mlp.down_proj.weight", "D F", "F D"),
        )
    },
}
# Tables that old files hold and every model computes for itself.
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPES = {v: k for k, v in FILE_DTYPES.items()}
BLOCK = 256  # rows of a matrix that are transposed at a time
READERS = 4  # threads; each holds one tensor of a file
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Tensor(NamedTuple):
    """One tensor of a Hugging Face file, and where it belongs."""

    path: str  # of our parameter
    layer: int | None  # its row in the parameter, stacked over layers
    name: str
    shape: tuple[int, ...]
    transposed: bool  # ours is its transpose, but for the split of axes


def tensors_of(cfg: ModelConfig) -> Iterator[Tensor]:
    """All tensors of a model, parameter by parameter, with their shapes."""
    sizes = {
        "D": cfg.d_model, "F": cfg.d_ff, "N": cfg.num_heads, "K": cfg.num_kv_heads,
        "H": cfg.head_dim, "V": cfg.vocab_size,
    }  # fmt: skip
    for path, leaf in shapes_of(cfg).items():
        row = WEIGHTS[path]
        axes = row.theirs.split()
        shape = tuple(math.prod(sizes[a] for a in axis) for axis in axes)
        ours = tuple(row.ours.split())
        transposed = "".join(axes) != "".join(ours)
        stacked = path.startswith("layers/")
        expected = tuple(sizes[a] for a in ours)
        if leaf.shape != ((cfg.num_layers, *expected) if stacked else expected) or (
            "".join(axes[::-1] if transposed else axes) != "".join(ours)
        ):
            raise AssertionError(
                f"hf_model.WEIGHTS[{path!r}] does not fit {leaf.shape}"
            )
        for layer in range(cfg.num_layers) if stacked else (None,):
            name = row.name.format(layer=layer)
            yield Tensor(path, layer, name, shape, transposed)


def convert(out: np.ndarray, value: np.ndarray, transposed: bool) -> None:
    """Copy and cast `value` to `out`, contiguous and of its size.

    One is a tensor of a file, at most a matrix; the other is ours, maybe with its heads
    in an axis of their own. Transposing goes in blocks that stay in the cache.
    """
    if not transposed:
        out.reshape(value.shape)[...] = value
        return
    rows, columns = value.shape if value.ndim == 2 else out.shape[::-1]
    value, out = value.reshape(rows, columns), out.reshape(columns, rows)
    for i in range(0, rows, BLOCK):
        out[:, i : i + BLOCK] = value[i : i + BLOCK].T


def all_finite(value: np.ndarray) -> bool:
    """Whether no exponent is all ones; several times as fast as isfinite.

    In blocks that stay in the cache.
    """
    bits = value.reshape(-1).view(f"u{value.itemsize}")
    magnitude = bits.dtype.type(2 ** (8 * value.itemsize - 1) - 1)
    infinity = int(np.array(np.inf, value.dtype).view(bits.dtype))
    return all(
        int((bits[i : i + BLOCK**2] & magnitude).max()) < infinity
        for i in range(0, len(bits), BLOCK**2)
    )


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array that JAX's CPU backend takes over without a copy."""
    size, line = 4 * math.prod(shape), 64
    memory = np.empty(size + line, np.uint8)
    start = -memory.ctypes.data % line
    return memory[start : start + size].view(np.float32).reshape(shape)


def shapes_of(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract parameters by path."""
    leaves = jax.tree_util.tree_flatten_with_path(nn.unbox(abstract_params(cfg)))[0]
    return {parameter_path(path): leaf for path, leaf in leaves}


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a Hugging Face folder.

    Raises:
      UserError: no safetensors, an index that does not fit its files or names one
        outside of the folder, or a damaged file.
    """
    single = folder / "model.safetensors"
    index = single.with_name("model.safetensors.index.json")
    if single.is_file():
        return dict.fromkeys(names_in(single), single)
    if not index.is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} has its weights as {pickles[0]}, a pickle, which may run "
                "any code: load it where you trust it and save_pretrained() it again, "
                "which writes safetensors"
            )
        raise UserError(f"{folder} has no model.safetensors and no index of several")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: copy it again")
    for name in weight_map.values():
        plain = isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)
        if not plain or name.startswith("."):
            raise UserError(
                f"{index} names file {name!r}: only safetensors files in the same "
                "folder are read"
            )
    found: dict[str, Path] = {}
    for name in sorted(set(weight_map.values())):
        names = names_in(folder / name)
        listed = {k for k, v in weight_map.items() if v == name}
        if odd := sorted(listed ^ set(names)):
            raise UserError(
                f"{index} and {name} disagree about tensor {odd[0]!r}: copy them again"
            )
        found |= dict.fromkeys(names, folder / name)
    return found


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file; its errors become a UserError of one line."""
    try:
        with safetensors.safe_open(path, framework="np") as f:
            yield f
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path} cannot be read ({e}): copy it again") from e


def names_in(path: Path) -> list[str]:
    """The names of the tensors of a safetensors file."""
    with open_tensors(path) as f:
        return list(f.keys())


def check_tensor(file: Any, path: Path, tensor: Tensor) -> None:
    """Compare shape and dtype in an open file's header with what is needed."""
    info = file.get_slice(tensor.name)
    dtype, shape = info.get_dtype(), tuple(info.get_shape())
    if shape != tensor.shape:
        raise UserError(
            f"{path}: {tensor.name} is {list(shape)}, the config needs "
            f"{list(tensor.shape)}"
        )
    if dtype not in FILE_DTYPES:
        raise UserError(
            f"{path}: {tensor.name} has dtype {dtype}; {', '.join(FILE_DTYPES)} are "
            "read"
        )


def read_tensor(path: Path, tensor: Tensor) -> np.ndarray:
    """One tensor in the dtype of its file, checked.

    The file is opened anew each time: what was mapped of it does not stay in memory.
    """
    with open_tensors(path) as f:
        check_tensor(f, path, tensor)
        value = f.get_tensor(tensor.name)
    if not all_finite(value):
        raise UserError(f"{path}: {tensor.name} has values that are not finite")
    return value


def read_weights(folder: Path, cfg: ModelConfig, shardings: Any = None) -> Any:
    """The parameters of a Hugging Face folder, float32, as the model has them.

    Args:
      shardings: of each parameter (a tree like theirs): each goes straight onto its
        devices, and the host holds one parameter at a time. Without it: on the
        default device.

    Raises:
      UserError: files that cannot be read; a tensor that is missing, left over, of
        another shape or dtype, or not finite.
    """
    where = find_tensors(folder)
    if cfg.num_layers > len(where):  # before a number of any size is believed
        raise UserError(
            f"{folder} has {len(where)} tensors, the config {cfg.num_layers} layers"
        )
    expected = {t.name: t for t in tensors_of(cfg)}
    if missing := sorted(set(expected) - set(where)):
        raise UserError(
            f"{folder} lacks tensor {missing[0]!r} ({len(missing)} are missing)"
        )
    extra = {k for k in where if k not in expected and not COMPUTED.search(k)}
    head, table = WEIGHTS["unembedding"].name, WEIGHTS["embedding"].name
    if head in extra and cfg.tie_embeddings:  # some writers store a tied head too
        own = read_tensor(where[head], expected[table]._replace(name=head))
        if np.array_equal(own, read_tensor(where[table], expected[table])):
            extra.remove(head)
    if extra:
        raise UserError(
            f"{folder} has tensor {min(extra)!r}, which the config has no place for "
            f"({len(extra)} are left over)"
        )
    # All headers before the first allocation.
    for file in sorted(set(where.values())):
        with open_tensors(file) as f:
            for tensor in expected.values():
                if where[tensor.name] == file:
                    check_tensor(f, file, tensor)
    placed = {}
    if shardings is not None:
        leaves = jax.tree_util.tree_flatten_with_path(shardings)[0]
        placed = {parameter_path(path): s for path, s in leaves}
    params: dict[str, Any] = {}
    for path, leaf in shapes_of(cfg).items():
        value = aligned(leaf.shape)

        def read(tensor: Tensor, value: np.ndarray = value) -> None:
            part = read_tensor(where[tensor.name], tensor)
            out = value if tensor.layer is None else value[tensor.layer]
            convert(out, part, tensor.transposed)

        with futures.ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(read, (t for t in expected.values() if t.path == path)):
                pass
        sharding = placed.get(path) or jax.sharding.SingleDeviceSharding(
            jax.local_devices()[0]
        )
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.make_array_from_callback(
            leaf.shape, sharding, value.__getitem__
        )
        jax.block_until_ready(node[name])
    return params


def write_weights(
    params: Any,
    cfg: ModelConfig,
    folder: Path,
    max_shard_bytes: int = 4 * 2**30,
    dtype: str = "float32",
) -> list[Path]:
    """Write safetensors files of at most about `max_shard_bytes`, with their index.

    One parameter and one tensor at a time are in memory beside `params`.

    Args:
      params: parameters, or functions that read them, each called once in its turn.

    Raises:
      UserError: values that are not finite.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    values = {parameter_path(path): leaf for path, leaf in leaves}
    size = np.dtype(jax.numpy.dtype(dtype)).itemsize
    shards: list[list[Tensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors_of(cfg):
        needed = size * math.prod(tensor.shape)
        if needed > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= needed
    paths, weight_map = [], {}
    # The stacked parameter on the host, kept for the tensors of its other layers.
    at, host = "", np.empty(0)
    for i, shard in enumerate(shards, 1):
        many = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = folder / f"model{many}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for t in shard:
            begin, end = end, end + size * math.prod(t.shape)
            offsets = [begin, end]
            kind = DTYPES[dtype]
            header[t.name] = dict(dtype=kind, shape=t.shape, data_offsets=offsets)
            weight_map[t.name] = path.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with files.atomic(path) as temporary, open(temporary, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for t in shard:
                if t.path != at:
                    at, value = t.path, values[t.path]
                    host = np.empty(0)  # the one before goes first
                    host = np.asarray(value() if callable(value) else value)
                ours = host if t.layer is None else host[t.layer]
                out = np.empty(t.shape, jax.numpy.dtype(dtype))
                with np.errstate(over="ignore"):  # checked in the next line
                    convert(out, ours, t.transposed)
                if not all_finite(out):
                    raise UserError(f"{t.path} has values that {dtype} cannot hold")
                f.write(out.view(np.uint8).data)
        paths.append(path)
    if len(shards) > 1:
        total = sum(size * math.prod(t.shape) for t in tensors_of(cfg))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(folder / "model.safetensors.index.json", index)
    return paths
