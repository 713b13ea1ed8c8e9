"""What checkpoints still know of the examples they saw, from RUN/forgetting.json."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gamayun_jax.config import UserError
from gamayun_jax.report.charts import DASHES, Line, LinePanel, Points, lines_chart
from gamayun_jax.report.colours import colours_of
from gamayun_jax.report.formats import fixed, plain, short
from gamayun_jax.report.html import block, section
from gamayun_jax.report.read_run import Run, entries, get, num, rows
from gamayun_jax.tables import Cell, Table

if TYPE_CHECKING:
    from markupsafe import Markup

BINS = 8  # of as many examples each


def read_forgetting(run: Run) -> list[Mapping[str, Any]]:
    """The checkpoints of a run that were asked; none where `gamayun forgetting` was not
    run.

    Raises:
      UserError: the file is damaged.
    """
    path = run.folder / "forgetting.json"
    try:
        told = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}): delete it") from e
    return rows(told, "checkpoints")


def examples_of(told: Any, language: str) -> list[tuple[float, float, float]]:
    """(tokens since it was served, nll, targets) of each example, the latest first."""
    found = get(told, "languages", language, "examples")
    whole = [
        (float(row[0]), float(row[1]), float(row[2]))
        for row in (found if isinstance(found, list) else [])
        if isinstance(row, list) and len(row) == 3 and all(map(is_number, row))
    ]
    return sorted(row for row in whole if row[2] > 0)


def is_number(x: Any) -> bool:
    """Whether it is a finite number."""
    return num({"x": x}, "x") is not None


def mean_of(examples: Sequence[tuple[float, float, float]]) -> float | None:
    """Nats per target of examples together."""
    targets = sum(n for *_, n in examples)
    return sum(nll for _, nll, _ in examples) / targets if targets else None


def curve(told: Any, language: str) -> Points:
    """(mean tokens since served, nats per target) of bins of examples."""
    examples = examples_of(told, language)
    size = max(1, -(-len(examples) // BINS))
    groups = [examples[i : i + size] for i in range(0, len(examples), size)]
    points = []
    for group in groups:
        y = mean_of(group)
        if y is not None:
            points.append((sum(x for x, *_ in group) / len(group), y))
    return points


def unseen_of(told: Any, language: str) -> float | None:
    """Nats per target of examples that were never served."""
    sums = get(told, "languages", language, "unseen")
    if isinstance(sums, list) and len(sums) == 2 and all(map(is_number, sums)):
        return sums[0] / sums[1] if sums[1] else None
    return None


def forgetting_section(
    run: Run, who: str, languages: Sequence[str]
) -> Iterable[Markup]:
    """A panel per language and a line per checkpoint; none where nothing was asked."""
    asked = read_forgetting(run)
    known = [k for k in languages if any(k in entries(t, "languages") for t in asked)]
    if not known:
        return
    colours, panels = colours_of(languages), []
    for language in known:
        lines = []
        for told, dash in zip(asked, itertools.cycle(DASHES), strict=False):
            points, name = curve(told, language), label(told)
            if points:
                lines.append(Line(points, colours[language], dash, name=name))
                unseen = unseen_of(told, language)
                if unseen is not None:
                    ends = points[0][0], points[-1][0]
                    flat = [(x, unseen) for x in ends]
                    lines.append(Line(flat, dash=dash, faint=True, name="not served"))
        title, colour = plain(language, 20), colours[language]
        panels.append(LinePanel(title, lines, short, ylabel="nats", colour=colour))
    styles = [(label(t), d) for t, d in zip(asked, itertools.cycle(DASHES))]
    yield section(
        f"{who}Forgetting",
        "Loss of checkpoints on a sample of the examples that they were trained on, in "
        "nats per target, against the tokens since each was served last. Faint and "
        "grey: examples of the same sources that were not served yet. A line that "
        "rises to it forgets.",
        block("line_styles", styles),
        lines_chart("Loss on training examples by tokens since", panels),
        block("folded", "Numbers", [block("table", forgetting_table(asked, known))]),
    )


def label(told: Any) -> str:
    """What a checkpoint is called."""
    return f"{plain(get(told, 'stage'), 16)}, step {plain(get(told, 'step'), 12)}"


def forgetting_table(asked: Sequence[Any], languages: Sequence[str]) -> Table:
    """Of each checkpoint and language: tokens since its last example, and nats per
    target of the latest quarter of its sample, of the oldest, and of examples that were
    not served."""
    body = []
    for told in asked:
        for language in languages:
            examples = examples_of(told, language)
            quarter = max(1, len(examples) // 4)
            since = num(told, "languages", language, "last_seen")
            means = [mean_of(examples[:quarter]), mean_of(examples[-quarter:])]
            means.append(unseen_of(told, language))
            cells = [Cell(label(told)), Cell(plain(language, 20))]
            cells += [Cell(short(since), value=since)]
            cells += [Cell(fixed(x), value=x) for x in means]
            body.append(cells)
    heads = ("checkpoint", "language", "tokens since last seen", "latest quarter",
             "oldest quarter", "not served")  # fmt: skip
    return Table(heads, body, left=(0, 1))
