"""The compiled programs of generation: a prompt's layers one by one, and decode steps
in one loop.

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
QUEUE = 8  # layers of a prompt that wait to be run
# Logical axes of a prompt's hidden states [B, T, D], and of both caches of a layer.
HIDDEN_AXES = "batch", "length", None
CACHE_AXES = "batch", "kv_heads", None, None


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
            layers = params["layers"]
            self.weights = {
                "head": cast({k: v for k, v in params.items() if k != "layers"}),
                "layers": [layer(layers, np.int32(i)) for i in range(cfg.num_layers)],
            }
        # Whole on every device, or a process could not fetch what others hold.
        whole = sharding.replicated(mesh)
        self._begin = jax.jit(self._begin_fn)
        self._prompt_layer = jax.jit(self._prompt_layer_fn, donate_argnums=1)
        self._first = jax.jit(
            self._first_fn, static_argnums=7, out_shardings=(None, whole)
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

    def _floats(self, weights: Any) -> Any:
        """Weights in the compute dtype: quantised ones are dequantised."""
        return map_leaves(lambda _, x: dequantize(x, self.dtype), weights)

    def _embed(self, head, tokens_BT, positions_BT):
        """x [B, T, D], and the cosines and sines of its positions [B, T, 1, H]."""
        x_BTD = jnp.take(self._floats(head)["embedding"], tokens_BT, axis=0)
        return x_BTD, rope_angles(self.cfg, positions_BT)

    def _layer(self, layer, x_BTD, cache, angles, segments):
        """x [B, T, D] after a layer, and its cache with T more slots filled.

        `segments` are the queries' [B, T], the slots' [B, S], and the first slot.
        """
        block = Block(self.cfg, self.compute)
        return block.apply(
            {"params": self._floats(layer)}, x_BTD, cache, *angles, (*segments, None)
        )

    def _logits(self, head, x_BTD):
        """float32 logits [B, V] of the last token."""
        head = self._floats(head)
        scale = head["final_norm"]["scale"]
        x_BTD = ops.rms_norm(x_BTD[:, -1:], scale, self.cfg.norm_eps)
        return logits(head, x_BTD)[:, 0]

    def _forward(self, weights, tokens_BT, positions_BT, segments_BT, state):
        """float32 logits [B, V] of the last token; the state with T slots filled."""
        at = state["index"]
        kv_segments_BS = jax.lax.dynamic_update_slice(
            state["segments"], segments_BT, (0, at)
        )
        x_BTD, angles = self._embed(weights["head"], tokens_BT, positions_BT)
        segments, caches = (segments_BT, kv_segments_BS, at), []
        for layer, cache in zip(weights["layers"], state["caches"], strict=True):
            x_BTD, cache = self._layer(layer, x_BTD, cache, angles, segments)
            caches.append(cache)
        filled = dict(
            caches=caches, segments=kv_segments_BS, index=at + tokens_BT.shape[1]
        )
        return self._logits(weights["head"], x_BTD), filled

    def _next(self, logits_BV, state, values, stops, program):
        token_B = sample_token(logits_BV, state["seen"], values, state["step"], program)
        seen_BV, rows = state["seen"], jnp.arange(len(token_B))
        if program[2]:
            seen_BV = seen_BV.at[rows, token_B].set(True)
        done_B = state["done"] | (token_B[:, None] == stops[None]).any(-1)
        return dict(token=token_B, seen=seen_BV, done=done_B, step=state["step"] + 1)

    def prefill(self, tokens_BT, lengths_B, values, stops, program):
        """The state after the prompts, and their first new tokens, int32 [B].

        One program for any layer: all of them in one take seconds to compile, for
        each length of prompts. No more than QUEUE of them wait to be run: with 32,
        several CPU devices of a process may block each other for ever.
        """
        head = self.weights["head"]
        x_BTD, angles, segments_BT = self._begin(head, tokens_BT, lengths_B)
        caches = []
        for number, layer in enumerate(self.weights["layers"]):
            if number % QUEUE == 0:
                jax.block_until_ready(x_BTD)
            x_BTD, cache = self._prompt_layer(layer, x_BTD, angles, segments_BT)
            caches.append(cache)
        state, token_B = self._first(
            head, x_BTD, tokens_BT, segments_BT, lengths_B, values, stops, program
        )
        return {**state, "caches": caches, "segments": segments_BT}, token_B

    def _begin_fn(self, head, tokens_BT, lengths_B):
        """What the layers take: x [B, T, D], angles, and segments [B, T], 0 padding."""
        self.compilations += 1
        T = tokens_BT.shape[1]
        positions_BT = jnp.arange(T, dtype=jnp.int32)[None] - (T - lengths_B)[:, None]
        x_BTD, angles = self._embed(head, tokens_BT, jnp.maximum(positions_BT, 0))
        segments_BT = (positions_BT >= 0).astype(jnp.int32)
        return nn.with_logical_constraint(x_BTD, HIDDEN_AXES), angles, segments_BT

    def _prompt_layer_fn(self, layer, x_BTD, angles, segments_BT):
        """x [B, T, D] after a layer, and its cache of T slots."""
        self.compilations += 1
        B, T, _ = x_BTD.shape
        K, H = self.cfg.num_kv_heads, self.cfg.head_dim
        # As attention's two matrix products take them: no step transposes a cache.
        cache = tuple(
            nn.with_logical_constraint(jnp.zeros((B, K, *rest), self.dtype), CACHE_AXES)
            for rest in ((H, T), (T, H))
        )
        segments = segments_BT, segments_BT, 0
        x_BTD, cache = self._layer(layer, x_BTD, cache, angles, segments)
        return nn.with_logical_constraint(x_BTD, HIDDEN_AXES), cache

    def _first_fn(
        self, head, x_BTD, tokens_BT, segments_BT, lengths_B, values, stops, program
    ):
        """The state but for caches and segments, and the first tokens, int32 [B]."""
        self.compilations += 1
        B, T = tokens_BT.shape
        V = self.cfg.vocab_size
        seen_BV = jnp.zeros((B, V if program[2] else 1), bool)
        if program[2]:
            # Padding is scattered outside of the table, where it is dropped.
            ids_BT = jnp.where(segments_BT > 0, tokens_BT, V)
            rows_B1 = jnp.arange(B)[:, None]
            seen_BV = seen_BV.at[rows_B1, ids_BT].set(True, mode="drop")
        fresh = dict(seen=seen_BV, step=jnp.int32(0), done=lengths_B == 0)
        chosen = self._next(self._logits(head, x_BTD), fresh, values, stops, program)
        state = {**chosen, "index": jnp.int32(T), "position": lengths_B}
        return state, chosen["token"]

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
