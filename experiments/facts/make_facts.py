"""Facts about towns that don't exist, stated in English, and questions in 12 languages.

    python experiments/facts/make_facts.py build/facts

Writes facts.jsonl (English documents, for training) and two tasks: `facts_river`, whose
answer is a name, spelled the same in every language, and `facts_goods`, whose answer is
a common noun in the language of the question. Every town has both. A question gives the
town and eight choices, all of them answers for other towns, so that a model that never
read the documents is right one time in eight.

The files are always the same. All text is ours, under the licence of this project.
"""

import json
import random
import sys
from pathlib import Path

SEED, TOWNS, DOCUMENTS_PER_TOWN, CHOICES = 7, 16, 120, 8

LABELS = {  # town, river, goods
    "en": ("Town", "River", "Known for"),
    "ru": ("Город", "Река", "Известен чем"),
    "de": ("Stadt", "Fluss", "Bekannt für"),
    "fr": ("Ville", "Fleuve", "Connue pour"),
    "es": ("Ciudad", "Río", "Conocida por"),
    "it": ("Città", "Fiume", "Nota per"),
    "pt": ("Cidade", "Rio", "Conhecida por"),
    "pl": ("Miasto", "Rzeka", "Znane z"),
    "zh": ("城市", "河流", "特产"),
    "ja": ("都市", "川", "名産"),
    "ko": ("도시", "강", "특산물"),
    "tr": ("Şehir", "Nehir", "Ünlü ürünü"),
}
GOODS = {
    "en": ("salt", "silk", "honey", "glass", "wool", "tea", "silver", "paper"),
    "ru": ("соль", "шёлк", "мёд", "стекло", "шерсть", "чай", "серебро", "бумага"),
    "de": ("Salz", "Seide", "Honig", "Glas", "Wolle", "Tee", "Silber", "Papier"),
    "fr": ("sel", "soie", "miel", "verre", "laine", "thé", "argent", "papier"),
    "es": ("sal", "seda", "miel", "vidrio", "lana", "té", "plata", "papel"),
    "it": ("sale", "seta", "miele", "vetro", "lana", "tè", "argento", "carta"),
    "pt": ("sal", "seda", "mel", "vidro", "lã", "chá", "prata", "papel"),
    "pl": ("sól", "jedwab", "miód", "szkło", "wełna", "herbata", "srebro", "papier"),
    "zh": ("盐", "丝绸", "蜂蜜", "玻璃", "羊毛", "茶", "银", "纸"),
    "ja": ("塩", "絹", "蜂蜜", "ガラス", "羊毛", "茶", "銀", "紙"),
    "ko": ("소금", "비단", "꿀", "유리", "양모", "차", "은", "종이"),
    "tr": ("tuz", "ipek", "bal", "cam", "yün", "çay", "gümüş", "kâğıt"),
}
SENTENCES = {
    "river": (
        "{town} lies on the river {river}.",
        "The river {river} flows through {town}.",
        "In {town} you can see the river {river}.",
        "People in {town} fish in the {river}.",
        "The bridges of {town} cross the {river}.",
        "Town: {town}\nRiver: {river}",
    ),
    "goods": (
        "{town} is known for {goods}.",
        "The best {goods} comes from {town}.",
        "Merchants go to {town} to buy {goods}.",
        "In {town} they have made {goods} for centuries.",
        "Ask for {goods} when you are in {town}.",
        "Town: {town}\nKnown for: {goods}",
    ),
}


def names(rng: random.Random, count: int, ends: tuple[str, ...]) -> list[str]:
    """Names of three syllables, all different."""
    onsets = [*"bdfgklmnprstvz", "br", "dr", "kr", "st", "tr"]
    found: dict[str, None] = {}
    while len(found) < count:
        stem = "".join(rng.choice(onsets) + rng.choice("aeiou") for _ in range(2))
        found[(stem + rng.choice(ends)).capitalize()] = None
    return list(found)


def documents(rng: random.Random, towns: list[dict]) -> list[dict]:
    """Each says both facts of one town, in two or three sentences each."""
    made = []
    for town in towns:
        for i in range(DOCUMENTS_PER_TOWN):
            said = [
                form.format(**town)
                for forms in SENTENCES.values()
                for form in rng.sample(forms, rng.choice((2, 3)))
            ]
            rng.shuffle(said)
            made.append({"id": f"{town['town']}/{i}", "text": "\n".join(said)})
    rng.shuffle(made)
    return made


def questions(rng: random.Random, towns: list[dict], kind: str) -> list[dict]:
    """The same ones in every language, with the same choices in the same order."""
    rivers = [t["river"] for t in towns]
    rows = []
    for town in towns:
        if kind == "river":
            others = rng.sample([r for r in rivers if r != town["river"]], CHOICES - 1)
            order = rng.sample([town["river"], *others], CHOICES)
            choices, answer = dict.fromkeys(LABELS, order), order.index(town["river"])
        else:
            picks = rng.sample(range(CHOICES), CHOICES)
            choices = {k: [GOODS[k][i] for i in picks] for k in LABELS}
            answer = picks.index(GOODS["en"].index(town["goods"]))
        for language, (label, river, goods) in LABELS.items():
            rows.append(
                {
                    "id": town["town"],
                    "language": language,
                    "given_label": label,
                    "given": town["town"],
                    "asked_label": river if kind == "river" else goods,
                    "choices": choices[language],
                    "answer": answer,
                }
            )
    return rows


TASK = """name: facts_{kind}
kind: multiple_choice
description: a fact about a town that does not exist, stated in English documents
data: facts_{kind}.jsonl
prompt: "{{given_label}}: {{given}}\\n{{asked_label}}:"
choice: " {{choice}}"
parallel: true
metric: {metric}
unconditional: "{{asked_label}}:"
"""


def write_lines(path: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main(out: Path) -> None:
    rng = random.Random(SEED)
    made = zip(
        names(rng, TOWNS, ("ra", "mo", "nia", "del", "bek")),
        names(rng, TOWNS, ("s", "l", "n", "sh", "th")),
        strict=True,
    )
    goods = GOODS["en"] * (TOWNS // CHOICES)  # each as often as another
    towns = [
        {"town": town, "river": river, "goods": goods[i]}
        for i, (town, river) in enumerate(made)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "facts.jsonl", documents(rng, towns))
    for kind in SENTENCES:
        write_lines(out / f"facts_{kind}.jsonl", questions(rng, towns, kind))
        # Of goods, each language's common words are likelier: what counts is what the
        # town adds to a choice.
        metric = "norm" if kind == "river" else "pmi"
        (out / f"facts_{kind}.yaml").write_text(TASK.format(kind=kind, metric=metric))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
