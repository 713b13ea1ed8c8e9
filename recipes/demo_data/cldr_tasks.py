"""Items from the Unicode CLDR: facts, names of things and of countries, calendars.

Names and facts are of the npm packages `cldr-*` (Unicode Common Locale Data
Repository), in 12 languages. What is drawn depends
on fixed seeds and keys alone, and each position among the choices is right equally
often. An item has the same id, and the same choices in the same order, in every
language.
"""

from __future__ import annotations

import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from gamayun_jax.data.files import file_sha256
from gamayun_jax.demo_corpus import LANGUAGES
from recipes.demo_data import debian
from recipes.demo_data.decontaminate import DENSE
from recipes.demo_data.extract_text import clean

Item = dict[str, Any]

SEED = 0
CHOICES = 4
CLDR = {name: f"cldr-{name}-full@48.2.0" for name in ("annotations", "localenames")}
CLDR |= {name: f"cldr-{name}-full@48.2.0" for name in ("dates", "numbers", "units")}
CLDR |= {name: f"cldr-{name}@48.2.0" for name in ("core", "rbnf")}
DISPUTED = ("Europe/Simferopol",)  # claimed by two countries
LATIN = ("en", "de", "fr", "es", "it", "pt", "pl", "tr")
CONTINENTS = ("002", "019", "142", "150", "009")  # UN M49, as CLDR has them
# Country, city, continent, currency, language: CLDR does not have these words.
LABELS = {
    "en": "Country|City|Continent|Currency|Language",
    "ru": "Страна|Город|Континент|Валюта|Язык",
    "de": "Land|Stadt|Kontinent|Währung|Sprache",
    "fr": "Pays|Ville|Continent|Monnaie|Langue",
    "es": "País|Ciudad|Continente|Moneda|Idioma",
    "it": "Paese|Città|Continente|Valuta|Lingua",
    "pt": "País|Cidade|Continente|Moeda|Idioma",
    "pl": "Kraj|Miasto|Kontynent|Waluta|Język",
    "zh": "国家|城市|大洲|货币|语言",
    "ja": "国|都市|大陸|通貨|言語",
    "ko": "국가|도시|대륙|통화|언어",
    "tr": "Ülke|Şehir|Kıta|Para birimi|Dil",
}


def draw(task: str) -> random.Random:
    """Random numbers of one task, so that tasks do not change each other."""
    return random.Random(f"{SEED} {task}")


def place_answers(count: int, rng: random.Random) -> list[int]:
    """The right choice's position for each item: every position equally often."""
    places = [k % CHOICES for k in range(count)]
    rng.shuffle(places)
    return places


def with_choices(
    drafts: Sequence[tuple[Any, Any, Sequence[Any]]], rng: random.Random
) -> list[tuple[Any, list[Any], int]]:
    """(item, right, wrong ones) -> (item, choices, position of the right one)."""
    found = []
    for (item, right, wrong), place in zip(
        drafts, place_answers(len(drafts), rng), strict=True
    ):
        choices = list(wrong)
        choices.insert(place, right)
        found.append((item, choices, place))
    return found


class Cldr:
    """Names and facts of the Unicode Common Locale Data Repository."""

    def __init__(self, work: Path):
        self.archives = {name: debian.fetch_npm(work, CLDR[name]) for name in CLDR}
        self.text = {k: self._names(k) for k in LANGUAGES}
        facts = self.read("core", *(f"supplemental/{n}.json" for n in self.FACTS))
        self.facts = {
            n: f["supplemental"][n] for n, f in zip(self.FACTS, facts, strict=True)
        }
        grouping = self.facts["territoryContainment"]
        self.countries = sorted(grouping["UN"]["_contains"])
        for k in LATIN:  # CLDR's rule: a zone without a name is called as its id says
            for zone in self.cities_of():
                name = zone.split("/")[-1].replace("_", " ")
                self.text[k]["city"].setdefault(zone, name)

    FACTS = ("territoryContainment", "territoryInfo", "currencyData", "windowsZones")

    def read(self, archive: str, *names: str) -> list[Any]:
        """JSON files of an archive, named by their paths in it."""
        with tarfile.open(self.archives[archive]) as tar:
            return [
                json.load(tar.extractfile(f"package/{name}"))  # type: ignore[arg-type]
                for name in names
            ]

    def _names(self, k: str) -> dict[str, dict[str, str]]:
        """Of one language: "territory", "language", "currency", "city", "month", "day"
        and "thing", each key -> name."""
        files = ("territories", "languages")
        found = self.read("localenames", *(f"main/{k}/{f}.json" for f in files))
        territory, language = (
            data["main"][k]["localeDisplayNames"][f]
            for f, data in zip(files, found, strict=True)
        )
        (money,) = self.read("numbers", f"main/{k}/currencies.json")
        zones, calendar = self.read(
            "dates", f"main/{k}/timeZoneNames.json", f"main/{k}/ca-gregorian.json"
        )
        (things,) = self.read("annotations", f"annotations/{k}/annotations.json")
        gregorian = calendar["main"][k]["dates"]["calendars"]["gregorian"]
        names = {
            "territory": territory,
            "language": language,
            "currency": {
                key: value["displayName"]
                for key, value in money["main"][k]["numbers"]["currencies"].items()
                if "displayName" in value
            },
            "city": dict(cities(zones["main"][k]["dates"]["timeZoneNames"]["zone"])),
            "month": gregorian["months"]["stand-alone"]["wide"],
            "day": gregorian["days"]["stand-alone"]["wide"],
            "thing": {
                key: value["tts"][0]
                for key, value in things["annotations"]["annotations"].items()
                if "tts" in value
            },
        }
        return {
            kind: {key: clean(name) for key, name in values.items()}
            for kind, values in names.items()
        }

    def in_all(self, kind: str, key: str) -> list[str]:
        """The name in every language, [] if one lacks it."""
        names = [self.text[k][kind].get(key, "") for k in LANGUAGES]
        return names if all(names) else []

    def continent_of(self, code: str) -> str:
        """The continent's code of a country."""

        def within(group: str) -> Iterable[str]:
            for part in (
                self.facts["territoryContainment"].get(group, {}).get("_contains", ())
            ):
                yield part
                yield from within(part)

        return next(c for c in CONTINENTS if code in within(c))

    def currency_of(self, code: str) -> str:
        """The only currency that a country has today, "" if there are more or none."""
        rows = self.facts["currencyData"]["region"].get(code, ())
        now = [
            key
            for row in rows
            for key, told in row.items()
            if "_to" not in told and told.get("_tender") != "false"
        ]
        return now[0] if len(now) == 1 else ""

    def languages_of(self, code: str) -> tuple[list[str], set[str]]:
        """Official languages of a country, and all that a twentieth of it speaks."""
        spoken = self.facts["territoryInfo"].get(code, {}).get("languagePopulation", {})
        official = [
            key
            for key, v in spoken.items()
            if "official" in v.get("_officialStatus", "")
        ]
        common = {k for k, v in spoken.items() if float(v["_populationPercent"]) >= 5}
        return official, common | set(official)

    def cities_of(self) -> dict[str, str]:
        """Time zone such as "Europe/Paris" -> the country it lies in. Not those with a
        part of a country in their name, which are small places."""
        rows = (row["mapZone"] for row in self.facts["windowsZones"]["mapTimezones"])
        return {
            zone: row["_territory"]
            for row in rows
            if row["_territory"] in self.countries
            for zone in row["_type"].split()
            if zone.count("/") == 1 and zone not in DISPUTED
        }


def cities(zones: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, str]]:
    """("Europe/Paris", "Paris") of the time zones that have a name."""
    for key, value in zones.items():
        if "_type" not in value:
            yield from cities(value, f"{path}{key}/")
        elif name := value.get("exemplarCity"):
            yield f"{path}{key}", name


def tells(a: str, b: str, language: str) -> bool:
    """Whether names share the beginning of a word: Norway tells Norwegian Krone."""
    size = 2 if language in DENSE else 4
    a, b = a.casefold(), b.casefold()
    if language in DENSE:
        return any(a[i : i + size] in b for i in range(len(a) - size + 1))
    heads = {word[:size] for word in re.findall(r"\w+", a)}
    return any(len(h) > 2 and h in b for h in heads) or bool(
        heads & {word[:size] for word in re.findall(r"\w+", b)}
    )


def spread(
    facts: Sequence[tuple[str, str]], most: int, total: int, rng: random.Random
) -> list[tuple[str, str]]:
    """At most `total` (given, answer) pairs, none of the answers more than `most`."""
    counts: Counter[str] = Counter()
    found: list[tuple[str, str]] = []
    for given, answer in rng.sample(facts, len(facts)):
        if counts[answer] < most and len(found) < total:
            counts[answer] += 1
            found.append((given, answer))
    return sorted(found)


def cldr_facts(cldr: Cldr) -> list[Item]:
    """Facts whose answer cannot be guessed from the letters of the question."""
    rng = draw("cldr_facts")
    tongues = {c: cldr.languages_of(c) for c in cldr.countries}
    # kind, labels of what is given and asked, kinds of name, pairs, of one answer, all
    recipes = (
        ("city", (1, 0), ("city", "territory"), [*cldr.cities_of().items()], 2, 120),
        (
            *("continent", (0, 2), ("territory", "territory")),
            [(c, cldr.continent_of(c)) for c in cldr.countries],
            *(16, 80),
        ),
        (
            *("currency", (0, 3), ("territory", "currency")),
            [(c, key) for c in cldr.countries if (key := cldr.currency_of(c))],
            *(5, 60),
        ),
        (
            *("language", (0, 4), ("territory", "language")),
            [(c, t[0][0]) for c, t in tongues.items() if len(t[0]) == 1],
            *(5, 60),
        ),
    )
    items: list[Item] = []
    for kind, labels, names, pairs, most, total in recipes:
        given_in = [cldr.text[k][names[0]] for k in LANGUAGES]
        answer_in = [cldr.text[k][names[1]] for k in LANGUAGES]
        good = [
            (given, answer)
            for given, answer in pairs
            if cldr.in_all(names[0], given)
            and cldr.in_all(names[1], answer)
            and not any(
                tells(g[given], a[answer], k)
                for g, a, k in zip(given_in, answer_in, LANGUAGES, strict=True)
            )
        ]
        chosen = spread(good, most, total, rng)
        answers = sorted({answer for _, answer in good})
        drafts = []
        for given, answer in chosen:
            wrong = [a for a in answers if a != answer]
            if kind == "language":  # spoken there: not wrong enough
                wrong = [a for a in wrong if a not in tongues[given][1]]
            drafts.append((given, answer, rng.sample(wrong, CHOICES - 1)))
        drawn = with_choices(drafts, rng)
        for k, g, a in zip(LANGUAGES, given_in, answer_in, strict=True):
            words = LABELS[k].split("|")
            items += (
                {
                    "id": f"{kind}/{given}",
                    "language": k,
                    "kind": kind,
                    "given_label": words[labels[0]],
                    "given": g[given],
                    "asked_label": words[labels[1]],
                    "choices": [a[c] for c in choices],
                    "answer": answer,
                }
                for given, choices, answer in drawn
            )
    return sorted(items, key=lambda i: (LANGUAGES.index(i["language"]), i["id"]))


def partner(language: str) -> str:
    """The language that names are translated from: English, and Russian to English."""
    return "ru" if language == "en" else "en"


def own_name(cldr: Cldr, language: str) -> str:
    """What a language calls itself, with a capital letter."""
    name = cldr.text[language]["language"][language]
    return name[:1].upper() + name[1:]


def cldr_lexicon(cldr: Cldr, limit: int = 300) -> list[Item]:
    """Names of things that have an emoji; wrong ones are of things beside it."""
    rng = draw("cldr_lexicon")
    plain = re.compile(r"[a-z]+([ -][a-z]+){0,2}")
    seen: set[tuple[str, str]] = set()
    keys: list[str] = []
    for key, english in cldr.text["en"]["thing"].items():
        names = cldr.in_all("thing", key)
        pairs = {
            (k, name.casefold()) for k, name in zip(LANGUAGES, names, strict=False)
        }
        # A name that is the same in English, as "robot", needs no translation.
        same = sum(name.casefold() == english.casefold() for name in names) > 1
        # Emoji proper, not signs of mathematics, arrows, currencies, skin tones.
        emoji = len(key) == 1 and (ord(key) >= 0x1F300 or 0x2600 <= ord(key) < 0x2700)
        sign = re.search("tone|button|square|circle", english)
        good = emoji and plain.fullmatch(english) and not same and not sign
        if good and not pairs & seen:
            keys.append(key)
            seen |= pairs
    drafts = []
    for at in sorted(rng.sample(range(len(keys)), min(limit, len(keys)))):
        words = set(re.split("[ -]", cldr.text["en"]["thing"][keys[at]]))
        beside = [
            key
            for key in keys[max(0, at - 40) : at + 41]
            if not words & set(re.split("[ -]", cldr.text["en"]["thing"][key]))
        ]
        drafts.append((keys[at], keys[at], rng.sample(beside, CHOICES - 1)))
    return [
        {
            "id": f"U+{ord(key):04X}",
            "language": k,
            "from_label": own_name(cldr, partner(k)),
            "name": cldr.text[partner(k)]["thing"][key],
            "to_label": own_name(cldr, k),
            "choices": [cldr.text[k]["thing"][c] for c in choices],
            "answer": answer,
        }
        for drawn in [with_choices(drafts, rng)]
        for k in LANGUAGES
        for key, choices, answer in drawn
    ]


def cldr_names(cldr: Cldr, limit: int = 150, shots: int = 8) -> list[Item]:
    """Names of countries to write, with all the spellings that CLDR has."""
    rng = draw("cldr_names")
    known = [c for c in cldr.countries if cldr.in_all("territory", c)]
    chosen = rng.sample(known, min(limit + shots, len(known)))
    items = []
    for k in LANGUAGES:
        for n, code in sorted(enumerate(chosen), key=lambda pair: pair[1]):
            names = cldr.text[k]["territory"]
            variants = (f"{code}{alt}" for alt in ("", "-alt-short", "-alt-variant"))
            item: Item = {
                "id": f"country/{code}",
                "language": k,
                "from_label": own_name(cldr, partner(k)),
                "name": cldr.text[partner(k)]["territory"][code],
                "to_label": own_name(cldr, k),
                "answers": list(
                    dict.fromkeys(names[v] for v in variants if v in names)
                ),
            }
            items.append(item | ({"split": "shots"} if n < shots else {}))
    return items


def cldr_calendar(cldr: Cldr) -> list[Item]:
    """The month or weekday after three others, around the year and the week."""
    items = []
    week = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
    for k in LANGUAGES:
        for kind, keys in (("month", [str(m) for m in range(1, 13)]), ("day", week)):
            names = [cldr.text[k][kind][key] for key in keys]
            for i, key in enumerate(keys):
                told = ", ".join(names[i - j] for j in (3, 2, 1))
                row = {"id": f"{kind}/{key}", "language": k, "context": told}
                items.append({**row, "answers": [names[i]]})
    return items


def write_items(path: Path, items: Sequence[Item]) -> dict[str, Any]:
    """JSON lines, zstd level 19; returns what the manifest says of the file."""
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(lines.encode()))
    scored = (item["language"] for item in items if "split" not in item)
    return {
        "sha256": file_sha256(path),
        "compressed_bytes": path.stat().st_size,
        "bytes": len(lines.encode()),
        "rows": len(items),
        "items": dict(Counter(scored)),
    }
