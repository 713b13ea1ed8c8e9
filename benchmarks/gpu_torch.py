"""Parts of gpu.py that measure PyTorch and transformers: see there.

`Decoder` is the architecture of model/transformer.py (RMSNorm, norms on q and k, RoPE,
grouped-query attention, SwiGLU, tied embeddings) as one would write it in PyTorch:
float32 parameters under autocast to bfloat16, each layer through torch.compile,
PyTorch's fused attention, output head and loss by chunks that form the gradient in the
forward pass (the logits never exist whole), fused AdamW, gradients clipped.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as fn
from gpu import Recorder

# Sizes and the batch, from the project itself; JAX is kept to the CPU in this process.
from gpu_sizes import (
    attention_sizes,
    decode_sizes,
    decoding_bytes,
    packed_batch,
    step_config,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from gamayun_jax.model.weights import flops_per_token, parameter_count
from gamayun_jax.training.chips import CHIPS, DEVICE_KINDS

GIB = 2**30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
torch._dynamo.config.cache_size_limit = 64


def sync(_: Any = None) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_flops() -> float | None:
    if DEVICE != "cuda":
        return None
    kind = torch.cuda.get_device_name(0).lower()
    return next((CHIPS[name].flops for k, name in DEVICE_KINDS if k in kind), None)


# --- step -------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, cfg: Any):
        super().__init__()
        d, n, k, h = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.heads, self.width, self.eps = (n, k), h, cfg.norm_eps
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(d)) for _ in range(2))
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(h)) for _ in range(2))
        self.qkv = nn.Linear(d, (n + 2 * k) * h, bias=False)
        self.o = nn.Linear(n * h, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * cfg.d_ff, bias=False)
        self.down = nn.Linear(cfg.d_ff, d, bias=False)

    def forward(self, x, cos, sin, mask):
        B, T, _ = x.shape
        (n, k), h = self.heads, self.width

        def norm(x, scale):
            # In float32, as autocast leaves it, and rounded to the products' dtype.
            return fn.rms_norm(x.float(), scale.shape, scale, self.eps).to(x.dtype)

        def rotate(x):  # [B, n, T, h]
            a, b = x.float().chunk(2, -1)
            return (x.float() * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)

        qkv = self.qkv(norm(x, self.norm1)).view(B, T, n + 2 * k, h).transpose(1, 2)
        q, key, value = qkv.split([n, k, k], 1)
        q = rotate(norm(q, self.q_norm))
        key = rotate(norm(key, self.k_norm))
        if mask is None:
            out = fn.scaled_dot_product_attention(
                q, key, value, is_causal=True, enable_gqa=True
            )
        else:
            from torch.nn.attention.flex_attention import flex_attention

            out = flex_attention(q, key, value, block_mask=mask, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).reshape(B, T, n * h))
        gate, up = self.gate_up(norm(x, self.norm2)).chunk(2, -1)
        return x + self.down(fn.silu(gate) * up)


@torch.compile(dynamic=False)
def _head_gradient(logits, targets, weights):
    """Weighted sum of losses, and the gradient of the logits in their dtype."""
    logits = logits.float()
    lse = torch.logsumexp(logits, -1)
    picked = logits.gather(1, targets[:, None])[:, 0]
    grad = torch.exp(logits - lse[:, None])
    ids = torch.arange(logits.shape[1], device=logits.device)
    grad = grad - (ids[None] == targets[:, None]).float()
    loss = (weights * (lse - picked)).sum()
    return loss, (grad * weights[:, None]).to(torch.bfloat16)


class HeadLoss(torch.autograd.Function):
    """sum(weight * cross entropy of x @ w.T), by chunks of rows."""

    @staticmethod
    def forward(ctx, x, w, targets, weights, chunk):
        x16, w16 = x.to(torch.bfloat16), w.to(torch.bfloat16)
        dx, dw = torch.empty_like(x16), torch.zeros_like(w)
        total = torch.zeros((), device=x.device)
        for at in range(0, len(x), chunk):
            part = slice(at, at + chunk)
            loss, grad = _head_gradient(x16[part] @ w16.T, targets[part], weights[part])
            total += loss
            dx[part] = grad @ w16
            dw += grad.T @ x16[part]
        ctx.save_for_backward(dx, dw)
        ctx.dtype = x.dtype
        return total

    @staticmethod
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors
        return (dx * g).to(ctx.dtype), dw * g, None, None, None


class Decoder(nn.Module):
    """Args: remat: none, or full (each layer is computed again)."""

    def __init__(self, cfg: Any, remat: str, whole: bool = False):
        super().__init__()
        self.cfg, self.remat = cfg, remat
        self.embedding = nn.Parameter(0.02 * torch.randn(cfg.vocab_size, cfg.d_model))
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_layers))
        for p in self.layers.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        self.final = nn.Parameter(torch.ones(cfg.d_model))
        half = torch.arange(0, cfg.head_dim, 2) / cfg.head_dim
        self.register_buffer("frequencies", (1.0 / cfg.rope_theta**half).repeat(2))
        for layer in self.layers:
            layer.compile(dynamic=False)

    def loss(self, batch: dict[str, Any], mask: Any, chunk: int) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            angle = batch["positions"][:, None, :, None] * self.frequencies
            cos, sin = angle.cos(), angle.sin()
            x = fn.embedding(batch["inputs"], self.embedding).to(torch.bfloat16)
            for layer in self.layers:
                if self.remat == "full":
                    x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
                else:
                    x = layer(x, cos, sin, mask)
            x = fn.rms_norm(x.float(), self.final.shape, self.final, self.cfg.norm_eps)
        flat = x.reshape(-1, x.shape[-1])
        weights = batch["loss_mask"].reshape(-1) * batch["weight"].reshape(-1)
        return HeadLoss.apply(
            flat, self.embedding, batch["targets"].reshape(-1), weights, chunk
        )


def documents_mask(segments: torch.Tensor) -> Any:
    """flex_attention's block mask of causal attention within documents."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b, h, q, k):
        return (q >= k) & (segments[b, q] == segments[b, k])

    B, T = segments.shape
    return create_block_mask(seen, B, None, T, T, device=segments.device)


def step_torch(rec: Recorder) -> None:
    cfg = step_config(rec.toy)
    rows, length = cfg.data.batch_size, cfg.data.seq_len
    numpy = packed_batch(cfg.model.vocab_size, rows, length)
    batch = {k: torch.from_numpy(v).to(DEVICE) for k, v in numpy.items()}
    batch = {k: v.long() if k in ("inputs", "targets") else v for k, v in batch.items()}
    table = torch.rand(cfg.model.vocab_size, device=DEVICE) + 0.5
    chunk = 4096 if not rec.toy else 64

    def measure(remat: str, parts: int, documents: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        with torch.device(DEVICE):
            model = Decoder(cfg.model, remat)
        o = cfg.optimizer
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=3e-4, betas=(o.b1, o.b2), eps=o.eps,
            weight_decay=o.weight_decay, fused=True,
        )  # fmt: skip
        batch["weight"] = table[batch["targets"]]
        rows_of = [{k: v[i::parts] for k, v in batch.items()} for i in range(parts)]
        masks = [None] * parts
        if documents:  # made before the step: as if the loader did it
            masks = [documents_mask(part["segment_ids"]) for part in rows_of]
        losses = []

        def one() -> None:
            count = batch["loss_mask"].sum()
            total = torch.zeros((), device=DEVICE)
            for part, mask in zip(rows_of, masks, strict=True):
                loss = model.loss(part, mask, chunk) / count
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)

        one()
        sync()
        first = time.perf_counter() - begin
        times = rec.time(one, sync, 5)
        found = {
            "times": times,
            "tokens": rows * length,
            "flops_per_token": flops_per_token(cfg.model, length),
            "peak_flops": peak_flops(),
            "compile_s": round(first, 1),
            "losses": [round(float(x), 3) for x in losses],
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        if DEVICE == "cuda":
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 1)
        return found

    def clean(*case: Any) -> dict[str, Any]:
        try:
            return measure(*case)
        finally:
            torch._dynamo.reset()
            if DEVICE == "cuda":
                import gc

                gc.collect()
                torch.cuda.empty_cache()

    if DEVICE == "cuda":
        rec.write("versions", versions=f"torch {torch.__version__}")
    for remat, parts, documents in (
        ("none", 2, False),
        ("none", 2, True),
        ("none", 1, False),
        ("full", 1, False),
    ):
        what = "flex, documents" if documents else "causal, no documents"
        rec.case(
            f"{remat} {parts} parts, {what}",
            functools.partial(clean, remat, parts, documents),
        )


# --- attention --------------------------------------------------------------------


def attention_torch(rec: Recorder) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention

    B, T, N, K, H = attention_sizes(rec.toy)
    dtype = torch.float32 if rec.toy else torch.bfloat16
    torch.manual_seed(0)
    q, k, v, g = (
        torch.randn(B, n, T, H, device=DEVICE, dtype=dtype) for n in (N, K, K, N)
    )
    for x in (q, k, v):
        x.requires_grad_()
    segments = torch.from_numpy(packed_batch(512, B, T)["segment_ids"]).to(DEVICE)
    same = (segments[:, :, None] == segments[:, None]).tril()[:, None]
    block_mask = documents_mask(segments)
    flex = torch.compile(flex_attention, dynamic=False)

    def reference() -> tuple[torch.Tensor, ...]:
        row = [x[:1].detach().double().requires_grad_() for x in (q, k, v)]
        groups = N // K
        keys, values = (x.repeat_interleave(groups, 1) for x in row[1:])
        scores = row[0] @ keys.mT * H**-0.5
        out = scores.masked_fill(~same[:1], -torch.inf).softmax(-1) @ values
        return (out, *torch.autograd.grad(out, row, g[:1].double()))

    exact = reference()

    def of_documents() -> Any:
        starts = torch.from_numpy(
            np.flatnonzero(np.diff(segments.cpu().numpy().ravel(), prepend=-1))
        )
        bounds = torch.cat([starts, torch.tensor([B * T])]).to(DEVICE, torch.int32)
        return bounds, int(bounds.diff().max())

    bounds, longest = of_documents()

    def varlen() -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        def flat(x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2).reshape(B * T, -1, H)

        out = varlen_attn(
            flat(q), flat(k), flat(v), bounds, bounds, longest, longest,
            window_size=(-1, 0),
        )  # fmt: skip
        return out.view(B, T, N, H).transpose(1, 2)

    def sdpa(backend: Any, **kwargs: Any) -> torch.Tensor:
        with sdpa_kernel(backend):
            return fn.scaled_dot_product_attention(q, k, v, enable_gqa=True, **kwargs)

    def measure(kernel: Callable[[], torch.Tensor], check: bool) -> dict[str, Any]:
        begin = time.perf_counter()
        out = kernel()
        grads = torch.autograd.grad(out, (q, k, v), g)
        sync()
        found: dict[str, Any] = {"compile_s": round(time.perf_counter() - begin, 1)}
        if check:
            names = ("out", "dq", "dk", "dv")
            found["errors"] = {
                n: float((x[:1].double() - e).norm() / e.norm())
                for n, x, e in zip(names, (out, *grads), exact, strict=True)
            }

        def forward() -> None:
            with torch.no_grad():
                kernel()

        def whole() -> None:
            torch.autograd.grad(kernel(), (q, k, v), g)

        found["forward"] = rec.time(forward, sync, 7, 10)
        found["times"] = rec.time(whole, sync, 7, 10)
        return found

    def with_mask() -> torch.Tensor:
        keys, values = (x.repeat_interleave(N // K, 1) for x in (k, v))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return fn.scaled_dot_product_attention(q, keys, values, attn_mask=same)

    cases: dict[str, Callable[[], torch.Tensor]] = {
        "flex, documents": lambda: flex(
            q, k, v, block_mask=block_mask, enable_gqa=True
        ),
        "varlen flash, documents": varlen,
        "flash, causal, no documents": lambda: sdpa(
            SDPBackend.FLASH_ATTENTION, is_causal=True
        ),
        "cudnn, causal, no documents": lambda: sdpa(
            SDPBackend.CUDNN_ATTENTION, is_causal=True
        ),
        "efficient, mask": with_mask,
    }
    if rec.toy:  # PyTorch has no others on a CPU
        cases = {
            "flash, causal, no documents": lambda: sdpa(
                SDPBackend.MATH, is_causal=True
            ),
            "efficient, mask": lambda: sdpa(SDPBackend.MATH, attn_mask=same),
        }
    for name, kernel in cases.items():
        check = "no documents" not in name
        rec.case(name, functools.partial(measure, kernel, check))


# --- decode -----------------------------------------------------------------------


def decode_torch(rec: Recorder) -> None:
    import transformers

    cfg, prompt, new, batches = decode_sizes(rec.toy)
    hf = transformers.Qwen3Config(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim, max_position_embeddings=cfg.max_seq_len,
        rms_norm_eps=cfg.norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
    )  # fmt: skip
    torch.set_default_dtype(torch.float32 if rec.toy else torch.bfloat16)
    with torch.device(DEVICE):
        model = transformers.Qwen3ForCausalLM(hf).eval()

    def measure(batch: int) -> dict[str, Any]:
        ids = torch.randint(4, cfg.vocab_size, (batch, prompt), device=DEVICE)

        def run(count: int) -> Any:
            with torch.inference_mode():
                return model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                    min_new_tokens=count, do_sample=False, use_cache=True,
                    pad_token_id=0, eos_token_id=None,
                )  # fmt: skip

        begin = time.perf_counter()
        run(2)
        sync()
        first = time.perf_counter() - begin
        few = rec.time(lambda: run(1), sync, 3)
        many = rec.time(lambda: run(1 + new), sync, 2)
        prefill = float(np.median(few))
        return {
            "times": [t - prefill for t in many],
            "tokens": batch * new,
            "steps": new,
            "bytes": decoding_bytes(cfg, batch, prompt + new / 2),
            "compile_s": round(first, 1),
            "note": f"prefill of {prompt}: {1e3 * prefill:.1f} ms; "
            f"{parameter_count(cfg) / 1e9:.2f}B parameters",
        }

    rec.write("versions", versions=f"transformers {transformers.__version__}")
    for batch in batches:
        rec.case(f"batch {batch}", functools.partial(measure, batch))
