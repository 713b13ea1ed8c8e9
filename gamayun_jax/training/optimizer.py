"""The learning rate as a function of tokens, and optimisers, which have none of their
own: AdamW, and Muon for the layers' matrices.

The learning rate is a pure function of tokens, computed by the train step from the
step number. It is not an optimiser's private count, so that carrying the optimiser
state over to another stage cannot carry a stale position in the schedule with it.
"""

from __future__ import annotations

import math
import operator as op
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gamayun_jax.config import OptimizerConfig, ScheduleConfig, UserError
from gamayun_jax.model.sharding import map_layers
from gamayun_jax.model.weights import WEIGHTS, parameter_path

# Coefficients of x, x x' x and x x' x x' x: steep at 0, so that five iterations take
# singular values from 0.01 to about 1 on, to between 0.7 and 1.2 (Keller Jordan, "Muon:
# An optimizer for hidden layers in neural networks", 2024).
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5


def learning_rate(
    cfg: ScheduleConfig,
    tokens: jax.Array | float,
    stage_start: int,
    stage_end: int,
) -> jax.Array:
    """Learning rate after `tokens` training tokens, counted from the start of the
    whole history, the runs before --init-from included.

    wsd: linear warm-up, constant, decay over the last `decay_tokens` of the stage
    (MiniCPM, arXiv 2404.06395; 1-sqrt: arXiv 2405.18392). cosine: warm-up, then half
    a cosine to the stage's end. Both end at `floor * peak` when the stage ends.

    Args:
      stage_start, stage_end: in tokens; with position "restart" the schedule counts
        from `stage_start`, with "global" from 0.
    """
    # Floats: JAX takes an integer for an int32, and 2**31 tokens are soon trained.
    start = float(stage_start if cfg.position == "restart" else 0)
    total, warmup = stage_end - start, float(cfg.warmup_tokens)
    t = jnp.asarray(tokens, jnp.float32) - start
    warm = jnp.minimum(1.0, t / warmup) if warmup else 1.0
    span = total - warmup if cfg.kind == "cosine" else float(cfg.decay_tokens)
    if not span:
        return jnp.asarray(cfg.peak * warm, jnp.float32)
    done = jnp.clip((t - (total - span)) / span, 0.0, 1.0)
    if cfg.kind == "cosine":
        left = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    elif cfg.decay_shape == "1-sqrt":
        left = 1.0 - jnp.sqrt(done)
    else:
        left = 1.0 - done
    return jnp.asarray(
        cfg.peak * warm * (cfg.floor + (1.0 - cfg.floor) * left), jnp.float32
    )


def check_schedule(cfg: ScheduleConfig, where: str, start: int, end: int) -> None:
    """Raise UserError if warm-up and decay do not fit between the given tokens."""
    length = end - start if cfg.position == "restart" else end
    if cfg.warmup_tokens + cfg.decay_tokens > length:
        begun = ", or, where the schedule began in another run, give it by --init-from"
        raise UserError(
            f"{where}: warmup_tokens={cfg.warmup_tokens} + decay_tokens="
            f"{cfg.decay_tokens} exceed the schedule's {length} tokens: shorten them"
            f"{begun if cfg.position == 'global' and not start else ''}"
        )


def decay_mask(params: Any) -> Any:
    """True where weight decay applies, by the table of weights."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: WEIGHTS[parameter_path(path)].kind.decayed, params
    )


def orthogonal_mask(params: Any) -> Any:
    """True where Muon updates: the matrices of the layers, by the table of weights."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: WEIGHTS[parameter_path(path)].layer_matrix, params
    )


def orthogonalise(x: jax.Array, summed: int) -> jax.Array:
    """About U V' of the singular value decomposition U S V' of one layer's weight.

    Its products are in the dtype of x (in bfloat16 as Jordan's), its norm in float32.

    Args:
      x: [*I, *O]; the matrix is I x O.
      summed: how many axes are of I.
    """
    flat = x.reshape(math.prod(x.shape[:summed]), -1).astype(jnp.float32)
    wide = flat.shape[0] <= flat.shape[1]
    y = flat / jnp.maximum(jnp.linalg.norm(flat), 1e-20)
    y = (y if wide else y.T).astype(x.dtype)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y if wide else y.T).reshape(x.shape)


class MuonState(NamedTuple):
    """The running means of the gradients, as the parameters are."""

    mu: Any


def scale_by_muon(
    momentum: float, rms: float, dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Muon (Jordan 2024) with Nesterov's momentum, per layer.

    An orthogonal matrix of I x O has elements of 1 / sqrt(max(I, O)) in root mean
    square: times that root and `rms` of 0.2, updates are as long as AdamW's (Liu et
    al., arXiv 2502.16982, section 2.2).

    Args:
      dtype: of the products; the running means are in float32.
    """

    def update(grads: Any, state: MuonState, params: Any = None) -> Any:
        def blend(mean: Any, new: Any) -> Any:
            return jax.tree.map(
                lambda m, g: momentum * m + (1.0 - momentum) * g, mean, new
            )

        def direction(path: Any, x: jax.Array) -> jax.Array:
            weight = WEIGHTS[parameter_path(path)]
            summed = len(weight.summed)
            shape = x.shape[1:]
            longer = max(math.prod(shape[:summed]), math.prod(shape[summed:]))
            made = map_layers(
                partial(orthogonalise, summed=summed),
                x.astype(dtype),
                weight.logical_axes,
            )
            return rms * longer**0.5 * made.astype(x.dtype)

        mu = blend(state.mu, grads)
        ahead = blend(mu, grads)
        return jax.tree_util.tree_map_with_path(direction, ahead), MuonState(mu)

    return optax.GradientTransformation(
        lambda params: MuonState(jax.tree.map(jnp.zeros_like, params)), update
    )


def make_optimizer(
    cfg: OptimizerConfig, dtype: jnp.dtype | str = "float32"
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101), or Muon beside Adam, up to the factor -learning_rate,
    after clipping.

    Args:
      dtype: in which Muon multiplies matrices.
    """
    scale = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    if cfg.kind == "muon":
        muon = scale_by_muon(cfg.momentum, cfg.update_rms, jnp.dtype(dtype))
        scale = optax.chain(
            optax.masked(muon, orthogonal_mask),
            optax.masked(scale, lambda p: jax.tree.map(op.not_, orthogonal_mask(p))),
        )
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        scale,
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
    )
