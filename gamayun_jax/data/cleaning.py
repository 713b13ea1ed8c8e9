"""Cleaning of text: one form for each character, invisible characters removed."""

from __future__ import annotations

import itertools
import re
import unicodedata
from typing import Literal

CLEANING = 2  # version of the rules of `clean`: part of a corpus's recipe
# All that ends a line or a paragraph in Unicode (annex 14) or separates records.
LINE_BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
# Control characters but tab and newline; soft hyphen, BOM. The joiners U+200C and
# U+200D stay: words and emoji are spelled with them.
DROPPED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u00ad\u2028\u2029\ufeff]")
REPLACED = {**dict.fromkeys(LINE_BREAKS, "\n"), "\x1f": " "}
# The zero-width space stays beside letters of scripts that mark words with it (Thai,
# Lao, Burmese, Khmer, Tai); elsewhere it only allows a line to break within a word.
WORDS_BY_MARKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf"
WORDS_BY_MARKS += "\ua9e0-\ua9ff\uaa60-\uaadf"
ZERO_WIDTH = re.compile(f"(?<![{WORDS_BY_MARKS}])\u200b(?![{WORDS_BY_MARKS}])")
Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
# Runs in which marks may be; two of kana are letters, and marks when decomposed.
MARKS = re.compile(r"(?:[^\w\x00-\x7f]|[\uff9e\uff9f]){32,}")


def normal_form(form: Form, text: str) -> str:
    """unicodedata.normalize, in a time that does not grow as the square.

    It sorts a run of combining marks by insertion: half a million take a quarter of
    an hour. So long runs are sorted before, in the same (stable) order.
    """
    if unicodedata.is_normalized(form, text):
        return text

    def sort(run: re.Match[str]) -> str:
        apart: Form = "NFD" if form in ("NFC", "NFD") else "NFKD"
        marks = "".join(unicodedata.normalize(apart, c) for c in run[0])
        groups = itertools.groupby(marks, lambda c: unicodedata.combining(c) > 0)
        return "".join(
            "".join(sorted(part, key=unicodedata.combining) if is_mark else part)
            for is_mark, part in groups
        )

    return unicodedata.normalize(form, MARKS.sub(sort, text))


def without_breaks(text: str) -> str:
    """NFC text without the zero-width spaces that mark no words.

    Without one of them, marks may change places, so that another one stands beside
    other characters. Where that goes on, the text is no language: all of them go.
    """
    for _ in range(4):
        fewer = ZERO_WIDTH.sub("", text)
        if fewer == text:
            return text
        text = normal_form("NFC", fewer)
    return normal_form("NFC", text.replace("\u200b", ""))


def clean(text: str) -> str:
    """NFC, \\n line ends, no control or invisible characters, no trailing spaces."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = DROPPED.sub(lambda match: REPLACED.get(match[0], ""), text)
    text = normal_form("NFC", text)
    if "\u200b" in text:
        text = without_breaks(text)
    if " \n" in text or "\t\n" in text:
        text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])
    return text.rstrip(" \t\n").lstrip("\n")
