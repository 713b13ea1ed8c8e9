"""The decoder: RoPE, RMSNorm, grouped-query attention, SwiGLU, scan over layers.

A pre-norm transformer decoder that covers Gamayun, LLaMA-3.2, Qwen2.5 and Qwen3
through the fields of ModelConfig, without branches on a model's name. Parameters
are float32 and a plain nested dict; compute is in `dtype`.

Shape suffixes: B batch, T query length, S key length (cache slots), D model,
F mlp, N query heads, K key-value heads, H head dim, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gamayun_jax.config import ComputeConfig, ModelConfig
from gamayun_jax.model import sharding
from gamayun_jax.model.attention import OUTPUT, attention, self_attention
from gamayun_jax.model.weights import VOCAB_MATRIX_AXES, WEIGHTS

Cache = dict[str, jax.Array]

# What the backward pass keeps of a layer's forward pass besides the layer's input, by
# name of the policy. `minimal` makes the products k, v and o again, the cheapest ones
# for their size; `attention` also gate and up of the MLP, two thirds of its products.
# `offload` is `minimal` in the memory of the host.
KEPT = ("q", OUTPUT, "gate", "up")
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "minimal": jax.checkpoint_policies.save_only_these_names(*KEPT),
    "attention": jax.checkpoint_policies.save_only_these_names("q", "k", "v", OUTPUT),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(KEPT),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def compute_dtype(name: str) -> jnp.dtype:
    """ "auto" is bfloat16 where the platform multiplies it fast, float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def rope_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Angular frequency of each rotated pair, float32 [H/2].

    Su et al., arXiv 2104.09864; with `rope_scaling`, the LLaMA-3.1 rule: slow
    frequencies are divided by `factor`, fast ones kept, those between blended.
    """
    half = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    freqs = np.float32(1.0) / np.float32(cfg.rope_theta) ** half
    scaling = cfg.rope_scaling
    if scaling is None:
        return freqs
    turns = scaling.original_max_len * freqs / np.float32(2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return ((1 - smooth) * freqs / scaling.factor + smooth * freqs).astype(np.float32)


def rope_angles(
    cfg: ModelConfig, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of each position's angles, both float32 [B, T, 1, H]."""
    angle_BTH = positions_BT[..., None].astype(jnp.float32) * _like(
        jnp.tile(rope_frequencies(cfg), 2), positions_BT[..., None]
    )
    return jnp.cos(angle_BTH)[:, :, None], jnp.sin(angle_BTH)[:, :, None]


def rotate(x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array) -> jax.Array:
    """Rotate pairs (i, i + H/2) of each head: Hugging Face's order of dimensions.

    In float32, as the LLaMA reference, and rounded once to the dtype of x: a cosine
    rounded to bfloat16 turns all heads' pairs of one position by a wrong angle.
    """
    x32_BTNH = x_BTNH.astype(jnp.float32)
    x1, x2 = jnp.split(x32_BTNH, 2, axis=-1)
    rotated = jnp.concatenate([-x2, x1], axis=-1)
    return (x32_BTNH * cos_BT1H + rotated * sin_BT1H).astype(x_BTNH.dtype)


class Weight(NamedTuple):
    """A matrix's parameter, divided over devices, and how to compute with it."""

    value: jax.Array  # float32 [*I, *O]
    axes: tuple[str | None, ...]  # logical
    reduce_dtype: str  # ComputeConfig.reduce_dtype


def project(x: jax.Array, w: Weight, contracted: int) -> jax.Array:
    """x [B, T, *I] times w [*I, *O] over the `contracted` axes I: [B, T, *O].

    In the dtype of x, with w gathered over fsdp.
    """
    return _project(x, w.value, contracted, w.axes, w.reduce_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _project(x, w, contracted, axes, reduce_dtype):
    """Its own gradient, for three reasons.

    The gathered weight is no residual, under any remat policy: kept, it would undo
    its division. The gradient of w leaves the product in the dtype in which devices
    sum it: automatic differentiation would round each device's part to that of x. And
    the order of that product's factors: in that of the weights, automatic
    differentiation puts the output's gradient first, and on CPU XLA transposes the
    first factor, with all that computes it. For SwiGLU that took a quarter of a step.
    Here the narrower factor is the first.
    """
    return jnp.tensordot(x, sharding.gather(w, axes, x.dtype), contracted)


def _project_fwd(x, w, contracted, axes, reduce_dtype):
    return _project(x, w, contracted, axes, reduce_dtype), (x, w)


def _project_bwd(contracted, axes, reduce_dtype, saved, g):
    x, w = saved
    over = (tuple(range(2, g.ndim)), tuple(range(contracted, w.ndim)))
    dx = jnp.tensordot(g, sharding.gather(w, axes, x.dtype), over)
    if x.size <= g.size:
        dw = sharding.weight_gradient(x, g, reduce_dtype)
    else:
        dw = sharding.weight_gradient(g, x, reduce_dtype)
        dw = jnp.moveaxis(dw, range(g.ndim - 2), range(contracted, w.ndim))
    return dx, sharding.constrain_parameter(dw, axes).astype(w.dtype)


_project.defvjp(_project_fwd, _project_bwd)


def _param(module: nn.Module, path: str, cfg: ModelConfig) -> Any:
    """A weight of the table, declared in its module."""
    w = WEIGHTS[path]
    return module.param(w.name, w.kind.initializer(cfg), w.shape(cfg), jnp.float32)


def _weight(module: Any, path: str) -> Weight:
    """A matrix to `project` with."""
    value = _param(module, path, module.cfg)
    return Weight(value, WEIGHTS[path].logical_axes, module.reduce_dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32 (1910.07467)."""

    cfg: ModelConfig
    weight: str  # path of its scale
    lean: bool = False  # see Block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = _param(self, self.weight, self.cfg)

        def norm(x, scale):
            x32 = x.astype(jnp.float32)
            inverse = jax.lax.rsqrt(
                jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.cfg.norm_eps
            )
            return (x32 * inverse * _like(scale, x32)).astype(x.dtype)

        return (jax.checkpoint(norm) if self.lean else norm)(x, scale)


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Give a trailing-axis vector the rank of `x` (implicit promotion is an error)."""
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions (GQA: arXiv 2305.13245)."""

    cfg: ModelConfig
    dtype: jnp.dtype
    attention_impl: str = "auto"  # ComputeConfig.attention
    reduce_dtype: str = "float32"  # ComputeConfig.reduce_dtype
    lean: bool = False  # see Block

    @nn.compact
    def __call__(self, x_BTD, cos_BT1H, sin_BT1H, segments, layer_cache):
        """Returns the output [B, T, D] and the layer's updated (k, v) or None."""
        cfg = self.cfg
        at = "layers/attention"

        def heads(name: str) -> jax.Array:
            y_BTNH = project(x_BTD, _weight(self, f"{at}/{name}"), 1)
            if cfg.qkv_bias:
                bias = _param(self, f"{at}/{name}_bias", cfg)
                # In float32, as its gradient is then summed.
                y32_BTNH = y_BTNH.astype(jnp.float32)
                y_BTNH = (y32_BTNH + _like(bias, y32_BTNH)).astype(self.dtype)
            return checkpoint_name(y_BTNH, name)

        q_BTNH = heads("q")
        k_BTKH = heads("k")
        v_BTKH = heads("v")
        if cfg.qk_norm:
            norm = functools.partial(RMSNorm, cfg, lean=self.lean)
            q_BTNH = norm(f"{at}/q_norm/scale", name="q_norm")(q_BTNH)
            k_BTKH = norm(f"{at}/k_norm/scale", name="k_norm")(k_BTKH)
        q_BTNH = rotate(q_BTNH, cos_BT1H, sin_BT1H)
        k_BTKH = rotate(k_BTKH, cos_BT1H, sin_BT1H)
        q_BTNH = nn.with_logical_constraint(
            q_BTNH, ("batch", "length", "act_heads", None)
        )
        q_segments, kv_segments, offset, q_contexts = segments
        if layer_cache is not None:
            k_BKHS, v_BKSH = layer_cache
            k_BKHS = jax.lax.dynamic_update_slice(
                k_BKHS,
                k_BTKH.transpose(0, 2, 3, 1).astype(k_BKHS.dtype),
                (0, 0, 0, offset),
            )
            v_BKSH = jax.lax.dynamic_update_slice(
                v_BKSH, v_BTKH.swapaxes(1, 2).astype(v_BKSH.dtype), (0, 0, offset, 0)
            )
            layer_cache = (k_BKHS, v_BKSH)
            k_BTKH, v_BTKH = k_BKHS.transpose(0, 3, 1, 2), v_BKSH.swapaxes(1, 2)
        qkv = (q_BTNH, k_BTKH, v_BTKH)
        if layer_cache is None and q_contexts is None:
            # Initialisation looks at one token, which no kernel takes.
            impl = "xla" if self.is_initializing() else self.attention_impl
            out_BTNH = self_attention(*qkv, q_segments, impl)
        else:
            out_BTNH = attention(*qkv, q_segments, kv_segments, offset, q_contexts)
        y_BTD = project(out_BTNH, _weight(self, f"{at}/o"), 2)
        return y_BTD, layer_cache


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    cfg: ModelConfig
    dtype: jnp.dtype
    reduce_dtype: str = "float32"  # ComputeConfig.reduce_dtype
    lean: bool = False  # see Block

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_DF, up_DF, down_FD = (
            _weight(self, f"layers/mlp/{name}") for name in ("gate", "up", "down")
        )
        gate_BTF = checkpoint_name(project(x_BTD, gate_DF, 1), "gate")
        up_BTF = checkpoint_name(project(x_BTD, up_DF, 1), "up")

        def down(gate_BTF, up_BTF):
            h_BTF = nn.with_logical_constraint(
                jax.nn.silu(gate_BTF) * up_BTF, ("batch", "length", "act_mlp")
            )
            return project(h_BTF, down_FD, 1)

        # Lean, gate and up are kept for the gradient, not four more of their size.
        return (jax.checkpoint(down) if self.lean else down)(gate_BTF, up_BTF)


class Block(nn.Module):
    """One layer, in the form that `nn.scan` carries: (x, cache) -> (x, cache).

    Attributes:
      lean: elementwise functions keep their arguments alone for the gradient, which on
        CPU is faster too. Not under remat, whose policy decides what is kept, nor with
        weights divided over fsdp: XLA for TPUs estimates that the barriers within cost
        14 % of a step.
    """

    cfg: ModelConfig
    dtype: jnp.dtype
    attention_impl: str = "auto"
    reduce_dtype: str = "float32"
    lean: bool = False

    @nn.compact
    def __call__(self, x_BTD, layer_cache, cos_BT1H, sin_BT1H, segments):
        norm = functools.partial(RMSNorm, self.cfg, lean=self.lean)
        scale = "layers/attention_norm/scale"
        h_BTD = norm(scale, name="attention_norm")(x_BTD)
        how = (self.reduce_dtype, self.lean)
        args = (self.cfg, self.dtype, self.attention_impl)
        attend = Attention(*args, *how, name="attention")
        h_BTD, layer_cache = attend(h_BTD, cos_BT1H, sin_BT1H, segments, layer_cache)
        x_BTD = x_BTD + h_BTD
        h_BTD = norm("layers/mlp_norm/scale", name="mlp_norm")(x_BTD)
        x_BTD = x_BTD + SwiGLU(self.cfg, self.dtype, *how, name="mlp")(h_BTD)
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "act_embed"))
        # Kept only where the collection is asked for: see `hidden_states`.
        self.sow("intermediates", "hidden", x_BTD)
        return x_BTD, layer_cache


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(
    table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, reduce_dtype: str
) -> jax.Array:
    """Rows of the embedding, which is gathered over fsdp like any other weight.

    Left to itself, the partitioner looks up the whole global batch on every device,
    and sums the whole table's gradient over all of them.
    """
    table = sharding.gather(table_VD, VOCAB_MATRIX_AXES, dtype)
    return jnp.take(table, tokens_BT, axis=0)


def _look_up_fwd(table_VD, tokens_BT, dtype, reduce_dtype):
    return look_up(table_VD, tokens_BT, dtype, reduce_dtype), (tokens_BT, table_VD)


def _look_up_bwd(dtype, reduce_dtype, kept, dx_BTD):
    tokens_BT, table_VD = kept
    P, Q = sharding.batch_groups(len(tokens_BT))

    def cut(a: jax.Array) -> jax.Array:  # each device's rows: [P, Q, B' x T, ...]
        a = a.reshape(P, Q, -1, *a.shape[2:])
        return sharding.divide_groups(a)

    # In float32: a sum in bfloat16 stands still once it is 256 times what is added,
    # and the token of a comma is added thousands of times.
    def add(dx, tokens):
        zeros = jnp.zeros(table_VD.shape, jnp.float32)
        return zeros.at[tokens].add(dx.astype(jnp.float32)).astype(reduce_dtype)

    parts = sharding.divide_groups(jax.vmap(jax.vmap(add))(cut(dx_BTD), cut(tokens_BT)))
    return sharding.sum_groups(parts, VOCAB_MATRIX_AXES).astype(table_VD.dtype), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


class Transformer(nn.Module):
    """Token ids to final hidden states; `unembedding` gives the output matrix."""

    cfg: ModelConfig
    compute: ComputeConfig = ComputeConfig()

    @property
    def dtype(self) -> jnp.dtype:
        return compute_dtype(self.compute.dtype)

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: Cache | None = None,
        contexts_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the final norm, and the updated cache.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32 position of each token in its document, for RoPE.
          segment_ids_BT: int32; tokens see only their own segment; 0 is padding.
          contexts_BT: int32, a second segment that a token sees: a context that several
            continuations in a row share.
          cache: from `init_cache`; the T new tokens are written at its `index`.

        Returns:
          x_BTD in the compute dtype, and the new cache (None without one).
        """
        cfg, dtype = self.cfg, self.dtype
        embedding_VD = _param(self, "embedding", cfg)
        if not cfg.tie_embeddings:
            _param(self, "unembedding", cfg)
        x_BTD = look_up(embedding_VD, tokens_BT, dtype, self.compute.reduce_dtype)
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "act_embed"))
        self.sow("intermediates", "embedded", x_BTD)

        cos_BT1H, sin_BT1H = rope_angles(cfg, positions_BT)

        offset: jax.Array | int = 0
        kv_segments_BS = segment_ids_BT
        layer_caches = None
        if cache is not None:
            offset = cache["index"]
            kv_segments_BS = jax.lax.dynamic_update_slice(
                cache["segment_ids"], segment_ids_BT, (0, offset)
            )
            layer_caches = (cache["k"], cache["v"])
        segments = (segment_ids_BT, kv_segments_BS, offset, contexts_BT)
        context = (cos_BT1H, sin_BT1H, segments)

        block = Block
        remat = self.compute.remat != "none"
        if remat and cache is None:
            block = nn.remat(  # type: ignore[assignment]
                Block,
                policy=REMAT_POLICIES[self.compute.remat],
                prevent_cse=not self.compute.scan_layers,
            )
        # The parameters are stacked over layers in both cases, so that checkpoints
        # and exports do not depend on how the loop was compiled.
        x_BTD, layer_caches = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=cfg.num_layers,
            unroll=1 if self.compute.scan_layers else cfg.num_layers,
        )(
            cfg,
            dtype,
            self.compute.attention,
            self.compute.reduce_dtype,
            lean=not remat and not sharding.divides_parameters(),
            name="layers",
        )(x_BTD, layer_caches, *context)

        x_BTD = RMSNorm(cfg, "final_norm/scale", name="final_norm")(x_BTD)
        if cache is None:
            return x_BTD, None
        k, v = layer_caches
        index = offset + tokens_BT.shape[1]
        return x_BTD, dict(k=k, v=v, segment_ids=kv_segments_BS, index=index)


def hidden_states(
    model: Transformer,
    params: Any,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """States of every layer: embedded [1, B, T, D], of the layers but the last
    [L-1, B, T, D], after the final norm [1, B, T, D].

    One after another they are the `output_hidden_states` of transformers.
    """
    (x_BTD, _), kept = model.apply(
        {"params": params},
        tokens_BT,
        positions_BT,
        segment_ids_BT,
        mutable=["intermediates"],
    )
    (embedded_BTD,) = kept["intermediates"]["embedded"]
    (hidden_LBTD,) = kept["intermediates"]["layers"]["hidden"]
    return embedded_BTD[None], hidden_LBTD[:-1], x_BTD[None]


def init_cache(
    cfg: ModelConfig, batch: int, slots: int, dtype: jnp.dtype = jnp.float32
) -> Cache:
    """An empty key-value cache: k [L, B, K, H, S], v [L, B, K, S, H].

    Slots are filled in order. The layouts are those of the two matrix products of
    attention, so that a decoding step does not transpose what is there already.
    """
    shape = (cfg.num_layers, batch, cfg.num_kv_heads)
    return dict(
        k=jnp.zeros((*shape, cfg.head_dim, slots), dtype),
        v=jnp.zeros((*shape, slots, cfg.head_dim), dtype),
        segment_ids=jnp.zeros((batch, slots), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def unembedding(params: dict[str, Any]) -> jax.Array:
    """The output matrix [V, D]: the embedding itself where they are tied."""
    return params.get("unembedding", params["embedding"])


def logits(params: dict[str, Any], x_BTD: jax.Array) -> jax.Array:
    """float32 logits [B, T, V] of hidden states; for evaluation and decoding."""
    w_VD = unembedding(params).astype(x_BTD.dtype)
    return jnp.einsum("BTD,VD->BTV", x_BTD, w_VD, preferred_element_type=jnp.float32)
