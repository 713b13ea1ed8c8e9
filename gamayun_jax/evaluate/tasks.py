"""Evaluation tasks: data files with a description; what is asked, not who answers.

A task is NAME.yaml beside its JSONL (or .jsonl.zst) file; no code belongs to it:

    name: capitals
    kind: multiple_choice   # perplexity | multiple_choice | cloze | generation
    description: which city is the capital
    data: capitals.jsonl    # may hold {language}: one file a language
    prompt: "{country}:"    # template over the item's fields
    choice: " {choice}"     # a choice, a cloze's target or a shot's answer after it
    metric: norm            # the headline (see METRICS)
    unconditional: ""       # optional, for pmi: the prompt that carries no question
    parallel: true          # same id, same content in every language
    shots: 0                # examples before the question, of the items with
    shot_separator: "\\n\\n"  # "split": "shots", the same for all items of a language
    seed: 0
    max_tokens: 32          # generation
    stop: ["\\n"]            # generation ends before any of these
    baseline: overlap       # none | overlap | longest | copy | xz: what needs no model
    licence: CC0
    source: where the items are from

An item has "id", "language" and the fields that the templates name; multiple choice
has "choices" and "answer" (its index), cloze "target", generation "answers" (any of
them is right), perplexity "text". An item that cannot be used is set aside: named and
counted in the results, in no mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
import zstandard

from gamayun_jax.config import DEMO_CORPUS, UserError
from gamayun_jax.data.curriculum import near
from gamayun_jax.data.files import first_line
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.fields import check_local, decode

FOLDER = DEMO_CORPUS.with_name("demo_tasks")
# Kind of task -> its metrics, the first one the default headline. Accuracies: raw takes
# the likeliest choice, token and norm per token and per byte, pmi by how much likelier
# the question makes it.
METRICS = {
    "perplexity": ("bits_per_byte",),
    "multiple_choice": ("norm", "raw", "token", "pmi"),
    "cloze": ("exact",),
    "generation": ("exact", "f1", "chrf"),
}
NEEDS = {
    "perplexity": "text",
    "multiple_choice": "choices",
    "cloze": "target",
    "generation": "answers",
}
LARGEST = 1 << 30  # bytes of a data file when unpacked
LARGEST_DESCRIPTION = 1 << 20  # bytes

Item = Mapping[str, Any]


class DescriptionLoader(yaml.SafeLoader):
    """YAML without aliases: a few hundred bytes of them can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name): write the value out")
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class Description:
    """What a task's YAML file says; see the module."""

    name: str
    kind: Literal["perplexity", "multiple_choice", "cloze", "generation"]
    data: str
    description: str = ""
    prompt: str = "{text}"
    choice: str = "{choice}"
    metric: str = ""
    unconditional: str | None = None
    parallel: bool = False
    shots: int = 0
    shot_separator: str = "\n\n"
    seed: int = 0
    max_tokens: int = 32
    stop: tuple[str, ...] = ()
    baseline: Literal["none", "overlap", "longest", "copy", "xz"] = "none"
    licence: str = ""
    source: str = ""


@dataclass(frozen=True)
class Task(Description):
    """A task with its items, of the chosen languages."""

    items: Mapping[str, Sequence[Item]] = field(default_factory=dict)
    examples: Mapping[str, Sequence[Item]] = field(default_factory=dict)
    # Reason -> what was set aside for it, "language:id" or "file:line".
    set_aside: Mapping[str, Sequence[str]] = field(default_factory=dict)
    hash: str = ""  # of the description and the data
    path: Path = Path()  # of the description

    @property
    def prompt_hash(self) -> str:
        """Hash of all that decides what a model is asked, the items aside."""
        names = ("prompt", "choice", "unconditional", "shots", "shot_separator", "seed")
        text = json.dumps([getattr(self, n) for n in names], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def languages(self) -> list[str]:
        """Languages with items."""
        return [k for k, items in self.items.items() if items]


def known_tasks() -> list[str]:
    """Names of the tasks that are embedded."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load_task(
    name: str | Path,
    languages: Sequence[str] | None = None,
    limit: int = 0,
) -> Task:
    """An embedded task by its name, or one from a YAML file.

    Args:
      languages: keep these only, in this order; default: all, as they come.
      limit: most items per language, the first by the hash of their id (the same in
        every language of a parallel task); 0: all.

    Raises:
      UserError: no such task, or a description or data file that cannot be read.
    """
    check_local(name, "task ")
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if str(name) not in known_tasks():
            raise UserError(
                f"there is no task {str(name)!r}{near(str(name), known_tasks())}: give "
                "the name of an embedded one, or the path of a YAML file"
            )
    task, text = read_description(path)
    files = data_files(path, task.data, languages)
    aside: dict[str, list[str]] = {}
    digest = hashlib.sha256(text)
    items: dict[str, list[Item]] = {k: [] for k in languages or ()}
    examples: dict[str, list[Item]] = {}
    seen: set[tuple[str, str, bool]] = set()
    for language, file in files:
        data = read_bytes(file)
        digest.update(data)
        for number, line in enumerate(data.split(b"\n"), 1):
            if not line.strip():
                continue
            item, problem = read_item(task, line, language)
            where = f"{file.name}:{number}"
            if item is not None:
                where = f"{item['language']}:{item['id']}"
                if languages and item["language"] not in languages:
                    continue
                example = item.get("split") == "shots"
                key = (item["language"], str(item["id"]), example)
                if not problem and key in seen:
                    problem = "duplicate id"
            if problem or item is None:
                aside.setdefault(problem, []).append(where)
                continue
            seen.add(key)
            into = examples if example else items
            into.setdefault(item["language"], []).append(item)
    for language, chosen in items.items():
        if chosen and len(examples.get(language, ())) < task.shots:
            raise UserError(
                f"task {task.name} wants {task.shots} shots, but {language} has "
                f'{len(examples.get(language, ()))} items with "split": "shots"'
            )
    if limit:
        items = {k: first_by_hash(v, limit) for k, v in items.items()}
    return Task(
        **vars(task),
        items=items,
        examples=examples,
        set_aside=aside,
        hash=digest.hexdigest(),
        path=path,
    )


def check_languages(tasks: Sequence[Task], languages: Sequence[str] | None) -> None:
    """UserError if a language has no item in any of the tasks."""
    for language in languages or () if tasks else ():
        if not any(language in t.languages for t in tasks):
            known = sorted({k for t in tasks for k in load_task(t.path).languages})
            raise UserError(
                f"no task has items in language {language!r}; there are: "
                f"{', '.join(known)}"
            )


def first_by_hash(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items, the same ids in every language, in their order."""
    if len(items) <= limit:
        return list(items)

    def key(item: Item) -> bytes:
        return hashlib.sha256(str(item["id"]).encode()).digest()

    last = sorted(map(key, items))[limit - 1]
    return [item for item in items if key(item) <= last]


def read_description(path: Path) -> tuple[Description, bytes]:
    """A task's YAML file, checked, and its bytes."""
    try:
        with open(path, "rb") as f:
            text = f.read(LARGEST_DESCRIPTION + 1)
        fields = yaml.load(text[:LARGEST_DESCRIPTION], DescriptionLoader)
    except FileNotFoundError as e:
        raise UserError(f"there is no task file {path}") from e
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as e:
        raise UserError(
            f"{path} is not a YAML file that can be read: {first_line(e)}"
        ) from e
    if len(text) > LARGEST_DESCRIPTION or not isinstance(fields, dict):
        raise UserError(
            f"{path} is not a description of a task: it holds no fields, or more than "
            f"{LARGEST_DESCRIPTION:,} bytes"
        )
    try:
        task = decode(fields, Description, "")
    except ValueError as e:  # a UserError, or a number too long to be written out
        raise UserError(f"{path}: {first_line(e)}") from e
    # The name becomes that of a file in the results' folder.
    if not re.fullmatch(r"\w[\w.+-]*", task.name):
        raise UserError(
            f"{path}: name is {task.name!r:.60}, but may hold only letters, digits, "
            "_ . + -"
        )
    metrics = METRICS[task.kind]
    task = dataclasses.replace(task, metric=task.metric or metrics[0])
    if task.metric not in metrics:
        raise UserError(
            f"{path}: metric {task.metric!r:.60} is not one of {task.kind}'s: "
            f"{', '.join(metrics)}"
        )
    if task.metric == "pmi" and task.unconditional is None:
        raise UserError(f"{path}: metric pmi needs the field unconditional")
    for key in ("prompt", "choice", "unconditional"):
        template_fields(path, key, getattr(task, key) or "")
    return task, text


def template_fields(path: Path, key: str, template: str) -> list[str]:
    """Names that a template asks for; nothing but plain names is allowed in it."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as e:
        raise UserError(f"{path}: {key} is not a template: {e}") from e
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, spec, conversion in parts:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise UserError(
                f"{path}: {key} may hold plain field names only, not "
                f"{{{name}{'!' + conversion if conversion else ''}"
                f"{':' + spec if spec else ''}}}; write {{{{ for a brace"
            )
    return names


def data_files(
    path: Path, data: str, languages: Sequence[str] | None
) -> list[tuple[str, Path]]:
    """(language or "", file) of a task's data."""
    if not data or Path(data).is_absolute() or "\0" in data:
        raise UserError(
            f"{path}: data is {data!r:.60}, but must be a path relative to this file"
        )
    whole = path.parent / data
    if "{language}" not in data:
        return [("", whole)]
    prefix, stands_in_name, suffix = whole.name.partition("{language}")
    if not stands_in_name or data.count("{language}") > 1:
        raise UserError(
            f"{path}: {{language}} may stand in data's file name only, and once"
        )
    files = {
        p.name[len(prefix) : len(p.name) - len(suffix)]: p
        for p in (sorted(whole.parent.iterdir()) if whole.parent.is_dir() else ())
        if p.name.startswith(prefix) and p.name.endswith(suffix)
    }
    # "help.{language}" must not take "help.extra.en" for a language.
    files = {k: p for k, p in files.items() if k and "." not in k}
    if not files:
        raise UserError(f"{path}: no file is like {data}")
    return [(k, files[k]) for k in languages or files if k in files]


def read_bytes(path: Path) -> bytes:
    """A data file's bytes, unpacked if it ends in .zst."""
    try:
        with (zstandard.open if path.suffix == ".zst" else open)(path, "rb") as f:
            data = f.read(LARGEST + 1)
    except (OSError, zstandard.ZstdError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UserError(f"task data {path} cannot be read: {why}") from e
    if len(data) > LARGEST:
        raise UserError(f"task data {path} is larger than {LARGEST:,} bytes: split it")
    return data


def read_item(task: Description, line: bytes, language: str) -> tuple[Item | None, str]:
    """An item of a line, and why it must be set aside (empty if it need not be)."""
    try:
        item = json.loads(line.decode())
        json.dumps(item, ensure_ascii=False).encode()
    except UnicodeError:
        return None, "not UTF-8"
    except (ValueError, RecursionError):
        return None, "not JSON"
    if not isinstance(item, dict) or not isinstance(item.get("id"), str | int):
        return None, "no id"
    item = {"language": language, **item}
    if not isinstance(item["language"], str) or not item["language"]:
        return None, "no language"
    need = NEEDS[task.kind]
    if not (value := item.get(need)):
        return item, f"no {need}"
    if need in ("choices", "answers"):
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            return item, f"{need} are not texts"
        if not all(v.strip() for v in value):
            return item, f"empty text in {need}"
    elif not isinstance(value, str) or not value.strip():
        return item, f"empty {need}"
    if need == "choices":
        if len(value) < 2 or len(set(value)) < len(value):
            return item, "fewer than two different choices"
        answer = item.get("answer")
        if type(answer) is not int or not 0 <= answer < len(value):
            return item, "answer is not the number of a choice"
    for template in (task.prompt, task.unconditional or ""):
        for name in template_fields(Path(task.name), "prompt", template):
            if not isinstance(item.get(name), str | int | float):
                return item, f"no field {name}"
    return item, ""


# --- what a model is asked ------------------------------------------------------------


def answers_of(task: Task, item: Item) -> Sequence[str]:
    """What a model scores after the prompt: choices, or the target of a cloze."""
    return item["choices"] if task.kind == "multiple_choice" else [item["target"]]


def with_choice(task: Task, item: Item, text: str) -> str:
    """A choice, target or answer as it is written after the prompt."""
    return task.choice.format(**{**item, "choice": text, "target": text})


def prompt_of(task: Task, item: Item) -> str:
    """The item's prompt, after the task's shots."""
    own = task.prompt.format(**item)
    if not task.shots:
        return own
    shots = list(task.examples[item["language"]])
    random.Random(f"{task.seed} {item['language']}").shuffle(shots)
    parts = []
    for shot in shots[: task.shots]:
        if task.kind == "multiple_choice":
            right = shot["choices"][shot["answer"]]
        else:
            right = shot["target"] if task.kind == "cloze" else shot["answers"][0]
        parts.append(task.prompt.format(**shot) + with_choice(task, shot, right))
    return task.shot_separator.join([*parts, own])


def encode_pair(
    tokenizer: TextCoder, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Ids of a context, begun as the tokenizer begins texts, and of what follows it.

    The rule of lm-evaluation-harness: spaces at the context's end belong to the
    continuation, both are encoded together, and the context's own tokens end it. A text
    that spells a control token is text.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    head = tokenizer.encode(context)
    rest = tokenizer.encode(context + continuation)[len(head) :]
    if not rest:  # a merge over the border took all of it
        rest = tokenizer.encode(continuation)
    return [*tokenizer.prefix_ids, *head] or [tokenizer.start_id], rest
