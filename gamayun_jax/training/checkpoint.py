"""Checkpoints: Orbax, asynchronous and atomic, verified when read back.

A checkpoint holds `params`, `opt_state` (arrays, with the step), `ema` where the run
keeps one, and `meta` (JSON: resolved config, data cursors, curriculum and its
fingerprint, lineage, running sums of the records). Evaluation and export read `params`
and `meta` alone.

Files may be cut, changed or lost after they were written. So `meta` has a checksum of
every array, taken on the devices from the values themselves: one pass over memory at
each save and restore, no pass over files, the same on any mesh; and one of itself.
"""

from __future__ import annotations

import contextlib
import json
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from gamayun_jax.config import CheckpointConfig, Config, UserError
from gamayun_jax.model.weights import parameter_path
from gamayun_jax.storage import as_given, is_bucket, listed_once, move
from gamayun_jax.training import cluster
from gamayun_jax.training.checksums import (
    checksums,
    json_sha256,
    named_leaves,
    verify,
)
from gamayun_jax.training.file_errors import of_files
from gamayun_jax.training.run_folder import mark_copied, steps_in
from gamayun_jax.training.run_meta import RunMeta

FORMAT = 2
ITEMS = ("params", "opt_state", "ema")
# Of a file of a checkpoint: a process holds as much in memory before it writes.
DATA_FILE_BYTES = 32 * 2**20


class DamagedCheckpointError(UserError):
    """A checkpoint whose files are not what was written."""

    def __init__(self, where: Path, reason: str, advice: str):
        super().__init__(f"checkpoint {where} cannot be read ({reason}). {advice}")
        self.reason = reason


class TrainState(flax.struct.PyTreeNode):
    """What a train step maps to its successor. Plain nested dicts inside."""

    step: Any  # int32 scalar: optimiser steps done in this run
    params: Any
    opt_state: Any
    ema: Any = None  # see ema.py; None: the run keeps no average


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self,
        folder: Path,
        cfg: CheckpointConfig = CheckpointConfig(),
        forever: Collection[int] = (),
        read_only: bool = False,
        in_flight: int | None = None,
    ):
        """The checkpoints in `folder`.

        Args:
          forever: steps that are never deleted (see `kept_forever`).
          in_flight: bytes of parameters on their way to or from the disk at a time,
            at least the largest one's; default: Orbax's own, tens of gigabytes.
        """
        remote = is_bucket(folder)
        keep: list[Any] = [policies.LatestN(cfg.keep)]
        if forever:
            keep.append(policies.CustomSteps(sorted(forever)))
        self.folder = as_given(folder)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # No rename in a bucket: a mark is written last (run_folder.is_whole).
            temporary_path_class=ocp.path.atomicity.CommitFileTemporaryPath
            if remote
            else None,
        )
        limit: Any = in_flight and in_flight / 1e9
        handlers: dict[str, Any] = {
            item: ocp.PyTreeCheckpointHandler(
                # Compression saves a tenth of float32 values and takes most of the
                # time; zarr3 is what keeps to DATA_FILE_BYTES.
                use_compression=False,
                use_zarr3=True,
                save_concurrent_gb=limit,
                save_device_host_concurrent_gb=limit,
                restore_concurrent_gb=limit,
            )
            for item in ITEMS
        }
        handlers["meta"] = ocp.JsonCheckpointHandler()
        self._handlers = handlers
        with listed_once(self.folder):
            if remote and jax.process_index() == 0:
                mark_copied(self.folder)
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )
        self._same_steps()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: RunMeta) -> None:
        """Begin to save; returns once the arrays are copied off the devices.

        Raises:
          UserError: this checkpoint, or the one before, cannot be written.
        """
        items = items_of(state)
        data = {**meta.to_json(), "format": FORMAT, "checksums": checksums(items)}
        # A copy: it is written while the run goes on, and its lineage changes.
        data = json.loads(json.dumps(data))
        with of_files(self._unwritten):
            self._manager.save(
                meta.step,
                args=ocp.args.Composite(
                    **{
                        k: ocp.args.PyTreeSave(
                            v, ocdbt_target_data_file_size=DATA_FILE_BYTES
                        )
                        for k, v in items.items()
                    },
                    meta=ocp.args.JsonSave({**data, "sha256": json_sha256(data)}),
                ),
                force=True,
            )

    def delete(self, step: int) -> None:
        """Delete a checkpoint that the run has gone back before."""
        self._manager.delete(step)

    def meta(self, step: int) -> RunMeta:
        """What was saved beside the arrays.

        Raises:
          DamagedCheckpointError: what is read is not what was written.
          UserError: it is not given now (see file_errors.is_refused), or of a version
            that this one cannot read.
        """
        return self._agreed(step, lambda: self._meta(step))

    def _meta(self, step: int) -> RunMeta:
        data = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        if not isinstance(data, dict) or data.pop("sha256", "") != json_sha256(data):
            raise self._damaged(step, "its meta has changed since it was written")
        where = f"{self.folder}/{step}"
        if data.get("format") != FORMAT:
            raise UserError(
                f"checkpoint {where} has format {data.get('format')}, this version "
                f"reads {FORMAT}"
            )
        meta = RunMeta.from_json(data, where)
        if meta.step != step:
            raise self._damaged(step, f"it was saved as that of step {meta.step}")
        return meta

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state at `step`, on the shardings of `abstract`; every leaf checked.

        An average that the checkpoint has not is None; `step.begin_ema` begins it.

        Raises:
          UserError: a state of another structure, or it is not given now.
          DamagedCheckpointError: what is read is not what was written.
        """
        items = items_of(abstract)
        if "ema" in items and not self.meta(step).has_ema:
            del items["ema"]
        restored = self._restore(step, items)
        return TrainState(
            step=restored["opt_state"]["step"],
            params=restored["params"],
            opt_state=restored["opt_state"]["opt_state"],
            ema=restored.get("ema"),
        )

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone; as `restore`."""
        return self._restore(step, {"params": abstract_params})["params"]

    def restore_ema(self, step: int, abstract_ema: Any) -> Any:
        """The average of the parameters alone; as `restore`."""
        return self._restore(step, {"ema": abstract_ema})["ema"]

    def readers(self, step: int, abstract_params: Any) -> Any:
        """Functions in place of the parameters; each reads its own, as `restore`."""

        def reader(path: Any, leaf: Any) -> Callable[[], jax.Array]:
            tree = leaf
            for name in reversed(parameter_path(path).split("/")):
                tree = {name: tree}

            def read() -> jax.Array:
                found = self._restore(step, {"params": tree}, partly=True)
                return jax.tree.leaves(found)[0]

            return read

        return jax.tree_util.tree_map_with_path(reader, abstract_params)

    def _restore(
        self, step: int, items: dict[str, Any], partly: bool = False
    ) -> dict[str, Any]:
        expected, restored = self._agreed(
            step, lambda: self._read_arrays(step, items, partly)
        )

        def compare() -> None:
            for item, values in checksums(restored).items():
                for name, value in values.items():
                    if value != expected[item][name]:
                        raise self._damaged(
                            step, f"{item} {name!r} has changed since it was written"
                        )

        # What every device has whole may be damaged on one process alone.
        self._agreed(step, compare)
        return restored

    def _read_arrays(
        self, step: int, items: dict[str, Any], partly: bool
    ) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """The checksums that were written, and what this process reads."""
        where = self.folder / str(step)
        expected = self._meta(step).checksums or {}
        # A checkpoint of another model, or of another version, is not a damaged one.
        for item, tree in items.items():
            names = {name for name, _ in named_leaves(tree)}
            known = set(expected[item])
            if names - known or (known - names and not partly):
                raise UserError(
                    f"checkpoint {where} holds other {item} than this config and "
                    "this version have"
                )
        arguments = {
            k: ocp.args.PyTreeRestore(
                v,
                restore_args=ocp.checkpoint_utils.construct_restore_args(v),
                partial_restore=partly,
            )
            for k, v in items.items()
        }
        found = self._read(step, **arguments)
        restored = {k: found[k] for k in items}
        for item, tree in items.items():
            verify(restored[item], tree, where)
        return expected, restored

    def _agreed(self, step: int, read: Callable[[], Any]) -> Any:
        """What `read` gives, if it does on every process; otherwise all raise.

        Whatever several processes do together comes after all have read: one that
        cannot would leave the others alone in it.
        """
        result, error = None, None
        try:
            result = read()
        except UserError as e:
            error = e
        damaged = isinstance(error, DamagedCheckpointError)
        kinds = cluster.gather(0 if error is None else 1 if damaged else 2)
        kind = kinds.max()
        if error is not None and kind == (1 if damaged else 2):
            raise error
        who = np.flatnonzero(kinds == kind).tolist()
        if kind == 1:
            raise self._damaged(step, f"processes {who} cannot read it")
        if kind == 2:
            raise UserError(
                f"checkpoint {self.folder / str(step)} cannot be used by processes "
                f"{who}: they say why"
            )
        return result

    def newest(
        self,
        abstract: TrainState,
        check: Callable[[RunMeta, str], None],
        aside: Path,
        log: Callable[[str], None],
    ) -> tuple[RunMeta, TrainState, list[dict[str, Any]]] | None:
        """(meta, state, lineage events) of the newest checkpoint that is whole.

        Damaged newer ones are moved to the folder `aside`, with one event each. None
        if there is no checkpoint at all.

        Args:
          check: called with each meta and its place before anything is moved or read
            further; what it raises is raised.

        Raises:
          UserError: from `check`, or the last checkpoint that is left is damaged too.
        """
        events: list[dict[str, Any]] = []
        while (step := self.latest()) is not None:
            try:
                meta = self.meta(step)
                check(meta, f"{self.folder}/{step}")
                return meta, self.restore(step, abstract), events
            except DamagedCheckpointError as damage:
                if len(self.steps()) == 1:
                    raise
                reason = damage.reason
            place = self._set_aside(step, aside)
            log(f"checkpoint {step} is damaged ({reason}): moved to {place}")
            events.append({"event": "damaged", "step": step, "reason": reason})
        return None

    def _set_aside(self, step: int, aside: Path) -> Path:
        place, number = aside / str(step), 1
        while place.exists():
            place, number = aside / f"{step}.{number}", number + 1
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            move(self.folder / str(step), place)
        cluster.barrier(f"set aside {step}")
        self._manager.reload()
        self._same_steps()
        return place

    def _same_steps(self) -> None:
        """Return when all processes see the same checkpoints.

        Raises:
          UserError: they do not within half a minute.
        """
        for _ in range(30):
            lists = cluster.gather(np.uint32(zlib.crc32(str(self.steps()).encode())))
            if (lists == lists[0]).all():
                return
            time.sleep(1)  # a shared folder may show what is new with a delay
            self._manager.reload()
        who = np.flatnonzero(lists != lists[0]).tolist()
        raise UserError(
            f"processes {who} do not see the checkpoints in {self.folder} that the "
            "first process sees: give all of them a --workdir that they share"
        )

    def _read(self, step: int, **items: Any) -> Any:
        where = self.folder / str(step)
        if step not in self._manager.all_steps():
            raise UserError(
                f"checkpoint {where} does not exist; there are: "
                f"{', '.join(map(str, self.steps())) or 'none'}"
            )
        with of_files(
            lambda reason: self._damaged(step, reason),
            lambda reason: UserError(
                f"checkpoint {where} cannot be read now ({reason}). Nothing was moved: "
                "see to the bucket or the rights, then give the same command again"
            ),
        ):
            # Not by the manager, which ends with a barrier: see `_agreed`.
            folder = self._manager.directory / str(step)
            with listed_once(folder):
                return {
                    name: self._handlers[name].restore(folder / name, args=args)
                    for name, args in items.items()
                }

    def _damaged(self, step: int, reason: str) -> DamagedCheckpointError:
        others = [s for s in self.steps() if s != step]
        return DamagedCheckpointError(
            self.folder / str(step),
            reason,
            f"Move that folder away to go on from step {max(others)}"
            if others
            else "There is no other: start again in an empty folder",
        )

    def _unwritten(self, reason: str) -> UserError:
        there: list[int] = []  # where the folder is gone, or its bucket gives no answer
        with contextlib.suppress(OSError):
            there = steps_in(self.folder)
        return UserError(
            f"a checkpoint cannot be written to {self.folder} ({reason}): make room or "
            "give --workdir a folder that can be written; the same command then goes "
            f"on from {f'step {max(there)}' if there else 'the beginning'}"
        )

    def check(self) -> None:
        """Raise what went wrong in the background since the last save began."""
        with of_files(self._unwritten):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Return when the last save is committed; raises what it raised."""
        with of_files(self._unwritten):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with of_files(self._unwritten):
            self._manager.close()


def kept_forever(cfg: Config) -> list[int]:
    """Steps whose checkpoints stay: the stages' ends, those that
    checkpoint.keep_every_steps names, and the first regular one at or after each
    checkpoint.keep_every_tokens tokens of the run."""
    keep = cfg.checkpoint
    steps = {cfg.stage_start(k + 1) for k in range(len(cfg.stages))}
    if keep.keep_every_steps:
        every = keep.keep_every_steps
        steps |= set(range(every, cfg.total_steps, every))
    if keep.keep_every_tokens:

        def passed(step: int) -> int:
            return step * cfg.tokens_per_step // keep.keep_every_tokens

        every = keep.every_steps  # not by each so many tokens, which may be few
        for step in range(every, cfg.total_steps + 1, every):
            if passed(step) > passed(step - every):
                steps.add(step)
    return sorted(steps)


def items_of(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint that are arrays."""
    opt_state = {"opt_state": state.opt_state, "step": state.step}
    items = {"params": state.params, "opt_state": opt_state, "ema": state.ema}
    return {k: v for k, v in items.items() if v is not None}
