"""Averages of a run as models: of its checkpoints, what a decay of the learning rate
would give; and the one that it kept while it trained (ema.py).

Parameters at a constant learning rate wander about what a decay settles on. With p_k
those of checkpoint k, oldest first, and w_k its weight, all weights together 1,

    sum of w_k p_k  =  p_0 + sum over k > 0 of s(k) (p_k - p_(k-1)),
    where s(k) = w_k + w_(k+1) + ... + w_(N-1)

so an average is the last stretch of training with its updates scaled by s, which falls
from s(0) = 1 to s(N) = 0, and w_k = s(k) - s(k+1) (arXiv 2507.17634, "WSM").
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gamayun_jax.config import AnyPath, UserError
from gamayun_jax.model.weights import abstract_params
from gamayun_jax.training.checkpoint import Checkpoints
from gamayun_jax.training.ema import new_ema
from gamayun_jax.training.model_folder import (
    freed_memory_given_back,
    largest_bytes,
    on_host,
)
from gamayun_jax.training.run_folder import find_checkpoint
from gamayun_jax.training.run_meta import RunMeta

Scheme = Literal["uniform", "linear", "1-sqrt"]
EMA = "ema"  # in the place of a scheme: the average that the run kept itself


def average_weights(steps: Sequence[int], scheme: Scheme) -> list[float]:
    """The weight of each checkpoint, all together 1.

    uniform: 1 / N each. Evenly spaced, it stands for a linear decay: s(k) = 1 - k / N.

    linear: the k-th from the oldest, from 1, weighs k / (1 + 2 + ... + N).

    1-sqrt: w_k = s(k) - s(k+1) with s(k) = 1 - sqrt(x_k), where x runs over the window
    from x_0 = 0 to x_N = 1. Evenly spaced, x_k = k / N, and the updates before
    checkpoint k are scaled as a decay of that shape scales them. A run's checkpoints
    need not be evenly spaced (it also keeps the ends of stages), and a decay is by
    tokens: so x_k = (t_k - t_0) / (t_(N-1) - t_0) (N - 1) / N, with t_k its step. The
    oldest weighs most, since such a decay is steepest where it begins.

    Args:
      steps: of two or more checkpoints, oldest first.
    """
    n = len(steps)
    if scheme == "uniform":
        return [1 / n] * n
    if scheme == "linear":
        return [k / (n * (n + 1) / 2) for k in range(1, n + 1)]
    span = (steps[-1] - steps[0]) * n / (n - 1)
    roots = [*(math.sqrt((step - steps[0]) / span) for step in steps), 1.0]
    return [after - before for before, after in itertools.pairwise(roots)]


def average_params(
    store: Checkpoints, weights: Mapping[int, float], abstract: Any
) -> Any:
    """The weighted sum of checkpoints' parameters, in float32 and one array at a time.

    Each element is added up from the oldest checkpoint to the newest, and every product
    is rounded before it is added, so the bits are the same on any devices.

    Args:
      weights: by step.
      abstract: the parameters' shapes, and the shardings that they are read onto.

    Raises:
      UserError: a checkpoint of another model.
      DamagedCheckpointError: one is not what was written.
    """
    readers = [store.readers(step, abstract) for step in sorted(weights)]
    shares = [jnp.float32(weights[step]) for step in sorted(weights)]

    def one(*reads: Any) -> jax.Array:
        total = _scaled(reads[0](), shares[0])
        for read, share in zip(reads[1:], shares[1:], strict=True):
            total = _added(total, _scaled(read(), share))
        return total

    return jax.tree.map(one, *readers)


# Two programs: in one, a compiler may round a product and a sum at once, or not.
_scaled = jax.jit(lambda x, share: x * share, donate_argnums=0)
_added = jax.jit(lambda total, x: total + x, donate_argnums=0)


def average_meta(
    run: AnyPath,
    last: int | None = None,
    window: int | None = None,
    scheme: Scheme = "uniform",
    until: int | None = None,
    ema: bool = False,
) -> RunMeta:
    """The meta of an average: that of the newest checkpoint in it, which also says what
    is averaged.

    Args:
      run: run folder, or one checkpoint of it, which is then the newest that is taken.
      last: how many checkpoints.
      window: those within so many tokens of the newest one.
      until: the newest to be taken is the last one up to this step.
      ema: the average that the run kept while it trained; one of the three.

    Raises:
      UserError: fewer checkpoints than that, none of a run, or no average in it.
      DamagedCheckpointError: the newest among them is damaged.
    """
    folder, newest = find_checkpoint(run)
    until = newest if until is None else until
    with contextlib.closing(Checkpoints(folder, read_only=True)) as store:
        steps = store.steps()
        newest = max((step for step in steps if step <= until), default=newest)
        meta = store.meta(newest)
    check_run(meta, f"{folder}/{newest}")
    averaged: dict[str, Any]
    if ema:
        if not meta.has_ema:
            raise UserError(
                f"{folder}/{newest} has no average of its parameters: optimizer."
                "ema_tokens of the run's config keeps one; average checkpoints instead"
            )
        tokens = meta.config.optimizer.ema_tokens
        averaged = {"scheme": EMA, "ema_tokens": tokens}
    else:
        each = meta.config.tokens_per_step
        chosen = choose_steps(steps, until, last, window, each, folder)
        weights = average_weights(chosen, scheme)
        averaged = {"scheme": scheme, "steps": chosen, "weights": weights}
    event = {"event": "averaged", "step": meta.step, **averaged}
    lineage = {**meta.lineage, "events": [*meta.lineage.get("events", ()), event]}
    return dataclasses.replace(meta, averaged=averaged, lineage=lineage)


def average_of(run: AnyPath, meta: RunMeta) -> Any:
    """The averaged parameters, on the host: little is computed, and a device may have
    less memory.

    Args:
      meta: what `average_meta` returned for the run.

    Raises:
      UserError: a checkpoint is gone, or of another model.
      DamagedCheckpointError: one of them is damaged.
    """
    folder, _ = find_checkpoint(run)
    averaged, cfg = meta.averaged or {}, meta.config.model
    abstract = on_host(jax.eval_shape(new_ema, abstract_params(cfg)))
    store = Checkpoints(folder, read_only=True, in_flight=largest_bytes(cfg))
    with contextlib.closing(store), freed_memory_given_back():
        if averaged["scheme"] != EMA:
            weights = dict(zip(averaged["steps"], averaged["weights"], strict=True))
            return average_params(store, weights, abstract["params"])
        ema = store.restore_ema(meta.step, abstract)
        if not int(ema["updates"]):  # of a run all of whose steps were skipped
            raise UserError(f"{folder}/{meta.step} has an average of no updates yet")
        return ema["params"]


def check_run(meta: RunMeta, where: str) -> None:
    """Raise UserError for a checkpoint that is not one of several of a run."""
    if meta.bits:
        raise UserError(
            f"{where} is quantised to {meta.bits} bits: average the run that it was "
            "made from, then quantise the average"
        )
    if meta.averaged:
        steps = meta.averaged.get("steps", [meta.step])
        raise UserError(
            f"{where} is an average already, of steps {', '.join(map(str, steps))}: "
            "give the run's folder"
        )
    if meta.lineage.get("imported"):
        raise UserError(
            f"{where} is an imported model, which has no run: give a run folder"
        )


def choose_steps(
    steps: Sequence[int],
    until: int,
    last: int | None,
    window: int | None,
    tokens_per_step: int,
    folder: Path,
) -> list[int]:
    """The steps to average, oldest first.

    Args:
      steps: of the checkpoints that exist, in order.
      last: how many; None: `window`, in tokens up to the newest, both ends included.

    Raises:
      UserError: there are fewer than `last`, or than two.
    """
    upto = [step for step in steps if step <= until]
    if last is not None:
        chosen, asked = upto[-last:], f"--last {last}"
    else:
        span = window or 0
        chosen = [s for s in upto if (upto[-1] - s) * tokens_per_step <= span]
        asked = f"--window {window} ({tokens_per_step} tokens a step)"
    if len(chosen) < max(2, last or 0):
        few = "an average needs 2 or more" if last == 1 else f"{len(chosen)} of them"
        raise UserError(
            f"{folder} has too few checkpoints for {asked} up to step {until}: {few}; "
            f"there are those of steps {', '.join(map(str, steps))}. Ask for what is "
            "there; checkpoint.keep and checkpoint.keep_every_tokens of a run's config "
            "decide what is kept"
        )
    return chosen
