"""Write docs/api.md: what `import gamayun_jax as gx` offers, from the docstrings.

    python docs/make_api_reference.py

The examples are run by tests/api/test_api.py.
"""

import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gamayun_jax as gx
from gamayun_jax.api.columns import Columns
from gamayun_jax.api.curricula import CurriculumPreview
from gamayun_jax.api.models import Comparison, Evaluation, Model
from gamayun_jax.api.plans import Plans
from gamayun_jax.api.runs import Run
from gamayun_jax.data.corpus import Corpus

OUT = Path(__file__).with_name("api.md")
HEAD = """# In a notebook: `import gamayun_jax as gx`

Made from the code by `python docs/make_api_reference.py`; the examples are run by the
tests, on a small config `cfg` and its `run`. Paths are `str` or `Path`; where a model
is asked for, a run will do. What is returned shows itself as the output of a cell, as
figures and tables. [experiments/notebooks](../experiments/notebooks) has six notebooks,
from a curriculum to a pod's plan; [config.md](config.md) has every field of a config.
"""
# In the order of the work; a function with the class that it returns.
CONTENTS: dict[str, type | None] = {
    "load_config": None,
    "shorten": None,
    "curriculum": CurriculumPreview,
    "build_corpus": Corpus,
    "open_corpus": None,
    "train": Run,
    "read_run": Columns,
    "load_model": Model,
    "evaluate": Evaluation,
    "compare": Comparison,
    "export_hf": None,
    "import_hf": None,
    "plan": Plans,
    "UserError": None,
}
# Of a corpus, what notebooks need.
SHOWN = {Corpus: ("table", "heldout_sets", "heldout")}


def signature_of(function: Any) -> str:
    """Its parameters without the types, which stand in the text where they matter."""
    parameters = [
        p.replace(annotation=p.empty)
        for name, p in inspect.signature(function).parameters.items()
        if name != "self"
    ]
    return str(inspect.Signature(parameters)).replace(
        "<built-in function print>", "print"
    )


def told(thing: Any) -> Iterator[str]:
    """A docstring in Markdown, a paragraph or list at a time."""
    text = inspect.cleandoc(thing.__doc__ or "")
    parts = re.split(r"^(Example|Args|Returns|Raises):\n", text, flags=re.MULTILINE)
    yield parts[0].strip()
    for head, body in zip(parts[1::2], parts[2::2], strict=True):
        body = textwrap.dedent(body).strip()
        if head == "Example":
            code = re.sub(r"  # doctest: .*", "", body)
            yield f"```python\n{code}\n```"
        elif head == "Returns":
            yield f"Returns {' '.join(body.split())}"
        else:
            items = re.split(r"\n(?=\S)", body)
            lines = (" ".join(item.split()) for item in items)
            lead = "" if head == "Args" else "Raises "
            yield "\n".join(
                re.sub(r"^(\S+):", rf"- {lead}`\1`:", line) for line in lines
            )


def members(kind: type) -> Iterator[str]:
    """The public methods and properties of a class, a list item each."""
    for name in SHOWN.get(kind, [n for n in vars(kind) if not n.startswith("_")]):
        member = vars(kind).get(name)
        function, call = member, ""
        if isinstance(member, property):
            function = member.fget
        elif isinstance(member, functools.cached_property):
            function = member.func
        elif isinstance(member, classmethod):
            continue
        elif inspect.isfunction(member):
            call = signature_of(member)
        if not (inspect.isfunction(function) and function.__doc__):
            continue
        first, *rest = told(function)
        item = "\n\n".join([f"`{name}{call}`: {first}", *rest])
        yield "- " + item.replace("\n", "\n  ").replace("\n  \n", "\n\n")


def reference() -> str:
    """The page."""
    assert sorted(CONTENTS) == gx.__all__
    parts = [HEAD]
    for name, kind in CONTENTS.items():
        thing = getattr(gx, name)
        call = "" if isinstance(thing, type) else signature_of(thing)
        parts += [f"## gx.{name}", f"`gx.{name}{call}`" if call else "", *told(thing)]
        if kind is not None:
            parts += [f"### {kind.__name__}", *told(kind), *members(kind)]
    return "\n\n".join(filter(None, parts)).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    OUT.write_text(reference(), encoding="utf-8")
