"""Study folders whose truth is known, written without training anything."""

import json
from pathlib import Path

import numpy as np

from gamayun_jax.study.analysis import RULES
from gamayun_jax.study.records import write_record
from gamayun_jax.study.registration import digest

LANGUAGES = ("en", "ru", "de", "fr", "tr", "ja")
ORDERS = ("staged", "single", "reversed", "ramped")
SERVED = {f"{k}/web": 400 if k == "en" else 120 for k in LANGUAGES}
UNITS = 24


def hypothesis(name, better, than, outcome=""):
    claim = f"{better['order']} is better than {than['order']}, with the same examples"
    return {"name": name, "claim": claim, "better": better, "than": than,
            "outcome": outcome}  # fmt: skip


def arm_of(size, order, rate, seeds):
    stages = [
        {"name": name, "tokens": 50_000, "mixture": {}, "schedule": {"peak": 1e-3}}
        for name in (["all"] if order == "single" else ["align", "enrich"])
    ]
    config = {"languages": list(LANGUAGES), "stages": stages, "data": {"seq_len": 128}}
    return {
        "levels": {"size": size, "order": order, "rate": rate}, "seeds": list(seeds),
        "twin": "" if order == "staged" else order,
        "average_tokens": 10_000 if rate == "constant" else 0,
        "config": config, "served": dict(SERVED), "corpus": "c" * 64,
        "tokenizer": "t" * 64,
    }  # fmt: skip


def registration(sizes=("1M", "3M"), rates=("decay", "constant"), seeds=range(6)):
    arms = [arm_of(z, o, r, seeds) for z in sizes for o in ORDERS for r in rates]
    last, rate = sizes[-1], rates[0]
    staged = {"size": last, "order": "staged", "rate": rate}
    study = {
        "name": "order",
        "question": "Does it help to serve English last, with the same examples?",
        "arms": arms,
        "outcomes": [
            {"name": "udhr", "sets": ["udhr"], "languages": "others"},
            {"name": "others", "sets": ["help", "udhr"], "languages": "others"},
            {"name": "english", "sets": ["help"], "languages": "en"},
        ],
        "primary": "others",
        "hypotheses": [
            hypothesis("order", staged, {**staged, "order": "reversed"}),
            hypothesis("stages", staged, {**staged, "order": "single"}),
            hypothesis("ramp", {**staged, "order": "ramped"}, staged),
            hypothesis("english", staged, {**staged, "order": "single"}, "english"),
        ],
        "matched": ["size"], "noise": 0.004, "worthwhile": 0.02, "exclusions": "none",
        "notes": ["The peak was tuned on the staged arm at 1M."],
    }  # fmt: skip
    frozen = {"study": study, "analysis": json.loads(json.dumps(RULES))}
    return {"sha256": digest(frozen), **frozen}


def units(rng):
    ids = [f"page{i}" for i in range(UNITS)]
    return {
        name: {
            k: {"ids": ids, "bytes": rng.integers(80, 400, UNITS).tolist()}
            for k in LANGUAGES
        }
        for name in ("help", "udhr")
    }


def record_of(frozen, row, seed, sizes, effects, rng_seed=0, sd=0.004):
    """A run's record: its arm's effect is in `effects` by order, in bits per byte."""
    levels = row["levels"]
    common = np.random.default_rng([rng_seed, seed])  # of a seed, in all arms
    own = np.random.default_rng(
        [rng_seed, seed, *(sum(map(ord, v)) for v in levels.values())]
    )
    level = 2.0 if levels.get("size", "1M") == "1M" else 1.7
    level += common.normal(0, 0.02) + effects.get(levels["order"], 0.0)
    level += own.normal(0, sd)
    bits, sets = {}, {}
    for name, of_set in sizes.items():
        for n, (k, of) in enumerate(of_set.items()):
            each = np.array(of["bytes"]) * (
                level + 0.05 * n + own.normal(0, 0.02, UNITS)
            )
            bits.setdefault(name, {})[k] = np.round(each, 2).tolist()
            mean = round(float(each.sum() / sum(of["bytes"])), 6)
            sets.setdefault(name, {})[k] = mean
    curve = [
        {
            "step": 5 * i, "tokens": 2500 * i, "loss": level + 4 / i,
            "languages": {k: level + 4 / i + own.normal(0, 0.05) for k in LANGUAGES},
        }
        for i in range(1, 41)
    ]  # fmt: skip
    record = {
        "arm": "-".join(levels.values()), "seed": seed, "sha256": frozen["sha256"],
        "status": "done", "corpus": row["corpus"], "steps": 200, "tokens": 100_000,
        "served": dict(SERVED), "sets": sets, "bits": bits, "curve": curve,
        "made_with": {"device": "cpu", "dtype": "float32", "side_by_side": 16,
                      "seconds": 100.0 + seed,
                      "versions": {"jax": "0.9", "gamayun_jax": "1.0"}},
    }  # fmt: skip
    if row["average_tokens"]:
        record["raw"] = {
            name: {k: v + 0.01 for k, v in of.items()} for name, of in sets.items()
        }
    return record


def curricula(frozen):
    made = {}
    for row in frozen["study"]["arms"]:
        order, even = row["levels"]["order"], 1 / len(LANGUAGES)
        first = {f"{k}/web": even for k in LANGUAGES}
        second = {f"{k}/web": 0.7 if k == "en" else 0.06 for k in LANGUAGES}
        if order == "reversed":
            first, second = second, first
        if order == "single":
            first = second = {k: (first[k] + second[k]) / 2 for k in first}
        half = 50_000 if order != "ramped" else 100_000
        points = [{"tokens": 0, "shares": first}]
        if order != "ramped":
            points.append({"tokens": half, "shares": first})
            points.append({"tokens": half, "shares": second})
        points.append({"tokens": 100_000, "shares": second})
        end = 1e-3 if row["levels"].get("rate") == "constant" else 0.0
        stages = [
            {"name": "align", "start_tokens": 0, "end_tokens": 50_000},
            {"name": "enrich", "start_tokens": 50_000, "end_tokens": 100_000},
        ]
        made["-".join(row["levels"].values())] = {
            "seq_len": 128,
            "stages": stages[: 1 if order == "single" else 2],
            "shares": points,
            "rates": [[0, 0.0], [10_000, 1e-3], [50_000, 1e-3], [100_000, end]],
            "table": [
                {"phase": "align", "source": k, "share": 0.1, "examples": n,
                 "epochs": n / 500, "epochs_total": n / 500}
                for k, n in SERVED.items()
            ],
        }  # fmt: skip
    return made


def write_study(
    folder: Path, effects=None, frozen=None, change=None, pictures=True, rng_seed=0
):
    """A study's folder with the records of all its runs.

    Args:
      effects: order -> bits per byte that it adds.
      change: called with every record; returns it, another one, or None for none.
    """
    frozen = frozen or registration()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(frozen, indent=1, ensure_ascii=False)
    (folder / "registration.json").write_text(text + "\n")
    sizes = units(np.random.default_rng(rng_seed))
    told = {frozen["study"]["arms"][0]["corpus"]: sizes}
    (folder / "units.json").write_text(json.dumps(told))
    if pictures:
        (folder / "curricula.json").write_text(json.dumps(curricula(frozen)))
    for row in frozen["study"]["arms"]:
        for seed in row["seeds"]:
            record = record_of(frozen, row, seed, sizes, effects or {}, rng_seed)
            record = change(record) if change else record
            if record:
                write_record(folder, record)
    return folder
