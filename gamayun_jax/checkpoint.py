"""Checkpoints: Orbax, asynchronous and atomic, verified when read back.

A checkpoint holds three items: `params`, `opt_state` (arrays, with the step), and
`meta` (JSON: resolved config, data cursors, curriculum and its fingerprint, lineage,
running sums of the records). Evaluation and export read `params` and `meta` alone.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import flax.struct
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from gamayun_jax.config import CheckpointConfig, UserError
from gamayun_jax.optim import parameter_path

FORMAT = 1


class TrainState(flax.struct.PyTreeNode):
    """What a train step maps to its successor. Plain nested dicts inside."""

    step: Any  # int32 scalar: optimiser steps done in this run
    params: Any
    opt_state: Any


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self,
        folder: Path,
        cfg: CheckpointConfig = CheckpointConfig(),
        forever: Collection[int] = (),
        read_only: bool = False,
    ):
        """`forever`: steps that are never deleted (the stages' ends)."""
        keep: list[Any] = [policies.LatestN(cfg.keep)]
        if cfg.keep_every_steps:
            keep.append(policies.EveryNSteps(cfg.keep_every_steps))
        if forever:
            keep.append(policies.CustomSteps(sorted(forever)))
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, step: int, meta: dict[str, Any]) -> None:
        """Begin to save; returns once the arrays are copied off the devices."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(
                    {"opt_state": state.opt_state, "step": state.step}
                ),
                meta=ocp.args.JsonSave({"format": FORMAT, **meta}),
            ),
            force=True,
        )

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON item; UserError if another version of this project wrote it."""
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        if meta.get("format") != FORMAT:
            raise UserError(
                f"checkpoint {self.folder / str(step)} has format "
                f"{meta.get('format')}, this version reads {FORMAT}"
            )
        return meta

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state at `step`, on the shardings of `abstract`; every leaf checked."""
        rest = {"opt_state": abstract.opt_state, "step": abstract.step}
        restored = self._read(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(rest),
        )
        state = TrainState(
            step=restored["opt_state"]["step"],
            params=restored["params"],
            opt_state=restored["opt_state"]["opt_state"],
        )
        verify(state, abstract, self.folder / str(step))
        return state

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        params = self._read(step, params=ocp.args.StandardRestore(abstract_params))
        verify(params["params"], abstract_params, self.folder / str(step))
        return params["params"]

    def _read(self, step: int, **items: Any) -> Any:
        where = self.folder / str(step)
        if step not in self._manager.all_steps():
            raise UserError(
                f"checkpoint {where} does not exist; there are: "
                f"{', '.join(map(str, self.steps())) or 'none'}"
            )
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # Orbax and TensorStore raise many kinds
            others = [s for s in self.steps() if s != step]
            reason = " ".join(str(e).split())[:300]
            raise UserError(
                f"checkpoint {where} cannot be read ({type(e).__name__}: {reason}). "
                + (
                    f"Move that folder away to go on from step {max(others)}"
                    if others
                    else "There is no other: start again in an empty folder"
                )
            ) from e

    def wait(self) -> None:
        """Return when the last save is committed; raises what it raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def verify(tree: Any, abstract: Any, where: Path) -> None:
    """Check that every leaf is an array of the expected shape and dtype.

    Orbax hands back a ShapeDtypeStruct for a leaf that the checkpoint lacks.

    Raises:
      UserError: naming the first leaf that is missing or different.
    """
    expected = jax.tree_util.tree_flatten_with_path(abstract)[0]
    found = dict(jax.tree_util.tree_flatten_with_path(tree)[0])
    for path, leaf in expected:
        value = found.get(path)
        if not isinstance(value, jax.Array):
            raise UserError(f"checkpoint {where} lacks {parameter_path(path)!r}")
        if value.shape != leaf.shape or value.dtype != leaf.dtype:
            raise UserError(
                f"checkpoint {where}: {parameter_path(path)!r} is "
                f"{value.dtype}{list(value.shape)}, the config needs "
                f"{leaf.dtype}{list(leaf.shape)}"
            )


def find_checkpoint(path: Path) -> tuple[Path, int]:
    """(checkpoints folder, step) of a run folder (its newest) or of one checkpoint.

    Raises:
      UserError: neither a run folder nor a checkpoint.
    """
    path = Path(path)
    if path.name.isdigit() and (path / "meta").is_dir():
        return path.parent, int(path.name)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [
        int(p.name)
        for p in (folder.iterdir() if folder.is_dir() else ())
        if p.name.isdigit() and (p / "meta").is_dir()
    ]
    if not steps:
        raise UserError(
            f"{path} has no checkpoint: give a run folder, or one of its "
            "checkpoints/<step>"
        )
    return folder, max(steps)
