"""The page of a study: its question, its verdicts, and all that its records show.

Everything is made from the study's folder: registration.json, records/, units.json and
curricula.json. FOLDER/report/ gets index.html, results.txt (what the terminal shows),
results.json, comparisons.csv and runs.csv.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gamayun_jax.data.files import read_json
from gamayun_jax.report.colours import colours_of
from gamayun_jax.report.formats import plain
from gamayun_jax.report.html import GLOSSARY, block, section, write_page
from gamayun_jax.report.study_figures import (
    arms_chart,
    curricula_grid,
    curve_charts,
    forest,
    language_charts,
    languages_of,
    size_charts,
)
from gamayun_jax.report.study_tables import (
    exploratory_table,
    hypothesis_table,
    ledger_table,
    made_with_table,
    mean_lines,
    noise_table,
    pair_text,
    power_table,
    runs_text,
    sentence,
    status_lines,
    write_files,
)
from gamayun_jax.study.findings import Findings

if TYPE_CHECKING:
    from markupsafe import Markup

MANY = 120  # rows of a figure
WORDS = {
    "difference": "Outcome of the first arm minus the second's, in bits, seed by seed: "
    "below 0, the first is better. Solid: the mean with its 95 % interval; "
    "open: single seeds.",
    "interval": "Resamples seeds, languages and texts together: it speaks of others "
    "of the same kinds, too. It is for one comparison alone.",
    "verdict": "Supported: significant at 5 % over all hypotheses (Holm) and the "
    "interval below 0. Contradicted: the same on the other side. Else not decided.",
    "smallest effect": "The difference that would have had a verdict with 80 % power, "
    "at the spread over seeds and the width of the interval that were seen (before "
    "Holm's correction).",
    "bits per byte": GLOSSARY["bits per byte"],
    "share of translations missed": "Of retrieval among all units of a parallel set by "
    "a layer's hidden states, the mean over the other languages.",
    "bits per question": "Bits that the right choice takes among a question's choices: "
    "0 where the model is sure of it, log2 of their number by chance.",
}


def head_parts(f: Findings) -> Iterable[Markup]:
    """The question, the headline numbers, and what is missing."""
    marks = [c.verdict for c in f.hypotheses]
    seeds = {s for a in f.arms for s in a.plan["seeds"]}
    yield section("Question", plain(f.study["question"], 400))
    yield block(
        "cards",
        {
            "runs": runs_text(f),
            "arms": str(len(f.arms)),
            "seeds": str(len(seeds)),
            "diverged": str(sum(len(a.diverged) for a in f.arms)),
            "verdicts": ", ".join(
                f"{marks.count(k)} {k}" for k in dict.fromkeys(marks)
            ),
            "registration": f.frozen["sha256"][:16],
        },
    )
    yield from (block("gap", text) for text in status_lines(f))
    yield block("glossary", WORDS)


def matched_text(factors: Sequence[str] | None) -> str:
    """Which arms serve the same examples."""
    if factors is None:
        return "Arms are not matched in the examples that they serve."
    if not factors:
        return "All arms serve the same examples."
    return f"Arms of the same {' and '.join(factors)} serve the same examples."


def registered_section(f: Findings) -> Markup:
    """What was decided before the first run."""
    study = f.study
    sets = {
        o.name: f"{' and '.join(o.sets)}, languages: {o.languages}" for o in f.outcomes
    }
    told = [
        f"Primary outcome: {study['primary']} ({sets[study['primary']]}).",
        *(
            f"Also measured: {k} ({v})."
            for k, v in sets.items()
            if k != study["primary"]
        ),
        matched_text(study["matched"]),
        f"Exclusions: {study['exclusions'].rstrip('.')}.",
        *(f"Hypothesis {h['name']}: {h['claim']}" for h in study["hypotheses"]),
        *study["notes"],
        f"SHA-256 of all this and of every arm's config: {f.frozen['sha256']}",
    ]
    if worthwhile := study.get("worthwhile"):
        text = f"A difference in the primary outcome matters from {worthwhile:g} on."
        told.insert(1, text)
    rules = {k: str(v) for k, v in f.frozen["analysis"].items()}
    return section(
        "Registered before the first run",
        "Frozen with a hash. Whatever is analysed beyond it is called exploratory.",
        block("notes", told),
        block("glossary", rules, "Rules of the analysis"),
    )


def verdict_section(f: Findings) -> Markup:
    """The registered hypotheses."""
    names = [c.name for c in f.hypotheses]
    content = [block("gap", "No hypothesis was registered.")]
    if names:
        content = [
            block("notes", [sentence(f, c) for c in f.hypotheses]),
            *([block("notes", [*part.values()])] if (part := mean_lines(f)) else []),
            forest(f, "Registered differences", f.hypotheses, names),
            block("table", hypothesis_table(f)),
        ]
    text = "The registered hypotheses, those that were not borne out included."
    return section("Verdicts", text, *content)


def arm_sections(f: Findings, curricula: Mapping[str, Any]) -> Iterable[Markup]:
    """What the arms are, and that they served what they should."""
    text = (
        "Share of each source in the tokens, stacked; beneath, the learning rate. Arms "
        "that differ in size alone are shown once."
    )
    content = [block("gap", "Not recorded in this study: curricula.json.")]
    if curricula:
        colours = colours_of(languages_of(f))
        content = [block("colours", colours), curricula_grid(f, curricula)]
    yield section("Arms", text, *content)
    done = sum(len(a.done) for a in f.arms)
    wrong = [a.name for a in f.arms if a.other]
    text = (
        f"Tokens by source, from the plans. Of the {done} finished runs "
        f"{'none says' if not wrong else 'these say'} that it served anything else"
        f"{': ' if wrong else ''}{', '.join(wrong)}. Columns stand for all arms that "
        "serve the same."
    )
    yield section("Exposure", text, block("table", ledger_table(f, curricula)))


def effect_sections(f: Findings) -> Iterable[Markup]:
    """The registered pairs by language and by size; outcomes and noise by arm."""
    text = (
        "The registered pairs in each language alone, which is then not resampled; the "
        "last row is the mean. Intervals are for one cell each, not corrected."
    )
    for name, chart in language_charts(f):
        yield section(f"Every language, on “{plain(name, 30)}”", text, chart)
    if f.sizes:
        text = "The registered pairs at every size; others than those are exploratory."
        yield section("Effect against size", text, *size_charts(f))
    text = "Open: single runs; solid: their mean. The table has standard deviations."
    content = [arms_chart(f), block("table", noise_table(f))]
    if part := mean_lines(f):
        content.append(block("notes", [*part.values()]))
    yield section("Outcomes and noise by arm", text, *content)
    if any(c.difference.sd is not None for c in f.hypotheses):
        text = (
            "Standard deviation over seeds of the paired differences, and the smallest "
            "effect that the t test over so many seeds shows with 80 % power. A "
            "verdict asks for an interval on one side of 0 as well, which needs more."
        )
        yield section("Power", text, block("table", power_table(f)))


def exploratory_section(f: Findings) -> Markup:
    """All other pairs of matched arms, and averaged against last parameters."""
    parts = []
    for outcome in f.outcomes:
        found = [
            c for c in f.exploratory if c.outcome == outcome.name and c.difference.n
        ]
        if not found:
            continue
        title, names = f"{outcome.name}: {len(found)} pairs", [*map(pair_text, found)]
        content = [block("table", exploratory_table(found))]
        if len(found) <= MANY:
            content.insert(0, forest(f, title, found, names, letters=44))
        parts.append(block("folded", title, content))
    if f.averages:
        table = block("table", exploratory_table(f.averages))
        told = (
            "The average of a run's checkpoints minus its last parameters. These "
            "intervals are over seeds alone, since of the last parameters no units "
            "are kept: they do not speak of other languages and texts."
        )
        content = [block("notes", [told]), table]
        parts.append(block("folded", "Averaged against last parameters", content))
    return section(
        "Exploratory",
        "Not registered: all other pairs of matched arms, of one size. Of many "
        "such intervals of nothing, some exclude 0; p is not corrected.",
        *parts,
    )


def curve_section(f: Findings) -> Markup:
    """Learning curves."""
    colours, charts = curve_charts(f)
    text = (
        "Training loss, nats per target token: the mean over languages, then each "
        "language at the last size; means over seeds, the steep start cut off. Arms "
        "see texts in different order: only the end compares."
    )
    return section("Learning curves", text, block("colours", colours), *charts)


def end_sections(f: Findings) -> Iterable[Markup]:
    """On what it ran, and how to do it again."""
    yield section("Made with", "", block("table", made_with_table(f)))
    yield section(
        "How to repeat it",
        "Runs that have a record are not made again: delete records/ to train anew. "
        "The second command makes this page from the records alone.",
        block(
            "notes",
            ["gamayun study STUDY.py --out FOLDER", "gamayun report FOLDER"],
        ),
    )


def write_study(f: Findings, folder: Path) -> Path:
    """Write FOLDER/report/: the page and the files; returns the page's path."""
    path, out = folder / "curricula.json", folder / "report"
    advice = "delete it, and start the study again"
    curricula = read_json(path, advice, missing={})
    write_files(f, out)
    parts = [*head_parts(f), verdict_section(f), registered_section(f)]
    parts += arm_sections(f, curricula)
    parts += effect_sections(f)
    if any(a.done for a in f.arms):
        parts.append(curve_section(f))
    parts.append(exploratory_section(f))
    parts += end_sections(f)
    return write_page(out, plain(f.study["name"]), "Study", parts)
