"""Sizes and batches of gpu.py, the same for us and for PyTorch: see there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax import config as c
from gamayun_jax.model import presets
from gamayun_jax.model.weights import parameter_count

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
BOS = 1
replace = dataclasses.replace


def document_lengths(rng: np.random.Generator, total: int) -> list[int]:
    """Documents that fill so many tokens: log-normal, median 500, mean about 900."""
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, max(16, int(rng.lognormal(np.log(500), 1.1)))))
    return lengths


def packed_batch(vocab: int, rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    """A batch of documents as data/loader.py makes it, of random tokens."""
    rng = np.random.default_rng(seed)
    lengths = np.array(document_lengths(rng, rows * length))
    starts = np.cumsum(lengths) - lengths
    begins = np.zeros(rows * length + 1, bool)
    begins[starts] = True
    tokens = rng.integers(3, vocab, rows * length + 1).astype(np.int32)
    tokens[begins] = BOS
    inputs = tokens[:-1].reshape(rows, length)
    targets = tokens[1:].reshape(rows, length)
    begins = begins[:-1].reshape(rows, length)
    begins[:, 0] = True
    segments = np.cumsum(begins, 1, dtype=np.int32)
    places = np.arange(length, dtype=np.int32)
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), 1)
    return {
        "inputs": inputs,
        "targets": targets,
        "positions": positions.astype(np.int32),
        "segment_ids": segments,
        "language": np.repeat(np.arange(rows, dtype=np.int32) % 2, length).reshape(
            rows, length
        ),
        "loss_mask": (targets != BOS).astype(np.float32),
    }


def resized(base: c.Config, model: c.ModelConfig, length: int, rows: int) -> c.Config:
    """A config of another model and batch, and of the corpus that they need."""
    corpus = replace(
        base.corpus,
        record_tokens=length,
        tokenizer=replace(base.corpus.tokenizer, vocab_size=model.vocab_size),
    )
    data = replace(base.data, seq_len=length, batch_size=rows)
    return replace(base, model=model, corpus=corpus, data=data)


def step_config(toy: bool) -> c.Config:
    """Stage 1 on one device, a batch of 8 sequences (the H200 has room for more)."""
    base = c.load_config(EXPERIMENTS / "stage1.py")
    model, length, rows, chunk = base.model, base.data.seq_len, 8, 512
    if toy:
        model = replace(presets.tiny(512), max_seq_len=256)
        length, rows, chunk = 128, 4, 64
    return replace(
        resized(base, model, length, rows),
        mesh=c.MeshConfig(),
        compute=c.ComputeConfig(loss_chunk=chunk),
    )


def attention_sizes(toy: bool) -> tuple[int, int, int, int, int]:
    """B, T, N, K, H (model/attention.py)."""
    cfg = presets.gamayun_1p5b()
    if toy:
        return 2, 256, 4, 2, 64
    return 4, 4096, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim


def decode_sizes(toy: bool) -> tuple[c.ModelConfig, int, int, tuple[int, ...]]:
    """The model, tokens of the prompt, new ones, and batches."""
    if toy:
        return presets.tiny(512), 32, 16, (1, 2)
    # A prompt of 512 takes 768 slots at the first step: one program for all steps.
    return presets.gamayun_1p5b(), 512, 128, (1, 16, 64)


def decoding_bytes(cfg: c.ModelConfig, batch: int, slots: float) -> float:
    """Bytes that a step must read: weights and the filled cache, in bfloat16."""
    cache = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * slots * batch
    return 2.0 * (parameter_count(cfg) + cache)
