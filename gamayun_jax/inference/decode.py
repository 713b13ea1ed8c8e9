"""The compiled programs of generation: prefill, and decode steps in one loop.

Decoding differs from the training forward in its loop only: each layer's weights and
cache are arrays of their own. In a `scan` over stacked layers every step would copy
all weights and the whole cache.

Shape suffixes: B rows, T new tokens, S cache slots, D model, V vocabulary, K
key-value heads, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gamayun_jax.config import ComputeConfig, ModelConfig
from gamayun_jax.inference.quantize import dequantize, map_leaves, unfold
from gamayun_jax.inference.sampling import sample_token
from gamayun_jax.model import ops, sharding
from gamayun_jax.model.transformer import (
    Block,
    compute_dtype,
    logits,
    rope_angles,
)

CHUNK = 16  # tokens decoded between two looks at the text


class Decoder:
    """Weights laid out for decoding, and the programs that use them.

    To be called inside `jax.set_mesh(mesh)` and the logical-axis rules. A state is a
    dict: caches, segments [B, S], index (slots filled), token [B], position [B],
    done [B], step, seen [B, V] (one column where there is no penalty).
    """

    def __init__(
        self, cfg: ModelConfig, params: Any, mesh: Mesh, compute: ComputeConfig
    ):
        self.cfg, self.compute = cfg, compute
        self.dtype = compute_dtype(compute.dtype)
        self.compilations = 0

        cast = jax.jit(functools.partial(map_leaves, self._cast))

        # A program for any layer: one that cuts out all of them takes seconds to
        # compile.
        @jax.jit
        def layer(layers: Any, i: jax.Array) -> Any:
            return map_leaves(self._cast, jax.tree.map(lambda x: x[i], layers))

        params = sharding.params_on_devices(params, mesh)
        with jax.set_mesh(mesh):
            self.weights = cast({k: v for k, v in params.items() if k != "layers"})
            self.weights["layers"] = [
                layer(params["layers"], np.int32(i)) for i in range(cfg.num_layers)
            ]
        # Whole on every device, or a process could not fetch what others hold.
        whole = sharding.replicated(mesh)
        self.prefill = jax.jit(
            self._prefill_fn, static_argnums=5, out_shardings=(None, whole)
        )
        self.decode = jax.jit(
            self._decode_fn,
            static_argnums=5,
            donate_argnums=1,
            out_shardings=(None, whole, whole),
        )

        def longer(caches: Any, segments_BS: jax.Array, slots: int) -> Any:
            added = slots - segments_BS.shape[1]
            more = ((0, 0), (0, 0), (0, 0), (0, added))
            wider = [
                (jnp.pad(k_BKHS, more), jnp.pad(v_BKSH.mT, more).mT)
                for k_BKHS, v_BKSH in caches
            ]
            return wider, jnp.pad(segments_BS, ((0, 0), (0, added)))

        self._longer = jax.jit(longer, static_argnums=2)

    def longer(self, state: dict[str, Any], slots: int) -> dict[str, Any]:
        """The state with so many cache slots."""
        caches, segments_BS = self._longer(state["caches"], state["segments"], slots)
        return {**state, "caches": caches, "segments": segments_BS}

    def _cast(self, name: str, leaf: Any) -> Any:
        """To the compute dtype once, not in every step; norms stay float32."""
        whole = not isinstance(leaf, dict) and name != "scale"
        return leaf.astype(self.dtype) if whole else unfold(leaf)

    def _forward(self, weights, tokens_BT, positions_BT, segments_BT, state):
        """float32 logits [B, V] of the last token; the state with T slots filled."""
        cfg, dtype = self.cfg, self.dtype
        use = functools.partial(map_leaves, lambda _, x: dequantize(x, dtype))
        head = use({k: v for k, v in weights.items() if k != "layers"})
        x_BTD = jnp.take(head["embedding"], tokens_BT, axis=0)
        cos_BT1H, sin_BT1H = rope_angles(cfg, positions_BT)
        at = state["index"]
        kv_segments_BS = jax.lax.dynamic_update_slice(
            state["segments"], segments_BT, (0, at)
        )
        block, caches = Block(cfg, self.compute), []
        for layer, cache in zip(weights["layers"], state["caches"], strict=True):
            x_BTD, cache = block.apply(  # type: ignore[assignment,misc]
                {"params": use(layer)},
                x_BTD,
                cache,
                cos_BT1H,
                sin_BT1H,
                (segments_BT, kv_segments_BS, at, None),
            )
            caches.append(cache)
        scale = head["final_norm"]["scale"]
        x_BTD = ops.rms_norm(x_BTD[:, -1:], scale, cfg.norm_eps)
        filled = dict(
            caches=caches, segments=kv_segments_BS, index=at + tokens_BT.shape[1]
        )
        return logits(head, x_BTD)[:, 0], filled

    def _next(self, logits_BV, state, values, stops, program):
        token_B = sample_token(logits_BV, state["seen"], values, state["step"], program)
        seen_BV, rows = state["seen"], jnp.arange(len(token_B))
        if program[2]:
            seen_BV = seen_BV.at[rows, token_B].set(True)
        done_B = state["done"] | (token_B[:, None] == stops[None]).any(-1)
        return dict(token=token_B, seen=seen_BV, done=done_B, step=state["step"] + 1)

    def _prefill_fn(self, weights, tokens_BT, lengths_B, values, stops, program):
        """The state after the prompts, and their first new tokens, int32 [B]."""
        self.compilations += 1
        B, T = tokens_BT.shape
        V, K, H = self.cfg.vocab_size, self.cfg.num_kv_heads, self.cfg.head_dim
        positions_BT = jnp.arange(T, dtype=jnp.int32)[None] - (T - lengths_B)[:, None]
        valid_BT = positions_BT >= 0
        seen_BV = jnp.zeros((B, V if program[2] else 1), bool)
        if program[2]:
            # Padding is scattered outside of the table, where it is dropped.
            ids_BT = jnp.where(valid_BT, tokens_BT, V)
            rows_B1 = jnp.arange(B)[:, None]
            seen_BV = seen_BV.at[rows_B1, ids_BT].set(True, mode="drop")
        # As attention's two matrix products take them: no step transposes a cache.
        axes = ("batch", "kv_heads", None, None)
        k_BKHS, v_BKSH = (
            nn.with_logical_constraint(jnp.zeros((B, K, *rest), self.dtype), axes)
            for rest in ((H, T), (T, H))
        )
        state = dict(
            caches=[(k_BKHS, v_BKSH)] * self.cfg.num_layers,
            segments=jnp.zeros((B, T), jnp.int32),
            index=jnp.int32(0),
        )
        logits_BV, filled = self._forward(
            weights,
            tokens_BT,
            jnp.maximum(positions_BT, 0),
            valid_BT.astype(jnp.int32),
            state,
        )
        fresh = dict(seen=seen_BV, step=jnp.int32(0), done=lengths_B == 0)
        chosen = self._next(logits_BV, fresh, values, stops, program)
        return {**filled, **chosen, "position": lengths_B}, chosen["token"]

    def _decode_fn(self, weights, state, values, stops, count, program):
        """The state, up to `count` <= CHUNK more tokens, int32 [B, CHUNK], how many."""
        self.compilations += 1
        B = len(state["token"])
        ones_B1 = jnp.ones((B, 1), jnp.int32)

        def going(carry: Any) -> Any:
            i, state, _ = carry
            return (i < count) & ~state["done"].all()

        def step(carry: Any) -> Any:
            i, state, out_BC = carry
            logits_BV, filled = self._forward(
                weights,
                state["token"][:, None],
                state["position"][:, None],
                ones_B1,
                state,
            )
            chosen = self._next(logits_BV, state, values, stops, program)
            out_BC = jax.lax.dynamic_update_slice(
                out_BC, chosen["token"][:, None], (0, i)
            )
            state = {**filled, **chosen, "position": state["position"] + 1}
            return i + 1, state, out_BC

        out_BC = jnp.zeros((B, CHUNK), jnp.int32)
        made, state, out_BC = jax.lax.while_loop(
            going, step, (jnp.int32(0), state, out_BC)
        )
        return state, out_BC, made
