"""Models that a run begins from (`--init-from`): checkpoints, and folders of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from gamayun_jax.interop import huggingface
from gamayun_jax.interop.hf_weights import read_weights
from gamayun_jax.training.checkpoint import TrainState
from gamayun_jax.training.lineage import ModelStore, open_checkpoint
from gamayun_jax.training.model_folder import freed_memory_given_back
from gamayun_jax.training.run_folder import is_hf_folder
from gamayun_jax.training.run_meta import RunMeta


class FolderStore:
    """A Hugging Face folder, read as a checkpoint of step 0 is."""

    def __init__(self, folder: Path):
        self.folder = folder
        _, self._meta = huggingface.describe(folder)

    def meta(self, step: int) -> RunMeta:
        """What it says of itself; it has parameters alone."""
        return self._meta

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters, on the shardings of `abstract_params`."""
        shardings = jax.tree.map(lambda x: x.sharding, abstract_params)
        with freed_memory_given_back():
            return read_weights(self.folder, self._meta.config.model, shardings)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        raise NotImplementedError("parameters alone: see RunMeta.params_alone")

    def restore_ema(self, step: int, abstract_ema: Any) -> Any:
        raise NotImplementedError("it has no average: see RunMeta.has_ema")

    def close(self) -> None:
        """Nothing is open."""


def open_model(path: Path) -> tuple[ModelStore, int]:
    """The store and step of a model: a run folder, one checkpoint, or a folder in
    Hugging Face's format, which is read as it is.

    Raises:
      UserError: none of these, or a folder that is not a model that can be read.
    """
    if is_hf_folder(path):
        return FolderStore(path), 0
    return open_checkpoint(path)
