"""What the fields of a configuration may hold, and how they are read, set and written.

A field's annotation is its check: one walk (`decode`) holds the values of every source
(Python, JSON, `--set`) against type, choices and bound, and names the field at fault.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import json
import math
import numbers
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")
AnyPath = str | os.PathLike[str]  # what functions for users take as a path


class UserError(ValueError):
    """Bad input: one line saying what is wrong, where, and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str):
        # Parts of a message come from files and from other errors: keep it one line.
        super().__init__(" ".join(message.splitlines()))


def causes_of(error: BaseException, contexts: bool) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on; each once.

    Args:
      contexts: also what was being handled when it was raised, as a traceback shows.
    """
    found: BaseException | None = error
    seen: set[int] = set()  # `raise e from e` makes an error its own cause
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        handled = contexts and not found.__suppress_context__
        found = found.__cause__ or (found.__context__ if handled else None)


BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> the package that reads it
SCHEMES = tuple(f"{scheme}://" for scheme in BUCKETS)
LOCAL = (
    f"a path on this machine: addresses such as {' and '.join(SCHEMES)} are not read "
    "here, copy it or mount the bucket"
)
STORED = f"a path on this machine, {' or '.join(f'{s}BUCKET/...' for s in SCHEMES)}"


def is_local(path: str | Path) -> bool:
    """Whether a path is not of the form scheme://host, which pathlib would take for a
    folder named "scheme:"."""
    if isinstance(path, Path):  # has lost one of the slashes
        return not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path))
    return "://" not in path


def is_stored(path: str | Path) -> bool:
    """Whether a path is on this machine, or in a bucket of a kind that is read."""
    bucket = f"({'|'.join(BUCKETS)}):/+[^/]{{3}}"
    return is_local(path) or re.match(bucket, str(path)) is not None


def check_local(path: str | Path, where: str) -> None:
    """Raise UserError, which begins with `where`, for a path that is not local."""
    if not is_local(path):
        raise UserError(f"{where}{path} must be {LOCAL}")


def check_there(path: AnyPath, where: str, advice: str) -> None:
    """Raise UserError, which begins with `where`, for a path at which nothing is, with
    the nearest name beside it; or for one whose bucket is not there."""
    place: Any = path
    if not isinstance(path, PurePath) or isinstance(path, Path):  # not in a bucket
        place = Path(path)
        check_local(place, where)
    if not place.exists():
        if not isinstance(place, Path):
            place.check_bucket(where)
        beside = place.parent.iterdir() if place.parent.is_dir() else ()
        near = nearest(place.name, [p.name for p in beside])
        hint = f" (did you mean {place.parent / near}?)" if near else ""
        raise UserError(f"{where}{place} does not exist{hint}: {advice}")


# Types of fields: what a value must be, as an error says it, and the test of it.
Count = Annotated[int, ("greater than 0", lambda x: x > 0)]
Whole = Annotated[int, ("at least 0", lambda x: x >= 0)]
Seed = Annotated[int, ("in [0, 2**31)", lambda x: 0 <= x < 2**31)]
DrawSeed = Annotated[int, ("in [0, 2**32)", lambda x: 0 <= x < 2**32)]  # of sampling
Axis = Annotated[
    int, ("at least 1, or -1 for what is left", lambda x: x > 0 or x == -1)
]
Positive = Annotated[float, ("greater than 0", lambda x: x > 0)]  # math.inf too
Finite = Annotated[float, ("a finite number above 0", lambda x: 0 < x < math.inf)]
Share = Annotated[float, ("a finite number of at least 0", lambda x: 0 <= x < math.inf)]
Part = Annotated[float, ("in [0, 1]", lambda x: 0 <= x <= 1)]
Mass = Annotated[float, ("in (0, 1]", lambda x: 0 < x <= 1)]
LocalPath = Annotated[str, (LOCAL, is_local)]
StoredPath = Annotated[str, (STORED, is_stored)]
Decay = Annotated[float, ("in [0, 1)", lambda x: 0 <= x < 1)]


class JSONFloat(float):
    """A number of JSON text, which has one kind: 1e6 may be given for an int there."""


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Field -> its type, bounds included; empty if `kind` is not a dataclass."""
    is_part = dataclasses.is_dataclass(kind)
    return typing.get_type_hints(kind, include_extras=True) if is_part else {}


def settle(part: Any, where: str) -> None:
    """Hold every field of a dataclass that is being made against its type.

    Lists become tuples, and numbers of other kinds (NumPy's) plain ones.

    Raises:
      UserError: the first field that does not fit, named by its path from `where`.
    """
    kind: Any = type(part)
    for name, hint in hints_of(kind).items():
        value = decode(getattr(part, name), hint, f"{where}.{name}".lstrip("."))
        object.__setattr__(part, name, value)


def decode(value: Any, hint: Any, where: str) -> Any:
    """`value`, object or plain JSON data, as type `hint`.

    Raises:
      UserError: it does not fit; names the field by its path, `where` included.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        if hint in (LocalPath, StoredPath) and isinstance(value, os.PathLike):
            # pathlib takes one of an address's slashes away.
            value = re.sub(r"^([A-Za-z][\w+.-]+):/(?!/)", r"\1://", os.fspath(value))
        value = decode(value, args[0], where)
        bound, holds = args[1]
        if not holds(value):
            raise UserError(f"{where}={value} must be {bound}")
        return value
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            choices = ", ".join(a or "''" for a in args)
            raise UserError(f"{where}={value!r} is unknown: choose one of {choices}")
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else decode(value, args[0], where)
    if hints_of(hint):
        return _decode_part(value, hint, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            item = _bare(args[0])
            forgot = item is str and isinstance(value, str)
            tip = ': did you forget a comma? Write ["..."] or ("...",)'
            what = f"a list of {item.__name__}"
            raise _expected(what, value, where, tip if forgot else "")
        return tuple(
            decode(x, args[0], f"{where}.{_name(x, i)}") for i, x in enumerate(value)
        )
    if origin is Mapping:
        if not isinstance(value, Mapping):
            what = f"a dict of str to {_bare(args[1]).__name__}"
            raise _expected(what, value, where)
        return {
            decode(k, str, f"{where}: key"): decode(v, args[1], f"{where}[{k!r}]")
            for k, v in value.items()
        }
    return _decode_plain(value, hint, where)


def _decode_part(value: Any, kind: Any, where: str) -> Any:
    """A dataclass, from an object of it or from a mapping of its fields."""
    hints = hints_of(kind)
    if isinstance(value, kind):
        value = {name: getattr(value, name) for name in hints}
    if not isinstance(value, Mapping):
        raise _expected(kind.__name__, value, where)
    at = f"{where}." if where else ""
    for key in value:
        if decode(key, str, where) not in hints:
            raise unknown_field(at + key, key, hints)
    for f in dataclasses.fields(kind):
        if f.name not in value and f.default is f.default_factory:
            raise UserError(f"{at}{f.name} is missing")
    return kind(**{k: decode(v, hints[k], at + k) for k, v in value.items()})


def _decode_plain(value: Any, kind: Any, where: str) -> Any:
    """A str, bool, int or float."""
    if kind is int and isinstance(value, JSONFloat) and value.is_integer():
        value = int(value)
    if kind is float and isinstance(value, str) and value in ("inf", "Infinity"):
        return math.inf
    number: Any = {int: numbers.Integral, float: numbers.Real}.get(kind)
    fits = isinstance(value, number or kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        whole = kind is int and isinstance(value, float) and value.is_integer()
        tip = f": write {int(value)}" if whole else ""
        raise _expected(kind.__name__, value, where, tip)
    if kind is str and value != value.encode(errors="replace").decode():
        raise _expected("text that UTF-8 can write", value, where)  # a lone surrogate
    if number is None:
        return value
    # An int stays one in a float's field: recipes of corpora are hashed as written.
    value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise _expected(f"{kind.__name__} of at most 64 bits", value, where)
    if not value > -math.inf:  # nor NaN
        raise UserError(f"{where}: {value} is not a number to compute with")
    return value


def _expected(what: str, value: Any, where: str, tip: str = "") -> UserError:
    given = repr(value)
    given = given if len(given) <= 80 else f"{given[:77]}..."
    return UserError(f"{where}: expected {what}, got {given}{tip}")


def _bare(hint: Any) -> Any:
    """A type without its bound, and without None."""
    if typing.get_origin(hint) in (Annotated, types.UnionType, typing.Union):
        return _bare(typing.get_args(hint)[0])
    return hint


def _name(item: Any, number: int) -> str:
    """How paths name an item of a tuple: by its name, or by its number."""
    name = item.get("name") if isinstance(item, dict) else getattr(item, "name", None)
    return name if isinstance(name, str) and name else str(number)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that was perhaps meant; empty if none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def unknown_field(full: str, key: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest that does."""
    near = nearest(key, known)
    hint = f" Did you mean {near!r}?" if near else ""
    return UserError(
        f"{full}: there is no field {key!r}.{hint} Known here: {', '.join(known)}"
    )


def to_dict(obj: Any) -> Any:
    """Dataclasses, tuples and mappings as plain JSON data (inf as a string)."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: to_dict(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {k: to_dict(v) for k, v in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_dict(v) for v in obj]
    if isinstance(obj, float) and math.isinf(obj):
        return "inf"
    return obj


def to_json(obj: Any) -> str:
    """A dataclass as indented JSON text."""
    return json.dumps(to_dict(obj), indent=2, ensure_ascii=False) + "\n"


def read_json(text: str, kind: type[T], where: str) -> T:
    """A dataclass from JSON text; UserError names `where` and the field at fault."""
    try:
        data = json.loads(text, parse_float=JSONFloat)
    except (ValueError, RecursionError) as e:  # too deep, or a number too long
        raise UserError(f"{where} is not JSON: {e}") from e
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is not a JSON object")
    try:
        return decode(data, kind, "")
    except UserError as e:
        raise UserError(f"{where}: {e}") from e


def call_in_file(path: Path, function: str) -> tuple[bool, Any]:
    """Run a Python file and call a function of it.

    Returns:
      whether the file defines the function, and what the function returns.

    Raises:
      UserError: no such file, and whatever the file raises, with the last of its lines
        that was run.
    """
    advice = "give a Python experiment file"
    check_there(path, "config ", advice)
    if not path.is_file():
        raise UserError(f"config {path} is a folder: {advice}")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class up there
    try:
        spec.loader.exec_module(module)
        defined = hasattr(module, function)
        return defined, getattr(module, function)() if defined else None
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # whatever the file does, sys.exit() included
        ran = [(f.filename, f.lineno) for f in traceback.extract_tb(e.__traceback__)]
        reason = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        if isinstance(e, SyntaxError):
            ran, reason = [*ran, (e.filename or "", e.lineno)], e.msg
        lines = [n for file, n in ran if file == spec.origin and n]
        at = f", line {lines[-1]}" if lines else ""
        raise UserError(f"config {path}{at}: {reason}") from e


def set_fields(obj: T, overrides: Sequence[str] | Mapping[str, Any]) -> T:
    """A dataclass with all "a.b=value" applied, or all values by "a.b"; then checked.

    Items of tuples are named by number or by their name.

    Raises:
      UserError: unknown field (with its neighbours), a value of another type or out of
        bounds, values that do not fit together.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        overrides = [f"{k}={_text(v)}" for k, v in overrides.items()]
    data, places = to_dict(obj), {}
    for override in overrides:
        key, eq, text = override.partition("=")
        if not eq or not key.strip():
            raise UserError(f"--set {override!r}: write field=value, e.g. seed=1")
        places[override] = _put(data, type(obj), key.strip(), text)
    try:
        return decode(data, type(obj), "")
    except UserError as e:
        at_fault = [
            override
            for override, place in places.items()
            if re.search(rf"(?<![\w.]){re.escape(place)}(?=[=:.\[])", str(e))
        ]
        named = " ".join(f"--set {o}" for o in at_fault or overrides)
        raise UserError(f"{named}: {e}") from e


def _text(value: Any) -> str:
    """A value as `--set` has it."""
    plain = os.fspath(value) if isinstance(value, os.PathLike) else to_dict(value)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _put(at: Any, hint: Any, path: str, text: str) -> str:
    """Put what --set gives into plain data of type `hint`; returns the field's path."""
    keys: list[Any] = path.split(".")
    where = ""
    while keys:
        inside, key = at, keys.pop(0)
        hint = _bare(hint)
        if (hints := hints_of(hint)) and isinstance(at, dict):
            if key not in hints:
                raise unknown_field(f"--set {path}", key, hints)
            hint, where, at = hints[key], f"{where}.{key}", at.get(key, {})
            if at is None and keys:  # a part that is not there yet, to be filled
                at = {}
        elif typing.get_origin(hint) is tuple and isinstance(at, list):
            names = [_name(x, i) for i, x in enumerate(at)]
            number = int(key) if key.isdecimal() else len(at)
            number = names.index(key) if key in names else number
            if number >= len(at):
                raise unknown_field(f"--set {path}", key, names)
            hint, where = typing.get_args(hint)[0], f"{where}.{names[number]}"
            key, at = number, at[number]
        elif typing.get_origin(hint) is Mapping and isinstance(at, dict):
            key, keys = ".".join([key, *keys]), []
            hint, where = typing.get_args(hint)[1], f"{where}[{key!r}]"
        else:
            raise UserError(f"--set {path}: {key!r} is inside a plain value; drop it")
        inside[key] = at
    inside[key] = _parse(text, _bare(hint))
    return where.lstrip(".")


def _parse(text: str, hint: Any) -> Any:
    """What --set gives for a field, as plain data; text where it is nothing else."""
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    try:
        if hint is float:
            return float(text)
        plain = text.replace("_", "") if hint is int else text
        return json.loads(plain, parse_float=JSONFloat)
    except (ValueError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
