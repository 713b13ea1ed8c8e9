"""Pages from the templates: each one file that loads nothing.

Names are data: a text gets into a page only through a template, which escapes it, or
through matplotlib, which does too.
"""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import html
import io
import itertools
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gamayun_jax.config import AnyPath
from gamayun_jax.data.files import write_text
from gamayun_jax.report.colours import DARK, LIGHT
from gamayun_jax.report.formats import plain
from gamayun_jax.storage import as_path

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
GLOSSARY = {
    "change, difference": "Of the same items, scored twice; its 95 % interval is for "
    "that one number alone. Where items are not at hand, the errors of both are "
    "combined, which is cautious, and the interval says so.",
    "colours of numbers": "Green: better, red: worse, both significant at 5 % over all "
    "languages and tests compared (Holm's correction). Grey: within noise.",
    "macro, micro": "The mean over languages; the mean over all units of text.",
    "bits per byte": "Bits of the model's code for a text, by its bytes in UTF-8: "
    "compares across tokenizers, as perplexities do not.",
    "parity": "Bits for the same content, relative to English.",
    "accuracy": "Share of tokens that the model ranks first. Of a task with choices: "
    "share of questions whose right choice has the highest log-probability: in all "
    "(raw), per token, per byte (norm), or less that without the question (pmi).",
    "uniform, unigram": "Bits per byte of a model to which all tokens are alike, and "
    "of one that knows how often each occurs in the training text.",
    "xz -9e": "Bits per byte of the held-out text, compressed by xz.",
    "goodput": "Share of the wall time that went to steps that count (productive). "
    "Interrupted: away, or making steps again.",
    "stalled steps": "Steps before which the device had nothing to do, for want of "
    "data.",
}


@functools.cache
def environment() -> Environment:
    """The templates; a text in one is escaped, printable and 400 characters at most."""
    import jinja2
    from markupsafe import Markup

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda x: x if isinstance(x, Markup) else plain(x, 400),
    )
    made.filters |= {"plain": plain, "whole": Markup}
    return made


def block(name: str, *args: Any) -> Markup:
    """HTML by a macro of blocks.html.jinja, or of charts.html.jinja."""
    file = "charts.html.jinja" if name.endswith("_chart") else "blocks.html.jinja"
    return getattr(environment().get_template(file).module, name)(*args)


def csv_link(heads: Sequence[str], numbers: Iterable[Sequence[object]]) -> str:
    """A figure's numbers as the address of a CSV file that the page holds itself."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for row in numbers:
        values = (f"{x:.10g}" if isinstance(x, float) else x for x in row)
        writer.writerow([plain(x, 200) if isinstance(x, str) else x for x in values])
    data = text.getvalue().encode("utf-8", "replace")
    return f"data:text/csv;charset=utf-8,{urllib.parse.quote(data, safe=',/:;()+')}"


def section(title: str, text: str, *content: Markup) -> Markup:
    """A heading, a paragraph, and the blocks that follow."""
    return block("section", title, text, content)


def with_anchors(text: str) -> tuple[Markup, list[tuple[str, str]]]:
    """HTML whose headings can be linked to, and (place, heading) of each."""
    from markupsafe import Markup

    places: dict[str, str] = {}

    def named(heading: re.Match[str]) -> str:
        title = heading[1]
        words = re.findall(r"[\w.]+", html.unescape(title).lower())
        place = name = "-".join(words)[:80] or "section"
        for n in itertools.count(2):
            if place not in places:
                break
            place = f"{name}-{n}"
        places[place] = title
        return f'<h2 id="{place}">{title}</h2>'

    made = re.sub(r"<h2>(.*?)</h2>", named, text, flags=re.DOTALL)
    return Markup(made), list(places.items())


def fragment(parts: Iterable[Markup]) -> str:
    """HTML parts as what a notebook shows for an object, in the style of the pages."""
    from markupsafe import Markup

    # The page's own rules come to stand inside of one for the fragment alone.
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    style = style.replace(":root {", "& {").replace("\nbody {", "\n& {")
    template = environment().get_template("notebook.html.jinja")
    return template.render(
        parts=list(parts), style=Markup(style), light=LIGHT, dark=DARK
    )


def write_page(out: AnyPath, title: str, kind: str, parts: Iterable[Markup]) -> Path:
    """Write OUT/index.html of HTML parts; returns its path."""
    from markupsafe import Markup

    style, script = (
        Markup((TEMPLATES / name).read_text(encoding="utf-8"))
        for name in ("style.css", "page.js")
    )
    page = environment().get_template("page.html.jinja")
    whole, places = with_anchors("\n".join(parts))
    text = page.render(
        title=plain(title, 200), kind=kind, whole=whole, style=style,
        script=script, light=LIGHT, dark=DARK,
        contents=block("contents", places) if len(places) > 2 else "",
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    out = as_path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "index.html", text + "\n")
    return out / "index.html"
