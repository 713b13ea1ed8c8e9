"""Clean text has one form, and nothing that matters is lost."""

from __future__ import annotations

import unicodedata

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gamayun_jax.data import (
    cleaning,
)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.text("ae\u0301\u00ad\u200b\ufeff \t\n\r\0\x85\u1100\u1161\u11a8"),
        st.text("a\u0e01\u0e38\u0e48\u0301\u0327\u0334\u00ad\u200b \x0c\u2028"),
    )
)
@example("e\u00ad\u0301")
@example("\u200b\u0e48\u0300\u200b\u0334")
@example("\u200b\u0e48\u0300\u200b\u0334" * 40)
@example("\u0e01\u200b\u0334\u200b" * 9 + "\u0e48\u0300\u200b\u0334" * 9)
def test_clean(text):
    found = cleaning.clean(text)
    assert cleaning.clean(found) == found
    assert unicodedata.is_normalized("NFC", found)
    assert not cleaning.DROPPED.search(found)
    for line in found.split("\n"):
        assert line == line.rstrip(" \t")
    assert found == found.strip("\n")


def test_clean_keeps_what_matters():
    assert (
        cleaning.clean("\n  def f():\r\n\treturn  1 \t\n\n")
        == "  def f():\n\treturn  1"
    )
    assert cleaning.clean("می\u200cخواهم 👩\u200d👩") == "می\u200cخواهم 👩\u200d👩"


def test_clean_does_not_glue_words():
    for mark in "\f\v\x1c\x1d\x1e\x85\u2028\u2029":  # \f: a page of pdftotext ends
        assert cleaning.clean(f"last{mark}first") == "last\nfirst"
    assert cleaning.clean("a\x1fb \f\n c") == "a b\n\n c"
    # Thai, Lao, Burmese and Khmer mark words with it; elsewhere it is a break that
    # may be, within a word.
    for words in ("ฉัน\u200bรัก", "ຂ້ອຍ\u200bຮັກ", "ကျွန်\u200bတော်", "ខ្ញុំ\u200bស្រលាញ់"):
        assert cleaning.clean(words) == unicodedata.normalize("NFC", words)
    assert cleaning.clean("super\u200bcali, \u200bfragi") == "supercali, fragi"


@settings(max_examples=100, deadline=None)
@given(
    st.text("a\u0301\u0316\u0327\u0344\u0f73\uff9e\u1100\u1161\u00e9", min_size=30),
    st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]),
)
@example("\u0344\u0316" * 40, "NFC")
@example("\uff9e\u0316" * 40, "NFKC")
def test_normal_forms_are_unicode_s(text, form):
    """Marks that are sorted before come out as if they had not been."""
    for times in (1, 3):
        expected = unicodedata.normalize(form, text * times)
        assert cleaning.normal_form(form, text * times) == expected
