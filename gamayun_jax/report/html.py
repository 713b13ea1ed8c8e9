"""Pages from the templates: each one file that loads nothing.

Names are data: a text gets into a page only through a template, which escapes it, or
through matplotlib, which does too.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gamayun_jax.data.files import write_text
from gamayun_jax.report.colours import DARK, LIGHT
from gamayun_jax.report.formats import plain

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
    "accuracy": "Share of tokens that the model ranks first.",
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


def section(title: str, text: str, *content: Markup) -> Markup:
    """A heading, a paragraph, and the blocks that follow."""
    return block("section", title, text, content)


def write_page(out: Path, title: str, kind: str, parts: Iterable[Markup]) -> Path:
    """Write OUT/index.html of HTML parts; returns its path."""
    from markupsafe import Markup

    style, script = (
        Markup((TEMPLATES / name).read_text(encoding="utf-8"))
        for name in ("style.css", "table.js")
    )
    page = environment().get_template("page.html.jinja")
    text = page.render(
        title=plain(title, 200), kind=kind, parts=list(parts), style=style,
        script=script, light=LIGHT, dark=DARK,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "index.html", text + "\n")
    return out / "index.html"
