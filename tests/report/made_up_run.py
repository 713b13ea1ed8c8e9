"""The records of a made-up run of two stages in twelve languages."""

import json
import random
from pathlib import Path

LANGUAGES = ("en", "ru", "de", "fr", "es", "it", "pt", "pl", "zh", "ja", "ko", "tr")
SOURCES = (*(f"{k}/help" for k in LANGUAGES), "en/hq")
TOTAL, BOUNDARY = 2_100_000_000, 1_680_000_000


def shares_at(tokens: float) -> dict[str, float]:
    """English 37 % until the boundary, then 70 %, over a short ramp."""
    f = min(1.0, max(0.0, (tokens - BOUNDARY) / 0.05 / TOTAL))
    rest = (1 - (0.37 + 0.33 * f)) / (len(LANGUAGES) - 1)
    shares = dict.fromkeys(SOURCES, rest)
    return shares | {"en/help": 0.37 - 0.12 * f, "en/hq": 0.45 * f}


def difficulty(language: str) -> float:
    return 1.0 + 0.06 * LANGUAGES.index(language)


def evaluation(step: int, label: str, quality: float, rng: random.Random) -> dict:
    """Results whose bits per byte fall from 4 by `quality`, other in each language."""
    progress, sets = step / 1000, {}
    for name, se in (("help", 0.012), ("udhr", 0.03)):
        rows = {}
        for k in LANGUAGES:
            bpb = (4.0 - quality * (progress**0.15 if progress else 0)) * difficulty(k)
            bpb = bpb * (0.55 if k in ("ru", "zh", "ja", "ko") else 0.8)
            bpb += rng.gauss(0, se / 2) + (0.2 if name == "udhr" else 0)
            rows[k] = {
                "units": 400, "tokens": 20_000, "bytes": 69_000, "bits": 69_000 * bpb,
                "bits_se": 900.0, "bits_per_byte": bpb, "bits_per_byte_se": se,
                "bits_per_unit": 172.5 * bpb, "nll": bpb * 2.39,
                "parity": 0.9 + difficulty(k) / 3 - (0.233 if k == "en" else 0),
                "accuracy": 0.002 + 0.4 * progress,
                "baselines": {
                    "uniform": 3.5 * difficulty(k), "unigram": 2.2 * difficulty(k),
                    "xz": 1.3 * difficulty(k),
                },
            }  # fmt: skip
        mean = sum(r["bits_per_byte"] for r in rows.values()) / len(rows)
        means = {"bits_per_byte": mean, "bits_per_byte_se": se / 3, "accuracy": 0.2}
        sets[name] = {"parallel": True, "languages": rows, "micro": means}
        sets[name]["macro"] = means
    stage = "align" if step <= 800 else "enrich"
    tokens = TOTAL * step // 1000
    return {
        "step": step,
        "tokens": tokens,
        "stage": stage,
        "label": label,
        "sets": sets,
    }


def train_line(step: int, quality: float, rng: random.Random) -> dict:
    x = step / 1000
    languages = {
        k: {
            "nll": (9 - quality * 1.6 * x**0.2) * (0.8 + 0.2 * difficulty(k))
            - (0.1 if x > 0.8 else 0)
            + rng.gauss(0, 0.05),
            "targets": 10_000,
            "tokens": 10_240,
        }
        for k in LANGUAGES
    }
    tokens = int(TOTAL * x)
    return {
        "kind": "train", "step": step, "tokens": tokens,
        "stage": "align" if x <= 0.8 else "enrich", "loss": 5.0, "nll": 5.0,
        "lr": 4e-3 * min(x / 0.04, 1.0, max(0.0, (1 - x) / 0.2)),
        "grad_norm": 0.5 + abs(rng.gauss(0, 0.1)), "languages": languages,
        "sources": {s: {"tokens": int(tokens * shares_at(0)[s])} for s in SOURCES},
        "time": {
            "tokens_per_s": 41_000 + rng.gauss(0, 900), "mfu": None, "seconds": 52.0,
            "data_wait_s": abs(rng.gauss(0, 0.4)),
        },
    }  # fmt: skip


def records(quality: float = 2.4, every: int = 5, evals=(0, 800, 1000)) -> dict:
    """All the records of a run: file name -> content."""
    rng = random.Random(round(quality * 1000))
    rows = []
    for phase, begin, end in (("align", 0, BOUNDARY), ("enrich", BOUNDARY, TOTAL)):
        for s in SOURCES:
            share = shares_at(end)[s] if end == TOTAL else shares_at(0)[s]
            tokens = int(share * (end - begin))
            rows.append(
                {"phase": phase, "source": s, "share": share, "tokens": tokens,
                 "epochs": tokens / 5e8, "epochs_total": tokens / 4e8}
            )  # fmt: skip
    points = [0, BOUNDARY, BOUNDARY + int(0.05 * TOTAL), TOTAL]
    lineage = {
        "run": "tiny", "started": "2026-01-02T03:04:05+00:00", "parents": [],
        "parameters": 2_361_280, "device": "1 x cpu", "init_from": None,
        "corpus": {
            "recipe": "9b83c8aad48dae91", "tokenizer": "697b98ec810dfc6c",
            "sources": {
                s: {"documents": 900, "bytes": 1_500_000_000, "tokens": 500_000_000}
                for s in SOURCES
            },
        },
        "checkpoints": [
            {"step": k, "tokens": TOTAL * k // 1000,
             "stage": "align" if k <= 800 else "enrich",
             "reason": "stage end" if k in (800, 1000) else "regular"}
            for k in range(100, 1001, 100)
        ],
        "events": [
            {"event": "resumed", "step": 300},
            {"event": "config", "step": 300, "field": "log.every_steps", "old": 10},
        ],
        "versions": {"jax": "0.10.2", "flax": "0.12.8", "python": "3.11.7"},
        "curriculum": {
            "table": rows,
            "shares": [{"tokens": p, "shares": shares_at(p)} for p in points],
        },
        "stages": [
            {"name": "align", "start_tokens": 0, "end_tokens": BOUNDARY},
            {"name": "enrich", "start_tokens": BOUNDARY, "end_tokens": TOTAL},
        ],
    }  # fmt: skip
    labels = {0: "start", 800: "end of align", 1000: "end of enrich"}
    return {
        "config.json": {"name": "tiny", "languages": list(LANGUAGES)},
        "lineage.json": lineage,
        "metrics.jsonl": [
            train_line(k, quality, rng) for k in range(every, 1001, every)
        ],
        **{
            f"eval/{k}.json": evaluation(k, labels.get(k, ""), quality, rng)
            for k in evals
        },
    }


def write_run(folder: Path, files: dict, tail: str = "") -> Path:
    (folder / "eval").mkdir(parents=True)
    for name, content in files.items():
        if name.endswith("l"):
            text = "".join(json.dumps(line) + "\n" for line in content) + tail
        else:
            text = json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def without_english(files: dict) -> dict:
    """Records of a run that has no English: nothing is told relative to it."""
    for name, record in files.items():
        if name.startswith("eval/"):
            for part in record["sets"].values():
                del part["languages"]["en"]
                for row in part["languages"].values():
                    del row["parity"]
    files["config.json"]["languages"] = [k for k in LANGUAGES if k != "en"]
    for line in files["metrics.jsonl"]:
        del line["languages"]["en"]
    return files


def with_samples(folder: Path, task: str = "names") -> Path:
    """A run's folder whose labelled evaluations have a generation task, too."""
    languages = {
        k: {"items": 3, "chrf": 0.25, "chrf_se": 0.02, "baseline": 0.2}
        for k in LANGUAGES
    }
    told = {
        "kind": "generation", "metric": "chrf", "description": "write a name",
        "parallel": True, "shots": 0, "baseline": "copy", "languages": languages,
        "macro": {"chrf": 0.25, "chrf_se": 0.02}, "gaps": [], "set_aside": {},
    }  # fmt: skip
    for path in (folder / "eval").glob("*.json"):
        record = json.loads(path.read_text())
        if not record["label"]:
            continue
        path.write_text(json.dumps(record | {"tasks": {task: told}}))
        rows = [
            {"id": f"{task}{i}", "language": k, "prompt": f"{k}: name {i}?\nA:",
             "text": f"written at {record['step']} <b>", "answers": [f"answer {i}"],
             "correct": {"chrf": 0.3, "exact": float(k == "ru")}}
            for k in LANGUAGES for i in range(3)
        ]  # fmt: skip
        items = path.with_suffix(".items")
        items.mkdir(exist_ok=True)
        (items / f"{task}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows)
        )
    return folder
