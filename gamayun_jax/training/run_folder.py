"""The run folder's records: config, lineage, metrics, and the lock on the folder.

config.json     the resolved config of the last start
lineage.json    where the run comes from and what happened to it
parameters.txt  names, shapes and sizes of the parameters
tokenizer.model the corpus's tokenizer; an imported one: tokenizer.json, its settings
metrics.jsonl   one JSON object a line: no gap and no duplicate after any crash; in a
                bucket metrics/<number>.jsonl (records.py)
goodput.json    where the run's time went
events.*        the same for TensorBoard, and samples of what the model writes
tracker.*.json  what the run is called by Weights & Biases or trackio; wandb/ is its own
eval/<step>.json
eval/<step>.items/*.jsonl  units and items, at the start and at stage ends; in ema/
                those of the average of the parameters
former/<n>/     the records of a start that --fresh moved aside
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gamayun_jax.config import (
    AnyPath,
    Config,
    UserError,
    to_dict,
)
from gamayun_jax.data.files import (
    lock,
    read_json,
    write_json,
    write_json_lines,
    write_text,
)
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.fields import check_there
from gamayun_jax.storage import (
    InUseError,
    as_path,
    is_bucket,
    lexists,
    listed_once,
    move,
    remove_tree,
    with_checkpoints,
)
from gamayun_jax.training.spool import RecordLog, Spool

# What a start writes, besides the checkpoints themselves.
RECORDS = (
    *("config.json", "lineage.json", "parameters.txt", "eval"),
    *("tokenizer*", "generation_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
    *("metrics.jsonl", "metrics", "goodput.json", "events.*", "set_aside.*"),
    *("rollbacks.json", "tracker.*", "wandb"),
    *("divergence", "damaged", "profile", "report"),
)
# What may lie in a folder where no run has begun: logs, scripts, notes; and folders.
BESIDE = (".err", ".log", ".md", ".out", ".py", ".sh", ".txt")
NO_RUN = ("compiled", "former", "lost+found")
COMMITTED = "commit_success.txt"  # in a checkpoint of a bucket, by Orbax
SAMPLES = 2  # items of a generation task that are shown, of each language
# What a run cannot change on its way: its state or its past would not fit any more.
FIXED = (
    "model", "languages", "data.seq_len", "data.batch_size", "optimizer.kind", "seed",
)  # fmt: skip


def differences(old: Any, new: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old, new) of every plain value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in {**old, **new}:
            path = f"{where}.{key}".lstrip(".")
            found |= differences(old.get(key), new.get(key), path)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = {}
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            found |= differences(a, b, f"{where}.{i}")
        return found
    return {} if old == new else {where: (old, new)}


def config_changes(former: Config, cfg: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old, new) of what changed since the checkpoint was written.

    Raises:
      UserError: a change that a run cannot go on with.
    """
    changes = differences(to_dict(former), to_dict(cfg))
    for name, (old, new) in changes.items():
        if any(name == f or name.startswith(f + ".") for f in FIXED):
            raise UserError(
                f"{name} was {old!r} in the run's checkpoint and is {new!r} now: a run "
                "cannot change it; set it back, or use another --workdir"
            )
    return changes


class RunFolder:
    """A run folder that this process (the first host's) writes, locked while open.

    Attributes:
      spool: where files that grow are written.
    """

    def __init__(
        self,
        path: AnyPath,
        writer: bool = True,
        log: Callable[[str], None] = lambda text: None,
        own_process: bool = False,
    ):
        """Args:
          writer: False on all hosts but the first, which then write nothing.
          log: told once that the lease of a former owner is waited for.
          own_process: end the process at once if the folder of a bucket is lost to
            another one; otherwise the next `write` or `check` raises.

        Raises:
          UserError: the folder cannot be made, holds other files but no run, or
            another run is using it.
        """
        self.path = with_checkpoints(as_path(path, "run folder "))
        self.writer = writer
        self._lease: Any = None
        self._stack = contextlib.ExitStack()
        with self._stack:
            if writer:
                self._open(log, own_process)
            self.spool = Spool(self.path, self.check)
            self._stack.callback(self.spool.close)
            self._records = RecordLog(self.spool)
            self._stack.callback(self._records.close)
            self._stack = self._stack.pop_all()

    def _open(self, log: Callable[[str], None], own_process: bool) -> None:
        folder = f"run folder {self.path}"
        if is_bucket(self.path):
            from gamayun_jax.lease import take

            self._lease = take(self.path / ".lock", folder, log, own_process)
            self._stack.callback(self._lease.close)
            check_folder(self.path)
            return
        check_folder(self.path)
        try:
            (self.path / "eval").mkdir(parents=True, exist_ok=True)
            (self.path / ".lock").touch()
        except OSError as e:
            raise UserError(
                f"{folder} cannot be written ({e.strerror}): give --workdir a folder "
                "that can"
            ) from e
        busy = InUseError(
            f"{folder} is in use by another process: wait for it, or give another "
            "--workdir"
        )
        self._stack.enter_context(lock(self.path / ".lock", busy))

    def check(self) -> None:
        """Raise UserError if another process may have the folder by now."""
        if self._lease:
            self._lease.check()

    def close(self) -> None:
        self._stack.close()

    def begin_afresh(self) -> Path | None:
        """Move the former start's records to former/<n>, which is returned.

        Raises:
          UserError: there are checkpoints, which a run can go on from; or none can be
            written there.
        """
        folder = self.path / "checkpoints"
        if lexists(folder) and not folder.is_dir():
            raise UserError(
                f"{folder} is a link to what is not there, or a file: mount or restore "
                "it, or take it away to begin anew"
            )
        if steps := checkpoint_steps(self.path):
            raise UserError(
                f"run folder {self.path} has a checkpoint of step {max(steps)}: leave "
                "--fresh out to go on from it, or give another --workdir"
            )
        found = [
            p
            for p in sorted(self.path.iterdir() if self.path.is_dir() else ())
            if any(fnmatch.fnmatch(p.name, pattern) for pattern in RECORDS)
            and (not p.is_dir() or any(p.iterdir()))
        ]
        if not (self.writer and found):
            return None
        number = 1
        while (place := self.path / "former" / str(number)).exists():
            number += 1
        place.mkdir(parents=True)
        # The lineage last: until then the next start is told the same as this one.
        for path in sorted(found, key=lambda p: p.name == "lineage.json"):
            move(path, place / path.name)
        (self.path / "eval").mkdir(exist_ok=True)
        return place

    def write(self, name: str, data: Any, often: bool = False) -> None:
        """Write a file of the folder whole: a text as it is, else as JSON.

        Args:
          often: at every record, so that a bucket gets it with those.
        """
        if self.writer:
            self.check()
            whole = write_text if isinstance(data, str) else write_json
            whole((self.spool.folder if often else self.path) / name, data)

    def write_tokenizer(self, tokenizer: TextCoder) -> None:
        """Beside the checkpoints, so that the run can be used without its corpus."""
        if self.writer:
            tokenizer.write(self.path)

    def lineage(self) -> dict[str, Any]:
        """What the last start wrote, {} if none did.

        Raises:
          UserError: it is damaged, or not what a start writes.
        """
        path = self.path / "lineage.json"
        advice = "restore it from a copy, or give another --workdir"
        found = read_json(path, advice, missing={})
        try:
            _ = len(found.get("rollbacks", ())), (found.get("init_from") or {}).keys()
            if all(type(c["step"]) is int for c in found.get("checkpoints", ())):
                return found
        except (AttributeError, KeyError, TypeError):
            pass
        raise UserError(f"{path} is not what `gamayun train` writes: {advice}")

    def wall_seconds(self) -> float:
        """The run's wall time when it was last recorded; infinite if that is lost."""
        try:
            return float(read_json(self.path / "goodput.json")["wall"])
        except (UserError, KeyError, TypeError, ValueError):
            return math.inf

    def has_evaluation(self, step: int, label: str) -> bool:
        """Whether the evaluation at `step` is there, under that label."""
        try:
            found = read_json(self.path / "eval" / f"{step}.json")
        except UserError:
            return False  # it is made again
        return found.get("label") == label

    def write_items(self, step: int, name: str, rows: Iterable[Any]) -> None:
        """One JSON object a line; before the evaluation itself, which completes it."""
        if self.writer:
            folder = self.path / "eval" / f"{step}.items"
            write_json_lines(folder / f"{name}.jsonl", rows)

    def start_metrics(self, step: int) -> list[int]:
        """Drop what was recorded after `step`, which will be made again; open for more.

        At step 0 everything goes: it is of another start.

        Returns:
          numbers of lines of metrics.jsonl that are damaged, and stay as they are.
        """
        if not self.writer:
            return []
        for made, evaluation in evaluations(self.path).items():
            if not step or made > step:
                evaluation.unlink()
                remove_tree(evaluation.with_suffix(".items"))
        return self._records.start(step)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one record; it is durable once `sync` returns."""
        if self.writer:
            self._records.add(record)

    def sync(self) -> None:
        """Force the records to disk; before a checkpoint that counts on them."""
        if self.writer:
            self.check()
            self._records.sync()


def check_folder(path: Path) -> None:
    """Raise UserError for a folder that holds other files, and no run."""
    if (path / "lineage.json").exists() or checkpoint_steps(path):
        return
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        note = entry.suffix in BESIDE and entry.name != "parameters.txt"
        if note or entry.name in NO_RUN or entry.name.startswith("."):
            continue
        if not entry.is_dir() or any(entry.iterdir()):
            raise UserError(
                f"{path} has {entry.name!r} in it, but no run: give another --workdir"
            )


def evaluations(run: Path) -> dict[int, Path]:
    """Step -> file of the evaluations of a run folder, by step."""
    paths = {p.stem: p for p in (run / "eval").glob("*.json")}
    return {int(k): paths[k] for k in sorted(filter(is_step, paths), key=int)}


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that are in a run folder."""
    return steps_in(run / "checkpoints")


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder of them; none where there is no folder."""
    with listed_once(folder):
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(int(p.name) for p in found if is_step(p.name) and is_whole(p))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, or copied from where it was. In a
    bucket, which has no rename, a mark comes last."""
    if not is_bucket(checkpoint):
        return checkpoint.is_dir()
    if (checkpoint / COMMITTED).exists():
        return True
    try:
        data = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_bytes())
        return bool(data["commit_timestamp_nsecs"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def mark_copied(folder: Path) -> None:
    """Put Orbax's mark into the checkpoints of a folder in a bucket that were copied
    from a file system, where there are no marks."""
    for step in steps_in(folder):
        mark = folder / str(step) / COMMITTED
        if not mark.exists():
            mark.write_text("copied")


def is_step(name: str) -> bool:
    """Whether a file or folder is named as a step's is."""
    return name.isdecimal() and name == str(int(name))


def is_hf_folder(folder: AnyPath) -> bool:
    """Whether a folder holds a model in Hugging Face's format, not a run."""
    folder = as_path(folder)
    path = folder / "config.json"
    return path.is_file() and "model_type" in read_json(path)


def has_chat_template(folder: AnyPath) -> bool:
    """Whether a folder in Hugging Face's format can write chats: Instruct models, and
    some base models."""
    folder = as_path(folder)
    if not is_hf_folder(folder):
        return False
    own = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or bool(
        read_json(own, missing={}).get("chat_template")
    )


def model_name(path: Path) -> str:
    """How a lineage names a model: RUN/checkpoints/STEP, or a folder of others.

    Raises:
      UserError: neither a run folder, nor a checkpoint, nor a model.
    """
    if is_hf_folder(path):
        return path.resolve().name
    folder, step = find_checkpoint(path)
    return f"{folder.parent.name}/{folder.name}/{step}"


def find_checkpoint(path: AnyPath) -> tuple[Path, int]:
    """(checkpoints folder, step) of a run folder (its newest) or of one checkpoint.

    Raises:
      UserError: neither a run folder nor a checkpoint.
    """
    path = as_path(path, "model ")
    advice = (
        "give a run folder, one of its checkpoints/<step>, or a folder in Hugging "
        "Face's format, with its config.json"
    )
    check_there(path, "model ", advice)
    with_checkpoints(path)
    if is_step(path.name) and (path / "meta").is_dir():
        return path.parent, int(path.name)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [k for k in steps_in(folder) if (folder / str(k) / "meta").is_dir()]
    if not steps:
        raise UserError(f"{path} has no checkpoint: {advice}")
    return folder, max(steps)
