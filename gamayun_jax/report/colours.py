"""Colours of languages: the same on every page, in both modes.

Twelve of them, far apart for readers with any kind of colour vision: tests/report has
the measure. What a colour says always stands in words, too.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

from gamayun_jax.report.formats import plain
from gamayun_jax.tables import LANGUAGES, Cell

# fmt: off
LIGHT = (  # on white
    "#005d8d", "#ac0c35", "#0e8460", "#8a65cf", "#a25e15", "#29a0c7", "#a314b2",
    "#8d9a01", "#591c9a", "#d07b88", "#0e530b", "#71315c",
)
DARK = (  # on black
    "#539ed2", "#f86071", "#61c49d", "#c4abff", "#e69c5c", "#89dcfd", "#e967f8",
    "#c9d95d", "#9865e4", "#ffc2c9", "#54954f", "#b6709d",
)
# fmt: on


def colour_number(language: str) -> int:
    """Place of a language's colour; "zh-Hant" and "zh/web" have that of "zh"."""
    name = re.split(r"[-_/]", language)[0].lower()
    known = name in LANGUAGES
    number = (
        LANGUAGES.index(name) if known else zlib.crc32(name.encode(errors="replace"))
    )
    return number % len(LIGHT)


def colours_of(languages: Iterable[str]) -> dict[str, str]:
    """Language -> its colour, as a page's style names it."""
    return {k: f"var(--c{colour_number(k)})" for k in languages}


def arm_colours(names: Iterable[str]) -> dict[str, str]:
    """Colours of what is not a language: by its place among the others."""
    return {k: f"var(--c{n % len(LIGHT)})" for n, k in enumerate(names)}


def language_cell(place: int, language: str, is_mean: bool = False) -> Cell:
    """The first cell of a language's row, with its colour; a mean has none."""
    colour = None if is_mean else colour_number(language)
    return Cell(plain(language, 20), value=place, colour=colour)
