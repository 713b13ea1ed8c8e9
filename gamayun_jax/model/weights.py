"""The model's weights, a line each, from which all that is done with them follows.

Read from this table: initial values, the division over devices, weight decay,
quantisation, the exchange with Hugging Face, and the counts of parameters and FLOPs.
A new weight needs a line here and its use in transformer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.nn import initializers

from gamayun_jax.config import ModelConfig


class Kind(NamedTuple):
    """What all weights of a kind have in common."""

    initializer: Callable[[ModelConfig], Any]
    decayed: bool  # by the optimiser
    fewest_bits: int | None = None  # that a quantiser may leave it; None: float32


def residual_std(cfg: ModelConfig) -> float:
    """Of the 2 L matrices whose products the residual stream adds up."""
    return cfg.init_std / (2 * cfg.num_layers) ** 0.5


# In an int4 model, matrices that cost it most have more than 4 bits.
MATRIX = Kind(lambda cfg: initializers.normal(cfg.init_std), True, 4)
RESIDUAL = Kind(lambda cfg: initializers.normal(residual_std(cfg)), True, 4)
VALUE, DOWN = (kind._replace(fewest_bits=5) for kind in (MATRIX, RESIDUAL))
VOCAB = Kind(lambda cfg: initializers.normal(cfg.init_std), False, 6)
NORM = Kind(lambda cfg: initializers.ones, False)
BIAS = Kind(lambda cfg: initializers.zeros, False)


class Weight(NamedTuple):
    """A parameter; those under "layers/" are stacked over the layers."""

    path: str  # in the tree of parameters
    hf_name: str  # in Hugging Face's files
    kind: Kind
    # Letters of sizes: D model, F mlp, N query heads, K key-value heads, H head dim,
    # V vocabulary.
    axes: str
    summed: str  # the axes that its matrix product sums over; none: no matrix
    division: str  # per axis the logical axis of sharding.RULES, or - for none
    condition: str = ""  # what a model with it has, see `weights_of`

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def stacked(self) -> bool:
        """Whether there is one per layer."""
        return self.path.startswith("layers/")

    @property
    def layer_matrix(self) -> bool:
        """Whether the layers multiply by it."""
        return self.stacked and bool(self.summed)

    @property
    def logical_axes(self) -> tuple[str | None, ...]:
        """The logical axes, without the layers'."""
        return tuple(None if axis == "-" else axis for axis in self.division.split())

    @property
    def summed_axes(self) -> tuple[int, ...]:
        """The numbers of the summed axes from the end, the last one first."""
        numbers = (self.axes.index(letter) - len(self.axes) for letter in self.summed)
        return tuple(sorted(numbers, reverse=True))

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """The shape, of one layer where they are stacked."""
        return tuple(size_of(cfg, letter) for letter in self.axes)

    def full_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """The shape of the parameter, stacked or not."""
        return (cfg.num_layers,) * self.stacked + self.shape(cfg)

    def size(self, cfg: ModelConfig) -> int:
        """Number of elements, of one layer where they are stacked."""
        return math.prod(self.shape(cfg))


def size_of(cfg: ModelConfig, letters: str) -> int:
    """Product of the sizes that letters of `Weight.axes` stand for."""
    sizes = dict(
        D=cfg.d_model,
        F=cfg.d_ff,
        N=cfg.num_heads,
        K=cfg.num_kv_heads,
        H=cfg.head_dim,
        V=cfg.vocab_size,
    )
    return math.prod(sizes[letter] for letter in letters)


# path, name, kind, axes, summed, division; without "layers/", "model.layers.{layer}."
_OF_A_LAYER: tuple[Any, ...] = (
    ("attention_norm/scale", "input_layernorm.weight", NORM, "D", "", "norm"),
    ("attention/q", "self_attn.q_proj.weight", MATRIX, "DNH", "D", "embed heads -"),
    ("attention/k", "self_attn.k_proj.weight", MATRIX, "DKH", "D", "embed kv_heads -"),
    ("attention/v", "self_attn.v_proj.weight", VALUE, "DKH", "D", "embed kv_heads -"),
    ("attention/o", "self_attn.o_proj.weight", RESIDUAL, "NHD", "NH", "head_rows - -"),
    ("attention/q_bias", "self_attn.q_proj.bias", BIAS, "NH", "", "heads -", "bias"),
    ("attention/k_bias", "self_attn.k_proj.bias", BIAS, "KH", "", "kv_heads -", "bias"),
    ("attention/v_bias", "self_attn.v_proj.bias", BIAS, "KH", "", "kv_heads -", "bias"),
    ("attention/q_norm/scale", "self_attn.q_norm.weight", NORM, "H", "", "-", "norms"),
    ("attention/k_norm/scale", "self_attn.k_norm.weight", NORM, "H", "", "-", "norms"),
    ("mlp_norm/scale", "post_attention_layernorm.weight", NORM, "D", "", "norm"),
    ("mlp/gate", "mlp.gate_proj.weight", MATRIX, "DF", "D", "embed mlp"),
    ("mlp/up", "mlp.up_proj.weight", MATRIX, "DF", "D", "embed mlp"),
    ("mlp/down", "mlp.down_proj.weight", DOWN, "FD", "F", "mlp_rows -"),
)
_ALL = (
    Weight("embedding", "model.embed_tokens.weight", VOCAB, "VD", "D", "vocab_rows -"),
    Weight("unembedding", "lm_head.weight", VOCAB, "VD", "D", "vocab_rows -", "untied"),
    Weight("final_norm/scale", "model.norm.weight", NORM, "D", "", "norm"),
    *(
        Weight(f"layers/{path}", f"model.layers.{{layer}}.{name}", *columns)
        for path, name, *columns in _OF_A_LAYER
    ),
)
WEIGHTS = {w.path: w for w in _ALL}
VOCAB_MATRIX_AXES = WEIGHTS["embedding"].logical_axes


def weights_of(cfg: ModelConfig) -> list[Weight]:
    """The weights that a model has, in the order of its tree of parameters."""
    conditions = {
        "": True,
        "untied": not cfg.tie_embeddings,
        "bias": cfg.qkv_bias,
        "norms": cfg.qk_norm,
    }
    return [w for _, w in sorted(WEIGHTS.items()) if conditions[w.condition]]


def parameter_path(path: tuple[Any, ...]) -> str:
    """ "layers/attention/q" for a key path of `jax.tree_util`.

    Checksums in checkpoints go by these names.
    """
    return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def find_weight(path: str) -> Weight | None:
    """The weight at a path, also within another tree, such as an optimiser's state."""
    parts = path.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((WEIGHTS[end] for end in ends if end in WEIGHTS), None)


def abstract_params(cfg: ModelConfig) -> dict[str, Any]:
    """Shapes and dtypes of the parameters; nothing is allocated."""
    leaves = {
        w.path: jax.ShapeDtypeStruct(w.full_shape(cfg), jnp.float32)
        for w in weights_of(cfg)
    }
    return traverse_util.unflatten_dict(leaves, sep="/")


def parameter_count(cfg: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(w.full_shape(cfg)) for w in weights_of(cfg))


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one training token, forward and backward.

    6 per parameter in a matrix product (the embedding look-up is none, the output
    head is one), plus attention: causal, so half of the T x T scores count
    (PaLM, arXiv 2204.02311, appendix B, with that factor).
    """
    layer = sum(w.size(cfg) for w in weights_of(cfg) if w.layer_matrix)
    matrices = cfg.num_layers * layer + WEIGHTS["embedding"].size(cfg)
    scores = cfg.num_layers * cfg.num_heads * cfg.head_dim * seq_len
    return 6.0 * matrices + 6.0 * scores
