"""The decoder: RoPE, RMSNorm, grouped-query attention, SwiGLU, scan over layers.

A pre-norm transformer decoder that covers Gamayun, LLaMA-3.2, Qwen2.5 and Qwen3
through the fields of ModelConfig, without branches on a model's name. Parameters
are float32 and a plain nested dict; compute is in `dtype`.

Shape suffixes: B batch, T query length, S key length (cache slots), D model,
F mlp, N query heads, K key-value heads, H head dim, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gamayun_jax.config import ComputeConfig, ModelConfig
from gamayun_jax.model import ops, sharding
from gamayun_jax.model.attention import OUTPUT, attention, by_parts, self_attention
from gamayun_jax.model.weights import VOCAB_MATRIX_AXES, WEIGHTS


class Remat(NamedTuple):
    """What the backward pass keeps of a layer's forward pass besides its input.

    By name only: what a gradient of our own (ops.py) takes is one value to JAX's
    policies that go by the kind of operation.
    """

    kept: tuple[str, ...]
    offloaded: bool = False  # to the memory of the host

    @property
    def policy(self) -> Callable[..., Any]:
        """The policy of jax.checkpoint."""
        if not self.offloaded:
            return jax.checkpoint_policies.save_only_these_names(*self.kept)
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(self.kept),
            offload_src="device",
            offload_dst="pinned_host",
        )


# `minimal` makes the products k, v and o again, the cheapest ones for their size;
# `attention` also gate and up of the MLP, two thirds of its products.
_MINIMAL = ("q", OUTPUT, "gate", "up")
REMATS = {
    "minimal": Remat(_MINIMAL),
    "attention": Remat(("q", "k", "v", OUTPUT)),
    "full": Remat(()),
    "offload": Remat(_MINIMAL, offloaded=True),
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
    angle_BTH = positions_BT[..., None].astype(jnp.float32) * ops.as_rank_of(
        jnp.tile(rope_frequencies(cfg), 2), positions_BT[..., None]
    )
    return jnp.cos(angle_BTH)[:, :, None], jnp.sin(angle_BTH)[:, :, None]


@jax.custom_vjp
def rotate(x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array) -> jax.Array:
    """Rotate pairs (i, i + H/2) of each head: Hugging Face's order of dimensions.

    In float32, as the LLaMA reference, and rounded once to the dtype of x: a cosine
    rounded to bfloat16 turns all heads' pairs of one position by a wrong angle. Its
    gradient is the rotation back, rounded once too; the angles have none.
    """
    turned_BTNH = jax.lax.platform_dependent(
        x_BTNH, tpu=_turned_by_product, default=_turned
    )
    y32_BTNH = x_BTNH.astype(jnp.float32) * cos_BT1H + turned_BTNH * sin_BT1H
    return y32_BTNH.astype(x_BTNH.dtype)


def _turned(x_BTNH: jax.Array) -> jax.Array:
    """Each pair (a, b) as (-b, a), in float32."""
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([-x2, x1], axis=-1)


def _turned_by_product(x_BTNH: jax.Array) -> jax.Array:
    """The same for TPUs, which have a matrix unit and store halves of 128 lanes as
    whole ones: a product with a matrix of one 1 or -1 in each column, exact."""
    H = x_BTNH.shape[-1]
    turn_HH = np.eye(H, k=H // 2) - np.eye(H, k=-H // 2)
    return jnp.einsum(
        "BTNH,HK->BTNK",
        x_BTNH,
        turn_HH.astype(x_BTNH.dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )


def _rotate_fwd(x_BTNH, cos_BT1H, sin_BT1H):
    return rotate(x_BTNH, cos_BT1H, sin_BT1H), (cos_BT1H, sin_BT1H)


def _rotate_bwd(saved, g_BTNH):
    cos_BT1H, sin_BT1H = saved
    return rotate(g_BTNH, cos_BT1H, -sin_BT1H), None, None


rotate.defvjp(_rotate_fwd, _rotate_bwd)


def _param(module: nn.Module, cfg: ModelConfig, path: str) -> Any:
    """A weight of the table, declared in its module."""
    w = WEIGHTS[path]
    return module.param(w.name, w.kind.initializer(cfg), w.shape(cfg), jnp.float32)


def _matrix(module: Any, path: str) -> ops.Matrix:
    """A weight to compute products with."""
    w, value = WEIGHTS[path], _param(module, module.cfg, path)
    return ops.Matrix(value, w.logical_axes, len(w.summed), module.compute.reduce_dtype)


class RMSNorm(nn.Module):
    """`ops.rms_norm` with its scale."""

    cfg: ModelConfig
    weight: str  # path of the scale

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = _param(self, self.cfg, self.weight)
        return ops.rms_norm(x, scale, self.cfg.norm_eps)


def norm(cfg: ModelConfig, path: str) -> RMSNorm:
    """The norm whose scale is at path/scale, named by the end of its path."""
    return RMSNorm(cfg, f"{path}/scale", name=path.rpartition("/")[2])


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions (GQA: arXiv 2305.13245)."""

    cfg: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BTD, cos_BT1H, sin_BT1H, segments, layer_cache):
        """Returns the output [B, T, D] and the layer's updated (k, v) or None."""
        cfg, at = self.cfg, "layers/attention"

        def heads(name: str) -> jax.Array:
            y_BTNH = ops.linear(x_BTD, _matrix(self, f"{at}/{name}"))
            if cfg.qkv_bias:
                bias = _param(self, cfg, f"{at}/{name}_bias")
                # In float32, as its gradient is then summed.
                y32_BTNH = y_BTNH.astype(jnp.float32)
                y32_BTNH += ops.as_rank_of(bias, y32_BTNH)
                y_BTNH = y32_BTNH.astype(x_BTD.dtype)
            return checkpoint_name(y_BTNH, name)

        q_BTNH, k_BTKH, v_BTKH = heads("q"), heads("k"), heads("v")
        if cfg.qk_norm:
            q_BTNH = norm(cfg, f"{at}/q_norm")(q_BTNH)
            k_BTKH = norm(cfg, f"{at}/k_norm")(k_BTKH)
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
            impl = "xla" if self.is_initializing() else self.compute.attention
            out_BTNH = self_attention(*qkv, q_segments, impl)
        elif x_BTD.shape[1] == k_BTKH.shape[1]:  # a prompt that fills the cache, too
            out_BTNH = by_parts(*qkv, q_segments, q_contexts)
        else:
            out_BTNH = attention(*qkv, q_segments, kv_segments, offset)
        # Kept only where the collection is asked for: see inference/rounding.py.
        self.sow("inputs", "q", x_BTD)
        self.sow("inputs", "o", out_BTNH)
        return ops.linear(out_BTNH, _matrix(self, f"{at}/o")), layer_cache


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    cfg: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_DF, up_DF, down_FD = (
            _matrix(self, f"layers/mlp/{name}") for name in ("gate", "up", "down")
        )
        gate_BTF = checkpoint_name(ops.linear(x_BTD, gate_DF), "gate")
        up_BTF = checkpoint_name(ops.linear(x_BTD, up_DF), "up")
        self.sow("inputs", "gate", x_BTD)
        self.sow("inputs", "down", (gate_BTF, up_BTF))
        return ops.swiglu(gate_BTF, up_BTF, down_FD)


class Block(nn.Module):
    """One layer, in the form that `nn.scan` carries: (x, cache) -> (x, cache)."""

    cfg: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x_BTD, layer_cache, cos_BT1H, sin_BT1H, segments):
        h_BTD = norm(self.cfg, "layers/attention_norm")(x_BTD)
        attend = Attention(self.cfg, self.compute, name="attention")
        h_BTD, layer_cache = attend(h_BTD, cos_BT1H, sin_BT1H, segments, layer_cache)
        x_BTD = x_BTD + h_BTD
        h_BTD = norm(self.cfg, "layers/mlp_norm")(x_BTD)
        x_BTD = x_BTD + SwiGLU(self.cfg, self.compute, name="mlp")(h_BTD)
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "act_embed"))
        # Kept only where the collection is asked for: see `hidden_states`.
        self.sow("intermediates", "hidden", x_BTD)
        return x_BTD, layer_cache


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
        contexts_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in the compute dtype.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32 position of each token in its document, for RoPE.
          segment_ids_BT: int32; tokens see only their own segment; 0 is padding.
          contexts_BT: int32, a second segment that a token sees: a context that several
            continuations in a row share.
        """
        cfg = self.cfg
        embedding_VD = _matrix(self, "embedding")
        if not cfg.tie_embeddings:
            _param(self, cfg, "unembedding")
        x_BTD = ops.embed(embedding_VD, tokens_BT, self.dtype)
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", "act_embed"))
        self.sow("intermediates", "embedded", x_BTD)

        cos_BT1H, sin_BT1H = rope_angles(cfg, positions_BT)
        segments = (segment_ids_BT, segment_ids_BT, 0, contexts_BT)
        block = Block
        if self.compute.remat != "none":
            block = nn.remat(  # type: ignore[assignment]
                Block,
                policy=REMATS[self.compute.remat].policy,
                prevent_cse=not self.compute.scan_layers,
            )
        # The parameters are stacked over layers in both cases, so that checkpoints
        # and exports do not depend on how the loop was compiled.
        x_BTD, _ = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=cfg.num_layers,
            unroll=1 if self.compute.scan_layers else cfg.num_layers,
        )(cfg, self.compute, name="layers")(x_BTD, None, cos_BT1H, sin_BT1H, segments)

        return norm(cfg, "final_norm")(x_BTD)


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
    x_BTD, kept = model.apply(
        {"params": params},
        tokens_BT,
        positions_BT,
        segment_ids_BT,
        mutable=["intermediates"],
    )
    (embedded_BTD,) = kept["intermediates"]["embedded"]
    (hidden_LBTD,) = kept["intermediates"]["layers"]["hidden"]
    return embedded_BTD[None], hidden_LBTD[:-1], x_BTD[None]


def unembedding(params: dict[str, Any]) -> jax.Array:
    """The output matrix [V, D]: the embedding itself where they are tied."""
    return params.get("unembedding", params["embedding"])


def logits(params: dict[str, Any], x_BTD: jax.Array) -> jax.Array:
    """float32 logits [B, T, V] of hidden states; for evaluation and decoding."""
    w_VD = sharding.gather(unembedding(params), VOCAB_MATRIX_AXES, x_BTD.dtype)
    return jnp.einsum("BTD,VD->BTV", x_BTD, w_VD, preferred_element_type=jnp.float32)
