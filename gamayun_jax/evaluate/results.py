"""Result folders: what `gamayun eval --out` writes, and `gamayun compare` reads.

eval.json holds the summaries and all that is needed to reproduce them;
items/<task>.jsonl and items/heldout-<set>.jsonl hold one line an item, in the task's
order, so that two evaluations can be paired by language and id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gamayun_jax.config import AnyPath, UserError
from gamayun_jax.data.files import read_json_lines, write_json, write_json_lines
from gamayun_jax.storage import as_path

FORMAT = 1
# eval.json with its held-out sets among the tasks, and the items of each task.
Results = tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]


def is_result(path: AnyPath) -> bool:
    """Whether a folder is what `gamayun eval --out` wrote."""
    path = as_path(path)
    return (path / "eval.json").is_file() and (path / "items").is_dir()


def plain_name(path: AnyPath) -> str:
    """What a model is called in tables: its folder, and the step if it is given."""
    path = as_path(path).absolute()
    if path.name.isdigit() and path.parent.name == "checkpoints":
        return f"{path.parents[1].name} {path.name}"
    return path.name


def write_items(folder: Path, name: str, items: Sequence[Mapping[str, Any]]) -> None:
    """Write the scored items of a task or held-out set to FOLDER/<name>.jsonl."""
    write_json_lines(folder / f"{name}.jsonl", items)


def read_items(folder: Path, name: str) -> list[dict[str, Any]]:
    """The items that `write_items` wrote; UserError if they cannot be read."""
    path = folder / f"{name}.jsonl"
    try:
        items = read_json_lines(path)
        for number, item in enumerate(items, 1):
            if not {"id", "language"} <= item.keys():
                raise ValueError(f"line {number} has no id or language")
        return items
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): run `gamayun eval` again") from e


def write_results(
    out: AnyPath, result: Mapping[str, Any], items: Mapping[str, Sequence[Any]]
) -> None:
    """eval.json and items/ of a result folder."""
    out = as_path(out)
    (out / "items").mkdir(parents=True, exist_ok=True)
    for name, of_task in items.items():
        write_items(out / "items", name, of_task)
    write_json(out / "eval.json", result)


def with_sets(result: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation whose held-out sets are among its tasks, to be compared."""
    sets = {
        f"heldout-{name}": {
            "kind": "perplexity",
            "metric": "bits_per_byte",
            "description": f"held-out set {name}",
            "parallel": part["parallel"],
            "baseline": "xz",
            "hash": None,  # sameness is checked text by text, in compare.py
            "prompt_hash": None,
            "languages": part["languages"],
            "macro": part.get("macro", {}),
        }
        for name, part in result.get("sets", {}).items()
    }
    return {**result, "tasks": {**sets, **result.get("tasks", {})}}


def read_results(path: AnyPath) -> Results:
    """eval.json and the items of each task; held-out sets are among the tasks.

    Raises:
      UserError: they cannot be read, or are of another version.
    """
    path = as_path(path)
    try:
        text = (path / "eval.json").read_text(encoding="utf-8")
        result = with_sets(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}/eval.json cannot be read ({e!r}): run `gamayun eval --out` again"
        ) from e
    if result.get("format") != FORMAT:
        raise UserError(f"{path}/eval.json is of another version: run it again")
    return result, {n: read_items(path / "items", n) for n in result["tasks"]}
