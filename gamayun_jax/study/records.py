"""A finished run's record, small enough to be kept with the code: one JSON file.

records/ARM/SEED.json
  arm, seed, sha256     the run, and the registration that it belongs to
  status                "done", or "diverged" with the reason in `why`
  steps, tokens, served source -> examples, as the run itself counted them
  sets                  held-out set or task -> language -> bits per byte at the end, or
                        per question of a multiple-choice task
  raw                   the same of the last parameters, where `sets` is of an average
  bits                  set or task -> language -> bits of each unit, rounded to 0.01
  curve                 [{step, tokens, loss, languages: {language: nats per token}}]
  made_with             device, dtype, versions, side_by_side, seconds

units.json has, of each set and language, the units' ids and sizes in bytes (a question
counts as 1); they are the same for all runs on a corpus.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax.config import UserError
from gamayun_jax.data.files import read_json, write_text

# "heldout-SET" or a task's name -> its units, as evaluators give them.
Items = Mapping[str, Sequence[Mapping[str, Any]]]


def record_path(folder: Path, arm: str, seed: int) -> Path:
    """Where a run's record is."""
    return folder / "records" / arm / f"{seed}.json"


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a run's record whole, a field a line."""
    fields = (
        f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False, allow_nan=False)}"
        for k, v in record.items()
    )
    path = record_path(folder, record["arm"], record["seed"])
    write_text(path, "{\n" + ",\n".join(fields) + "\n}\n")


def read_records(folder: Path, sha256: str = "") -> dict[tuple[str, int], dict]:
    """(arm, seed) -> record, of all that are finished.

    Args:
      sha256: of the registration that they must belong to; "": any.

    Raises:
      UserError: a record that cannot be read, that is of another registration or
        another run than its name says.
    """
    found = {}
    for path in sorted((folder / "records").glob("*/*.json")):
        try:
            record = json.loads(path.read_text("utf-8"))
            check_record(record)
            given = record["sha256"]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(
                f"{path} is damaged ({e}): delete it, and the run is made again"
            ) from None
        key = record["arm"], record["seed"]
        if path != record_path(folder, *key):
            raise UserError(f"{path} is the record of arm {key[0]}, seed {key[1]}")
        if sha256 and given != sha256:
            raise UserError(
                f"{path} belongs to another registration ({given[:16]}, not "
                f"{sha256[:16]}): keep the records of a study apart from others"
            )
        found[key] = record
    return found


def check_record(record: Mapping[str, Any]) -> None:
    """Raise an error of Python's for a record that is not as `finish` writes it."""
    if not isinstance(record["arm"], str) or type(record["seed"]) is not int:
        raise ValueError("arm or seed")
    if record["status"] == "diverged":
        return
    if record["status"] != "done":
        raise ValueError(f"status {record['status']!r}")
    if not all(type(n) is int for n in record["served"].values()):
        raise ValueError("served")
    for part in ("sets", "raw") if "raw" in record else ("sets",):
        for name, by in record[part].items():
            for language, value in by.items():
                if not (isinstance(value, float | int) and math.isfinite(value)):
                    raise ValueError(f"{part} of {name}, {language}: {value}")
    for name, by in record["sets"].items():
        if by.keys() != record["bits"][name].keys():
            raise ValueError(f"languages of {name}")


def check_sums(record: Mapping[str, Any], units: Mapping[str, Any]) -> None:
    """Raise UserError unless a record's results are the sums of its units' bits.

    Args:
      units: set or task -> language -> {"ids", "bytes"}, of the record's corpus.
    """
    for name, by in record["sets"].items():
        for language, value in by.items():
            bits = record["bits"][name][language]
            sizes = units.get(name, {}).get(language, {}).get("bytes", [])
            # Each unit's bits are rounded to 0.01.
            least = 0.005 * len(bits) / max(sum(sizes), 1) + 1e-6
            if len(bits) != len(sizes) or not (
                abs(sum(bits) / sum(sizes) - value) <= least
            ):
                raise UserError(
                    f"the record of arm {record['arm']}, seed {record['seed']} says "
                    f"{value} for {language} in {name!r}, and its units say otherwise: "
                    "it was edited, or is of other units than units.json; delete it, "
                    "and the run is made again"
                )


def choice_bits(item: Mapping[str, Any]) -> float:
    """Bits that a question's right choice takes among its C choices; log2(C) by chance.

    -log2 of its share of the choices' probabilities, each first divided by what the
    choice has without the question, where the task says how to ask for that.

    Args:
      item: the result of a multiple-choice item (evaluate.run_tasks).
    """
    scores_C = np.array(item["logprobs"], np.float64)
    if "unconditional" in item:
        scores_C = scores_C - np.array(item["unconditional"], np.float64)
    total = np.logaddexp.reduce(scores_C)
    return float(total - scores_C[item["answer"]]) / math.log(2)


def units_of(items: Items) -> dict[str, dict[str, dict[str, list[Any]]]]:
    """Set or task -> language -> {"ids", "bytes", "bits"} of its units, in their order.

    Generated answers have no bits, so tasks of that kind are left out.
    """
    made: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for name, rows in items.items():
        for row in rows:
            if "bits" in row:
                bits, size = row["bits"], row["bytes"]
            elif "answer" in row:
                bits, size = choice_bits(row), 1
            elif "logprobs" in row:  # cloze
                bits, size = -row["logprobs"][0] / math.log(2), row["bytes"][0]
            else:
                continue
            by = made.setdefault(name.removeprefix("heldout-"), {})
            of = by.setdefault(row["language"], {"ids": [], "bytes": [], "bits": []})
            for key, value in zip(of, (row["id"], size, bits), strict=True):
                of[key].append(value)
    return made


def bits_of(items: Items) -> dict[str, dict[str, list[float]]]:
    """Set or task -> language -> bits of each unit, rounded."""
    return {
        name: {k: [round(b, 2) for b in of["bits"]] for k, of in by.items()}
        for name, by in units_of(items).items()
    }


def means_of(items: Items) -> dict[str, dict[str, float]]:
    """Set or task -> language -> bits per byte, or per question."""
    return {
        name: {k: round(sum(of["bits"]) / sum(of["bytes"]), 6) for k, of in by.items()}
        for name, by in units_of(items).items()
    }


def write_units(folder: Path, corpus: str, items: Items) -> None:
    """Write the units of a corpus's held-out sets and tasks, if that is not done yet.

    Args:
      corpus: hash of its contents.
    """
    path = folder / "units.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if corpus in known:
        return
    known[corpus] = {
        name: {k: {"ids": of["ids"], "bytes": of["bytes"]} for k, of in by.items()}
        for name, by in units_of(items).items()
    }
    lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in known.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_units(folder: Path) -> dict[str, Any]:
    """Corpus's hash -> set or task -> language -> {"ids", "bytes"}.

    Raises:
      UserError: the file is missing or damaged.
    """
    return read_json(folder / "units.json", "take it back from where it is kept")
