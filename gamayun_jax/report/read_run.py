"""Reading the records of runs for people: whole or damaged, as text and tables."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gamayun_jax.config import UserError
from gamayun_jax.data.files import json_lines
from gamayun_jax.training.run_folder import evaluations

INK, PAPER = "#12345a", "#fefdfc"  # become the page's own colours
DASHES, SVG_DASHES = ("-", "--", ":", "-."), ("", "7 3", "2 3", "7 3 2 3")  # of runs
BASELINES = {"uniform": "uniform", "unigram": "unigram", "xz": "xz -9e"}
Span = tuple[str, float, float]  # name, first and last token of a stage
Points = list[tuple[float, float]]


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


@dataclass(frozen=True)
class Run:
    """The records of one run folder."""

    folder: Path
    name: str
    config: dict[str, Any]
    lineage: dict[str, Any]
    metrics: list[dict[str, Any]]  # of kind "train"
    evals: list[dict[str, Any]]  # by step
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
    def stage_evals(self) -> list[dict[str, Any]]:
        """The evaluations before training and at the stages' ends; else all."""
        return [e for e in self.evals if get(e, "label")] or self.evals

    def tests(self, name: str) -> list[dict[str, Any]]:
        """The same for one held-out set."""
        found = [e for e in self.evals if languages_of([e], name)]
        return [e for e in found if e in self.stage_evals] or found


def seconds_of(run: Run) -> float:
    return sum(num(m, "time", "seconds") or 0.0 for m in run.metrics)


def spans(stages: Iterable[Any]) -> list[Span]:
    found = [(s, num(s, "start_tokens"), num(s, "end_tokens")) for s in stages]
    return [
        (plain(get(s, "name"), 16), begin, end)
        for s, begin, end in found
        if begin is not None and end is not None
    ]


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
      UserError: no run folder, or a record that is not JSON.
    """
    config, lineage, path = (
        folder / n for n in ("config.json", "lineage.json", "metrics.jsonl")
    )
    if not (config.is_file() or lineage.is_file() or path.is_file()):
        raise UserError(
            f"{folder} is no run folder (it has no config.json, lineage.json or "
            "metrics.jsonl): give the --workdir of `gamayun train`"
        )

    def load(path: Path) -> dict[str, Any]:
        try:
            return entries(json.loads(path.read_text("utf-8"))) if path.exists() else {}
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is damaged ({e}): restore or delete it") from e

    lines = list(json_lines(path.read_bytes() if path.is_file() else b""))
    metrics = [r for _, r in lines if r is not None and r.get("kind") == "train"]
    unread = [n for n, (line, r) in enumerate(lines, 1) if r is None and line.strip()]
    evals = [load(p) for p in evaluations(folder).values()]
    evals.sort(key=lambda e: num(e, "step") or 0.0)
    name = plain(folder.resolve().name)
    goodput = load(folder / "goodput.json")
    known = load(config), load(lineage)
    return Run(folder, name, *known, metrics, evals, unread, goodput)


def read_quantised(folder: Path) -> dict[str, Any] | None:
    """What `gamayun quantize` recorded in a folder; None if it is no such folder.

    Raises:
      UserError: the record is not JSON.
    """
    path = folder / "quantised.json"
    try:
        return entries(json.loads(path.read_text("utf-8"))) if path.is_file() else None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}): quantise again") from e


def sets_of(evals: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(s for e in evals for s in entries(e, "sets")))


def languages_of(evals: Iterable[Any], name: str) -> list[str]:
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


def plain(value: Any, limit: int = 60) -> str:
    """Any value as one printable line of at most `limit` characters."""
    text = "".join(c if c.isprintable() else " " for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def esc(value: Any, limit: int = 60) -> str:
    return html.escape(plain(value, limit), quote=True)


def short(value: float | None) -> str:
    """1234567 -> "1.23M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value is not None and abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return "–" if value is None else f"{value:.3g}"


def fixed(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def label_of(record: Any, limit: int = 24) -> str:
    return plain(get(record, "label") or f"step {get(record, 'step')}", limit)


def language_table(
    evals: Sequence[Mapping[str, Any]], languages: Sequence[str] = ()
) -> str:
    """Plain-text bits per byte by language: a column per evaluation, and baselines.

    Of more than four evaluations, the first and the last three are shown.
    """
    shown = list(evals) if len(evals) <= 4 else [evals[0], *evals[-3:]]
    lines: list[str] = []
    for name in sets_of(shown):
        heads = "".join(f"{label_of(e, 14):>16}" for e in shown)
        lines += [
            f"bits per byte on held-out set {plain(name)!r} (± standard error)",
            f"{'':<7}{heads}{'unigram':>9}{'xz -9e':>8}{'acc.':>7}{'parity':>8}",
        ]
        found = languages_of(shown, name)
        order = [k for k in languages if k in found]
        for language in dict.fromkeys([*order, *found, "macro", "micro"]):
            results = [score(e, name, language) for e in shown]
            line = f"{plain(language, 6):<7}"
            for r in results:
                error = num(r, "bits_per_byte_se")
                cell = fixed(num(r, "bits_per_byte"))
                line += f"{cell + (f' ±{error:.3f}' if error is not None else ''):>16}"
            base = [num(results[-1], "baselines", k) for k in ("unigram", "xz")]
            line += "".join(
                f"{'' if b is None else fixed(b):>{w}}"
                for b, w in zip(base, (9, 8), strict=True)
            )
            parity = num(results[-1], "parity")
            line += f"{fixed(num(results[-1], 'accuracy'), '.1%'):>7}"
            lines.append(line + f"{'' if parity is None else fixed(parity):>8}")
        lines += [*(beaten(shown[-1], name, key) for key in ("unigram", "xz")), ""]
    return "\n".join(line.rstrip() for line in lines).rstrip()


def run_table(folder: Path) -> str:
    """The per-language table of a run: before, and after each stage."""
    run = read_run(folder)
    return language_table(run.stage_evals, run.languages) or "no evaluation in this run"


def curriculum_table(table: Sequence[Mapping[str, Any]], seq_len: int) -> str:
    """Plain-text table: share, tokens and epochs per stage and source, and the total
    of each language that has more than one source. "~" is before what is estimated."""
    heads = f"{'share':>8}{'tokens':>12}{'epochs':>9}{'in all':>9}"
    lines = [f"{'stage':<12}{'source':<16}{heads}"]
    for phase, group in itertools.groupby(table, lambda r: r["phase"]):
        lines += [""] if len(lines) > 1 else []
        languages: dict[str, list[Mapping[str, Any]]] = {}
        for r in group:
            languages.setdefault(r["source"].split("/")[0], []).append(r)
            about = "~" if r.get("estimated") else ""
            epochs = (r["epochs"], r["epochs_total"])
            passes = ["?" if x is None else f"{x:.2f}" for x in epochs]
            lines.append(
                f"{phase:<12}{r['source']:<16}{about + format(r['share'], '.2%'):>8}"
                f"{about + short(r['examples'] * seq_len):>12}"
                f"{passes[0]:>9}{passes[1]:>9}"
            )
        for language, of_language in languages.items():
            if len(of_language) > 1:
                share = sum(r["share"] for r in of_language)
                tokens = sum(r["examples"] for r in of_language) * seq_len
                about = "~" if any(r.get("estimated") for r in of_language) else ""
                total = f"{about + format(share, '.2%'):>8}{about + short(tokens):>12}"
                lines.append(f"{phase:<12}{language + ', all':<16}{total}")
    return "\n".join(lines)


def cell(task: Mapping[str, Any], value: float | None) -> str:
    """A value of a task's headline metric as it is shown: 41.5 %, or 1.234."""
    if value is None:
        return ""
    return f"{value:.3f}" if task["kind"] == "perplexity" else f"{100 * value:.1f} %"


def error_text(task: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """ "±1.2 %", the standard error of a row's headline metric; "" where none is known.

    Items that are all right, or all wrong, have a spread of 0, which tells no error.
    """
    error = row.get(f"{task['metric']}_se")
    return f"±{cell(task, error)}" if error else ""
