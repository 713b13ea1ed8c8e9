"""Reading the records of runs, whole or damaged."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gamayun_jax.config import AnyPath, UserError
from gamayun_jax.data.files import json_lines
from gamayun_jax.fields import check_there
from gamayun_jax.report.formats import plain
from gamayun_jax.storage import as_path
from gamayun_jax.training.run_folder import evaluations
from gamayun_jax.training.spool import metric_lines

BASELINES = {"uniform": "uniform", "unigram": "unigram", "xz": "xz -9e"}
Span = tuple[str, float, float]  # name, first and last token of a stage


def get(data: Any, *keys: str) -> Any:
    """data[key][key]..., or None where any of it is missing."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def num(data: Any, *keys: str) -> float | None:
    """The finite number there, or None."""
    value = get(data, *keys)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e18 else None


def entries(data: Any, *keys: str) -> dict[str, Any]:
    """The mapping there, or an empty one."""
    value = get(data, *keys)
    return dict(value) if isinstance(value, Mapping) else {}


def rows(data: Any, *keys: str) -> list[Mapping[str, Any]]:
    """The mappings in the list there."""
    value = get(data, *keys)
    return [r for r in value if isinstance(r, Mapping)] if type(value) is list else []


Items = dict[str, dict[str, dict[str, Any]]]  # language -> id -> item


class Evaluation(dict[str, Any]):
    """The record of an evaluation, and the items of its tests; equal to itself alone.

    Args:
      folder: where the items are, as <test>.jsonl; the folder may be missing.
      items: test -> its items, where they are in memory already.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__  # type: ignore[assignment]

    def __init__(
        self,
        record: Mapping[str, Any],
        folder: Path | None = None,
        items: Mapping[str, Iterable[dict[str, Any]]] | None = None,
    ):
        super().__init__(record)
        self.folder = folder
        self._read: dict[str, tuple[Items, list[int]]] = {
            test: (keyed(of_test), []) for test, of_test in (items or {}).items()
        }

    def items_of(self, test: str) -> tuple[Items, list[int]]:
        """The items of a test, and the numbers of the lines that hold none."""
        if test not in self._read:
            path = self.folder / f"{test}.jsonl" if self.folder else None
            data = path.read_bytes() if path and path.is_file() else b""
            whole, damaged = [], []
            for number, (_, item) in enumerate(json_lines(data), 1):
                if item is not None and "language" in item and "id" in item:
                    whole.append(item)
                else:
                    damaged.append(number)
            self._read[test] = keyed(whole), damaged
        return self._read[test]


def averaged(record: Mapping[str, Any]) -> Evaluation:
    """An evaluation's results of the average of the parameters that its run kept; none
    at all where it kept none."""
    folder = record.folder if isinstance(record, Evaluation) else None
    results = {kind: entries(record, "ema", kind) for kind in ("sets", "tasks")}
    return Evaluation({**record, **results}, folder and folder / "ema")


def keyed(items: Iterable[dict[str, Any]]) -> Items:
    """Items by language and id."""
    by_language: Items = {}
    for item in items:
        by_language.setdefault(str(item["language"]), {})[str(item["id"])] = item
    return by_language


@dataclass(frozen=True)
class Run:
    """The records of one run folder."""

    folder: Path
    name: str
    config: dict[str, Any]
    lineage: dict[str, Any]
    metrics: list[dict[str, Any]]  # of kind "train"
    evals: list[Evaluation]  # by step
    unread: list[int]  # numbers of the lines of metrics.jsonl that are no JSON objects
    goodput: dict[str, Any]  # seconds of wall time by what they went to

    @property
    def stages(self) -> list[Span]:
        return spans(rows(self.lineage, "stages"))

    @property
    def languages(self) -> list[str]:
        known = get(self.config, "languages")
        found = [k for k in known if isinstance(k, str)] if type(known) is list else []
        found += [k for m in self.metrics[-1:] for k in entries(m, "languages")]
        found += [k for s in sets_of(self.evals) for k in languages_of(self.evals, s)]
        return list(dict.fromkeys(found))

    @property
    def stage_evals(self) -> list[Evaluation]:
        """The evaluations before training and at the stages' ends; else all."""
        return self.labelled or self.evals

    @property
    def labelled(self) -> list[Evaluation]:
        """The evaluations before training and at the stages' ends."""
        return [e for e in self.evals if get(e, "label")]

    def tests(self, name: str) -> list[Evaluation]:
        """The same for one held-out set."""
        found = [e for e in self.evals if languages_of([e], name)]
        return [e for e in found if e in self.stage_evals] or found


def seconds_of(run: Run) -> float:
    """Seconds that the run's steps took."""
    return sum(num(m, "time", "seconds") or 0.0 for m in run.metrics)


def spans(stages: Iterable[Any]) -> list[Span]:
    """The stages of a lineage whose tokens are known."""
    found = [(s, num(s, "start_tokens"), num(s, "end_tokens")) for s in stages]
    return [
        (plain(get(s, "name"), 16), begin, end)
        for s, begin, end in found
        if begin is not None and end is not None
    ]


def read_run(folder: AnyPath) -> Run:
    """Read a run folder.

    Raises:
      UserError: no run folder, or a record that is not JSON.
    """
    folder, advice = as_path(folder), "give the folder of a run"
    check_there(folder, "run folder ", advice)
    config, lineage = folder / "config.json", folder / "lineage.json"
    lines = metric_lines(folder)
    if not (config.is_file() or lineage.is_file() or lines):
        raise UserError(
            f"{folder} is no run folder (it has no config.json, lineage.json or "
            f"metrics.jsonl): {advice}"
        )

    def load(path: Path) -> dict[str, Any]:
        try:
            return entries(json.loads(path.read_text("utf-8"))) if path.exists() else {}
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is damaged ({e}): restore or delete it") from e

    known = load(config), load(lineage)
    if "model_type" in known[0]:
        raise UserError(
            f"{folder} is a model in Hugging Face's format, which has no records: "
            "`gamayun eval` scores it"
        )
    metrics = [r for _, r in lines if r is not None and r.get("kind") == "train"]
    unread = [n for n, (line, r) in enumerate(lines, 1) if r is None and line.strip()]
    evals = [
        Evaluation(load(p), p.with_suffix(".items"))
        for p in evaluations(folder).values()
    ]
    evals.sort(key=lambda e: num(e, "step") or 0.0)
    name = plain(folder.resolve().name)
    goodput = load(folder / "goodput.json")
    return Run(folder, name, *known, metrics, evals, unread, goodput)


def read_quantised(folder: AnyPath) -> dict[str, Any] | None:
    """What `gamayun quantize` recorded in a folder; None if it is no such folder.

    Raises:
      UserError: the record is not JSON.
    """
    path = Path(folder) / "quantised.json"
    try:
        return entries(json.loads(path.read_text("utf-8"))) if path.is_file() else None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}): quantise again") from e


def sets_of(evals: Iterable[Any]) -> list[str]:
    """Names of the held-out sets of evaluations."""
    return list(dict.fromkeys(s for e in evals for s in entries(e, "sets")))


def languages_of(evals: Iterable[Any], name: str) -> list[str]:
    """Languages of a held-out set in any of the evaluations."""
    found = (entries(e, "sets", name, "languages") for e in evals)
    return list(dict.fromkeys(itertools.chain(*found)))


def score(record: Any, name: str, language: str) -> dict[str, Any]:
    """The results of a language, or of "macro" or "micro", on a held-out set."""
    part = get(record, "sets", name)
    mean = entries(part, language) if language in ("macro", "micro") else {}
    return entries(part, "languages", language) or mean


def beaten(record: Any, name: str, key: str) -> str:
    """ "below xz -9e: 3 of 12 languages"."""
    found = [score(record, name, k) for k in languages_of([record], name)]
    pairs = [(num(r, "bits_per_byte"), num(r, "baselines", key)) for r in found]
    known = [a < b for a, b in pairs if a is not None and b is not None]
    return f"below {BASELINES[key]}: {sum(known)} of {len(known)} languages"


def label_of(record: Any, limit: int = 24) -> str:
    """What an evaluation is called: its label, or its step."""
    return plain(get(record, "label") or f"step {get(record, 'step')}", limit)
