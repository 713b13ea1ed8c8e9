"""Pairs of short phrases of which one is right, from patterns of the Unicode CLDR.

    python -m recipes.demo_data.minimal_pairs OUT --work DIR    # this task's file alone

Two phrases differ in a few letters, and CLDR has one of them. Items come as twins, in
which the same two forms change sides:

  3 дня.  not  3 дней.        5 дней.  not  5 дня.

so that whoever likes one form, the shorter or the more frequent, is right in one twin
and wrong in the other: without a look at the rest of the phrase half are right.

  number   en ru de fr es it pt pl  the unit's form after a number (plural rules)
  gender   ru de fr es it pt pl     the article or pronoun before a unit
  case     ru de pl                 the unit's case after a verb or preposition
  ordinal  en                       the ending of a number: 22nd, 23rd
  harmony  tr                       the vowels of an ordinal's suffix: üçüncü, onuncu
  counter  zh ja ko                 个, か, 개 between a number and the unit of time:
                                    before months, not before days

What is asked is one thing of each language, on few words; languages are not asked the
same, so a mean over them is a mean of unlike things. Phrases that are in the embedded
training text are left out, right or wrong.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from gamayun_jax.demo_corpus import LANGUAGES
from recipes.demo_data.cldr_tasks import Cldr, Item, draw, write_items
from recipes.demo_data.decontaminate import trained_paragraphs
from recipes.demo_data.extract_text import clean

TWINS = 40  # of a phenomenon in a language
FULL_STOP = {"zh": "。", "ja": "。"}  # "." elsewhere
MOST_LETTERS = 3  # in which the phrases of an item differ
EVERYDAY = {
    "duration": "century decade year month week day night hour minute second",
    "length": "kilometer meter centimeter millimeter mile yard foot inch",
    "mass": "tonne kilogram gram milligram pound ounce carat",
    "volume": "liter milliliter drop barrel cup pint gallon teaspoon tablespoon",
    "area": "hectare acre",
    "digital": "byte bit kilobyte megabyte gigabyte",
    "energy": "calorie kilocalorie joule",
    "electric": "volt ampere ohm",
    "power": "watt kilowatt",
    "pressure": "atmosphere",
    "light": "candela",
    "angle": "degree revolution",
    "graphics": "pixel",
    "concentr": "item",
}
UNITS = [f"{kind}-{n}" for kind, names in EVERYDAY.items() for n in names.split()]
FIELDS = "year quarter month week day hour minute second"
# Nouns whose gender or case varies, or is not CLDR's (il miglio), those that are
# another word in another gender (le livre, la tour), and those before which articles
# have another form (l'ora, lo yard, el acre).
UNSURE = {
    "de": r".*(?i:meter|liter|löffel)|Hektar|Yard|Grad|Acre|Barrel|Joule|Pint|Pixel",
    "fr": r"[aâeéèêiîoôuûhy].*|livre|tour",
    "es": r"(a|á|ha).*",
    "it": r"[aeiouhxyz].*|s[^aeiou].*|p[sn].*|gn.*|miglio",
    "pt": r"(mili|quilo)?grama",
}
# Units and times whose other form is right, too: 6 foot, 4 Yard; 19个天后 are 19 divas.
UNSURE_FORMS = {
    "en": ("length-foot",),
    "de": ("area-acre", "length-yard", "volume-pint"),
    "zh": ("day-future",),
}
GENDERS = ("masculine", "inanimate", "feminine", "neuter")
CASES = {
    "ru": ("accusative", "dative", "genitive", "instrumental", "prepositional"),
    "pl": ("accusative", "dative", "genitive", "instrumental", "locative"),
    "de": ("accusative", "dative"),  # a measure's genitive may lack its -s
}
# Counters, and the units of time that never have one (others may, as 三个小时).
COUNTERS = {
    "zh": ("个", "year day minute second"),
    "ja": ("か", "week day hour minute second"),
    "ko": ("개", "day hour minute second"),
}
Twin = tuple[str, list[tuple[str, str]]]  # id, (right, wrong) of both items


def cross(key: str, fill: Callable[[Any, Any], str], xs: Any, ys: Any) -> Twin:
    """Twins of two contexts and the form that each wants."""
    return key, [(fill(xs[i], ys[i]), fill(xs[i], ys[1 - i])) for i in (0, 1)]


# --- CLDR's plural rules


def category(rules: Mapping[str, str], n: int) -> str:
    """The category of a whole number, as "few"; see UTS 35, "Plural Rules Syntax"."""
    return next(
        key.split("-")[-1]
        for key, rule in rules.items()
        if any(
            all(relation(r.strip(), n) for r in part.split(" and ") if r.strip())
            for part in rule.split("@")[0].split(" or ")
        )
    )


def relation(text: str, n: int) -> bool:
    """Whether a whole number fulfils such as "i % 10 = 2..4"."""
    found = re.fullmatch(r"([nivfte])(?: % (\d+))? (!?=) ([\d.,]+)", text)
    assert found, text
    operand, modulus, sign, ranges = found.groups()
    value = n if operand in "ni" else 0  # the others are of decimals and exponents
    value = value % int(modulus) if modulus else value
    ends = (r.split("..") for r in ranges.split(","))
    inside = any(int(r[0]) <= value <= int(r[-1]) for r in ends)
    return inside == (sign == "=")


# --- candidates


def alike(a: str, b: str) -> int:
    """Number of letters with which both begin."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def middles(a: str, b: str) -> tuple[str, str, str]:
    """What two phrases begin with alike, and what each has before they end alike."""
    begin = alike(a, b)
    end = alike(a[begin:][::-1], b[begin:][::-1])
    return a[:begin], a[begin : len(a) - end], b[begin : len(b) - end]


def letters(a: str, b: str) -> int:
    """In how many letters two phrases differ."""
    if len(a) == len(b):
        return sum(x != y for x, y in zip(a, b, strict=True))
    return max(map(len, middles(a, b)[1:]))


def inflected(a: str, b: str) -> bool:
    """Whether patterns differ in the end of a word, unlike 1 год and 5 лет."""
    return a != b and middles(a, b)[0][-1:].isalpha()


class Patterns:
    """What CLDR has of a language: units, times, sentences, plural rules."""

    def __init__(self, cldr: Cldr, k: str):
        units, numbers, fields = (
            cldr.read(archive, f"main/{k}/{name}.json")[0]["main"][k]
            for archive, name in (
                ("units", "units"),
                ("numbers", "numbers"),
                ("dates", "dateFields"),
            )
        )
        self.units = {
            name: {key: clean(v) for key, v in units["units"]["long"][name].items()}
            for name in UNITS
        }
        sentences = numbers["numbers"]["minimalPairs"]
        self.sentences = {key: bare(v) for key, v in sentences.items()}
        self.times = {
            f"{field}-{when}": {
                key.split("-")[-1]: clean(v)
                for key, v in fields["dates"]["fields"][field][
                    f"relativeTime-type-{when}"
                ].items()
            }
            for field in FIELDS.split()
            for when in ("future", "past")
        }
        plurals, ordinals = cldr.read(
            "core", "supplemental/plurals.json", "supplemental/ordinals.json"
        )
        self.cardinal = plurals["supplemental"]["plurals-type-cardinal"][k]
        self.ordinal = ordinals["supplemental"]["plurals-type-ordinal"][k]
        (spelling,) = cldr.read("rbnf", f"rbnf/{k}.json")
        self.spelling = spelling["rbnf"]["rbnf"]["SpelloutRules"]

    def forms(self, unit: str, case: str = "unitPattern") -> dict[str, str]:
        """Plural category -> pattern, of those with words of letters alone."""
        found = self.units[unit]
        texts = {
            key.split("-")[-1]: v
            for key, v in found.items()
            if key.startswith(f"{case}-count-")
        }
        plain = re.compile(r"\{0\}( [^\W\d_]+)+")
        return {c: v for c, v in texts.items() if plain.fullmatch(v)}


def bare(sentence: str) -> str:
    """Without the dots that stand for a beginning or an end."""
    return clean(sentence.replace("...", "…").strip(" …."))


def by_category(rules: Mapping[str, str], last: int = 99) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for n in range(1, last + 1):
        found.setdefault(category(rules, n), []).append(n)
    return found


def fill_in(context: Any, pattern: str) -> str:
    return pattern.replace("{0}", str(context))


def number(p: Patterns, k: str) -> Iterator[Twin]:
    rng, numbers = draw(f"minimal_pairs number {k}"), by_category(p.cardinal)
    patterns = {unit: p.forms(unit) for unit in UNITS} | p.times
    for unit, forms in patterns.items():
        for pair in combinations([c for c in numbers if c in forms], 2):
            # The second time of two digits, where both categories have such.
            for digits in (1, 2) if inflected(*(forms[c] for c in pair)) else ():
                of = [[n for n in numbers[c] if len(str(n)) == digits] for c in pair]
                if all(of):
                    xs = [rng.choice(ns) for ns in of]
                    key = f"{unit}/{xs[0]}-{xs[1]}"
                    yield cross(key, fill_in, xs, [forms[c] for c in pair])


def ordinal(p: Patterns, k: str) -> Iterator[Twin]:
    numbers = by_category(p.ordinal)
    for tens in range(0, 100, 10):
        for pair in combinations(numbers, 2):
            xs = [[n for n in numbers[c] if tens < n <= tens + 9][:1] for c in pair]
            if all(xs):
                ns = [x[0] for x in xs]
                forms = [p.sentences[c] for c in pair]
                yield cross(f"{ns[0]}-{ns[1]}", fill_in, ns, forms)


def gender(p: Patterns, k: str) -> Iterator[Twin]:
    nouns: dict[str, list[str]] = {}
    for unit in UNITS:
        noun = p.forms(unit).get("one", "").removeprefix("{0} ")
        of, unsure = p.units[unit].get("gender"), UNSURE.get(k, "")
        if of and noun.isalpha() and not re.fullmatch(unsure, noun):
            nouns.setdefault(of, []).append(noun)
    for pair in combinations([g for g in GENDERS if g in nouns], 2):
        forms = [p.sentences[g] for g in pair]
        for a in nouns[pair[0]]:
            for b in nouns[pair[1]]:
                yield cross(f"{a}-{b}", fill_in, (a, b), forms)


def case(p: Patterns, k: str) -> Iterator[Twin]:
    rng, numbers = draw(f"minimal_pairs case {k}"), by_category(p.cardinal)

    def sentence(frame: str, form: str) -> str:
        return frame.replace("{0}", form)

    for unit in UNITS:
        for pair in combinations(CASES[k], 2):
            of = [p.forms(unit, c) for c in pair]
            frames = [p.sentences[c] for c in pair]
            for count in [c for c in numbers if c in of[0] and c in of[1]]:
                noun = of[0][count].removeprefix("{0} ")
                unsure = re.fullmatch(UNSURE.get(k, ""), noun)
                if inflected(of[0][count], of[1][count]) and not unsure:
                    for n in rng.sample(numbers[count], min(6, len(numbers[count]))):
                        key = f"{unit}/{pair[0]}-{pair[1]}/{n}"
                        forms = [fill_in(n, f[count]) for f in of]
                        yield cross(key, sentence, frames, forms)


def counter(p: Patterns, k: str) -> Iterator[Twin]:
    rng, (mark, without) = draw(f"minimal_pairs counter {k}"), COUNTERS[k]
    for when in ("future", "past"):
        month = p.times[f"month-{when}"]["other"]
        assert mark in month
        for field in without.split():
            plain = p.times[f"{field}-{when}"]["other"]
            assert mark not in plain
            # From 13 on: without the mark a lesser number is a month's name.
            for n in rng.sample(range(13, 100), 12):
                xs = [(n, month.replace(mark, "")), (n, plain)]
                key = f"{field}-{when}/{n}"
                yield cross(key, lambda x, m: with_mark(*x, m), xs, (mark, ""))


def with_mark(n: int, pattern: str, mark: str) -> str:
    """A pattern with a counter, or none, between its number and the word after it."""
    return re.sub(r"(\{0\}\s?)", rf"\g<1>{mark}", pattern).replace("{0}", str(n))


# --- Turkish ordinals


def turkish_ordinals(rules: Mapping[str, Any]) -> dict[int, str]:
    """1 to 999 in words, by CLDR's rules for spelling numbers; of those whose last word
    ends in a consonant, before which the whole suffix is harmonised."""
    texts = {
        name: {row[0]: row[-1].rstrip(";") for row in rows}
        for name, rows in rules.items()
    }
    cardinals, ordinals = (texts[f"%spellout-{k}"] for k in ("cardinal", "ordinal"))

    def base_of(n: int) -> int:
        return n if n < 10 else n // 10 * 10 if n < 100 else 100

    def word(n: int) -> str:
        if n < 10:
            return ordinals[str(n)]
        rule = ordinals[str(200 if n >= 200 else base_of(n))]
        head, suffix = rule.rstrip("→").split("→", 1)
        head = head.split("← ")[-1]
        if n >= 200:
            head = f"{cardinals[str(n // 100)]} {head}"
        rest = n % base_of(n)
        return f"{head} {word(rest)}" if rest else head + texts[suffix]["0"]

    def last(n: int) -> str:
        rest = n % base_of(n)
        return last(rest) if rest else cardinals[str(base_of(n))].split("[")[0]

    return {n: word(n) for n in range(1, 1000) if last(n)[-1] not in "aeıioöuü"}


def harmony(p: Patterns, k: str) -> Iterator[Twin]:
    """Pairs of ordinals whose suffixes have other vowels."""
    words = turkish_ordinals(p.spelling)
    numbers = draw("minimal_pairs harmony tr").sample(sorted(words), len(words))

    def fill(stem: str, vowel: str) -> str:
        return p.sentences["other"].replace("{0}.", f"{stem}{vowel}nc{vowel}")

    for a, b in zip(numbers[::2], numbers[1::2], strict=False):
        stems = [words[n][:-4] for n in (a, b)]
        vowels = [words[n][-1] for n in (a, b)]
        if vowels[0] != vowels[1]:
            yield cross(f"{a}-{b}", fill, stems, vowels)


# --- items


def chosen(twins: Sequence[Twin], trained: str, rng: random.Random) -> list[Twin]:
    """Up to `TWINS` of the candidates, as even over their keys' first parts as may be:
    few letters apart, no phrase twice and none in the training text."""
    by_head: dict[str, list[Twin]] = {}
    for key, pairs in rng.sample(twins, len(twins)):
        by_head.setdefault(key.split("/")[0], []).append((key, pairs))
    found: list[Twin] = []
    used: set[str] = set()
    while by_head and len(found) < TWINS:
        for head in rng.sample(sorted(by_head), len(by_head)):
            while by_head[head]:
                key, pairs = by_head[head].pop()
                phrases = {phrase for pair in pairs for phrase in pair}
                near = all(0 < letters(*pair) <= MOST_LETTERS for pair in pairs)
                new = near and len(phrases) == 4 and not phrases & used
                if new and not any(phrase in trained for phrase in phrases):
                    found.append((key, pairs))
                    used |= phrases
                    break
            else:
                del by_head[head]
    return sorted(found[:TWINS])


PHENOMENA: dict[str, tuple[str, Callable[[Patterns, str], Iterator[Twin]]]] = {
    "number": ("en ru de fr es it pt pl", number),
    "gender": ("ru de fr es it pt pl", gender),
    "case": ("ru de pl", case),
    "ordinal": ("en", ordinal),
    "harmony": ("tr", harmony),
    "counter": ("zh ja ko", counter),
}


def minimal_pairs(cldr: Cldr) -> list[Item]:
    """All items; in one of twins the first choice is right, in the other the second."""
    items: list[Item] = []
    for k in LANGUAGES:
        p, trained = Patterns(cldr, k), "\n".join(trained_paragraphs(k))
        for name, (languages, twins_of) in PHENOMENA.items():
            if k in languages.split():
                rng, unsure = draw(f"minimal_pairs {name} {k}"), UNSURE_FORMS.get(k, ())
                twins = [t for t in twins_of(p, k) if t[0].split("/")[0] not in unsure]
                for key, pairs in chosen(twins, trained, rng):
                    for answer, choices in enumerate((pairs[0], pairs[1][::-1])):
                        items.append(
                            {
                                "id": f"{name}/{key}/{'ab'[answer]}",
                                "language": k,
                                "phenomenon": name,
                                "choices": [c + FULL_STOP.get(k, ".") for c in choices],
                                "answer": answer,
                            }
                        )
    return items


def main(out: Path, work: Path) -> None:
    """Write this task's file alone, as `gamayun tasks build` does with all."""
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    items = minimal_pairs(Cldr(work))
    print(write_items(out / "minimal_pairs.jsonl.zst", items))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    main(**vars(parser.parse_args()))
