"""Models in and out: Hugging Face folders to checkpoints and back.

What is written appears whole or not at all: it is made in a hidden folder beside the
place where it shall be, and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from gamayun_jax import __version__, files, sharding
from gamayun_jax.checkpoint import Checkpoints, TrainState, find_checkpoint
from gamayun_jax.config import (
    Config,
    DataConfig,
    MixtureConfig,
    ModelConfig,
    ScheduleConfig,
    StageConfig,
    UserError,
    from_json,
    to_json,
)
from gamayun_jax.corpus import open_corpus
from gamayun_jax.hf_model import (
    ARCHITECTURES,
    DTYPES,
    config_from_hf,
    config_to_hf,
    read_weights,
    write_weights,
)
from gamayun_jax.hf_tokenizer import (
    TOKENIZER_FILES,
    HFTokenizer,
    load_tokenizer,
    read_object,
    write_tokenizer,
)
from gamayun_jax.model import abstract_params, parameter_count
from gamayun_jax.tokenizer import Tokenizer

# Copied from an imported folder into the run folder, and out again.
KEPT_FILES = (*TOKENIZER_FILES, "generation_config.json")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder that becomes `out`, durably, if the block succeeds.

    Raises:
      UserError: there is something at `out` already.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: give a new folder, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            files.sync(path)
        os.replace(temporary, out)
        files.sync(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# --- in -------------------------------------------------------------------------


def import_hf(folder: Path, out: Path, mesh: Mesh | None = None) -> dict[str, Any]:
    """Read a Hugging Face folder; write a run folder with one checkpoint, step 0.

    The run folder has the tokenizer's files too, where there are any.

    Args:
      mesh: parameters go straight onto it; default: onto one device.

    Returns:
      parameters (their number), tokenizer (its vocabulary or None) and notes (lines
      for the user).

    Raises:
      UserError: the folder is not a model that can be read, or `out` exists.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json: give a folder with a model in Hugging "
            "Face's format"
        )
    data = read_object(folder / "config.json")
    model = config_from_hf(data, str(folder / "config.json"))
    tokenizer, notes = None, []
    if (folder / "tokenizer.json").is_file():
        tokenizer = HFTokenizer(folder)
        check_vocabulary(tokenizer, model, folder)
    else:
        notes.append(
            f"{folder} has no tokenizer.json: the weights are imported, but the model "
            "can neither be evaluated nor generate text"
        )
    name = folder.resolve().name
    cfg = imported_config(name, model)
    with new_folder(out) as temporary:
        shardings = None
        if mesh is not None:
            sharding.check_model(model, mesh)
            shardings = sharding.logical_shardings(abstract_params(model), mesh)
        params = read_weights(folder, model, shardings)
        origin = {
            "format": "huggingface",
            "folder": name,
            "model_type": data["model_type"],
            "dtype": data.get("dtype") or data.get("torch_dtype"),
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
        meta = dict(
            step=0,
            tokens=0,
            config=to_json(cfg),
            tokenizer=tokenizer.fingerprint if tokenizer else None,
            consumed={},
            curricula=[],
            origin=None,
            lineage=lineage,
            interval=None,
            seed=0,
            shares={},
        )
        store = Checkpoints(temporary / "checkpoints")
        try:
            store.save(TrainState(jnp.zeros((), jnp.int32), params, {}), 0, meta)
            store.wait()
        finally:
            store.close()
        files.write_text(temporary / "config.json", to_json(cfg))
        files.write_json(temporary / "lineage.json", lineage)
        if tokenizer:
            # The only settings of config.json that the tokenizer still needs.
            names = [f"{kind}_token_id" for kind in ("bos", "eos", "pad")]
            ids = {k: data[k] for k in names if data.get(k) is not None}
            copy_kept(folder, temporary, ids)
    return {
        "parameters": lineage["parameters"],
        "tokenizer": tokenizer.vocab_size if tokenizer else None,
        "notes": notes,
    }


def imported_config(name: str, model: ModelConfig) -> Config:
    """A config around an imported model: trained elsewhere, on what is unknown."""
    return Config(
        name=name,
        languages=("und",),  # undetermined (ISO 639)
        model=model,
        stages=(StageConfig("imported", 1, MixtureConfig(), ScheduleConfig()),),
        data=DataConfig(seq_len=min(4096, model.max_seq_len)),
    )


def check_vocabulary(
    tokenizer: Tokenizer | HFTokenizer, model: ModelConfig, where: Path
) -> None:
    """Raise UserError if the tokenizer has ids that the model has no row for.

    The other way round is common: tables are padded to a round number.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, but the model has "
            f"vocab_size={model.vocab_size}: they do not belong together"
        )


def copy_kept(source: Path, out: Path, ids: Mapping[str, Any]) -> None:
    """Copy the tokenizer's files; `ids` go into generation_config.json."""
    for name in KEPT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    path = out / "generation_config.json"
    former = read_object(path) if path.is_file() else {}
    files.write_json(path, {**ids, **former})


# --- out ------------------------------------------------------------------------


def export_hf(
    model: Path,
    out: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 4 * 2**30,
    tokenizer: Path | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a checkpoint as a folder that `transformers` loads with no custom code.

    Args:
      model: run folder (its newest checkpoint) or one checkpoint.
      dtype: of the weights: float32 (exact), bfloat16 or float16.
      tokenizer: a .model file or a folder; default: the run folder's own, or its
        corpus's.
      evaluation: results for the model card; default: the run's, of the same step.

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
    store = Checkpoints(folder, read_only=True)
    with contextlib.closing(store):
        meta = store.meta(step)
        if meta.get("bits"):
            raise UserError(
                f"{folder}/{step} is quantised to {meta['bits']} bits: export the "
                "checkpoint that it was made from"
            )
        cfg = from_json(meta["config"], f"{folder}/{step}")
        data = config_to_hf(cfg.model, dtype)
        found, notes = find_tokenizer(run, cfg, meta, tokenizer), []
        source = tokenizer or run
        if found is None:
            notes.append(
                f"{run} has no tokenizer: the weights are exported without one"
            )
        else:
            check_vocabulary(found, cfg.model, run)
        with new_folder(out) as temporary:
            # On the host: nothing is computed, and a device may have less memory.
            host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host),
                nn.unbox(abstract_params(cfg.model)),
            )
            params = store.restore_params(step, abstract)
            paths = write_weights(params, cfg.model, temporary, max_shard_bytes, dtype)
            write_rest(found, cfg, meta, data, source, temporary)
            path = run / "eval" / f"{step}.json"
            if evaluation is None and path.is_file():
                evaluation = read_object(path)
            card = model_card(cfg, meta, data, evaluation)
            files.write_text(temporary / "README.md", card)
            files.write_json(temporary / "lineage.json", meta["lineage"])
    names = [p.name for p in paths]
    return {"parameters": parameter_count(cfg.model), "files": names, "notes": notes}


def find_tokenizer(
    run: Path, cfg: Config, meta: Mapping[str, Any], given: Path | None
) -> Tokenizer | HFTokenizer | None:
    """The tokenizer a checkpoint was trained with; None if it was imported without.

    Raises:
      UserError: it cannot be found, or the one given is another.
    """
    found: Tokenizer | HFTokenizer
    if given is not None:
        found, where = load_tokenizer(given), str(given)
    elif (run / "tokenizer.json").is_file():
        found, where = load_tokenizer(run), str(run)
    elif meta["tokenizer"] is None:
        return None
    else:
        found = open_corpus(Path(cfg.data.corpus)).tokenizer()
        where = f"corpus {cfg.data.corpus}"
    if meta["tokenizer"] not in (None, found.fingerprint):
        raise UserError(
            f"{where} has another tokenizer ({found.fingerprint[:12]}) than {run} was "
            f"trained with ({meta['tokenizer'][:12]}): give the right one"
        )
    return found


def write_rest(
    tokenizer: Tokenizer | HFTokenizer | None,
    cfg: Config,
    meta: Mapping[str, Any],
    data: dict[str, Any],
    source: Path,
    out: Path,
) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    ids = {}
    if tokenizer is not None:
        ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        if tokenizer.bos_id >= 0:
            ids["bos_token_id"] = tokenizer.bos_id
    if isinstance(tokenizer, HFTokenizer):
        copy_kept(source, out, ids)
    else:
        files.write_json(out / "generation_config.json", {**ids, "do_sample": False})
    if isinstance(tokenizer, Tokenizer):
        write_tokenizer(tokenizer, out, cfg.model.max_seq_len)
    files.write_json(out / "config.json", {**data, **ids})


def model_card(
    cfg: Config,
    meta: Mapping[str, Any],
    data: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> str:
    """README.md of an exported model: what it is, where from, how well it does."""
    m, lineage = cfg.model, meta["lineage"]
    languages = [k for k in cfg.languages if k != "und"]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if languages:
        lines += ["language:", *(f"- {k}" for k in languages)]
    lines += [
        "---",
        "",
        f"# {cfg.name}",
        "",
        f"A decoder of {parameter_count(m):,} parameters, exported by gamayun_jax "
        f"{__version__} as `{ARCHITECTURES[data['model_type']]}` in "
        f"{data['torch_dtype']}: {m.num_layers} layers, width {m.d_model}, "
        f"{m.num_heads} query and {m.num_kv_heads} key-value heads of {m.head_dim}, "
        f"SwiGLU {m.d_ff}, vocabulary {m.vocab_size:,}, context {m.max_seq_len:,}.",
        "",
        "## Training",
        "",
    ]
    if imported := lineage.get("imported"):
        lines += [
            f"Not trained here: imported from `{imported['folder']}` "
            f"({imported['model_type']}).",
        ]
    else:
        lines += [
            f"Trained on {meta['tokens']:,} tokens ({meta['step']:,} steps).",
            f"Languages: {', '.join(languages)}." if languages else "",
            "",
            "| stage | from token | to token |",
            "|---|---:|---:|",
            *(
                f"| {s['name']} | {s['start_tokens']:,} | {s['end_tokens']:,} |"
                for s in lineage.get("stages", ())
            ),
        ]
        sources = lineage.get("corpus", {}).get("sources", {})
        lines += ["", "| source | documents | tokens |", "|---|---:|---:|"]
        lines += [
            f"| {name} | {s['documents']:,} | {s['tokens']:,} |"
            for name, s in sources.items()
        ]
    if lineage.get("init_from"):
        origin = lineage["init_from"]
        lines += ["", f"Began from `{origin.get('checkpoint')}`."]
    lines += ["", "`lineage.json` has the whole record.", ""]
    for name, result in ((evaluation or {}).get("sets") or {}).items():
        lines += [
            f"## Held-out set {name}",
            "",
            "| language | bits per byte | ± | token accuracy |",
            "|---|---:|---:|---:|",
        ]
        rows = dict(result["languages"])
        rows |= {k: result[k] for k in ("macro", "micro") if k in result}
        lines += [
            f"| {k} | {r['bits_per_byte']:.4f} | {r['bits_per_byte_se']:.4f} | "
            f"{r['accuracy']:.1%} |"
            for k, r in rows.items()
        ]
        lines.append("")
    lines += [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".")',
        "```",
        "",
    ]
    if not imported:  # with our tokenizer
        lines += [
            "With llama.cpp, whose converter takes a SentencePiece model to begin "
            "texts with a space, which this one does not:",
            "",
            "```sh",
            "python convert_hf_to_gguf.py . --outfile model.gguf",
            "llama-cli -m model.gguf "
            "--override-kv tokenizer.ggml.add_space_prefix=bool:false",
            "```",
            "",
        ]
    return "\n".join(lines)
