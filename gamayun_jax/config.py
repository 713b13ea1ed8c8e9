"""Configuration: frozen nested dataclasses, loaded from a Python experiment file.

An experiment file exports `get_config() -> Config`. It is code and is executed:
run only files you trust. Variants are `dataclasses.replace`; the command line
changes single fields with `--set a.b=value`, typed by the field it names. The
resolved configuration is plain JSON (`to_json`, `from_json`).

A field's annotation is its check: one walk (`decode`) holds the values of every source
against type, choices and bound. What several fields must fulfil together, the dataclass
that owns them checks in its `__post_init__`. Parts are checked when a Config is made.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import json
import math
import numbers
import re
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

DEMO_CORPUS = Path(__file__).parent / "demo_corpus"


class UserError(ValueError):
    """Bad input: one line saying what is wrong, where, and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str):
        # Parts of a message come from files and from other errors: keep it one line.
        super().__init__(" ".join(message.splitlines()))


LOCAL = (
    "a path on this machine: addresses such as gs:// and s3:// are not read, mount the "
    "bucket"
)


def is_local(path: str | Path) -> bool:
    """Whether a path is none of the kind scheme://host, which pathlib would take for
    a folder named "scheme:"."""
    if isinstance(path, Path):  # has lost one of the slashes
        return not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path))
    return "://" not in path


def check_local(path: str | Path, where: str) -> None:
    """Raise UserError, which begins with `where`, for a path that is not local."""
    if not is_local(path):
        raise UserError(f"{where}{path} must be {LOCAL}")


# Types of fields: what a value must be, as an error says it, and the test of it.
Count = Annotated[int, ("greater than 0", lambda x: x > 0)]
Whole = Annotated[int, ("at least 0", lambda x: x >= 0)]
Seed = Annotated[int, ("in [0, 2**31)", lambda x: 0 <= x < 2**31)]
Axis = Annotated[
    int, ("at least 1, or -1 for what is left", lambda x: x > 0 or x == -1)
]
Positive = Annotated[float, ("greater than 0", lambda x: x > 0)]  # math.inf too
Finite = Annotated[float, ("a finite number above 0", lambda x: 0 < x < math.inf)]
Share = Annotated[float, ("a finite number of at least 0", lambda x: 0 <= x < math.inf)]
Part = Annotated[float, ("in [0, 1]", lambda x: 0 <= x <= 1)]
LocalPath = Annotated[str, (LOCAL, is_local)]
Decay = Annotated[float, ("in [0, 1)", lambda x: 0 <= x < 1)]


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA-3 frequency scaling of rotary embeddings (Llama 3.1 model card)."""

    factor: Finite
    low_freq_factor: Finite
    high_freq_factor: Finite
    original_max_len: Count

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

    vocab_size: Count
    num_layers: Count
    d_model: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    d_ff: Count
    max_seq_len: Count = 4096
    rope_theta: Finite = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: Share = 1e-6
    qk_norm: bool = False
    qkv_bias: bool = False
    tie_embeddings: bool = True
    init_std: Share = 0.02

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
    """How the model is executed. Nothing here changes what the model is."""

    # "auto": bfloat16 on TPU and GPU, float32 on CPU. Parameters stay float32.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # In which gradients of parameters are summed over devices and over the chunks of
    # the loss. They leave the sum in float32 in either case.
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    # What the backward pass makes again: none | minimal | attention | full, from
    # nothing to all of a layer; offload: as minimal, kept in the host's memory.
    remat: Literal["none", "minimal", "attention", "full", "offload"] = "none"
    # auto | xla | splash (TPU) | cudnn (GPU); auto takes the platform's kernel.
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    scan_layers: bool = True  # one compiled layer body instead of num_layers copies
    # Positions per chunk of the output head; 0 computes all logits at once.
    loss_chunk: Whole = 0
    microbatches: Count = 1  # gradient accumulation


@dataclass(frozen=True)
class SourceConfig:
    """One named body of documents in one language and one domain.

    `name` is "<language>/<domain>". `files` are paths or globs of .jsonl, .txt
    (one document a line) or .parquet files, .gz and .zst included, or
    "tfds:<folder of a data set in array_record format>:<split>". .json and .ndjson
    are read as .jsonl is. `text_field` may be inside another: "translation.ru".
    """

    name: str
    files: tuple[LocalPath, ...]
    text_field: str = "text"
    tokens: Whole = 0  # about; `gamayun curriculum` plans with it before a corpus is

    @property
    def language(self) -> str:
        return self.name.split("/")[0]


@dataclass(frozen=True)
class HeldoutConfig:
    """A held-out set: language -> file. If `parallel`, line i means the same in all.

    None: it is, if the units of all files have ids, the same in the same order. True
    also where they have none.
    """

    name: str
    files: Mapping[str, LocalPath]
    parallel: bool | None = None


@dataclass(frozen=True)
class TokenizerConfig:
    """SentencePiece training. `shares`: language -> share of the training bytes."""

    vocab_size: Count
    shares: Mapping[str, Share] = field(default_factory=dict)  # empty: equal shares
    sample_bytes: Count = 200_000_000  # text given to the trainer, all languages
    model: LocalPath = ""  # path of a ready model: nothing is trained


@dataclass(frozen=True)
class CorpusConfig:
    """The recipe of a tokenised corpus: what `gamayun corpus build` makes."""

    sources: tuple[SourceConfig, ...] = ()
    heldout: tuple[HeldoutConfig, ...] = ()
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(4096))
    record_tokens: Count = 4096  # tokens per record; a multiple of data.seq_len
    shard_bytes: Count = 256_000_000  # text per input chunk, so per shard
    min_chars: Whole = 1
    max_bad_share: Part = 0.01  # a larger share of unreadable documents is an error
    # Documents that hold a held-out text (heldout.Contamination): remove, or report.
    # A document that equals one is always removed.
    held_out_copies: Literal["remove", "report"] = "remove"
    # Files that end early or are damaged within: stop, or keep_readable (what was not
    # read is told by the build, `corpus inspect` and the manifest).
    on_damaged_file: Literal["stop", "keep_readable"] = "stop"


@dataclass(frozen=True)
class DataConfig:
    """What training reads: a corpus folder, cut into examples of `seq_len` tokens."""

    corpus: LocalPath = ""
    seq_len: Count = 4096
    batch_size: Count = 512  # examples per step, over all devices and microbatches
    block_examples: Count = 1024  # curriculum block: counts are exact at its ends
    max_epochs: Positive = 4.0  # cap per source over all stages (math.inf: none)
    max_epochs_of: Mapping[str, Positive] = field(default_factory=dict)
    # Records that cannot be read or are not what they should be: stop, or set_aside
    # (padding takes their place; they are listed in the run folder).
    faults: Literal["stop", "set_aside"] = "stop"
    retry_seconds: Share = 120.0  # before a file that cannot be read is a fault
    verify: bool = False  # read the whole corpus at the start, to compare its hashes
    prefetch: Count = 8  # batches made ahead
    threads: Count = 4


@dataclass(frozen=True)
class MixtureConfig:
    """Shares of tokens per source in a stage.

    `shares` maps a source name or a glob ("en/*") to its exact share. A language that
    is named there has exactly what is named: its other sources get nothing. The rest
    is divided among the other languages by `scheme`: natural (by size), temperature
    (size ** alpha), unimax (uniform, at most `max_epochs` of a language,
    arXiv 2304.09151), or explicit (there is no rest).
    """

    scheme: Literal["natural", "temperature", "unimax", "explicit"] = "explicit"
    shares: Mapping[str, Share] = field(default_factory=dict)
    alpha: Share = 0.3
    max_epochs: Positive = 4.0
    # How the former stage's shares leave.
    ramp: Literal["step", "linear", "cosine"] = "step"
    ramp_tokens: Whole = 0


@dataclass(frozen=True)
class TokenWeightConfig:
    """Weights of target tokens in the loss.

    none; static (`weights`: language -> factor); bytes (a token weighs the bytes
    it spells); target_share (`weights`: language -> share of the objective, while
    sampling follows the mixture; they are made to sum to 1, and it is said where they
    do not). Normalised to mean 1 under the mixture.
    """

    scheme: Literal["none", "static", "bytes", "target_share"] = "none"
    weights: Mapping[str, Share] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of tokens.

    `position`: "global" counts tokens from the start of the first stage, "restart"
    from the start of this one. The decay ends where the stage ends.
    """

    kind: Literal["wsd", "cosine"] = "wsd"  # warmup-stable-decay
    peak: Finite = 3e-4
    warmup_tokens: Whole = 0
    decay_tokens: Whole = 0  # wsd only: length of the final decay
    decay_shape: Literal["linear", "1-sqrt"] = "linear"  # wsd only
    floor: Part = 0.0  # final learning rate as a fraction of the peak
    position: Literal["global", "restart"] = "global"


@dataclass(frozen=True)
class TransitionConfig:
    """What happens to the former stage's state when a stage begins."""

    moments: Literal["keep", "reset"] = "keep"  # Adam's running moments
    # Data position per source.
    cursors: Literal["continue", "restart"] = "continue"


@dataclass(frozen=True)
class StageConfig:
    """One segment of training: how long, on what, at which rate, with which weights."""

    name: str
    tokens: Count
    mixture: MixtureConfig
    schedule: ScheduleConfig
    token_weights: TokenWeightConfig = TokenWeightConfig()
    transition: TransitionConfig = TransitionConfig()


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; weight decay on matrices, not on embeddings, norms and biases."""

    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Finite = 1e-8
    weight_decay: Share = 0.1
    clip_norm: Positive = 1.0
    z_loss: Share = 0.0


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; one axis may be -1 (what is left)."""

    data: Axis = 1
    fsdp: Axis = -1
    tensor: Axis = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which of them stay."""

    every_steps: Count = 1000
    keep: Count = 3  # the newest; stage ends are kept forever
    keep_every_steps: Whole = 0  # besides, one every so many steps forever (0: none)
    keep_every_tokens: Whole = 0  # and the first after each so many tokens (0: none)

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
    """What is done when training diverges; skip=False stops at the first such step."""

    skip: bool = True  # no update where loss or gradient is not finite
    nonfinite: Whole = 3  # so many of those in a row: go back (0: never)
    # A loss so many robust standard deviations above the median of the last `window`
    # steps of the stage: go back (0: never).
    spike: Share = 0.0
    window: Count = 128
    rollbacks: Whole = 3  # at most, then the run stops


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, before the first step, at the stages' ends, and:"""

    every_steps: Whole = 0  # on the held-out sets, every so many steps (0: no more)
    batch_size: Count = 32
    max_units: Whole = 0  # per language and set; 0: all
    tasks: tuple[
        LocalPath, ...
    ] = ()  # embedded tasks by name, or YAML files (tasks.py)
    tasks_every_steps: Whole = 0  # on the tasks, every so many steps (0: no more)
    task_items: Whole = 0  # most items per language and task; 0: all


@dataclass(frozen=True)
class LogConfig:
    """The records of a run: metrics.jsonl, console, TensorBoard."""

    every_steps: Count = 10
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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    divergence: DivergenceConfig = DivergenceConfig()
    evaluation: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    seed: Seed = 0

    def __post_init__(self):
        settle(self, "")
        if not self.stages:
            raise UserError("stages is empty: a config needs at least one stage")
        if len(set(self.languages)) < len(self.languages) or not self.languages:
            raise UserError(f"languages={self.languages}: list each language once")
        names = [s.name for s in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"stages: two are called {name!r}: give each its own")
        for stage in self.stages:
            at = f"stages.{stage.name}.token_weights"
            scheme, weights = stage.token_weights.scheme, stage.token_weights.weights
            unknown = sorted(set(weights) - set(self.languages))
            if unknown:
                raise UserError(
                    f"{at}.weights names {unknown[0]!r}, which is not in languages "
                    f"({', '.join(self.languages)})"
                )
            missing = sorted(set(self.languages) - set(weights))
            if scheme in ("static", "target_share") and missing:
                raise UserError(
                    f"{at}.weights lacks {missing[0]!r}: scheme {scheme!r} needs a "
                    "number for every language"
                )
        if self.data.batch_size % self.compute.microbatches:
            raise UserError(
                f"data.batch_size={self.data.batch_size} is not a multiple of "
                f"compute.microbatches={self.compute.microbatches}"
            )
        if self.data.seq_len > self.model.max_seq_len:
            raise UserError(
                f"data.seq_len={self.data.seq_len} exceeds model.max_seq_len="
                f"{self.model.max_seq_len}: raise the latter or shorten the examples"
            )

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


def language_domain(
    languages: Mapping[str, float], domains: Mapping[str, float]
) -> dict[str, float]:
    """Shares as a product: {"ru": .3} x {"web": .8} -> {"ru/web": .24}."""
    return {f"{a}/{b}": x * y for a, x in languages.items() for b, y in domains.items()}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Run an experiment file's `get_config()` and apply `--set` overrides.

    Raises:
      UserError: no such file, no `get_config`, another return type, bad override, and
        whatever the file raises, with the last of its lines that was run.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"config {path} {what}: give a Python experiment file")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class up there
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "get_config", None)
        cfg = make() if make is not None else None
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # whatever the file does, sys.exit() included
        ran = [(f.filename, f.lineno) for f in traceback.extract_tb(e.__traceback__)]
        reason = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        if isinstance(e, SyntaxError):
            ran, reason = [*ran, (e.filename or "", e.lineno)], e.msg
        lines = [n for file, n in ran if file == spec.origin and n]
        at = f", line {lines[-1]}" if lines else ""
        raise UserError(f"config {path}{at}: {reason}") from e
    if make is None:
        raise UserError(f"config {path} does not define get_config() -> Config")
    if not isinstance(cfg, Config):
        raise UserError(
            f"config {path}: get_config() returned {type(cfg).__name__}, not Config"
        )
    return set_fields(cfg, overrides) if overrides else cfg


def set_fields(cfg: Config, overrides: Sequence[str]) -> Config:
    """Apply all "a.b=value", then check. Items are named by number or by their name.

    Raises:
      UserError: unknown field (with its neighbours), a value of another type or out of
        bounds, values that do not fit together.
    """
    data, places = to_dict(cfg), {}
    for override in overrides:
        key, eq, text = override.partition("=")
        if not eq or not key.strip():
            raise UserError(f"--set {override!r}: write field=value, e.g. seed=1")
        places[override] = _put(data, key.strip(), text)
    try:
        return decode(data, Config, "")
    except UserError as e:
        at_fault = {
            o: re.search(rf"(?<![\w.]){re.escape(place)}(?=[=:.\[])", str(e))
            for o, place in places.items()
        }
        named = [o for o, found in at_fault.items() if found] or overrides
        raise UserError(f"{' '.join(f'--set {o}' for o in named)}: {e}") from e


def _put(at: Any, path: str, text: str) -> str:
    """Put what --set gives into plain data; returns the full path of the field."""
    keys: list[Any] = path.split(".")
    hint: Any = Config
    where = ""
    while keys:
        inside, key = at, keys.pop(0)
        hint = _bare(hint)
        if (hints := hints_of(hint)) and isinstance(at, dict):
            if key not in hints:
                raise unknown_field(f"--set {path}", key, hints)
            hint, where, at = hints[key], f"{where}.{key}", at.get(key, {})
            if at is None and keys:  # a part that is not there yet, to be filled
                at = {}
        elif typing.get_origin(hint) is tuple and isinstance(at, list):
            names = [_name(x, i) for i, x in enumerate(at)]
            number = int(key) if key.isdecimal() else len(at)
            number = names.index(key) if key in names else number
            if number >= len(at):
                raise unknown_field(f"--set {path}", key, names)
            hint, where = typing.get_args(hint)[0], f"{where}.{names[number]}"
            key, at = number, at[number]
        elif typing.get_origin(hint) is Mapping and isinstance(at, dict):
            key, keys = ".".join([key, *keys]), []
            hint, where = typing.get_args(hint)[1], f"{where}[{key!r}]"
        else:
            raise UserError(f"--set {path}: {key!r} is inside a plain value; drop it")
        inside[key] = at
    inside[key] = _parse(text, _bare(hint))
    return where.lstrip(".")


def unknown_field(full: str, key: str, known: Any) -> UserError:
    """The error for a name that does not exist, with the nearest that do."""
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(
        f"{full}: there is no field {key!r}.{hint} Known here: {', '.join(known)}"
    )


def _parse(text: str, hint: Any) -> Any:
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    try:
        if hint is float:
            return float(text)
        plain = text.replace("_", "") if hint is int else text
        return json.loads(plain, parse_float=JSONFloat)
    except (ValueError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


class JSONFloat(float):
    """A number of JSON text, which has one kind: 1e6 may be given for an int there."""


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Field -> its type, bounds included; empty if it is no part of a config."""
    is_part = dataclasses.is_dataclass(kind)
    return typing.get_type_hints(kind, include_extras=True) if is_part else {}


def _bare(hint: Any) -> Any:
    """A type without its bound, and without None."""
    if typing.get_origin(hint) in (Annotated, types.UnionType, typing.Union):
        return _bare(typing.get_args(hint)[0])
    return hint


def _name(item: Any, number: int) -> str:
    """How paths name an item of a tuple: by its name, or by its number."""
    name = item.get("name") if isinstance(item, dict) else getattr(item, "name", None)
    return name if isinstance(name, str) and name else str(number)


def settle(part: Any, where: str) -> None:
    """Hold every field of a part of a config that is being made against its type.

    Lists become tuples, and numbers of other kinds (NumPy's) plain ones.

    Raises:
      UserError: the first field that does not fit, named by its path from `where`.
    """
    kind: Any = type(part)
    for name, hint in hints_of(kind).items():
        value = decode(getattr(part, name), hint, f"{where}.{name}".lstrip("."))
        object.__setattr__(part, name, value)


def decode(value: Any, hint: Any, where: str) -> Any:
    """`value`, object or plain JSON data, as type `hint`; UserError names `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)

    def expected(what: str, tip: str = "") -> UserError:
        given = repr(value)
        given = given if len(given) <= 80 else f"{given[:77]}..."
        return UserError(f"{where}: expected {what}, got {given}{tip}")

    if origin is Annotated:
        value = decode(value, args[0], where)
        bound, holds = args[1]
        if not holds(value):
            raise UserError(f"{where}={value} must be {bound}")
        return value
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise UserError(
                f"{where}={value!r} is unknown: choose one of {', '.join(args)}"
            )
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else decode(value, args[0], where)
    if hints := hints_of(hint):
        if isinstance(value, hint):
            value = {k: getattr(value, k) for k in hints}
        if not isinstance(value, Mapping):
            raise expected(hint.__name__)
        at = f"{where}." if where else ""
        for key in value:
            if decode(key, str, where) not in hints:
                raise unknown_field(at + key, key, hints)
        for f in dataclasses.fields(hint):
            if f.name not in value and f.default is f.default_factory:
                raise UserError(f"{at}{f.name} is missing")
        return hint(**{k: decode(v, hints[k], at + k) for k, v in value.items()})
    if origin is tuple:
        if not isinstance(value, list | tuple):
            tip = ': did you forget a comma? Write ["..."] or ("...",)'
            item = _bare(args[0])
            forgot = item is str and isinstance(value, str)
            raise expected(f"a list of {item.__name__}", tip if forgot else "")
        return tuple(
            decode(x, args[0], f"{where}.{_name(x, i)}") for i, x in enumerate(value)
        )
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise expected(f"a dict of str to {_bare(args[1]).__name__}")
        return {
            decode(k, str, f"{where}: key"): decode(v, args[1], f"{where}[{k!r}]")
            for k, v in value.items()
        }
    if hint is int and isinstance(value, JSONFloat) and value.is_integer():
        value = int(value)
    if hint is float and isinstance(value, str) and value in ("inf", "Infinity"):
        return math.inf
    kind: Any = {int: numbers.Integral, float: numbers.Real}.get(hint, hint)
    if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
        whole = hint is int and isinstance(value, float) and value.is_integer()
        raise expected(hint.__name__, f": write {int(value)}" if whole else "")
    if hint is str and value != value.encode(errors="replace").decode():
        raise expected("text that UTF-8 can write")  # a lone surrogate
    if hint not in (int, float):
        return value
    # An int stays one in a float's field: recipes of corpora are hashed as written.
    value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise expected(f"{hint.__name__} of at most 64 bits")
    if not value > -math.inf:  # nor NaN
        raise UserError(f"{where}: {value} is not a number to compute with")
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
        data = json.loads(text, parse_float=JSONFloat)
    except (ValueError, RecursionError) as e:  # too deep, or a number too long
        raise UserError(f"{where} is not JSON: {e}") from e
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is not a JSON object")
    try:
        return decode(data, Config, "")
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
