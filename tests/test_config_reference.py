"""docs/config.md has every field, says something of it, and is what the code is."""

import dataclasses
import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def maker():
    spec = importlib.util.spec_from_file_location(
        "make_config_reference", DOCS / "make_config_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_whole_and_current():
    made = maker()
    advice = "run python docs/make_config_reference.py"
    assert (DOCS / "config.md").read_text("utf-8") == made.reference(), advice
    kinds = [kind for _, kind in made.parts_of(made.config.Config, "", set())]
    assert {"Config", "StageConfig", "MixtureConfig", "SourceConfig", "RopeScaling"} < {
        kind.__name__ for kind in kinds
    }
    for kind in kinds:
        told = made.comments_of(kind)
        for field in dataclasses.fields(kind):
            assert told.get(field.name), f"{kind.__name__}.{field.name}: no comment"
