"""The train state and the one train step: pure, compiled once per stage.

Shape suffixes: B batch, T length, D model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gamayun_jax.config import Config
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import TokenWeights, weighted_loss
from gamayun_jax.model.transformer import Transformer, compute_dtype, unembedding
from gamayun_jax.model.weights import abstract_params
from gamayun_jax.training import optimizer as optim
from gamayun_jax.training.checkpoint import TrainState
from gamayun_jax.training.ema import new_ema, update_ema

# --- state ----------------------------------------------------------------------


def optimizer_of(cfg: Config) -> optax.GradientTransformation:
    """The config's optimiser; Muon multiplies in the dtype of computation."""
    return optim.make_optimizer(cfg.optimizer, compute_dtype(cfg.compute.dtype))


def init_state(cfg: Config, key: jax.Array) -> TrainState:
    """A new state; to be traced."""
    one = jnp.zeros((1, 1), jnp.int32)
    params = Transformer(cfg.model, cfg.compute).init(key, one, one, one)["params"]
    return state_of(cfg, params)


def state_of(cfg: Config, params: Any) -> TrainState:
    """The state at step 0 of these parameters."""
    opt_state = optimizer_of(cfg).init(params)
    ema = new_ema(params) if cfg.optimizer.ema_tokens else None
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)


def abstract_state(cfg: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated.

    The one source for initialisation, restore and ahead-of-time compilation.
    """
    params = abstract_params(cfg.model)
    state = jax.eval_shape(lambda params: state_of(cfg, params), params)
    return sharding.place_abstract(state, mesh)


def new_state(cfg: Config, mesh: Mesh) -> TrainState:
    """Initialise on the devices, each its part: the state never exists unsharded."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
    init = jax.jit(lambda key: init_state(cfg, key), out_shardings=shardings)
    return init(jax.random.key(cfg.seed))


def reset_moments(cfg: Config, state: TrainState, abstract: TrainState) -> TrainState:
    """The same parameters with the optimiser's state as at the start of a run."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
    init = jax.jit(optimizer_of(cfg).init, out_shardings=shardings)
    return state.replace(opt_state=init(state.params))


def begin_ema(state: TrainState, abstract: TrainState) -> TrainState:
    """The state with the average that `abstract` has; begun, if there is none yet."""
    if abstract.ema is None or state.ema is not None:
        return state
    shardings = jax.tree.map(lambda x: x.sharding, abstract.ema)
    return state.replace(ema=jax.jit(new_ema, out_shardings=shardings)(state.params))


# --- step -----------------------------------------------------------------------


def loss_sums(params, batch, cfg: Config, tables: TokenWeights):
    """`weighted_loss` of one (micro)batch: its loss_sum, and all sums."""
    x_BTD: Any = Transformer(cfg.model, cfg.compute).apply(
        {"params": params}, batch["inputs"], batch["positions"], batch["segment_ids"]
    )
    return weighted_loss(
        x_BTD,
        unembedding(params),
        batch,
        tables,
        cfg.optimizer.z_loss,
        cfg.compute.loss_chunk,
        cfg.compute.reduce_dtype,
    )


def divide_rows(batch: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
    """[count, B / count, T]: every count-th row together, so that a device's rows stay
    on that device."""

    def part(values_BT: jax.Array) -> jax.Array:
        B, T = values_BT.shape
        return jnp.moveaxis(values_BT.reshape(B // count, count, T), 1, 0)

    return jax.tree.map(part, batch)


def gradient_sums(params, batch, cfg: Config, tables: TokenWeights):
    """Gradient of `loss_sum` and all sums, added over the microbatches."""
    grad = jax.grad(loss_sums, has_aux=True)
    count = cfg.compute.microbatches
    if count == 1:
        return grad(params, batch, cfg, tables)

    def add(carry, microbatch):
        new = grad(params, microbatch, cfg, tables)
        return jax.tree.map(jnp.add, carry, new), None

    parts = divide_rows(batch, count)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda b: grad(params, b, cfg, tables), first),
    )
    return jax.lax.scan(add, zeros, parts)[0]


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    cfg: Config,
    stage: int,
    tables: TokenWeights,
    tokens_before: int,
    updates: int = 1,
) -> tuple[TrainState, dict[str, Any]]:
    """One step: an optimiser's update, or several while the batch warms up; pure.

    Args:
      batch: see data/loader.py.
      stage: index into cfg.stages; its schedule gives the learning rate.
      tokens_before: trained on before this run, in those it began from.
      updates: `cfg.updates_at` the step's first token; each has its part of the rows.

    Returns:
      The new state, and metrics: sums of weighted_loss, gradient norm (the updates'
      mean), learning rate (the last one's), and `skipped`: 1 if loss or gradient were
      not finite, so that the state is the old one but for its step number, and the
      sums are 0. Of several updates, those that are skipped count for nothing;
      `skipped` is 1 if any was, and the gradient norm then 0.
    """
    begin, end = stage_tokens(cfg, stage, tokens_before)

    def rate_at(step: jax.Array) -> jax.Array:
        # A float: JAX takes an integer for an int32, and a second stage starts beyond.
        tokens = float(tokens_before) + step * float(cfg.tokens_per_step)
        return optim.learning_rate(cfg.stages[stage].schedule, tokens, begin, end)

    # Read at the middle of an update, so that none has a rate of exactly 0.
    if updates == 1:
        return update(state, batch, cfg, tables, rate_at(state.step + 0.5))
    compute = dataclasses.replace(
        cfg.compute, microbatches=cfg.microbatches_of(updates)
    )
    part_cfg = dataclasses.replace(cfg, compute=compute)

    def one(new: TrainState, numbered: Any) -> tuple[TrainState, dict[str, Any]]:
        number, rows = numbered
        # Noise of a gradient grows as its batch shrinks: the square root rule for Adam
        # (arXiv 2205.10287).
        rate = rate_at(state.step + (number + 0.5) / updates) * updates**-0.5
        return update(new, rows, part_cfg, tables, rate, updates)

    parts = jnp.arange(updates), divide_rows(batch, updates)
    new, each = jax.lax.scan(one, state, parts)
    sums = jax.tree.map(lambda x: x.sum(0), each)
    skipped = jnp.minimum(sums["skipped"], 1.0)
    norm = sums["grad_norm"] / updates * (1.0 - skipped)
    metrics = {**sums, "skipped": skipped, "grad_norm": norm}
    metrics["learning_rate"] = each["learning_rate"][-1]
    return new.replace(step=state.step + 1), metrics


def update(
    state: TrainState,
    batch: dict[str, jax.Array],
    cfg: Config,
    tables: TokenWeights,
    rate: jax.Array,
    updates_of_step: int = 1,
) -> tuple[TrainState, dict[str, Any]]:
    """One update at a given learning rate; see `train_step`.

    Nothing of the stages is in it but what is passed, so that runs with other stages
    share the program.
    """
    grads, sums = gradient_sums(state.params, batch, cfg, tables)
    target_count = jnp.maximum(sums["target_count"], 1.0)
    grads = jax.tree.map(lambda g: g / target_count, grads)
    updates, opt_state = optimizer_of(cfg).update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    ema = state.ema and update_ema(state.ema, params, cfg, updates_of_step)
    norm = optax.tree.norm(grads)
    sums = {**sums, "grad_norm": norm, "skipped": jnp.zeros(())}
    if cfg.divergence.skip:
        good = jnp.isfinite(sums["loss_sum"]) & jnp.isfinite(norm)
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        served = sums["languages"]["tokens"]
        sums = jax.tree.map(lambda x: jnp.where(good, x, jnp.zeros_like(x)), sums)
        sums["languages"] = {**sums["languages"], "tokens": served}
        sums["skipped"] = 1.0 - good.astype(jnp.float32)
    metrics = {**sums, "learning_rate": rate}
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def stage_tokens(cfg: Config, stage: int, tokens_before: int) -> tuple[int, int]:
    """First token and end of a stage, counted from the start of the whole history."""
    begin = tokens_before + cfg.stage_start(stage) * cfg.tokens_per_step
    return begin, begin + cfg.stage_steps()[stage] * cfg.tokens_per_step


def compile_step(
    cfg: Config,
    mesh: Mesh,
    abstract: TrainState,
    stage: int,
    tables: TokenWeights,
    tokens_before: int,
    updates: int = 1,
) -> Any:
    """The train step compiled for a stage; the state's buffers are donated.

    Args:
      updates: as for `train_step`.
    """
    shape = (cfg.data.batch_size, cfg.data.seq_len)
    layout = sharding.batch_sharding(mesh)
    names = ("inputs", "targets", "positions", "segment_ids", "language")
    batch = {k: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout) for k in names}
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)

    def step(state, batch):
        return train_step(state, batch, cfg, stage, tables, tokens_before, updates)

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return (
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        .lower(abstract, batch)
        .compile()
    )
