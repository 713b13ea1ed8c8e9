"""Parts of gpu.py that measure this project: see there."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from gpu import Recorder
from gpu_sizes import (
    EXPERIMENTS,
    attention_sizes,
    decode_sizes,
    decoding_bytes,
    packed_batch,
    resized,
    step_config,
)

from gamayun_jax import config as c
from gamayun_jax.model import attention as attn
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import TokenWeights
from gamayun_jax.model.weights import abstract_params, flops_per_token, parameter_count
from gamayun_jax.training import step as steps
from gamayun_jax.training.chips import chip_of

GIB = 2**30
replace = dataclasses.replace


def peak_flops() -> float | None:
    chip = chip_of(jax.devices()[0])
    return chip.flops if chip else None


def fill(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    return draw(jax.random.key(seed), shape, dtype)


# --- peaks ------------------------------------------------------------------------


def peaks(rec: Recorder) -> None:
    size = 256 if rec.toy else 8192
    count = 2**20 if rec.toy else 2**31  # 4 GiB of bfloat16
    device = jax.devices()[0]
    rec.write(
        "device",
        device=device.device_kind,
        versions=f"jax {jax.__version__}, {device.client.platform_version}"[:200],
    )

    def product() -> dict[str, Any]:
        a, b = (fill((size, size), jnp.bfloat16, i) for i in range(2))
        run = jax.jit(jnp.matmul).lower(a, b).compile()
        times = rec.time(lambda: run(a, b), jax.block_until_ready, 7, 10)
        return {"times": times, "rate": 2e-12 * size**3, "unit": "TFLOP/s"}

    def copy() -> dict[str, Any]:
        x = fill((count // 2**14, 2**14), jnp.bfloat16)
        run = jax.jit(lambda x: -x).lower(x).compile()
        times = rec.time(lambda: run(x), jax.block_until_ready, 7, 5)
        return {"times": times, "rate": 4e-12 * count, "unit": "TB/s read and written"}

    rec.case("matmul", product)
    rec.case("copy", copy)


# --- step -------------------------------------------------------------------------


# remat, microbatches, attention, and what else: the most telling first.
STEPS: tuple[dict[str, Any], ...] = (
    dict(remat="minimal", attention="auto"),
    dict(remat="minimal", attention="packed"),
    dict(remat="none", microbatches=4, attention="packed"),
    dict(remat="minimal", microbatches=2, attention="packed"),
    dict(remat="minimal", attention="xla"),
    dict(remat="attention", attention="packed"),
    dict(remat="full", attention="packed"),
    dict(remat="minimal", attention="packed", loss_chunk=2048),
    dict(remat="none", microbatches=4, attention="auto"),
)


def step(rec: Recorder) -> None:
    base = step_config(rec.toy)
    mesh = sharding.make_mesh(base.mesh, jax.devices()[:1])
    rows, length = base.data.batch_size, base.data.seq_len
    batch = jax.device_put(
        packed_batch(base.model.vocab_size, rows, length),
        sharding.batch_sharding(mesh),
    )
    cudnn = attn._cudnn
    languages, vocab = len(base.languages), base.model.vocab_size
    tables = TokenWeights(
        np.ones(languages, np.float32),
        np.random.default_rng(0).uniform(0.5, 1.5, vocab).astype(np.float32),
    )

    def measure(choice: dict[str, Any]) -> dict[str, Any]:
        if rec.toy:
            choice = {**choice, "loss_chunk": 64, "attention": "auto"}
        packed = choice.get("attention") == "packed"
        if packed:  # not a choice of the config (yet)
            choice = {**choice, "attention": "cudnn"}
        attn._cudnn = cudnn_packed if packed else cudnn
        cfg = replace(base, compute=replace(base.compute, **choice))
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            begin = time.perf_counter()
            run = steps.compile_step(
                cfg, mesh, steps.abstract_state(cfg, mesh), 0, tables, 0
            )
            compiled = time.perf_counter() - begin
            planned = run.memory_analysis()
            state = steps.new_state(cfg, mesh)
            losses = []

            def one() -> Any:
                nonlocal state
                state, metrics = run(state, batch)
                losses.append(metrics["loss_sum"] / metrics["target_count"])
                return losses[-1]

            times = rec.time(one, jax.block_until_ready, 5)
        stats = jax.devices()[0].memory_stats() or {}
        kept = planned.argument_size_in_bytes + planned.temp_size_in_bytes
        return {
            "times": times,
            "tokens": rows * length,
            "flops_per_token": flops_per_token(cfg.model, length),
            "peak_flops": peak_flops(),
            "compile_s": round(compiled, 1),
            "peak_gib": round(kept / GIB, 1),
            "peak_of_process_gib": round(stats.get("peak_bytes_in_use", 0) / GIB, 1),
            "losses": [round(float(x), 3) for x in losses],
        }

    for choice in STEPS:
        words = [str(v) if k != "microbatches" else f"{v} parts"
                 for k, v in choice.items()]  # fmt: skip
        rec.case(" ".join(words), functools.partial(measure, choice))


# --- attention --------------------------------------------------------------------


def document_runs(segment_ids_BT: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Lengths [B, M] and first slots [B, M + 1] of the runs of equal segment ids.

    -1 where a row has fewer than M = `most` runs: what cuDNN takes for packed rows.
    """
    former_BT = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    run_BT = jnp.cumsum(segment_ids_BT != former_BT, 1, dtype=jnp.int32) - 1
    of_run_BTM = run_BT[:, :, None] == jnp.arange(most, dtype=jnp.int32)
    lengths_BM = jnp.sum(of_run_BTM, 1, dtype=jnp.int32)
    ends_BM = jnp.cumsum(lengths_BM, 1, dtype=jnp.int32)
    starts_BM = jnp.where(lengths_BM > 0, ends_BM - lengths_BM, -1)
    starts_BM = jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(lengths_BM > 0, lengths_BM, -1), starts_BM


def cudnn_packed(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, most: int = 64) -> jax.Array:
    """cuDNN's fused flash attention of packed rows: documents by their bounds."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    lengths_BM, starts_BM = document_runs(segment_ids_BT, most)
    N, K = q_BTNH.shape[2], k_BTKH.shape[2]
    if N != K and jax.__version_info__ < (0, 11):
        # Their offsets of keys are in heads of queries there.
        k_BTKH, v_BTKH = (jnp.repeat(x, N // K, 2) for x in (k_BTKH, v_BTKH))
    return fused.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=starts_BM,
        kv_offsets=starts_BM,
        scale=q_BTNH.shape[3] ** -0.5,
        mask_type=fused.MaskType.PADDING_CAUSAL,
    )


def pallas_triton(q, k, v, segments, interpret: bool = False):
    """The Pallas kernel that JAX ships, in Triton's dialect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax.experimental.pallas.ops.gpu import attention as kernel
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, 2) for x in (k, v))
    sizes = kernel.BlockSizes(
        block_q=128, block_k=64, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64,
        block_kv_dq=64,
    )  # fmt: skip
    scale = q.shape[-1] ** -0.5
    return kernel.mha(
        q, k, v, segments, sm_scale=scale, causal=True, block_sizes=sizes,
        interpret=interpret,
    )  # fmt: skip


def causal_only(q, k, v, segments, implementation: str = "cudnn"):
    """No documents: what the kernel takes for causal attention alone."""
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation=implementation
    )


def attention(rec: Recorder) -> None:
    B, T, N, K, H = attention_sizes(rec.toy)
    dtype = jnp.float32 if rec.toy else jnp.bfloat16
    q, k, v, g = (
        fill((B, T, n, H), dtype, i) for i, n in enumerate((N, K, K, N))
    )  # fmt: skip
    segments = jnp.asarray(packed_batch(512, B, T)["segment_ids"])

    def both(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(q, k, v, segments, g):
            out, pull = jax.vjp(lambda *a: kernel(*a, segments), q, k, v)
            return out, pull(g)

        return run

    row = tuple(x[:1].astype(jnp.float32) for x in (q, k, v))
    exact = both(lambda q, k, v, s: attn.attention(q, k, v, s, s))
    with jax.default_matmul_precision("highest"):
        reference = jax.jit(exact)(*row, segments[:1], g[:1].astype(jnp.float32))

    def measure(kernel: Callable[..., Any], check: bool) -> dict[str, Any]:
        begin = time.perf_counter()
        forward = jax.jit(kernel).lower(q, k, v, segments).compile()
        whole = jax.jit(both(kernel)).lower(q, k, v, segments, g).compile()
        compiled = time.perf_counter() - begin
        out = whole(q, k, v, segments, g)
        found: dict[str, Any] = {"compile_s": round(compiled, 1)}
        if check:
            names = ("out", "dq", "dk", "dv")
            leaves = zip(
                names, jax.tree.leaves(out), jax.tree.leaves(reference), strict=True
            )
            found["errors"] = {n: relative(x[:1], ref) for n, x, ref in leaves}
        ready = jax.block_until_ready
        found["forward"] = rec.time(lambda: forward(q, k, v, segments), ready, 7, 10)
        found["times"] = rec.time(lambda: whole(q, k, v, segments, g), ready, 7, 10)
        planned = whole.memory_analysis()
        found["peak_gib"] = round(planned.temp_size_in_bytes / GIB, 2)
        return found

    cudnn = "xla" if rec.toy else "cudnn"
    kernels: dict[str, Callable[..., Any]] = {
        "cudnn, mask": functools.partial(attn._cudnn, implementation=cudnn),
        "cudnn, bounds of documents": cudnn_packed,
        "cudnn, causal, no documents": functools.partial(
            causal_only, implementation=cudnn
        ),
        "pallas triton": functools.partial(pallas_triton, interpret=rec.toy),
        "xla, by parts": functools.partial(attn.self_attention, attention_impl="xla"),
    }
    for name, kernel in kernels.items():
        rec.case(name, functools.partial(measure, kernel, "no documents" not in name))


def relative(x: jax.Array, reference: jax.Array) -> float:
    x = x.astype(jnp.float32)
    return float(jnp.linalg.norm(x - reference) / jnp.linalg.norm(reference))


# --- seeds ------------------------------------------------------------------------


def seed_config(name: str, toy: bool) -> c.Config:
    """The demo's config with a model of about so many parameters."""
    base = c.load_config(EXPERIMENTS / "tiny.py")
    sizes = {
        "0.85M": (base.model, 128, 16),
        "3M": (
            replace(
                base.model, num_layers=4, d_model=192, num_heads=3, num_kv_heads=3,
                d_ff=640, vocab_size=4096,
            ), 128, 16,
        ),
        "25M": (
            replace(
                base.model, num_layers=8, d_model=448, num_heads=7, num_kv_heads=7,
                d_ff=1280, vocab_size=8192,
            ), 256, 16,
        ),
    }  # fmt: skip
    model, length, rows = sizes[name]
    if toy:
        model, length, rows = replace(model, num_layers=1, d_ff=64), 64, 2
    return replace(
        resized(base, model, length, rows),
        # JAX cannot vmap cuDNN's attention with a mask that heads share.
        compute=replace(base.compute, attention="xla"),
    )


def seeds(rec: Recorder) -> None:
    def measure(cfg: c.Config, count: int, together: bool) -> dict[str, Any]:
        tables = TokenWeights(
            np.ones(len(cfg.languages), np.float32),
            np.ones(cfg.model.vocab_size, np.float32),
        )
        keys = jax.vmap(jax.random.key)(np.arange(count))
        # Without a mesh: what one device computes for each seed.
        states = jax.jit(jax.vmap(functools.partial(steps.init_state, cfg)))(keys)
        rows, length = cfg.data.batch_size, cfg.data.seq_len
        batches = [
            packed_batch(cfg.model.vocab_size, rows, length, seed)
            for seed in range(count)
        ]

        def one(state: Any, batch: Any) -> Any:
            state, metrics = steps.train_step(state, batch, cfg, 0, tables, 0)
            return state, metrics["loss_sum"]

        begin = time.perf_counter()
        if together:
            batch = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *batches)
            run = jax.jit(jax.vmap(one), donate_argnums=0)
            run = run.lower(states, batch).compile()

            def turn() -> Any:
                nonlocal states
                states, losses = run(states, batch)
                return losses
        else:
            many = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(count)]
            placed = [jax.tree.map(jnp.asarray, batch) for batch in batches]
            run = jax.jit(one, donate_argnums=0).lower(many[0], placed[0]).compile()

            def turn() -> Any:
                for i in range(count):
                    many[i], loss = run(many[i], placed[i])
                return loss

        compiled = time.perf_counter() - begin
        calls = 2 if rec.toy else 20
        times = rec.time(turn, jax.block_until_ready, 5, calls)
        return {
            "times": times,
            "tokens": count * rows * length,
            "flops_per_token": flops_per_token(cfg.model, length),
            "peak_flops": peak_flops(),
            "compile_s": round(compiled, 1),
            "note": f"{parameter_count(cfg.model) / 1e6:.2f}M parameters",
        }

    for name, count in (("0.85M", 8), ("3M", 8), ("25M", 4)):
        cfg = seed_config(name, rec.toy)
        for together in (True, False):
            how = "side by side" if together else "in turns"
            rec.case(
                f"{name}, {count} seeds {how}",
                functools.partial(measure, cfg, count, together),
            )


# --- decode -----------------------------------------------------------------------


class NoText:
    """Token ids only: nothing is decoded to text, no token stops a row."""

    stop_ids = ()


def decode(rec: Recorder) -> None:
    from gamayun_jax.inference.generator import Generator

    cfg, prompt, new, batches = decode_sizes(rec.toy)
    shapes = abstract_params(cfg)

    @jax.jit
    def draw(key: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten(
            [
                (0.02 * jax.random.normal(k, x.shape)).astype(jnp.bfloat16)
                for k, x in zip(keys, leaves, strict=True)
            ]
        )

    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    dtype = "float32" if rec.toy else "bfloat16"
    generator = Generator(
        cfg, draw(jax.random.key(0)), mesh, NoText(), c.ComputeConfig(dtype=dtype)
    )

    def measure(batch: int) -> dict[str, Any]:
        rng = np.random.default_rng(batch)
        ids = rng.integers(4, cfg.vocab_size, (batch, prompt)).tolist()

        def seconds(count: int) -> list[float]:
            # What is returned are lists: the device is done.
            return rec.time(lambda: generator.generate_ids(ids, count), id, 3)

        begin = time.perf_counter()
        generator.generate_ids(ids, 2)
        first = time.perf_counter() - begin
        few, many = seconds(1), seconds(1 + new)
        prefill = float(np.median(few))
        return {
            "times": [t - prefill for t in many],
            "tokens": batch * new,
            "steps": new,
            "bytes": decoding_bytes(cfg, batch, prompt + new / 2),
            "compile_s": round(first, 1),
            "note": f"prefill of {prompt}: {1e3 * prefill:.1f} ms",
        }

    for batch in batches:
        rec.case(f"batch {batch}", functools.partial(measure, batch))
