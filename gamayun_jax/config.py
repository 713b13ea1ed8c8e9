"""Configuration: frozen nested dataclasses, loaded from a Python experiment file.

An experiment file exports `get_config() -> Config`. It is code and is executed:
run only files you trust. Variants are `dataclasses.replace`; the command line
changes single fields with `--set a.b=value`, typed by the field it names. The
resolved configuration is plain JSON (`to_json`, `from_json`).

A field's annotation is its check (fields.py), made when a Config is made. What several
fields must fulfil together, the dataclass that owns them checks in `__post_init__`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gamayun_jax.corpus_config import CorpusConfig as CorpusConfig
from gamayun_jax.corpus_config import HeldoutConfig as HeldoutConfig
from gamayun_jax.corpus_config import SourceConfig as SourceConfig
from gamayun_jax.corpus_config import TokenizerConfig as TokenizerConfig
from gamayun_jax.fields import (
    AnyPath,
    Axis,
    Count,
    Finite,
    LocalPath,
    Positive,
    Seed,
    Share,
    StoredPath,
    UserError,
    Whole,
    call_in_file,
    nearest,
    read_json,
    set_fields,
    settle,
)
from gamayun_jax.fields import check_local as check_local
from gamayun_jax.fields import to_dict as to_dict
from gamayun_jax.fields import to_json as to_json
from gamayun_jax.stage_config import MixtureConfig as MixtureConfig
from gamayun_jax.stage_config import OptimizerConfig as OptimizerConfig
from gamayun_jax.stage_config import ScheduleConfig as ScheduleConfig
from gamayun_jax.stage_config import StageConfig as StageConfig
from gamayun_jax.stage_config import TokenWeightConfig as TokenWeightConfig
from gamayun_jax.stage_config import TransitionConfig as TransitionConfig

DEMO_CORPUS = Path(__file__).parent / "demo_corpus"
EXPERIMENTS = Path(__file__).parents[1] / "experiments"  # of a clone


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA-3 frequency scaling of rotary embeddings (Llama 3.1 model card)."""

    factor: Finite  # by which long wavelengths are stretched
    low_freq_factor: Finite  # wavelengths above length / this: stretched
    high_freq_factor: Finite  # wavelengths below length / this: kept
    original_max_len: Count  # the length, in tokens

    def __post_init__(self):
        settle(self, "model.rope_scaling")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"model.rope_scaling.low_freq_factor={self.low_freq_factor} must be "
                f"below high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a pre-norm decoder; these fields span all the presets."""

    vocab_size: Count  # rows of the embedding; at least the tokenizer's
    num_layers: Count  # decoder blocks
    d_model: Count  # width of the residual stream
    num_heads: Count  # query heads
    num_kv_heads: Count  # key and value heads; divides num_heads
    head_dim: Count  # width of a head
    d_ff: Count  # width of SwiGLU's hidden layer
    max_seq_len: Count = 4096  # longest context, in tokens
    rope_theta: Finite = 500_000.0  # base of the rotary embeddings
    rope_scaling: RopeScaling | None = None  # none: as they are
    norm_eps: Share = 1e-6  # added to the mean square by RMSNorm
    qk_norm: bool = False  # RMSNorm of queries and keys
    qkv_bias: bool = False  # biases of q, k and v (Qwen2)
    tie_embeddings: bool = True  # the output head is the embedding
    init_std: Share = 0.02  # of the initial weights

    def __post_init__(self):
        settle(self, "model")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}: choose kv heads that divide "
                "the query heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.head_dim={self.head_dim} is odd: rotary embeddings rotate "
                "pairs, choose an even number"
            )


@dataclass(frozen=True)
class ComputeConfig:
    """How the model is executed. Nothing here changes the model itself."""

    # "auto": bfloat16 on TPU and GPU, float32 on CPU. Parameters stay float32.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Dtype in which gradients are summed over devices and over chunks of the loss. The
    # sum is float32 in either case.
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    # Rematerialisation: what the backward pass computes again, from nothing (none) to
    # all of a layer (full). offload: as minimal, the saved values in the host's memory.
    remat: Literal["none", "minimal", "attention", "full", "offload"] = "none"
    # auto | xla | splash (TPU) | cudnn (GPU); auto takes the platform's kernel.
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    scan_layers: bool = True  # one compiled layer body instead of num_layers copies
    # Positions per chunk of the output head; 0 computes all logits at once.
    loss_chunk: Whole = 0
    # Gradient accumulation: less memory, and on CPUs less time for some models, whose
    # arrays then stay in the caches (docs/speed.md).
    microbatches: Count = 1


@dataclass(frozen=True)
class DataConfig:
    """What training reads: a corpus folder, cut into examples of `seq_len` tokens."""

    corpus: StoredPath = ""  # folder of `gamayun corpus build`
    seq_len: Count = 4096  # tokens of an example
    batch_size: Count = 512  # examples per step, over all devices and microbatches
    block_examples: Count = 1024  # curriculum block: counts are exact at its ends
    max_epochs: Positive = 4.0  # cap per source over all stages (math.inf: none)
    # Source -> its own cap.
    max_epochs_of: Mapping[str, Positive] = field(default_factory=dict)
    # Records that cannot be read or fail their checks: stop, or set_aside (padding
    # takes their place; they are listed in the run folder).
    faults: Literal["stop", "set_aside"] = "stop"
    retry_seconds: Share = 120.0  # of trying to read a file before it is a fault
    verify: bool = False  # read the whole corpus at the start, to compare its hashes
    prefetch: Count = 8  # batches made ahead
    threads: Count = 4  # that read records


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; one axis may be -1 (all devices that are left)."""

    data: Axis = 1  # replicas
    fsdp: Axis = -1  # parameters and batches are divided
    tensor: Axis = 1  # heads and hidden layers are divided


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which of them stay."""

    every_steps: Count = 1000  # between regular checkpoints
    keep: Count = 3  # how many of the newest; stage ends are kept forever
    keep_every_steps: Whole = 0  # keep one forever every so many steps (0: none)
    keep_every_tokens: Whole = 0  # and the first one every so many tokens (0: none)

    def __post_init__(self):
        settle(self, "checkpoint")
        if self.keep_every_steps % self.every_steps:
            raise UserError(
                f"checkpoint.keep_every_steps={self.keep_every_steps} is not a "
                f"multiple of checkpoint.every_steps={self.every_steps}: there would "
                "be nothing to keep"
            )


@dataclass(frozen=True)
class DivergenceConfig:
    """When a step is skipped, and when the run goes back to a checkpoint."""

    skip: bool = True  # steps whose loss or gradient is not finite (False: stop there)
    nonfinite: Whole = 3  # go back after so many such steps in a row (0: never)
    # Go back at a loss so many robust standard deviations above the median of the last
    # `window` steps of the stage (0: never).
    spike: Share = 0.0
    window: Count = 128  # steps
    rollbacks: Whole = 3  # most times to go back; then the run stops


@dataclass(frozen=True)
class EvalConfig:
    """Evaluations: before the first step, at each stage's end, every so many steps."""

    every_steps: Whole = 0  # between evaluations on the held-out sets (0: no more)
    batch_size: Count = 32  # texts scored at once
    max_units: Whole = 0  # per language and set; 0: all
    # Embedded tasks by name, or YAML files (evaluate/tasks.py).
    tasks: tuple[LocalPath, ...] = ()
    tasks_every_steps: Whole = 0  # between evaluations on the tasks (0: no more)
    task_items: Whole = 0  # most items per language and task; 0: all


@dataclass(frozen=True)
class LogConfig:
    """The records of a run: metrics.jsonl, console, TensorBoard, a tracker."""

    every_steps: Count = 10  # of a record, from a stage's first step on
    tensorboard: bool = True  # event files in the run folder
    tracker: Literal["", "wandb", "trackio"] = ""  # sent what TensorBoard shows, too
    project: str = "gamayun"  # of the tracker


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; checked as a whole when it is made."""

    name: str  # of the run
    languages: tuple[str, ...]  # in the order of tables
    model: ModelConfig  # the architecture
    stages: tuple[StageConfig, ...]  # in order
    corpus: CorpusConfig = field(default_factory=CorpusConfig)  # how the corpus is made
    data: DataConfig = DataConfig()  # how it is read
    compute: ComputeConfig = ComputeConfig()  # how it is executed
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # of parameters
    mesh: MeshConfig = MeshConfig()  # devices
    # What is saved.
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    divergence: DivergenceConfig = DivergenceConfig()  # what is skipped or taken back
    evaluation: EvalConfig = EvalConfig()  # held-out sets and tasks
    log: LogConfig = LogConfig()  # records
    seed: Seed = 0  # of initial weights and the order of data

    def __post_init__(self):
        settle(self, "")
        if not self.stages:
            raise UserError("stages is empty: a config needs at least one stage")
        if len(set(self.languages)) < len(self.languages) or not self.languages:
            raise UserError(f"languages={self.languages}: list each language once")
        names = [s.name for s in self.stages]
        if twice := [n for n in names if names.count(n) > 1]:
            raise UserError(f"stages: two are called {twice[0]!r}: give each its own")
        for stage in self.stages:
            where = f"stages.{stage.name}.token_weights"
            stage.token_weights.check_languages(self.languages, where)
        if self.data.batch_size % self.compute.microbatches:
            raise UserError(
                f"data.batch_size={self.data.batch_size} is not a multiple of "
                f"compute.microbatches={self.compute.microbatches}: choose a number "
                "that divides the batch"
            )
        self._check_batch_warmup()
        chunk, length = self.compute.loss_chunk, self.data.seq_len
        if 0 < chunk < length and length % chunk:
            raise UserError(
                f"compute.loss_chunk={chunk} does not divide data.seq_len={length}: "
                "choose one that does"
            )
        if 0 < self.optimizer.ema_tokens < self.tokens_per_step:
            raise UserError(
                f"optimizer.ema_tokens={self.optimizer.ema_tokens} is less than the "
                f"{self.tokens_per_step} tokens of one step: it counts tokens, not "
                "steps; raise it, or set it to 0 for no average"
            )
        if self.data.seq_len > self.model.max_seq_len:
            raise UserError(
                f"data.seq_len={self.data.seq_len} exceeds model.max_seq_len="
                f"{self.model.max_seq_len}: raise the latter or shorten the examples"
            )

    def _check_batch_warmup(self) -> None:
        whole, first = self.data.batch_size, self.optimizer.first_batch_size
        if (first > 0) != (self.optimizer.batch_warmup_tokens > 0):
            raise UserError(
                f"optimizer.first_batch_size={first} and optimizer.batch_warmup_tokens="
                f"{self.optimizer.batch_warmup_tokens}: give both, or neither"
            )
        if first and (whole % first or (whole // first).bit_count() != 1):
            raise UserError(
                f"optimizer.first_batch_size={first} is not data.batch_size={whole} "
                "over a power of two: choose one that is"
            )

    def __repr__(self) -> str:
        m, steps = self.model, self.stage_steps()
        stages = " + ".join(
            f"{s.name} {n:,}" for s, n in zip(self.stages, steps, strict=True)
        )
        return (
            f"<Config {self.name!r}: {len(self.languages)} languages, {m.num_layers} "
            f"layers of {m.d_model}, {stages} steps of {self.tokens_per_step:,} tokens>"
        )

    @property
    def tokens_per_step(self) -> int:
        return self.data.batch_size * self.data.seq_len

    def updates_at(self, tokens: int) -> int:
        """Optimiser updates of a step that begins when so many tokens of the whole
        history are trained on: a power of two, 1 once the batch is warm."""
        whole, first = self.data.batch_size, self.optimizer.first_batch_size
        if not first:
            return 1
        done = min(1.0, tokens / self.optimizer.batch_warmup_tokens)
        updates, reached = whole // first, first + done * (whole - first)
        while updates > 1 and 2 * whole // updates <= reached:
            updates //= 2
        return updates

    def microbatches_of(self, updates: int) -> int:
        """Microbatches of each of so many updates: no more rows at once than with 1."""
        return math.ceil(self.compute.microbatches / updates)

    def stage_steps(self) -> list[int]:
        """Optimiser steps of each stage: its tokens, rounded up to whole steps."""
        return [math.ceil(s.tokens / self.tokens_per_step) for s in self.stages]

    @property
    def total_steps(self) -> int:
        return sum(self.stage_steps())

    def stage_at(self, step: int) -> int:
        """Index of the stage that step number `step` (from 0) belongs to."""
        ends = itertools.accumulate(self.stage_steps()[:-1])
        return sum(step >= end for end in ends)

    def stage_start(self, stage: int) -> int:
        """First step of stage number `stage`."""
        return sum(self.stage_steps()[:stage])

    def ends_record(self, step: int) -> bool:
        """Whether a record of training ends with step number `step` (from 1).

        One does every log.every_steps from a stage's first step on, and with the
        stage's last; a remainder of less than half of that joins the record before it,
        since the mean of a few steps would look like a spike.
        """
        stage, every = self.stage_at(step - 1), self.log.every_steps
        left = self.stage_start(stage + 1) - step
        done = step - self.stage_start(stage)
        return not left or (done % every == 0 and 2 * left >= every)


def load_config(
    path: AnyPath, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """Run an experiment file's `get_config()`, and change fields of what it returns.

    Example:
      >>> cfg = gx.load_config("tiny", {"seed": 1, "stages.align.schedule.peak": 1e-3})
      >>> cfg.stages[0].schedule.peak
      0.001

    Args:
      path: the file (executed); in a clone also the name of one in experiments/.
      overrides: field -> value, or texts "a.b=value" as `--set` has them; items of
        tuples are named by number or by their name.

    Raises:
      UserError: no such file, no `get_config`, another return type, bad override, and
        whatever the file raises, with the last of its lines that was run.
    """
    path = Path(path)
    if path.name == str(path) and not path.suffix and not path.exists():
        shipped = sorted(p.stem for p in EXPERIMENTS.glob("*.py"))
        if shipped and path.name not in shipped:
            near = nearest(path.name, shipped)
            hint = f" Did you mean {near!r}?" if near else ""
            raise UserError(
                f"there is no config {path.name!r}.{hint} Give an experiment file, or "
                f"the name of one in experiments/: {', '.join(shipped)}"
            )
        path = EXPERIMENTS / f"{path}.py"
    defined, cfg = call_in_file(path, "get_config")
    if not defined:
        raise UserError(f"config {path} does not define get_config() -> Config")
    if not isinstance(cfg, Config):
        raise UserError(
            f"config {path}: get_config() returned {type(cfg).__name__}, not Config"
        )
    return set_fields(cfg, overrides) if overrides else cfg


def from_json(text: str, where: str = "config") -> Config:
    """Inverse of `to_json`; UserError names the field that does not fit."""
    return read_json(text, Config, where)
