"""Commands on runs: the demo, training, plans for TPUs, reports."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Annotated

from gamayun_jax.commands import (
    File,
    Folder,
    Local,
    Repeated,
    RunFolder,
    in_repository,
    note,
)
from gamayun_jax.commands.study import show_study
from gamayun_jax.config import Count, Finite, UserError, load_config
from gamayun_jax.data.files import write_text
from gamayun_jax.fields import Share

Steps = Annotated[
    str, ("FIRST:LAST, such as 10:13", re.compile(r"\d+(:\d+)?").fullmatch)
]


def demo(
    *, workdir: RunFolder = Path("runs/demo"), long: Finite = 1.0, set_: Repeated = ()
) -> int:
    """Run the whole path on the embedded corpus: build, train, report. Minutes.

    Writes build/demo-corpus and the run folder; the same command goes on where it was
    interrupted.

    Examples:
      gamayun demo
      gamayun demo --long 8 --workdir runs/demo-long

    Args:
      workdir: run folder to write.
      long (N): train N times as long.
    """
    from gamayun_jax.api import configs
    from gamayun_jax.data import build
    from gamayun_jax.report import report, scores
    from gamayun_jax.train import train

    cfg = load_config(in_repository("experiments/tiny.py"), set_)
    if long != 1.0:
        cfg = configs.lengthen(cfg, long)
    folder = Path(cfg.data.corpus)
    print(f"1/3 corpus and tokenizer -> {folder}", flush=True)
    build.build(cfg, folder)
    print(f"2/3 training, two stages -> {workdir}", flush=True)
    if status := train(cfg, workdir):
        return status
    print("3/3 report", flush=True)
    page = report.write_report([workdir], workdir / "report")
    print(scores.run_text(workdir))
    print(f"\nreport: {page}\n\n{next_steps(workdir, page)}")
    return 0


def next_steps(workdir: Path, page: Path) -> str:
    """What can be done after the demo."""
    run = shlex.quote(str(workdir))
    return (
        "next:\n"
        f"  open {shlex.quote(str(page))} in a browser\n"
        f'  gamayun generate {run} --prompt "To open a file,"\n'
        f"  gamayun export-hf {run} out    for transformers and llama.cpp\n"
        "  your own data: docs/own_data.md; in a notebook: experiments/notebooks"
    )


def train(
    config: Local,
    *,
    workdir: RunFolder,
    init_from: Path | None = None,
    profile: Steps | None = None,
    fresh: bool = False,
    distributed: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    silence: Finite = 60.0,
    set_: Repeated = (),
) -> int:
    """Train all stages of CONFIG; go on where the run folder stands.

    Reads the corpus that CONFIG names; writes checkpoints, metrics and evaluations
    into the run folder. SIGTERM saves and stops (status 3): the same command goes on.

    Examples:
      gamayun train experiments/tiny.py --workdir runs/tiny
      gamayun train experiments/stage2.py --workdir stage2 --init-from stage1
      gamayun train CONFIG --workdir runs/a --init-from Qwen3-1.7B-Base
      gamayun train CONFIG --workdir runs/a --set seed=1 --set data.batch_size=8

    Args:
      workdir: run folder to write.
      init_from (MODEL): begin a new run with the parameters of a run, a checkpoint, or
        a Hugging Face folder of LLaMA, Qwen2 or Qwen3 (docs/continue.md).
      profile (FIRST:LAST): trace these steps into WORKDIR/profile, for XProf or
        TensorBoard.
      fresh: begin anew in a run folder whose checkpoints are lost; its records move to
        WORKDIR/former.
      distributed: train on several hosts, found from the environment (TPU pods, Slurm).
      coordinator (HOST:PORT): train on several hosts: address of the first process.
      num_processes (N): how many processes train, with --coordinator.
      process_id (K): number of this process, from 0, with --coordinator.
      silence (SECONDS): on several hosts, all stop (status 4) when one has given no
        sign of life for so long.
    """
    from gamayun_jax.training import xla

    xla.set_flags()
    from gamayun_jax.train import train as run_stages
    from gamayun_jax.training import cluster, join

    join.join_cluster(distributed, coordinator, num_processes, process_id)
    xla.keep_compilations(workdir / "compiled")
    steps = None
    if profile is not None:
        first, _, last = profile.partition(":")
        steps = int(first), int(last or first)
    with cluster.exit_with_peers(silence):
        cfg = load_config(config, set_)
        return run_stages(cfg, workdir, init_from, profile=steps, fresh=fresh)


def launch(*arguments: str) -> int:
    """Train on machines of a cloud: create, start, watch, restart, delete.

    Example:
      gamayun launch --help

    Args:
      arguments: a command and its flags; then -- and the arguments of `gamayun train`.
    """
    from gamayun_jax.launch.command import main

    return main(arguments)


def plan(
    config: Local,
    *,
    topology: str | None = None,
    table: list[str] | None = None,
    slices: Count = 1,
    search: bool = False,
    price: Finite = 0.0,
    currency: str = "",
    efficiency: Finite = 0.6,
    spot: Finite = 0.0,
    restart: Share = 600.0,
    save: Share = 30.0,
    queue: Share = 0.0,
    measured: Path | None = None,
    json_: File | None = None,
    cache: Path = Path("build/plan"),
    set_: Repeated = (),
) -> None:
    """Compile CONFIG's training step for TPUs that need not be there.

    Prints memory, traffic, time and cost. Needs the extra `tpu`; takes one to five
    minutes per topology. For GPUs (h100:8) nothing is compiled: it says what is known.

    Examples:
      gamayun plan experiments/stage1.py --topology v5e:16x16 --price 1.2
      gamayun plan experiments/stage1.py --topology v5e:16x16 --search
      gamayun plan experiments/stage1.py --topology tpu7x:4x4x4 --spot 2 --queue 0.5
      gamayun plan experiments/stage1.py --table v5e:16x16 '2*v5e:16x16' v4:4x4x8

    Args:
      topology (CHIP:AxB): chips to plan for, e.g. v5e:16x16.
      table ([N*]CHIP:AxB): several topologies instead, N slices each; one row of a
        table for each.
      slices (N): slices of --topology, joined by the data center's network.
      search: rank meshes, microbatches and remat policies of the config's batch.
      price: price of a chip-hour (default: none, no costs are shown).
      currency (NAME): of the price, e.g. EUR (default: none).
      efficiency: share of the dense peak that the step reaches when compute binds.
      spot (PER_DAY): preemptions of the run a day: days, cost and the best interval
        between checkpoints, by simulation (default: none).
      restart (SECONDS): with --spot, from new VMs to the first step.
      save (SECONDS): with --spot, that steps wait for a checkpoint.
      queue (HOURS): with --spot, until there are new VMs, in the mean.
      measured (RUN): restart and save as this former run took them.
      json_ (FILE): write the plans as data too.
      cache: folder of compilations' results.
    """
    if bool(topology) == bool(table):
        raise UserError("give either --topology or --table")
    if table and (search or slices > 1):
        raise UserError("--search and --slices go with --topology (N*CHIP:AxB: slices)")
    # Only described devices are used: whatever is at hand stays free for others.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from gamayun_jax.api.plans import Plans
    from gamayun_jax.api.plans import plan as plan_for
    from gamayun_jax.plan.preemption import Preemptions, measured_times

    if measured:
        restart, save = measured_times(measured)
    plans = plan_for(
        load_config(config, set_),
        topology or table or (),
        slices=slices,
        search=search,
        price=price,
        currency=currency,
        efficiency=efficiency,
        spot=Preemptions(spot, restart, save, queue * 3600),
        cache=cache,
        log=note,
    )
    print(plans.table() if table or search else plans)
    if search:
        print(f"\n{Plans(plans[:1])}")
    if json_:
        write_text(json_, json.dumps(plans, indent=1) + "\n")


def forgetting(
    run: Path,
    *,
    examples: Count = 64,
    steps: list[int] | None = None,
    corpus: Path | None = None,
) -> None:
    """Measure what checkpoints still know of the examples that they were trained on.

    Scores a sample of each language's examples, even over the steps that served them,
    against the tokens since; and examples that were not served. Writes
    RUN/forgetting.json, of which `gamayun report` makes a figure.

    Example:
      gamayun forgetting runs/demo --examples 64

    Args:
      run: run folder with its checkpoints.
      examples (N): of each language.
      steps (STEP): of the checkpoints (default: those at the stages' ends).
      corpus: the corpus that it was trained on (default: where it was).
    """
    from gamayun_jax.evaluate import forgetting as measure
    from gamayun_jax.report import forgetting as page

    asked = measure.forgetting(run, examples, steps or (), corpus)["checkpoints"]
    languages = list(dict.fromkeys(k for told in asked for k in told["languages"]))
    print(page.forgetting_table(asked, languages).text())


def report(runs: list[Path], *, out: Folder | None = None) -> None:
    """Make the HTML report of one run, or of several overlaid.

    Also prints what each stage changed by language, and the ledger of what was served
    of each source and language, which exposure.json has beside the page. Folders that
    `gamayun quantize` wrote are compared with the run that they were made from. Of a
    study's folder, made or under way, the page is made from its records alone, in
    STUDY/report.

    Examples:
      gamayun report runs/demo
      gamayun report runs/demo runs/single --out runs/compared
      gamayun report experiments/order

    Args:
      runs (RUN): run folders, and quantised ones; or one study's folder.
      out: folder to write (default: RUN/report).
    """
    if any((folder / "registration.json").exists() for folder in runs):
        if len(runs) > 1 or out:
            raise UserError(
                "report: a study's folder goes alone, without --out: its page is "
                "written to report/ inside of it"
            )
        show_study(runs[0])
        return
    from gamayun_jax.report import changes, exposure, read_run, report

    page = report.write_report(runs, out or runs[0] / "report")
    for folder in runs:
        if read_run.read_quantised(folder) is not None:
            continue
        run = read_run.read_run(folder)
        if table := changes.stage_text(run):
            print(f"{run.name}\n{table}\n" if len(runs) > 1 else f"{table}\n")
        if table := exposure.exposure_text(run):
            print(f"{table}\n")
    print(page)
