"""Training: from a config and a run folder, through the stages, to the last step."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from clu.parameter_overview import get_parameter_overview
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from gamayun_jax import hosts, sharding
from gamayun_jax.checkpoint import Checkpoints, TrainState, barrier, kept_forever
from gamayun_jax.chips import chip_of
from gamayun_jax.config import Config, UserError, from_json, to_dict, to_json
from gamayun_jax.corpus import Corpus, open_corpus
from gamayun_jax.data import DataPlan, batches, make_plan, mixture_notes
from gamayun_jax.divergence import (
    Diverged,
    Watch,
    discard_abandoned,
    load_rollbacks,
    roll_back,
    rollbacks_of,
)
from gamayun_jax.evaluate import HeldoutEvaluator
from gamayun_jax.lineage import (
    check_checkpoints,
    check_contents,
    check_corpus,
    check_origin,
    check_past,
    check_same,
    check_schedules,
    load_origin,
    lost_checkpoints,
    new_lineage,
    note_corpus,
    note_versions,
)
from gamayun_jax.losses import TokenWeights, make_token_weights
from gamayun_jax.model import Transformer, flops_per_token
from gamayun_jax.profiling import Profile
from gamayun_jax.records import (
    OVERHEADS,
    Clock,
    Interval,
    RunFolder,
    SetAside,
    config_changes,
    differences,
    goodput_text,
)
from gamayun_jax.run_tasks import TrainingTasks, headline_scalars
from gamayun_jax.step import (
    abstract_state,
    compile_step,
    new_state,
    reset_moments,
)

STALL_SECONDS = 1e-3  # of waiting for data, which is not yet called a stall
PREEMPTED = 3  # exit status of a run that was told to stop, saved, and can go on


def stage_tables(
    cfg: Config, corpus: Corpus, plan: DataPlan, stage: int
) -> TokenWeights:
    size: dict[str, list[int]] = {name: [0, 0] for name in cfg.languages}
    for source in corpus.sources.values():
        size[source.language][0] += source.bytes
        # Without each document's BOS and EOS, which spell nothing.
        size[source.language][1] += source.tokens - 2 * source.documents
    byte_lengths = np.zeros(cfg.model.vocab_size, np.int32)
    known = corpus.tokenizer().byte_lengths()
    byte_lengths[: len(known)] = known
    try:
        return make_token_weights(
            cfg.stages[stage].token_weights,
            cfg.languages,
            cfg.model.vocab_size,
            plan.language_shares(cfg, stage),
            byte_lengths,
            {name: b / t for name, (b, t) in size.items() if t},
        )
    except UserError as e:
        raise UserError(f"stages.{cfg.stages[stage].name}.{e}") from e


def check_stages(cfg: Config, corpus: Corpus, plan: DataPlan, first: int = 0) -> None:
    """Raise UserError for whatever of a stage would be refused when it begins.

    Args:
      first: tokens before this run.
    """
    check_schedules(cfg, first)
    for k in range(len(cfg.stages)):
        stage_tables(cfg, corpus, plan, k)


def start_from(
    cfg: Config, abstract: TrainState, store: Checkpoints, step: int, meta
) -> TrainState:
    """First state of a run that begins from another's checkpoint.

    The optimiser's moments of an imported model begin anew, whatever the config says.
    """
    where = f"--init-from {store.folder}/{step}"
    former = from_json(meta["config"], where)
    other = differences(to_dict(former.model), to_dict(cfg.model), "model")
    if other:
        told = "; ".join(f"{k} is {a!r} there and {b!r}" for k, (a, b) in other.items())
        raise UserError(f"{where} is another model than the config's: {told} here")
    if meta["lineage"].get("imported"):  # parameters are all that there is
        params = store.restore_params(step, abstract.params)
        start = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
        return reset_moments(cfg, TrainState(start, params, None), abstract)
    state = store.restore(step, abstract)
    state = state.replace(step=jnp.zeros_like(state.step))
    if cfg.stages[0].transition.moments == "reset":
        state = reset_moments(cfg, state, abstract)
    return state


def train(
    cfg: Config,
    workdir: Path,
    init_from: Path | None = None,
    log: Callable[[str], None] = tqdm.write,
    profile: tuple[int, int] | None = None,
    fresh: bool = False,
) -> int:
    """Run all the stages of `cfg`, going on where the run folder stands.

    Args:
      profile: the first and last step to trace, on the first process.
      fresh: begin anew in a run folder whose checkpoints are lost; its records are
        moved aside.

    Returns:
      0 when the run is complete, PREEMPTED if a signal made it save and stop.

    Raises:
      UserError: config, corpus, devices or run folder do not fit.
    """
    check_same(cfg, init_from=init_from and str(init_from), fresh=fresh)
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_divisible(cfg, mesh)
    corpus = open_corpus(
        Path(cfg.data.corpus), cfg.data.faults == "set_aside", cfg.data.verify
    )
    check_corpus(cfg, corpus)
    first = jax.process_index() == 0
    report = log if first else lambda text: None
    forever = kept_forever(cfg)
    with (
        jax.set_mesh(mesh),
        nn.logical_axis_rules(sharding.RULES),
        contextlib.closing(opened(workdir, first, fresh, report)) as run,
        contextlib.closing(
            Checkpoints(run.path / "checkpoints", cfg.checkpoint, forever)
        ) as store,
        StopSignal(log) as stop,
        contextlib.closing(
            Profile(run.path / "profile", profile if first else None, log)
        ) as trace,
    ):
        trace.check(store.latest() or 0, cfg.total_steps)
        rollbacks = [] if fresh else load_rollbacks(run.path)
        while True:
            discard_abandoned(store, rollbacks)
            args = (cfg, mesh, corpus, run, store, stop, init_from, report)
            try:
                return _train(*args, trace, rollbacks)
            except Diverged as e:
                decision = roll_back(e, cfg, corpus, run, store)
                rollbacks = [*e.rollbacks, decision]
                report(f"{e.reason}: going back to step {decision['to']}")


def opened(
    workdir: Path, writer: bool, fresh: bool, log: Callable[[str], None]
) -> RunFolder:
    """The run folder, which has the checkpoints that it says it has."""
    run = RunFolder(workdir, writer)
    try:
        hosts.check_shared(run.path)
        if fresh:
            if place := run.begin_afresh():
                log(f"the records of the former start are in {place}")
            barrier("begin afresh")
        else:
            lost = lost_checkpoints(run.lineage(), load_rollbacks(run.path))
            check_checkpoints(run.path, lost)
    except BaseException:
        run.close()
        raise
    return run


def _train(
    cfg: Config,
    mesh: Mesh,
    corpus: Corpus,
    run: RunFolder,
    store: Checkpoints,
    stop: StopSignal,
    init_from: Path | None,
    log: Callable[[str], None],
    trace: Profile,
    rollbacks: list[dict[str, Any]],
) -> int:
    """To the end or a signal; raises Diverged to be called again."""
    begun, now = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    ends = [cfg.stage_start(k + 1) for k in range(len(cfg.stages))]
    abstract = abstract_state(cfg, mesh)
    changes: dict[str, tuple[Any, Any]] = {}

    def check(meta: dict[str, Any], where: str) -> None:
        config_changes(from_json(meta["config"], where), cfg)
        check_origin(init_from, meta["origin"], None, run.path)
        rest_of = meta.get("rest_of", "sources")  # a former release's has none
        plan = make_plan(cfg, corpus, meta["origin"], rest_of=rest_of)
        check_past(cfg, plan, corpus, meta, where)
        check_contents(meta, corpus, where)
        begins = meta["origin"]["tokens"] if meta["origin"] else 0
        check_stages(cfg, corpus, plan, begins)

    # Where the run stands: its own checkpoint, another run's, or nowhere.
    found = store.newest(abstract, check, run.path / "damaged", log)
    if found is not None:
        step, meta, state, damages = found
        changes = config_changes(from_json(meta["config"]), cfg)
        origin = meta["origin"]
        rollbacks = rollbacks_of(meta, rollbacks)
        rest_of = meta.get("rest_of", "sources")
        plan = make_plan(cfg, corpus, origin, rollbacks, rest_of)
        interval = Interval(len(cfg.languages), meta["interval"])
        watch = Watch(cfg.divergence, meta.get("watch"))
        clock = Clock(begun, meta.get("times"))
        # What is to come may have changed; what has happened stays.
        kept = ("started", "events", "checkpoints")
        lineage = new_lineage(cfg, corpus, plan, origin)
        lineage |= {k: meta["lineage"][k] for k in kept}
        moved = {d["step"] for d in damages}
        for lost in lost_checkpoints(run.lineage(), rollbacks, step):
            if lost not in moved:
                log(f"checkpoint {lost} is gone: what came after {step} is made again")
                damages.append({"event": "gone", "step": lost})
        resumed_at = {"event": "resumed", "step": step}
        lineage["events"] = [*lineage["events"], *damages, resumed_at]
        note_versions(lineage, meta["lineage"].get("versions", {}), step, log)
        note_corpus(lineage, meta, corpus, f"{store.folder}/{step}", log)
        log(f"going on from step {step} of {cfg.total_steps} in {run.path}")
    else:
        step, origin = 0, None
        recorded = run.lineage()
        if init_from is None:
            check_origin(None, None, recorded.get("init_from"), run.path)
            plan = make_plan(cfg, corpus, None, rollbacks)
            check_stages(cfg, corpus, plan)
            state = new_state(cfg, mesh)
        else:
            source, source_step, meta, origin = load_origin(init_from, cfg, corpus)
            for text in origin["corpus_changes"]:
                log(f"corpus: {text}")
            for name in origin["restarted"]:
                log(f"source {name} is not what it was: its data begin anew")
            plan = make_plan(cfg, corpus, origin, rollbacks)
            check_stages(cfg, corpus, plan, origin["tokens"])
            state = start_from(cfg, abstract, source, source_step, meta)
            source.close()
        lineage = new_lineage(cfg, corpus, plan, origin)
        interval = Interval(len(cfg.languages))
        watch = Watch(cfg.divergence)
        clock = Clock(begun)
        # Not of the last attempt, where those before it left no checkpoint.
        known = recorded.get("started")
        lineage["started"] = known or now.isoformat("T", "milliseconds")
    lineage["rollbacks"] = rollbacks
    for name, (old, new) in changes.items():
        log(f"config change since the checkpoint: {name}: {old!r} -> {new!r}")
        lineage["events"].append(
            {"event": "config", "step": step, "field": name, "old": old, "new": new}
        )
    for text in mixture_notes(cfg, corpus, plan):
        log(text)
    first_token = origin["tokens"] if origin else 0
    if step >= cfg.total_steps:
        # They tell what the steps were made with, and nothing of this start made any.
        past = meta["lineage"]
        run.write_lineage({**past, "events": [*past["events"], *damages]})
        run.write_config(from_json(meta["config"]))
        if changes:
            log("the run is complete: config.json and lineage.json stay as they were")
    else:
        run.write_lineage(lineage)
        run.write_config(cfg)
        run.write_tokenizer(corpus.tokenizer())
    overview = get_parameter_overview(abstract.params, include_stats=False)
    run.write_parameters(overview)
    step_tokens = first_token + step * cfg.tokens_per_step
    for number in run.start_metrics(step, step_tokens, cfg.log.tensorboard):
        log(f"{run.path}/metrics.jsonl: line {number} is damaged and stays as it is")
    flops = flops_per_token(cfg.model, cfg.data.seq_len) * cfg.tokens_per_step
    chip = chip_of(jax.devices()[0])
    evaluator = HeldoutEvaluator(cfg, corpus, mesh, Transformer(cfg.model, cfg.compute))
    tasks = TrainingTasks(cfg, corpus.tokenizer(), mesh)
    aside = SetAside(run.path, jax.process_index())
    contents = corpus.contents()
    stalls = 0  # steps since the last record before which the device ran dry
    in_flight: list[tuple[int, dict[str, Any]]] = []

    def tokens_at(step: int) -> int:
        return first_token + step * cfg.tokens_per_step

    def stage_name() -> str:
        return cfg.stages[cfg.stage_at(max(step - 1, 0))].name

    def is_there(step: int, label: str) -> bool:
        """The first host's word: others may see the shared folder with a delay."""
        there = run.has_evaluation(step, label)
        if jax.process_count() == 1:
            return there
        return bool(multihost_utils.broadcast_one_to_all(np.array(there)))

    def write_record(at: int) -> None:
        """Record the interval that ends with step `at`."""
        nonlocal stalls
        times = clock.lap()
        shared = {k: times.get(k, 0.0) for k in ("input_s", "wait_s")}
        busy = times["seconds"] - sum(
            times.get(f"{k}_s", 0.0) for k in OVERHEADS if k != "input"
        )
        steps = interval.sums["steps"]
        rate = steps * cfg.tokens_per_step / max(busy, 1e-9)
        peak = chip.flops * jax.device_count() if chip else None
        mfu = flops * steps / max(busy, 1e-9) / peak if peak else None
        stage = cfg.stages[cfg.stage_at(at - 1)]
        record = {
            "kind": "train",
            "step": at,
            "tokens": tokens_at(at),
            "stage": stage.name,
            **interval.record(cfg.languages),
            "sources": {
                k: {"tokens": n * cfg.data.seq_len} for k, n in plan.served(at).items()
            },
            "time": {
                **times,
                "tokens_per_s": rate,
                "mfu": mfu,
                "stalled_steps": stalls,
            },
            **({"hosts": hosts.compare(shared)} if jax.process_count() > 1 else {}),
        }
        stalls = 0
        run.add(record)
        run.write_goodput(clock.goodput(lineage["started"]))
        flat = {"loss": record["loss"], "nll": record["nll"], "lr": record["lr"]}
        flat |= {"grad_norm": record["grad_norm"], "tokens_per_s": rate, "mfu": mfu}
        flat |= {f"nll/{k}": v["nll"] for k, v in record["languages"].items()}
        run.scalars({f"train/{k}": v for k, v in flat.items()}, tokens_at(at))
        left = (cfg.total_steps - at) * cfg.tokens_per_step / rate
        log(
            f"{stage.name:>8} step {at}/{cfg.total_steps}  tokens "
            f"{tokens_at(at) / 1e6:.2f}M  loss {record['loss'] or math.nan:.4f}  "
            f"lr {record['lr']:.2e}  {rate:,.0f} tokens/s"
            + (f"  MFU {mfu:.1%}" if mfu is not None else "")
            + f"  left {datetime.timedelta(seconds=round(left))}"
        )

    def drain(keep: int) -> None:
        """Fetch metrics of all but the newest `keep` steps: the host reads one step
        late, so that the device always has the next one queued."""
        nonlocal interval
        while len(in_flight) > keep:
            at, metrics = in_flight.pop(0)
            with clock.measure("wait"):
                metrics = jax.device_get(metrics)
            if why := watch.observe(at, cfg.stage_at(at - 1), metrics):
                bar.close()
                jax.block_until_ready(in_flight)
                raise Diverged(*why, plan, rollbacks)
            if not np.isfinite(metrics["numerator"] + metrics["grad_norm"]):
                last = store.latest()
                raise UserError(
                    f"loss or gradient is not finite at step {at}: lower "
                    f"stages.{cfg.stages[cfg.stage_at(at - 1)].name}.schedule.peak or "
                    f"optimizer.clip_norm; the last checkpoint is "
                    f"{'none' if last is None else f'step {last}'}"
                )
            interval.add(metrics)
            store.check()
            if at % cfg.log.every_steps == 0 or at in ends:
                write_record(at)
                interval = Interval(len(cfg.languages))

    def save(reason: str) -> None:
        with clock.measure("checkpoint"):
            entry = {"step": step, "tokens": tokens_at(step), "reason": reason}
            entry["stage"] = stage_name()
            lineage["checkpoints"].append(entry)
            if aside.counts:
                event = {"event": "records set aside so far", "step": step}
                lineage["events"] = [
                    e for e in lineage["events"] if e["event"] != event["event"]
                ] + [{**event, **aside.counts}]
            run.sync()
            meta = dict(
                step=step,
                tokens=tokens_at(step),
                config=to_json(cfg),
                tokenizer=corpus.manifest["tokenizer"]["fingerprint"],
                contents=contents,
                rest_of=plan.rest_of,
                consumed=plan.consumed(step),
                curricula=plan.curricula(step),
                origin=origin,
                lineage=lineage,
                interval=interval.to_json(),
                watch=watch.to_json(),
                times=clock.to_json(),
                rollbacks=rollbacks,
                seed=plan.segments[plan.segment_before(step)].seed,
                shares=plan.shares[cfg.stage_at(max(step - 1, 0))],
            )
            store.save(state, step, meta)
            # The one before is whole by now; this one is not yet.
            run.write_lineage({**lineage, "checkpoints": lineage["checkpoints"][:-1]})

    def evaluate() -> None:
        label = "" if step else "start"
        if step in ends:
            label = f"end of {stage_name()}"

        def due(every: int) -> bool:
            return bool(label) or bool(every and step % every == 0)

        of_sets = evaluator.sets and due(cfg.evaluation.every_steps)
        of_tasks = tasks and due(cfg.evaluation.tasks_every_steps)
        if not (of_sets or of_tasks) or is_there(step, label):
            return
        drain(keep=0)
        head = {"step": step, "tokens": tokens_at(step), "stage": stage_name()}
        result: dict[str, Any] = {**head, "label": label, "sets": {}}
        items: dict[str, Any] = {}
        with clock.measure("evaluate"):
            if of_sets:
                sums = evaluator.unit_sums(state.params)
                result |= evaluator.results(sums)
                for name in evaluator.sets:
                    items[f"heldout-{name}"] = evaluator.items(name, sums)
            if of_tasks:
                result["tasks"], found = tasks.run(state.params)
                items |= found
        for name, rows in items.items() if label else ():
            run.write_items(step, name, rows)
        run.write_evaluation(step, result)
        for name, values in result["sets"].items():
            for language, row in values["languages"].items():
                bpb = {f"eval/{name}/bits_per_byte/{language}": row["bits_per_byte"]}
                run.scalars(bpb, tokens_at(step))
            macro = values["macro"]["bits_per_byte"]
            log(f"{'eval':>8} step {step}  {name}: {macro:.3f} bits per byte (macro)")
        run.scalars(headline_scalars(result.get("tasks", {})), tokens_at(step))
        for name, task in result.get("tasks", {}).items():
            macro = task["macro"].get(task["metric"], math.nan)
            log(
                f"{'eval':>8} step {step}  {name}: {task['metric']} {macro:.3f} (macro)"
            )

    compiled_stage, resumed = -1, step
    rows = sharding.batch_sharding(mesh)
    data = batches(cfg, corpus, plan, rows, step, aside)
    hidden = None if run.writer else True  # None: shown on a terminal
    bar = tqdm(total=cfg.total_steps, initial=step, unit="step", disable=hidden)
    clock.add("start", time.perf_counter() - begun)
    evaluate()
    while step < cfg.total_steps:
        stage = cfg.stage_at(step)
        if stage != compiled_stage:
            reset = cfg.stages[stage].transition.moments == "reset"
            if reset and step and step == cfg.stage_start(stage):
                state = reset_moments(cfg, state, abstract)
            with clock.measure("compile"):
                tables = stage_tables(cfg, corpus, plan, stage)
                step_fn = compile_step(cfg, mesh, abstract, stage, tables, first_token)
            compiled_stage = stage
        waiting = time.perf_counter()
        batch = next(data)
        waited = time.perf_counter() - waiting
        clock.add("input", waited)
        # The step before is done: the device waits too.
        idle = bool(in_flight) and in_flight[-1][1]["numerator"].is_ready()
        stalls += idle and waited > STALL_SECONDS
        trace.begin(step + 1)
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, metrics = step_fn(state, batch)
        step += 1
        trace.end(step, metrics)
        bar.update()
        in_flight.append((step, metrics))
        drain(keep=1)
        due = step in ends or step % cfg.checkpoint.every_steps == 0
        stopping = stop.agreed(step)
        if due or stopping:
            drain(keep=0)
            save("stage end" if step in ends else "regular" if due else "signal")
        if stopping and step < cfg.total_steps:
            break  # what is to be evaluated here is so when the run goes on
        evaluate()
    with clock.measure("checkpoint"):
        store.wait()
    bar.close()
    if step > resumed:
        run.write_lineage(lineage)
        seconds = clock.goodput(lineage["started"])
        run.write_goodput(seconds)
        log(goodput_text(seconds))
    if step < cfg.total_steps:
        log(f"stopped by a signal; saved at step {step}; the same command goes on")
        return PREEMPTED
    return 0


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after this step; a second one stops at once.

    A thread of its own says so: Python's handlers wait while the compiler runs. With
    several processes SIGTERM goes to JAX's preemption service, which lets all of them
    stop after the same step whichever got it; SIGINT is passed on as one. Outside of
    the main thread, where Python takes no handlers, signals are left alone.
    """

    PATIENCE = 2.0  # seconds that the main thread has to hear of a second signal

    def __init__(self, log: Callable[[str], None]):
        self._log = log
        self.requested = False
        self._alone = jax.process_count() == 1
        self._former: dict[int, Any] = {}
        self._handled = self._received = 0
        self._leaving = threading.Event()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._former_fd = signal.set_wakeup_fd(self._write.fileno())
        signals = [signal.SIGINT, *([signal.SIGTERM] if self._alone else [])]
        self._former = {s: signal.signal(s, self._handle) for s in signals}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def agreed(self, step: int) -> bool:
        """Whether all processes stop after step number `step`."""
        if self._alone:
            return self.requested
        return multihost_utils.reached_preemption_sync_point(step)

    def _listen(self) -> None:
        while numbers := self._read.recv(16):
            for _ in filter(self._former.__contains__, numbers):
                self._received += 1
                if self._received == 1:
                    self._log("stopping: saving after this step; again to quit now")
                    if not self._alone:
                        os.kill(os.getpid(), signal.SIGTERM)
                elif not self._leaving.wait(self.PATIENCE):
                    print("gamayun: interrupted", file=sys.stderr, flush=True)
                    os._exit(130)

    def _handle(self, number: int, frame: Any) -> None:
        self._handled += 1
        if self._leaving.is_set():  # once is enough: `__exit__` runs to its end
            return
        # Two of the same number are one to Python while the compiler runs.
        if max(self._handled, self._received) > 1:
            self._leaving.set()
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error: object) -> None:
        if not self._former:
            return
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        self._write.close()
        self._thread.join()
        self._read.close()
