"""A model with its parameters on this machine's devices, whatever it is stored as."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gamayun_jax.config import AnyPath, Config, MeshConfig
from gamayun_jax.inference import quantize
from gamayun_jax.interop import huggingface
from gamayun_jax.model import sharding
from gamayun_jax.model.weights import abstract_params
from gamayun_jax.storage import as_path
from gamayun_jax.training import checkpoint
from gamayun_jax.training.run_folder import find_checkpoint, is_hf_folder
from gamayun_jax.training.run_meta import RunMeta


class LoadedModel(NamedTuple):
    """A model: its config, parameters on a mesh, and its checkpoint's meta."""

    cfg: Config
    params: Any
    meta: RunMeta
    mesh: Mesh


def load_params(path: AnyPath, quantised: bool = False) -> LoadedModel:
    """A model with its parameters on this machine's devices.

    Args:
      path: run folder (its newest checkpoint), one checkpoint, or a folder in Hugging
        Face's format, which is read straight onto the devices.
      quantised: leave quantised parameters as they are; else they become floats.

    Raises:
      UserError: none of these, or damaged.
    """
    path = as_path(path)
    if is_hf_folder(path):
        mesh = sharding.make_mesh(MeshConfig())
        loaded = LoadedModel(*huggingface.read_hf(path, mesh), mesh)
        for note in huggingface.notes_on(loaded.meta.lineage["imported"]):
            print(note, file=sys.stderr)
        return loaded
    folder, step = find_checkpoint(path)
    store = checkpoint.Checkpoints(folder, read_only=True)
    meta = store.meta(step)
    cfg = meta.config
    # Not the mesh of the training: this machine may have other devices.
    mesh = sharding.make_mesh(MeshConfig())
    sharding.check_model(cfg.model, mesh)
    abstract = sharding.place_abstract(abstract_params(cfg.model), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    bits = meta.bits
    if bits:
        abstract = quantize.abstract_quantised(abstract, meta)
    params = store.restore_params(step, abstract)
    store.close()
    if bits and not quantised:
        params = jax.jit(quantize.dequantize_all, out_shardings=shardings)(params)
    return LoadedModel(cfg, params, meta, mesh)
