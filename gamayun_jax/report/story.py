"""What a run's page says in words: in short, whether the switch helped, samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gamayun_jax.evaluate.paired import MACRO
from gamayun_jax.report.changes import BITS, Boundary, boundaries, by_test, tallies
from gamayun_jax.report.colours import language_cell
from gamayun_jax.report.formats import fixed, plain
from gamayun_jax.report.html import block, section
from gamayun_jax.report.read_run import (
    Evaluation,
    Run,
    beaten,
    entries,
    get,
    label_of,
    num,
    rows,
    score,
    sets_of,
)
from gamayun_jax.tables import Cell, Table
from gamayun_jax.training.run_folder import SAMPLES

if TYPE_CHECKING:
    from markupsafe import Markup


def summary_section(run: Run, who: str) -> Iterable[Markup]:
    """The run in a few sentences; none without an evaluation."""
    told = []
    for name in sets_of(run.evals):
        evals = run.tests(name)
        if not evals:
            continue
        first, last = (num(score(e, name, MACRO), BITS) for e in (evals[0], evals[-1]))
        fell = "" if len(evals) < 2 else f"went from {fixed(first)} to "
        text = (
            f"On “{plain(name, 20)}” the mean over languages {fell or 'is '}"
            f"{fixed(last)} bits per byte; {beaten(evals[-1], name, 'xz')}, "
            f"{beaten(evals[-1], name, 'unigram')}."
        )
        told.append(text)
    for boundary in boundaries(run):
        lines = [*tallies_of(boundary), *within_noise(boundary)]
        told += [f"During “{boundary.stage}”, {line}." for line in lines]
    if told:
        yield section(f"{who}In short", "", block("notes", told))


def tallies_of(boundary: Boundary) -> Iterable[str]:
    """A stage's tallies of tests with a verdict, each with its largest change for the
    better and what was forgotten."""
    tests = by_test(boundary.changes).values()
    for line, of_test in zip(tallies(boundary.changes), tests, strict=True):
        known = [c for k, c in of_test.items() if k != MACRO]
        better = [c for c in known if c.verdict == "better"]
        worse = [plain(c.language, 20) for c in known if c.verdict == "worse"]
        if better:
            most = max(better, key=lambda c: c.sign * c.estimate.value)
            line += f"; the largest gain: {plain(most.language, 20)} {most.cell().text}"
        if worse:
            line += f"; forgotten: {', '.join(worse)}"
        if better or worse:
            yield line


def within_noise(boundary: Boundary) -> Iterable[str]:
    """The tests that changed in no language beyond noise, in one sentence, if any."""
    names = [
        plain(name, 20)
        for (name, _), of_test in by_test(boundary.changes).items()
        if all(c.verdict == "same" for c in of_test.values())
    ]
    if names:
        yield f"within noise in all languages: {', '.join(names)}"


def rate_text(run: Run, stage: str) -> str:
    """How the learning rate went in a stage; "" where it is not recorded."""
    recorded = [
        (x, rate, plain(get(m, "stage"), 24) == stage)
        for m in run.metrics
        if (x := num(m, "tokens")) is not None and (rate := num(m, "lr")) is not None
    ]
    inside = [i for i, (_, _, own) in enumerate(recorded) if own]
    if not inside:
        return ""
    # From the last record before the stage on, whose rate is that of the switch.
    rates = [r[:2] for r in recorded[max(inside[0] - 1, 0) : inside[-1] + 1]]
    if len(rates) < 2:
        return ""
    (begin, first), (end, last) = rates[0], rates[-1]
    steps = itertools.pairwise(rates)
    falling = sum(x - w for (w, a), (x, b) in steps if b < a)
    went = f"its learning rate went from {first:.2g} to {last:.2g}"
    if not falling or end <= begin:
        return went
    return f"{went}, falling over {falling / (end - begin):.0%} of its tokens"


def switch_section(runs: Sequence[Run]) -> Iterable[Markup]:
    """Whether a change of stages helped: what a page of runs can't answer, and why.

    The share of the learning rate, of more tokens and of the mixture in a change are
    one sum here; arms of a study differ in one of them.
    """
    told = []
    for run in runs:
        first = [plain(get(s, "name"), 24) for s in rows(run.lineage, "stages")[:1]]
        for boundary in boundaries(run):
            if boundary.stage in first:
                continue
            which = f"{run.name}: in" if len(runs) > 1 else "In"
            rate = rate_text(run, boundary.stage)
            rate = rate or "how its learning rate went is not recorded"
            more = "and a falling rate lower" if "falling" in rate else "alone lower"
            told.append(
                f"{which} “{boundary.stage}” the mixture changed, more tokens were "
                f"seen, and {rate}. More tokens {more} bits per byte by themselves: "
                "their share and the mixture's are one sum here."
            )
    if not told:
        return
    several = ""
    if len(runs) > 1:
        several = (
            " Runs side by side answer it only where they are matched, as gamayun "
            "controls CONFIG --check RUN RUN says, and one pair is an anecdote."
        )
    yield section(
        "Did the switch help?",
        "One run can't tell. What stands above is what changed during a stage, not "
        f"what its mixture caused.{several}",
        block("notes", told),
        block(
            "gap",
            "A matched twin can: the same examples in another order, at the same "
            "learning rates. “gamayun controls” writes one; “gamayun study” trains "
            "arms over seeds and judges them.",
        ),
    )


def sample_sections(runs: Sequence[Run], who: Sequence[str]) -> Iterable[Markup]:
    """What each run wrote for its generation tasks, before and after each stage."""
    for run, name in zip(runs, who, strict=True):
        for task in written(run.labelled):
            text = (
                f"The first {SAMPLES} items of each language, as written without "
                "sampling; green ✓: exactly the answer."
            )
            table = sample_table(run.labelled, task, run.languages)
            title = f"{name}Samples, task “{plain(task, 30)}”"
            yield section(title, text, block("table", table, "words"))


def written(evals: Iterable[Evaluation]) -> list[str]:
    """The generation tasks of evaluations."""
    tasks = (t for e in evals for t in entries(e, "tasks").items())
    return list(dict.fromkeys(k for k, t in tasks if get(t, "kind") == "generation"))


def sample_table(
    evals: Sequence[Evaluation], task: str, languages: Sequence[str]
) -> Table:
    """Items by evaluations: what is asked, the answer, what was written."""
    evals = [e for e in evals if task in entries(e, "tasks")]
    items = [e.items_of(task)[0] for e in evals]
    body: list[list[Cell | str]] = []
    for language in languages:
        first = dict(itertools.islice(items[-1].get(language, {}).items(), SAMPLES))
        for name, item in first.items():
            made = (of.get(language, {}).get(name) for of in items)
            body.append(
                [
                    language_cell(len(body), language),
                    plain(get(item, "prompt") or name, 120),
                    plain(answer_of(item), 80),
                    *(sample_cell(x) for x in made),
                ]
            )
    heads = ["language", "asked", "answer", *(label_of(e) for e in evals)]
    return Table(heads, body)


def answer_of(item: Any) -> str:
    """The first of an item's answers."""
    answers = get(item, "answers")
    return str(answers[0]) if isinstance(answers, list) and answers else "–"


def sample_cell(item: Any) -> Cell:
    """What was written for an item."""
    if item is None:
        return Cell()
    right = num(item, "correct", "exact") == 1
    text = plain(get(item, "text") or "(nothing)", 160)
    return Cell(text, verdict="better" if right else "")
