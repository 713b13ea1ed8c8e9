"""The learning rate as a function of tokens, and AdamW, which does without its own.

The learning rate is a pure function of tokens, computed by the train step from the
step number. It is not an optimiser's private count, so that carrying the optimiser
state over to another stage cannot carry a stale position in the schedule with it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gamayun_jax.config import OptimizerConfig, ScheduleConfig, UserError
from gamayun_jax.model.weights import WEIGHTS, parameter_path


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


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) up to the factor -learning_rate, after clipping."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
    )
