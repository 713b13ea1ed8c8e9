"""Decoding against `transformers` with the same weights: new tokens per second.

    python benchmarks/decode.py [--rounds 5]

Both decode greedily with a key-value cache in float32 on all cores, in one process,
in turns; the text must be the same. The time includes the prefill.

Figures (2 cores of an AMD EPYC, otherwise idle; torch 2.13.0, transformers
5.23.0, jax 0.10.2; median of rounds, range in brackets; all tokens the same):

    threads batch  gamayun_jax tokens/s   transformers tokens/s
          2     1       695 (637-719)           191 (186-193)
          2    16    3486 (3106-3730)       1746 (1373-1810)
          1     1       638 (616-671)           197 (190-202)
          1    16    2624 (2582-2696)       1122 (1107-1152)

So 3.6 and 2.0 times transformers on two cores, 3.2 and 2.3 times on one. What gave it:
each layer's weights and cache an array of its own, updated in place; caches laid out
for attention's two products (batch 16: 2390 -> 3380 tokens/s, no transposes of the
cache); a cache that grows by a half or a third instead of doubling (3 %); argmax as two
plain reductions. No use: gate and up as one product, the head's weights as the left
factor, 512-bit vectors, oneDNN.
"""

from __future__ import annotations

import argparse
import os
import time

import jax
import numpy as np
import torch
import transformers
from rows import ratio, row

from gamayun_jax import config as c
from gamayun_jax.inference.generator import Generator
from gamayun_jax.model import sharding

MODEL = c.ModelConfig(
    vocab_size=8192, num_layers=8, d_model=256, num_heads=4, num_kv_heads=2,
    head_dim=64, d_ff=768, max_seq_len=1024, qk_norm=True, rope_theta=10_000.0,
)  # fmt: skip
PROMPT, NEW = 64, 128


class NoText:
    """Token ids only: nothing is decoded to text, no token stops a row."""

    stop_ids = ()


def random_params(cfg: c.ModelConfig) -> dict:

    from gamayun_jax.model.weights import abstract_params

    rng = np.random.default_rng(0)

    def draw(path, x):
        norm = "scale" in jax.tree_util.keystr(path)
        std = 0.1 if norm else 0.05
        return (norm + std * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def as_transformers(cfg: c.ModelConfig, params: dict) -> torch.nn.Module:
    """A Qwen3 model of `transformers` with the same weights."""
    hf = transformers.Qwen3Config(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim, max_position_embeddings=cfg.max_seq_len,
        rms_norm_eps=cfg.norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(hf).eval().float()
    state = {"model.embed_tokens.weight": params["embedding"]}
    state["lm_head.weight"] = params["embedding"]
    state["model.norm.weight"] = params["final_norm"]["scale"]
    for i in range(cfg.num_layers):
        w = jax.tree.map(lambda x, i=i: x[i], params["layers"])
        a, at, d = w["attention"], f"model.layers.{i}.", cfg.d_model
        for name in "qkv":
            state[f"{at}self_attn.{name}_proj.weight"] = a[name].reshape(d, -1).T
        state[f"{at}self_attn.o_proj.weight"] = a["o"].reshape(-1, d).T
        for name in ("q_norm", "k_norm"):
            state[f"{at}self_attn.{name}.weight"] = a[name]["scale"]
        for name in ("gate", "up", "down"):
            state[f"{at}mlp.{name}_proj.weight"] = w["mlp"][name].T
        state[f"{at}input_layernorm.weight"] = w["attention_norm"]["scale"]
        state[f"{at}post_attention_layernorm.weight"] = w["mlp_norm"]["scale"]
    tensors = {k: torch.tensor(np.ascontiguousarray(v)) for k, v in state.items()}
    model.load_state_dict(tensors, strict=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    params = random_params(MODEL)
    theirs = as_transformers(MODEL, params)
    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    ours = Generator(MODEL, params, mesh, NoText(), c.ComputeConfig(dtype="float32"))
    for batch in args.batches:
        rng = np.random.default_rng(batch)
        ids = rng.integers(4, MODEL.vocab_size, (batch, PROMPT))

        def run_ours(ids=ids) -> list[list[int]]:
            return ours.generate_ids(ids.tolist(), NEW)

        def run_theirs(ids=ids) -> list[list[int]]:
            tokens = torch.tensor(ids)
            with torch.inference_mode():
                out = theirs.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=0,
                    eos_token_id=None,
                )
            return out[:, PROMPT:].tolist()

        same = np.mean(np.array(run_ours()) == np.array(run_theirs()))
        rates: dict[str, list[float]] = {"ours": [], "transformers": []}
        for _ in range(args.rounds):
            for name, run in (("ours", run_ours), ("transformers", run_theirs)):
                begin = time.perf_counter()
                run()
                rates[name].append(batch * NEW / (time.perf_counter() - begin))
        for name, values in rates.items():
            row(f"batch {batch}: {name}", "tokens/s", values)
        ratio(f"batch {batch}: ours over transformers", *rates.values())
        row(f"batch {batch}: same tokens", "of 1", [float(same)])


if __name__ == "__main__":
    main()
