"""The config.json of a Hugging Face folder, both ways from one table.

FIELDS names every field of the configuration in both worlds. Gamayun leaves as Qwen3,
which has its norms on queries and keys; LLaMA-3.2, Qwen2.5 and Qwen3 come and leave as
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from gamayun_jax.config import ModelConfig, RopeScaling, UserError
from gamayun_jax.data.files import first_line
from gamayun_jax.fields import JSONFloat, decode, to_dict

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
    if "model_type" not in data:
        raise UserError(
            f"{where} lacks 'model_type': it is not of a model in Hugging Face's format"
        )
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

    hints = get_type_hints(ModelConfig)
    out = {
        ours: get(data, theirs, hints[ours], default)
        for ours, (theirs, default) in FIELDS.items()
    }
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
      UserError: a field of the model that this architecture does not have.
    """
    kind = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    data = {theirs: getattr(cfg, ours) for ours, (theirs, _) in FIELDS.items()}
    scaling = cfg.rope_scaling and {
        "rope_type": "llama3",
        **{name: getattr(cfg.rope_scaling, k) for k, name in SCALING.items()},
    }
    written = {
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
    read = to_dict(config_from_hf(written))
    if lost := [k for k, value in to_dict(cfg).items() if read[k] != value]:
        raise UserError(
            f"model.{lost[0]}={getattr(cfg, lost[0])} has no place in the config.json "
            f"of {ARCHITECTURES[kind]}, the nearest architecture: such a model is not "
            "one of those that transformers reads"
        )
    return written
