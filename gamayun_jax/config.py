"""Configuration: frozen nested dataclasses, loaded from a Python experiment file.

An experiment file exports `get_config() -> Config`. It is code and is executed:
run only files you trust. Variants are `dataclasses.replace`; the command line
changes single fields with `--set a.b=value`, typed by the field it names. The
resolved configuration is plain JSON (`to_json`, `from_json`).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

DEMO_CORPUS = Path(__file__).parent / "demo_corpus"


class UserError(ValueError):
    """Bad input: one line saying what is wrong, where, and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str):
        # Parts of a message come from files and from other errors: keep it one line.
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA-3 frequency scaling of rotary embeddings (Llama 3.1 model card)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int

    def __post_init__(self):
        if not (
            self.factor > 0
            and self.original_max_len > 0
            and 0 < self.low_freq_factor < self.high_freq_factor
        ):
            raise UserError(
                f"model.rope_scaling: {self}: factor and original_max_len must be "
                "greater than 0, and low_freq_factor below high_freq_factor"
            )


MODEL_SIZES = (
    "vocab_size",
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_ff",
    "max_seq_len",
)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a pre-norm decoder; these fields span all the presets."""

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int = 4096
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qk_norm: bool = False
    qkv_bias: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02

    def __post_init__(self):
        for name in MODEL_SIZES:
            if getattr(self, name) < 1:
                raise UserError(
                    f"model.{name}={getattr(self, name)} must be greater than 0"
                )
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
    """How the model is executed. Nothing here changes what the model is."""

    # "auto": bfloat16 on TPU and GPU, float32 on CPU. Parameters stay float32.
    dtype: str = "auto"
    # What the backward pass makes again: none | minimal | attention | full, from
    # nothing to all of a layer; offload: as minimal, kept in the host's memory.
    remat: str = "none"
    # auto | xla | splash (TPU) | cudnn (GPU); auto takes the platform's kernel.
    attention: str = "auto"
    scan_layers: bool = True  # one compiled layer body instead of num_layers copies
    # Positions per chunk of the output head; 0 computes all logits at once.
    loss_chunk: int = 0
    microbatches: int = 1  # gradient accumulation


@dataclass(frozen=True)
class SourceConfig:
    """One named body of documents in one language and one domain.

    `name` is "<language>/<domain>". `files` are paths or globs of .jsonl, .txt
    (one document a line) or .parquet files, .gz and .zst included, or
    "tfds:<folder of a data set in array_record format>:<split>".
    """

    name: str
    files: tuple[str, ...]
    text_field: str = "text"

    @property
    def language(self) -> str:
        return self.name.split("/")[0]


@dataclass(frozen=True)
class HeldoutConfig:
    """A held-out set: language -> file. If `parallel`, line i means the same in all."""

    name: str
    files: Mapping[str, str]
    parallel: bool = True


@dataclass(frozen=True)
class TokenizerConfig:
    """SentencePiece training. `shares`: language -> share of the training bytes."""

    vocab_size: int
    shares: Mapping[str, float] = field(default_factory=dict)  # empty: equal shares
    sample_bytes: int = 200_000_000  # text given to the trainer, all languages
    model: str = ""  # path of a ready model: nothing is trained


@dataclass(frozen=True)
class CorpusConfig:
    """The recipe of a tokenised corpus: what `gamayun corpus build` makes."""

    sources: tuple[SourceConfig, ...] = ()
    heldout: tuple[HeldoutConfig, ...] = ()
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(4096))
    record_tokens: int = 4096  # tokens per record; a multiple of data.seq_len
    shard_bytes: int = 256_000_000  # text per input chunk, so per shard
    min_chars: int = 1
    max_bad_share: float = 0.01  # a larger share of unreadable documents is an error


@dataclass(frozen=True)
class DataConfig:
    """What training reads: a corpus folder, cut into examples of `seq_len` tokens."""

    corpus: str = ""
    seq_len: int = 4096
    batch_size: int = 512  # examples per step, over all devices and microbatches
    block_examples: int = 1024  # curriculum block: counts are exact at its ends
    max_epochs: float = 4.0  # cap per source over all stages (math.inf: none)
    max_epochs_of: Mapping[str, float] = field(default_factory=dict)
    # Records that cannot be read or are not what they should be: stop, or set_aside
    # (padding takes their place; they are listed in the run folder).
    faults: str = "stop"
    retry_seconds: float = 120.0  # before a file that cannot be read is a fault
    verify: bool = False  # read the whole corpus at the start, to compare its hashes
    prefetch: int = 8  # batches made ahead
    threads: int = 4


@dataclass(frozen=True)
class MixtureConfig:
    """Shares of tokens per source in a stage.

    `shares` maps a source name or a glob ("en/*") to its exact share; the rest is
    divided among the other languages by `scheme`: natural (by size), temperature
    (size ** alpha), unimax (uniform, at most `max_epochs` of a language,
    arXiv 2304.09151), or explicit (there is no rest).
    """

    scheme: str = "explicit"
    shares: Mapping[str, float] = field(default_factory=dict)
    alpha: float = 0.3
    max_epochs: float = 4.0
    ramp: str = "step"  # step | linear | cosine: how the former stage's shares leave
    ramp_tokens: int = 0


@dataclass(frozen=True)
class TokenWeightConfig:
    """Weights of target tokens in the loss.

    none; static (`weights`: language -> factor); bytes (a token weighs the bytes
    it spells); target_share (`weights`: language -> share of the objective, while
    sampling follows the mixture). Normalised to mean 1 under the mixture.
    """

    scheme: str = "none"
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of tokens.

    `position`: "global" counts tokens from the start of the first stage, "restart"
    from the start of this one. The decay ends where the stage ends.
    """

    kind: str = "wsd"  # wsd (warmup-stable-decay) | cosine
    peak: float = 3e-4
    warmup_tokens: int = 0
    decay_tokens: int = 0  # wsd only: length of the final decay
    decay_shape: str = "linear"  # wsd only: linear | 1-sqrt
    floor: float = 0.0  # final learning rate as a fraction of the peak
    position: str = "global"


@dataclass(frozen=True)
class TransitionConfig:
    """What happens to the former stage's state when a stage begins."""

    moments: str = "keep"  # keep | reset: Adam's running moments
    cursors: str = "continue"  # continue | restart: data position per source


@dataclass(frozen=True)
class StageConfig:
    """One segment of training: how long, on what, at which rate, with which weights."""

    name: str
    tokens: int
    mixture: MixtureConfig
    schedule: ScheduleConfig
    token_weights: TokenWeightConfig = TokenWeightConfig()
    transition: TransitionConfig = TransitionConfig()


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; weight decay on matrices, not on embeddings, norms and biases."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; one axis may be -1 (what is left)."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which of them stay."""

    every_steps: int = 1000
    keep: int = 3  # the newest; stage ends are kept forever
    keep_every_steps: int = 0  # besides, one every so many steps forever (0: none)
    keep_every_tokens: int = 0  # and the first after each so many tokens (0: none)


@dataclass(frozen=True)
class DivergenceConfig:
    """What is done when training diverges; skip=False stops at the first such step."""

    skip: bool = True  # no update where loss or gradient is not finite
    nonfinite: int = 3  # so many of those in a row: go back (0: never)
    # A loss so many robust standard deviations above the median of the last `window`
    # steps of the stage: go back (0: never).
    spike: float = 0.0
    window: int = 128
    rollbacks: int = 3  # at most, then the run stops


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, before the first step, at the stages' ends, and:"""

    every_steps: int = 0  # on the held-out sets, every so many steps (0: no more)
    batch_size: int = 32
    max_units: int = 0  # per language and set; 0: all
    tasks: tuple[str, ...] = ()  # embedded tasks by name, or YAML files (tasks.py)
    tasks_every_steps: int = 0  # on the tasks, every so many steps (0: no more)
    task_items: int = 0  # most items per language and task; 0: all


@dataclass(frozen=True)
class LogConfig:
    """The records of a run: metrics.jsonl, console, TensorBoard."""

    every_steps: int = 10
    tensorboard: bool = True


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; checked as a whole when it is made."""

    name: str
    languages: tuple[str, ...]
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    corpus: CorpusConfig = CorpusConfig()
    data: DataConfig = DataConfig()
    compute: ComputeConfig = ComputeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    evaluation: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    seed: int = 0

    def __post_init__(self):
        validate(self)

    @property
    def tokens_per_step(self) -> int:
        return self.data.batch_size * self.data.seq_len

    def stage_steps(self) -> list[int]:
        """Optimiser steps of each stage: its tokens, rounded up to whole steps."""
        return [math.ceil(s.tokens / self.tokens_per_step) for s in self.stages]

    @property
    def total_steps(self) -> int:
        return sum(self.stage_steps())

    def stage_at(self, step: int) -> int:
        """Index of the stage that step number `step` (from 0) belongs to."""
        end = 0
        for k, steps in enumerate(self.stage_steps()):
            end += steps
            if step < end:
                return k
        return len(self.stages) - 1

    def stage_start(self, stage: int) -> int:
        """First step of stage number `stage`."""
        return sum(self.stage_steps()[:stage])


CHOICES = {
    "compute.dtype": ("auto", "float32", "bfloat16"),
    "data.faults": ("stop", "set_aside"),
    "compute.remat": ("none", "minimal", "attention", "full", "offload"),
    "compute.attention": ("auto", "xla", "splash", "cudnn"),
    "mixture.scheme": ("natural", "temperature", "unimax", "explicit"),
    "mixture.ramp": ("step", "linear", "cosine"),
    "token_weights.scheme": ("none", "static", "bytes", "target_share"),
    "schedule.kind": ("wsd", "cosine"),
    "schedule.decay_shape": ("linear", "1-sqrt"),
    "schedule.position": ("global", "restart"),
    "transition.moments": ("keep", "reset"),
    "transition.cursors": ("continue", "restart"),
}

POSITIVE = (
    "data.batch_size",
    "data.seq_len",
    "data.block_examples",
    "data.prefetch",
    "data.threads",
    "data.max_epochs",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "divergence.window",
    "evaluation.batch_size",
    "log.every_steps",
    "compute.microbatches",
    "corpus.record_tokens",
    "corpus.shard_bytes",
    "optimizer.clip_norm",
    "optimizer.eps",
)
AT_LEAST_0 = (
    "compute.loss_chunk",
    "data.retry_seconds",
    "checkpoint.keep_every_steps",
    "checkpoint.keep_every_tokens",
    "divergence.nonfinite",
    "divergence.spike",
    "divergence.rollbacks",
    "evaluation.every_steps",
    "evaluation.max_units",
    "evaluation.tasks_every_steps",
    "evaluation.task_items",
    "optimizer.weight_decay",
    "optimizer.z_loss",
)


def language_domain(
    languages: Mapping[str, float], domains: Mapping[str, float]
) -> dict[str, float]:
    """Shares as a product: {"ru": .3} x {"web": .8} -> {"ru/web": .24}."""
    return {f"{a}/{b}": x * y for a, x in languages.items() for b, y in domains.items()}


def validate(cfg: Config) -> None:
    """Check what one field's type cannot say; raises UserError naming the field."""

    def choice(key: str, value: str, where: str) -> None:
        if value not in CHOICES[key]:
            raise UserError(
                f"{where}={value!r} is unknown: choose one of {', '.join(CHOICES[key])}"
            )

    def positive(where: str, value: float) -> None:
        if not value > 0:
            raise UserError(f"{where}={value} must be greater than 0")

    def share(where: str, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{where}={value} must be a finite number of at least 0")

    for name in ("dtype", "remat", "attention"):
        choice(f"compute.{name}", getattr(cfg.compute, name), f"compute.{name}")
    choice("data.faults", cfg.data.faults, "data.faults")
    if not cfg.stages:
        raise UserError("stages is empty: a config needs at least one stage")
    if len(set(cfg.languages)) < len(cfg.languages) or not cfg.languages:
        raise UserError(f"languages={cfg.languages}: list each language once")
    if len({s.name for s in cfg.stages}) < len(cfg.stages):
        raise UserError("stages: two stages have the same name; give each its own")
    for name in POSITIVE:
        positive(name, attrgetter(name)(cfg))
    for name in AT_LEAST_0:
        share(name, attrgetter(name)(cfg))
    for name in ("optimizer.b1", "optimizer.b2"):
        if not 0 <= attrgetter(name)(cfg) < 1:
            raise UserError(f"{name}={attrgetter(name)(cfg)} must be in [0, 1)")
    if not 0 <= cfg.seed < 2**31:
        raise UserError(f"seed={cfg.seed} must be in [0, 2**31)")
    for key, value in cfg.data.max_epochs_of.items():
        positive(f"data.max_epochs_of[{key!r}]", value)
    for stage in cfg.stages:
        at = f"stages.{stage.name}"
        positive(f"{at}.tokens", stage.tokens)
        positive(f"{at}.schedule.peak", stage.schedule.peak)
        for name in ("peak", "warmup_tokens", "decay_tokens", "floor"):
            share(f"{at}.schedule.{name}", getattr(stage.schedule, name))
        share(f"{at}.mixture.ramp_tokens", stage.mixture.ramp_tokens)
        for part in ("mixture", "token_weights", "schedule", "transition"):
            for key in CHOICES:
                if key.startswith(part + "."):
                    name = key.split(".")[1]
                    choice(key, getattr(getattr(stage, part), name), f"{at}.{key}")
        for key, value in stage.mixture.shares.items():
            share(f"{at}.mixture.shares[{key!r}]", value)
        weights = stage.token_weights
        for key, value in weights.weights.items():
            share(f"{at}.token_weights.weights[{key!r}]", value)
        unknown = sorted(set(weights.weights) - set(cfg.languages))
        if unknown:
            raise UserError(
                f"{at}.token_weights.weights names {unknown[0]!r}, which is not in "
                f"languages ({', '.join(cfg.languages)})"
            )
        missing = sorted(set(cfg.languages) - set(weights.weights))
        if weights.scheme in ("static", "target_share") and missing:
            raise UserError(
                f"{at}.token_weights.weights lacks {missing[0]!r}: scheme "
                f"{weights.scheme!r} needs a number for every language"
            )
    if cfg.checkpoint.keep_every_steps % cfg.checkpoint.every_steps:
        raise UserError(
            f"checkpoint.keep_every_steps={cfg.checkpoint.keep_every_steps} is not a "
            f"multiple of checkpoint.every_steps={cfg.checkpoint.every_steps}: there "
            "would be nothing to keep"
        )
    if cfg.data.batch_size % cfg.compute.microbatches:
        raise UserError(
            f"data.batch_size={cfg.data.batch_size} is not a multiple of "
            f"compute.microbatches={cfg.compute.microbatches}"
        )
    if cfg.data.seq_len > cfg.model.max_seq_len:
        raise UserError(
            f"data.seq_len={cfg.data.seq_len} exceeds model.max_seq_len="
            f"{cfg.model.max_seq_len}: raise the latter or shorten the examples"
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Run an experiment file's `get_config()` and apply `--set` overrides.

    Raises:
      UserError: no such file, no `get_config`, another return type, bad override.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path} does not exist: give a Python experiment file")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as e:
        raise UserError(f"config {path}, line {e.lineno}: {e.msg}") from e
    except UserError:
        raise
    except Exception as e:  # whatever the file does
        raise UserError(f"config {path} fails to load: {type(e).__name__}: {e}") from e
    if not hasattr(module, "get_config"):
        raise UserError(f"config {path} does not define get_config() -> Config")
    try:
        cfg = module.get_config()
    except UserError:
        raise
    except Exception as e:
        raise UserError(
            f"config {path}: get_config() fails: {type(e).__name__}: {e}"
        ) from e
    if not isinstance(cfg, Config):
        raise UserError(
            f"config {path}: get_config() returned {type(cfg).__name__}, not Config"
        )
    for override in overrides:
        cfg = set_field(cfg, override)
    return cfg


def set_field(cfg: Config, override: str) -> Config:
    """Apply one "a.b=value". Tuples are entered by index or by their items' name.

    Raises:
      UserError: unknown field (with its neighbours) or a value of another type.
    """
    key, eq, text = override.partition("=")
    if not eq or not key.strip():
        raise UserError(f"--set {override!r}: write field=value, e.g. seed=1")
    return _set(cfg, Config, key.strip().split("."), text, key)


def _set(obj: Any, hint: Any, keys: list[str], text: str, full: str) -> Any:
    if not keys:
        return _parse(text, hint, full)
    key, rest = keys[0], keys[1:]
    if dataclasses.is_dataclass(obj):
        hints = typing.get_type_hints(type(obj))
        if key not in {f.name for f in dataclasses.fields(obj)}:
            raise unknown_field(full, key, hints)
        new = _set(getattr(obj, key), hints[key], rest, text, full)
        return dataclasses.replace(obj, **{key: new})  # type: ignore[type-var]
    if isinstance(obj, tuple):
        names = [getattr(x, "name", str(i)) for i, x in enumerate(obj)]
        if key in names:
            i = names.index(key)
        elif key.isdecimal() and int(key) < len(obj):
            i = int(key)
        else:
            raise unknown_field(full, key, names)
        new = _set(obj[i], typing.get_args(hint)[0], rest, text, full)
        return (*obj[:i], new, *obj[i + 1 :])
    if isinstance(obj, Mapping):
        key = ".".join(keys)
        return {**obj, key: _parse(text, typing.get_args(hint)[1], full)}
    raise UserError(f"--set {full}: {key!r} is inside a plain value; drop it")


def unknown_field(full: str, key: str, known: Any) -> UserError:
    """The error for a name that does not exist, with the nearest that do."""
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(
        f"{full}: there is no field {key!r}.{hint} Known here: "
        f"{', '.join(map(str, known))}"
    )


def _parse(text: str, hint: Any, where: str) -> Any:
    if hint is str:
        return text
    literal: Any
    try:
        literal = json.loads(text.replace("_", "") if hint in (int, float) else text)
    except json.JSONDecodeError:
        lowered = text.lower()
        literal = {"true": True, "false": False, "none": None}.get(lowered, text)
        if hint is float and lowered in ("inf", "infinity"):
            literal = math.inf
    return decode(literal, hint, where)


def decode(value: Any, hint: Any, where: str) -> Any:
    """Turn plain JSON data into a value of type `hint`; UserError names `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return decode(value, next(a for a in args if a is not type(None)), where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected an object, got {value!r}")
        hints = typing.get_type_hints(hint)
        fields = {f.name: f for f in dataclasses.fields(hint)}
        for key in value:
            if key not in fields:
                raise unknown_field(f"{where}.{key}".lstrip("."), key, fields)
        for name, f in fields.items():
            no_default = (
                f.default is dataclasses.MISSING
                and f.default_factory is dataclasses.MISSING
            )
            if no_default and name not in value:
                raise UserError(f"{where}.{name} is missing".lstrip("."))
        parts = {
            k: decode(v, hints[k], f"{where}.{k}".lstrip(".")) for k, v in value.items()
        }
        return hint(**parts)  # type: ignore[operator]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, got {value!r}")
        return tuple(decode(v, args[0], f"{where}.{i}") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected an object, got {value!r}")
        return {str(k): decode(v, args[1], f"{where}[{k!r}]") for k, v in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isnan(value) or value == -math.inf:
            raise UserError(f"{where}: {value} is not a number to compute with")
        return float(value)
    if hint is float and value in ("inf", "Infinity"):
        return math.inf
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not hint:
        raise UserError(
            f"{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})"
        )
    return value


def to_dict(obj: Any) -> Any:
    """Dataclasses, tuples and mappings as plain JSON data (inf as a string)."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: to_dict(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {k: to_dict(v) for k, v in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_dict(v) for v in obj]
    if isinstance(obj, float) and math.isinf(obj):
        return "inf"
    return obj


def to_json(cfg: Config) -> str:
    """The resolved configuration as indented JSON; `from_json` reads it back."""
    return json.dumps(to_dict(cfg), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str, where: str = "config") -> Config:
    """Inverse of `to_json`; UserError names the field that does not fit."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:  # too deep, or a number too long
        raise UserError(f"{where} is not JSON: {e}") from e
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is not a JSON object")
    return decode(data, Config, "")
