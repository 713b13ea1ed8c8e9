"""A megabyte of each of many kinds through all that loops over document text.

    python -m tests.faults.adversarial [FUNCTION[:KIND]]...

Prints each pair before it runs it, so that what never ends is named.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path

import zstandard

from gamayun_jax.config import DEMO_CORPUS, TokenizerConfig
from gamayun_jax.data import cleaning, contamination, fertility, tokenizer_training
from gamayun_jax.evaluate import task_metrics
from recipes.demo_data import decontaminate, extract_text, tasks

SIZE = 1_000_000  # bytes, at most
PATTERNS = {
    "spaces": " ", "tabs": "\t ", "newlines": "\n", "blank lines": " \n",
    "controls": "\0", "pages": "\f", "returns": "\r", "one letter": "a",
    "two letters": "ab", "one digit": "7", "full stops": ".", "quotes": "“",
    "one ideograph": "天", "one kana": "ア", "jamo": "\u1100\u1161",
    "marks": "\u0301\u0316", "marks of marks": "\u0f73\u0316",
    "half-width marks": "\uff9e\u0316", "ligatures": "\ufdfa", "joined": "👩\u200d",
    "zero width": "\u200b", "thai words": "ก\u200b", "space of pieces": "\u2581",
    "words": "the ", "lines of items": "x\n y\n", "brackets": "[", "backslashes": "\\",
    "fonts of roff": "\\f[", "strings of roff": "\\*[", "macros": ".B ",
    "paragraphs": "<p id=a>", "code": "<pre>x</pre>y", "inline": "<b>x</b>",
    "entities": "&amp;", "tags not ended": "<a b=1 ",
}  # fmt: skip


def texts():
    for name, pattern in PATTERNS.items():
        text = pattern * (SIZE // len(pattern.encode()))
        yield name, f"x{text}x"


def main(names):
    folder = Path(tempfile.mkdtemp())
    path = folder / "descriptions"
    with zstandard.open(DEMO_CORPUS / "train/en.help.jsonl.zst", "rt") as f:
        plain = [
            json.loads(line)["text"] for line, _ in zip(f, range(60), strict=False)
        ]
    small = TokenizerConfig(400, sample_bytes=3_000_000)

    @functools.cache
    def model():
        return tokenizer_training.train({"en": plain}, small, folder / "a.model")

    held = decontaminate.NearDuplicateFinder(plain)

    def help_page(text):
        page = f"<html><body><div id=DisplayArea>{text}</div></body></html>"
        return extract_text.help_paragraphs(page.encode())

    def descriptions(text):
        path.write_text(f"Description-md5: a\nDescription-en: {text}", "utf-8")
        return list(extract_text.description_documents(path, "en"))

    functions = {
        "clean": cleaning.clean,
        "normalise": lambda t: [
            decontaminate.normalise(t, dense) for dense in (False, True)
        ],
        "rejection": lambda t: decontaminate.rejection(t, "de", set()),
        "judge": lambda t: held.judge([t]),
        "contamination": lambda t: [
            contamination.Contamination("a", units).judge([t])
            for units in ([("1", t)], [(str(k), t[: 50 + k]) for k in range(500)])
        ],
        "normalised": task_metrics.normalised,
        "f1": lambda t: [task_metrics.f1(t, t[:999], k) for k in ("en", "zh")],
        "grams": task_metrics.grams,
        "repeated_word": lambda t: [
            tasks.repeated_word(t[:n], t[:n], k)
            for n in (4900, SIZE)
            for k in ("en", "zh")
        ],
        "man": lambda t: extract_text.man_paragraphs(t.encode()),
        "help": help_page,
        "html": lambda t: extract_text.html_paragraphs(t.encode()),
        "unwrap": lambda t: [
            extract_text.unwrap(t.split("\n"), k) for k in ("en", "zh")
        ],
        "descriptions": descriptions,
        "report": lambda t: fertility.report(
            model(), {"en": [cleaning.clean(t)]}
        ),
        "train": lambda t: tokenizer_training.train(
            {"en": [*plain, cleaning.clean(t)]}, small, folder / "b.model"
        ),
    }  # fmt: skip
    for wanted in names or functions:
        name, _, only = wanted.partition(":")
        for kind, text in texts():
            if only in ("", kind):
                print(f"{name} of {kind}", flush=True)
                functions[name](text)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1:])
