"""Write docs/config.md: every field of a config, from the dataclasses themselves.

    python docs/make_config_reference.py

A field's description is the comment beside it or above it; what it may hold is its
annotation, which fields.py checks.
"""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from gamayun_jax import config
from gamayun_jax.fields import LOCAL, hints_of

OUT = Path(__file__).with_name("config.md")
HEAD = """# Every field of a config

Made from the code by `python docs/make_config_reference.py`: what a field is, what it
may hold and its default. `--set a.b=value` sets one on the command line; of a stage or
a source the name stands in the path: `--set stages.align.schedule.peak=1e-3`.
"""


def comments_of(kind: type) -> dict[str, str]:
    """Field -> the comment beside its line, or above it."""
    text = textwrap.dedent(inspect.getsource(kind))
    lines: dict[int, tuple[bool, str]] = {}  # line -> stands alone, comment
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt"):
            alone = not token.line[: token.start[1]].strip()
            lines[token.start[0]] = alone, token.string.lstrip("# ").strip()
    found = {}
    body = ast.parse(text).body[0]
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above, line = [], node.lineno - 1
        while line in lines and lines[line][0]:
            above.insert(0, lines[line][1])
            line -= 1
        beside = [
            lines[n][1]
            for n in range(node.lineno, (node.end_lineno or node.lineno) + 1)
            if n in lines and not lines[n][0]
        ]
        found[node.target.id] = " ".join([*above, *beside])
    return found


def type_text(hint: Any) -> str:
    """A field's type as people say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bound = "a path on this machine" if args[1][0] == LOCAL else args[1][0]
        return f"{type_text(args[0])}, {bound}"
    if origin is Literal:
        return " \\| ".join(f"`{x}`" for x in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else type_text(a) for a in args)
    if origin is tuple:
        return f"list of {type_text(args[0])}"
    if origin is not None and args:
        return f"{type_text(args[0])} → {type_text(args[-1])}"
    if dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    return {"str": "text", "float": "number"}.get(hint.__name__, hint.__name__)


def default_text(field: dataclasses.Field[Any]) -> str:
    """A field's default; "required" without one."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        if dataclasses.is_dataclass(value):
            return "its own defaults"
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        return "its own defaults"
    return f"`{value}`" if value not in ("", (), {}, None) else "none"


def parts_of(kind: Any, path: str, seen: set[Any]) -> Iterator[tuple[str, type]]:
    """(path, dataclass) of a config's parts, each dataclass once."""
    if kind in seen:
        return
    seen.add(kind)
    yield path, kind
    for name, hint in hints_of(kind).items():
        for part in parts_in(hint):
            inner = f"{path}.{name}".lstrip(".")
            many = typing.get_origin(hint) is tuple
            yield from parts_of(part, f"{inner}.NAME" if many else inner, seen)


def parts_in(hint: Any) -> Iterator[Any]:
    """The dataclasses in a type."""
    if dataclasses.is_dataclass(hint):
        yield hint
    for inner in typing.get_args(hint):
        yield from parts_in(inner)


def reference() -> str:
    """The page."""
    parts = [HEAD]
    for path, kind in parts_of(config.Config, "", set()):
        parts.append(f"## {kind.__name__}\n")
        if path:
            parts.append(f"`{path}`\n")
        parts.append(f"{inspect.cleandoc(kind.__doc__ or '')}\n")
        parts.append("| field | type | default | |\n|---|---|---|---|")
        comments, hints = comments_of(kind), hints_of(kind)
        for field in dataclasses.fields(kind):
            told = comments.get(field.name, "").replace("|", "\\|")
            row = (f"`{field.name}`", type_text(hints[field.name]), default_text(field))
            parts.append(f"| {' | '.join((*row, told))} |".replace("|  |", "| |"))
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    OUT.write_text(reference(), encoding="utf-8")
