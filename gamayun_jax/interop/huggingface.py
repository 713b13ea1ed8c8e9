"""Models in and out: Hugging Face folders to checkpoints and back.

What is written appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gamayun_jax import __version__
from gamayun_jax.config import (
    AnyPath,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    MixtureConfig,
    ModelConfig,
    ScheduleConfig,
    StageConfig,
    UserError,
    to_json,
)
from gamayun_jax.data import files
from gamayun_jax.data.hf_tokenizer import (
    TOKENIZER_FILES,
    HFTokenizer,
)
from gamayun_jax.data.model_tokenizer import (
    check_vocabulary,
    open_tokenizer,
)
from gamayun_jax.data.tokenizer import Tokenizer
from gamayun_jax.fields import check_there
from gamayun_jax.interop.export_tokenizer import fingerprint_of, write_tokenizer
from gamayun_jax.interop.hf_config import config_from_hf, config_to_hf, unknown_keys
from gamayun_jax.interop.hf_weights import DTYPES, read_weights, write_weights
from gamayun_jax.interop.model_card import exposure_of, model_card
from gamayun_jax.model import sharding
from gamayun_jax.model.weights import abstract_params, parameter_count
from gamayun_jax.storage import as_path, with_checkpoints
from gamayun_jax.training.checkpoint import Checkpoints
from gamayun_jax.training.model_folder import (
    freed_memory_given_back,
    largest_bytes,
    on_host,
    write_params,
)
from gamayun_jax.training.run_folder import find_checkpoint
from gamayun_jax.training.run_meta import RunMeta

# Copied from an imported folder into the run folder, and out again.
KEPT_FILES = (*TOKENIZER_FILES, "generation_config.json")


# --- in -------------------------------------------------------------------------


def describe(folder: Path) -> tuple[HFTokenizer | None, RunMeta]:
    """A Hugging Face folder's tokenizer, and its meta as of a checkpoint.

    Raises:
      UserError: the folder is not a model that can be read.
    """
    path, advice = folder / "config.json", "give a folder in Hugging Face's format"
    check_there(folder, "model ", advice)
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: {advice}")
    data = files.read_json(path)
    model = config_from_hf(data, str(path))
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = HFTokenizer(folder)
        check_vocabulary(tokenizer, model, folder)
    name = folder.resolve().name
    origin = {
        "format": "huggingface",
        "folder": name,
        "model_type": data["model_type"],
        "dtype": data.get("dtype") or data.get("torch_dtype"),
        "unknown": unknown_keys(data),
    }
    now = datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")
    lineage = {
        "run": name,
        "started": now,
        "parameters": parameter_count(model),
        "init_from": None,
        "imported": origin,
        "stages": [],
        "checkpoints": [{"step": 0, "tokens": 0, "reason": "import", "stage": ""}],
        "events": [],
        "versions": {"gamayun_jax": __version__, "jax": jax.__version__},
    }
    return tokenizer, RunMeta(
        step=0,
        config=imported_config(name, model),
        tokenizer=fingerprint_of(folder, tokenizer),
        lineage=lineage,
    )


def read_hf(folder: Path, mesh: Mesh | None = None) -> tuple[Config, Any, RunMeta]:
    """A Hugging Face folder's config, parameters and meta, as of a checkpoint.

    Nothing is written: `load_model.load_params` takes such folders as they are.

    Args:
      mesh: parameters go straight onto it; default: onto one device.

    Raises:
      UserError: the folder is not a model that can be read.
    """
    _, meta = describe(folder)
    model = meta.config.model
    shardings = None
    if mesh is not None:
        sharding.check_model(model, mesh)
        shardings = sharding.parameter_shardings(abstract_params(model), mesh)
    return meta.config, read_weights(folder, model, shardings), meta


def import_hf(
    folder: AnyPath, out: AnyPath, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Read a Hugging Face folder; write a run folder with one checkpoint, step 0.

    The run folder has the tokenizer's files too, where there are any.

    Args:
      mesh: parameters go straight onto it; default: onto one device.

    Example:
      >>> gx.import_hf("hf/tiny", "runs/imported")["parameters"]
      35008

    Returns:
      parameters (their number), tokenizer (its vocabulary or None) and notes (lines
      for the user).

    Raises:
      UserError: the folder is not a model that can be read, or `out` exists.
    """
    folder = as_path(folder)
    tokenizer, _ = describe(folder)
    with_checkpoints(as_path(out))
    with files.new_folder(out) as temporary, freed_memory_given_back():
        cfg, params, meta = read_hf(folder, mesh)
        write_params(params, meta, temporary)
        files.write_text(temporary / "config.json", to_json(cfg))
        files.write_json(temporary / "lineage.json", meta.lineage)
        if tokenizer:
            copy_kept(folder, temporary)
            tokenizer.write(temporary)  # with what it took from config.json
    notes = notes_on(meta.lineage["imported"])
    if not tokenizer:
        notes.append(
            f"{folder} has no tokenizer.json: the weights are imported, but the model "
            "can neither be evaluated nor generate text"
        )
    return {
        "parameters": meta.lineage["parameters"],
        "tokenizer": tokenizer.vocab_size if tokenizer else None,
        "notes": notes,
    }


def notes_on(imported: Mapping[str, Any]) -> list[str]:
    """Lines for the user about what was imported, as lineage has it."""
    if not imported["unknown"]:
        return []
    return [
        f"config.json has keys unknown here: {', '.join(imported['unknown'])}. As in "
        "transformers they change nothing: make sure that the model was trained so"
    ]


def imported_config(name: str, model: ModelConfig) -> Config:
    """A config around an imported model: trained elsewhere, on what is unknown.

    Rows and batches are sized for evaluation: published vocabularies are large.
    """
    length = min(1024, model.max_seq_len)
    return Config(
        name=name,
        languages=("und",),  # undetermined (ISO 639)
        model=model,
        stages=(StageConfig("imported", 1, MixtureConfig(), ScheduleConfig()),),
        data=DataConfig(seq_len=length),
        compute=ComputeConfig(loss_chunk=0 if length % 128 else 128),
        evaluation=EvalConfig(batch_size=8),
    )


def copy_kept(source: Path, out: Path) -> None:
    """Copy the tokenizer's files."""
    for name in KEPT_FILES:
        if (source / name).is_file():
            (out / name).write_bytes((source / name).read_bytes())


# --- out ------------------------------------------------------------------------


def export_hf(
    model: AnyPath,
    out: AnyPath,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 4 * 2**30,
    tokenizer: AnyPath | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a checkpoint as a folder that `transformers` loads with no custom code.

    Args:
      model: run folder (its newest checkpoint) or one checkpoint.
      dtype: of the weights: float32 (exact), bfloat16 or float16.
      tokenizer: a .model file or a folder; default: the run folder's own, or its
        corpus's.
      evaluation: results for the model card; default: the run's, of the same step.

    Example:
      >>> gx.export_hf("runs/tiny", "hf/tiny")["files"]
      ['model.safetensors']

    Returns:
      parameters (their number), files (of weights) and notes (lines for the user).

    Raises:
      UserError: no such checkpoint, a tokenizer that does not fit, `out` exists.
    """
    if dtype not in DTYPES:
        raise UserError(
            f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}"
        )
    folder, step = find_checkpoint(model)
    run = folder.parent if folder.name == "checkpoints" else folder
    with contextlib.closing(Checkpoints(folder, read_only=True)) as reader:
        meta = reader.meta(step)
        if meta.bits:
            raise UserError(
                f"{folder}/{step} is quantised to {meta.bits} bits: export the "
                "checkpoint that it was made from"
            )
        cfg = meta.config
        data = config_to_hf(cfg.model, dtype)
        found, notes = None, []
        if meta.tokenizer is None and tokenizer is None:
            notes.append(
                f"{run} has no tokenizer: the weights are exported without one"
            )
        else:
            found = open_tokenizer(model, meta.tokenizer, cfg.data.corpus, tokenizer)
            check_vocabulary(found, cfg.model, run)
        with files.new_folder(out) as temporary:
            limit = largest_bytes(cfg.model)
            store = Checkpoints(folder, read_only=True, in_flight=limit)
            with contextlib.closing(store), freed_memory_given_back():
                paths = write_weights(
                    store.readers(step, on_host(abstract_params(cfg.model))),
                    cfg.model,
                    temporary,
                    max_shard_bytes,
                    dtype,
                )
            write_rest(found, cfg, data, temporary)
            path = run / "eval" / f"{step}.json"
            if evaluation is None and path.is_file():
                evaluation = files.read_json(path)
            ledger = exposure_of(meta, run)
            ours = isinstance(found, Tokenizer)
            card = model_card(cfg, meta, data, evaluation, ledger, ours)
            if ledger is not None:
                files.write_json(temporary / "exposure.json", ledger)
            files.write_text(temporary / "README.md", card)
            files.write_json(temporary / "lineage.json", meta.lineage)
    names = [p.name for p in paths]
    return {"parameters": parameter_count(cfg.model), "files": names, "notes": notes}


def write_rest(
    tokenizer: Tokenizer | HFTokenizer | None,
    cfg: Config,
    data: dict[str, Any],
    out: Path,
) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    ids = {}
    if tokenizer is not None:
        ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        if tokenizer.bos_id is not None:
            ids["bos_token_id"] = tokenizer.bos_id
    if isinstance(tokenizer, HFTokenizer):
        copy_kept(tokenizer.folder, out)
        path = out / "generation_config.json"
        former = files.read_json(path) if path.is_file() else {}
        files.write_json(path, {**ids, **former})
    else:
        files.write_json(out / "generation_config.json", {**ids, "do_sample": False})
    if isinstance(tokenizer, Tokenizer):
        write_tokenizer(tokenizer, out, cfg.model.max_seq_len)
    files.write_json(out / "config.json", {**data, **ids})
