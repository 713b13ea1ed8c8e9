"""What all scorers share: windows of texts, rows of windows, each token's score.

Shape suffixes: R rows, B rows of a batch, T length, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gamayun_jax.config import ModelConfig, UserError
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import target_and_logsumexp
from gamayun_jax.model.weights import VOCAB_MATRIX_AXES


@dataclass(frozen=True)
class Window:
    """A part of a unit that fits a row; only targets from `scored` on count."""

    unit: int
    inputs: np.ndarray  # int32 [n]
    targets: np.ndarray  # int32 [n]
    scored: int
    position: int  # of the first input in the unit


def check_window(window: int | None, cfg: ModelConfig) -> None:
    """UserError if a window is not None, nor one that the model has."""
    if window is not None and not 0 < window <= cfg.max_seq_len:
        raise UserError(
            f"a window of {window} tokens is beyond the model's: choose 1 to "
            f"{cfg.max_seq_len}"
        )


def window_spans(
    count: int, length: int, overlap: int
) -> Iterator[tuple[int, int, int]]:
    """(begin, scored, end) of windows that score each of `count` targets once.

    A window sees the targets' inputs from `begin`, at most `length` of them, and scores
    those from `scored`. Windows after the first see `overlap` inputs again.
    """
    begin = scored = 0
    while scored < count:
        end = min(begin + length, count)
        yield begin, scored, end
        begin, scored = end - overlap, end


def windows(unit: int, ids: Sequence[int], bos: int, length: int) -> list[Window]:
    """Cut [BOS, *ids] into windows of at most `length` inputs.

    Windows after the first begin with half a window of context that is not scored.
    """
    stream = np.array([bos, *ids], np.int32)
    return [
        Window(
            unit, stream[begin:end], stream[begin + 1 : end + 1], scored - begin, begin
        )
        for begin, scored, end in window_spans(len(ids), length, length // 2)
    ]


def pack(parts: Sequence[Window], length: int) -> dict[str, np.ndarray]:
    """Windows to rows, first fit in order of decreasing length: int32 arrays [R, T].

    `unit` numbers the unit of each target; `loss_mask` is 1.0 where it counts.
    """
    rows: list[list[Window]] = []
    free: list[int] = []
    for part in sorted(parts, key=lambda p: -len(p.inputs)):
        n = len(part.inputs)
        # The last rows are the emptiest: look at a few, so that packing stays linear.
        for r in range(max(0, len(rows) - 64), len(rows)):
            if free[r] >= n:
                break
        else:
            r = len(rows)
            rows.append([])
            free.append(length)
        rows[r].append(part)
        free[r] -= n
    names = ("inputs", "targets", "positions", "segment_ids", "unit")
    packed = {name: np.zeros((len(rows), length), np.int32) for name in names}
    packed["loss_mask"] = np.zeros((len(rows), length), np.float32)
    for r, row in enumerate(rows):
        at = 0
        for segment, part in enumerate(row, 1):
            n = len(part.inputs)
            values: dict[str, Any] = {
                "inputs": part.inputs,
                "targets": part.targets,
                "positions": np.arange(n) + part.position,
                "segment_ids": segment,
                "unit": part.unit,
                "loss_mask": np.arange(n) >= part.scored,
            }
            for name, value in values.items():
                packed[name][r, at : at + n] = value
            at += n
    return packed


def batches(rows: Mapping[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    """Rows [R, T] as batches of `size` rows; the last one is filled up with zeros."""
    count = len(next(iter(rows.values())))
    padded = {k: np.pad(v, ((0, -count % size), (0, 0))) for k, v in rows.items()}
    return [
        {k: v[at : at + size] for k, v in padded.items()}
        for at in range(0, count, size)
    ]


def on_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch that every process holds, its rows divided over the mesh."""
    layout = sharding.batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(values.shape, layout, values.__getitem__)
        for name, values in batch.items()
    }


def sum_over_batches(
    step: Callable[[Any, jax.Array, Any], jax.Array],
    params: Any,
    batches: Sequence[Mapping[str, np.ndarray]],
    shape: Sequence[int],
    mesh: Mesh,
) -> np.ndarray:
    """float32 `shape`: what `step(params, sums, batch)` makes of zeros, batch by batch.

    The sums stay on the devices, whole on each of them (or a process could not fetch
    what others hold); one transfer brings them back. No more than one step waits to be
    run: with 32 of them, several CPU devices of a process may block each other for
    ever (a thread of XLA's waits for room to start a step, and the step before for that
    thread), and their inputs would fill the memory of any device.
    """
    sums = jax.device_put(jnp.zeros(shape, jnp.float32), sharding.replicated(mesh))
    for batch in batches:
        placed = on_devices(batch, mesh)
        sums = step(params, jax.block_until_ready(sums), placed)
    return np.asarray(jax.device_get(sums))


def token_scores(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """nll (nats) and whether the target is the most likely token, float32 [B, T].

    Args:
      chunk: positions whose logits exist at a time; divides T, or is 0 for all.
    """
    B, T, _ = x_BTD.shape
    w_VD = sharding.gather(w_VD, VOCAB_MATRIX_AXES, x_BTD.dtype)

    def score(part):
        x, targets = part
        target, lse, logits = target_and_logsumexp(x, w_VD, targets)
        # The first of equals is the most likely, as in argmax, which is slower on CPUs:
        # it reduces pairs of value and index.
        before = jnp.arange(w_VD.shape[0])[None, None] < targets[..., None]
        target_1 = target[..., None]
        beaten = (logits > target_1) | ((logits == target_1) & before)
        most_likely = ~jnp.any(beaten, axis=-1) & ~jnp.isnan(lse)
        return lse - target, most_likely.astype(jnp.float32)

    if not chunk or chunk >= T:
        return score((x_BTD, targets_BT))

    def cut(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(B, T // chunk, chunk, *a.shape[2:]), 1, 0)

    nll, hit = jax.lax.map(score, (cut(x_BTD), cut(targets_BT)))
    return (
        jnp.moveaxis(nll, 0, 1).reshape(B, T),
        jnp.moveaxis(hit, 0, 1).reshape(B, T),
    )
