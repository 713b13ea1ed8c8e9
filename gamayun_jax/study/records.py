"""A finished run's record, small enough to be kept with the code: one JSON file.

records/ARM/SEED.json
  arm, seed, sha256     the run, and the registration that it belongs to
  status                "done", or "diverged" with the reason in `why`
  steps, tokens, served source -> examples, as the run itself counted them
  sets                  held-out set -> language -> bits per byte at the end
  raw                   the same of the last parameters, where `sets` is of an average
  bits                  held-out set -> language -> bits of each unit, rounded to 0.01
  curve                 [{step, tokens, loss, languages: {language: nats per token}}]
  made_with             device, dtype, versions, side_by_side, seconds

units.json has, of each set and language, the units' ids and sizes in bytes; they are
the same for all runs on a corpus.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gamayun_jax.config import UserError
from gamayun_jax.data.files import write_text

Items = Mapping[str, list[dict[str, Any]]]  # "heldout-SET" -> its units


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
            key = record["arm"], record["seed"]
            given = record["sha256"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} is damaged: delete it, and the run is made again"
            ) from None
        if path != record_path(folder, *key):
            raise UserError(f"{path} is the record of arm {key[0]}, seed {key[1]}")
        if sha256 and given != sha256:
            raise UserError(
                f"{path} belongs to another registration ({given[:16]}, not "
                f"{sha256[:16]}): keep the records of a study apart from others"
            )
        found[key] = record
    return found


def bits_of(items: Items) -> dict[str, dict[str, list[float]]]:
    """Set -> language -> bits of each unit, in the order of the items."""
    made: dict[str, dict[str, list[float]]] = {}
    for name, rows in items.items():
        by = made.setdefault(name.removeprefix("heldout-"), {})
        for row in rows:
            by.setdefault(row["language"], []).append(round(row["bits"], 2))
    return made


def write_units(folder: Path, corpus: str, items: Items) -> None:
    """Write the units of a corpus's held-out sets, if that is not done yet.

    Args:
      corpus: hash of its contents.
    """
    path = folder / "units.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if corpus in known:
        return
    sets: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for name, rows in items.items():
        by = sets.setdefault(name.removeprefix("heldout-"), {})
        for row in rows:
            of = by.setdefault(row["language"], {"ids": [], "bytes": []})
            of["ids"].append(row["id"])
            of["bytes"].append(row["bytes"])
    known[corpus] = sets
    lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in known.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_units(folder: Path) -> dict[str, Any]:
    """Corpus's hash -> set -> language -> {"ids", "bytes"}."""
    return json.loads((folder / "units.json").read_text("utf-8"))
