"""The notebooks: kept without outputs, with no machinery of their own, and run."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import users_environment

import gamayun_jax as gx

FOLDER = Path(__file__).parents[2] / "experiments/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NEEDS = {"5_another_model": ("transformers", "torch"), "6_plan_a_pod": ("libtpu",)}
BARS = "(read|tokenise|next_paragraph)"  # of progress
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=600, allow_errors=True).execute()
nbformat.write(notebook, sys.argv[2])
"""


def cells_of(path):
    return json.loads(path.read_text("utf-8"))["cells"]


def code_of(path):
    """The sources of a notebook's code cells, without IPython's own lines."""
    for cell in cells_of(path):
        if cell["cell_type"] == "code":
            text = "".join(cell["source"])
            yield re.sub(r"^( *)[%!].*", r"\1pass", text, flags=re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_plain(path):
    """Without outputs, so that a change of one is a change of text; short; and made of
    the package's functions alone."""
    notebook = json.loads(path.read_text("utf-8"))
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    title, setup, *_ = ("".join(c["source"]) for c in notebook["cells"])
    assert title.startswith("# ")
    assert setup == "".join(cells_of(NOTEBOOKS[0])[1]["source"])
    assert len("\n".join(code_of(path)).splitlines()) < 120
    for code in code_of(path):
        for node in ast.walk(ast.parse(code)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "gx" or node.attr in gx.__all__, node.attr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where they run: those that train the same in one worker share the run."""
    return tmp_path_factory.mktemp("notebooks")


def environment():
    """Of a kernel as a user has it."""
    return {**users_environment(), "PYTHONPATH": str(FOLDER.parents[1])}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, place):
    for name in NEEDS.get(path.stem, ()):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{path.name} needs {name}")
    out = place / f"{path.stem}.out.ipynb"
    words = [sys.executable, "-c", EXECUTE, shutil.copy(path, place), out]
    subprocess.run(words, check=True, cwd=place, env=environment())
    shown = 0
    for cell in cells_of(out):
        for output in cell.get("outputs", ()):
            source = "".join(cell["source"])
            assert output["output_type"] != "error", (source, output)
            text = "".join(output.get("text", ()))
            # Progress alone: no library speaks but those that the cell itself calls.
            if output.get("name") == "stderr" and "transformers" not in source:
                lines = re.split(r"[\r\n]+", text)
                assert all(re.fullmatch(f"({BARS}:.*)?", x.strip()) for x in lines)
            data = output.get("data", {})
            shown += bool({"text/html", "image/png", "text/markdown"} & set(data))
            plain = "".join(data.get("text/plain", ()))
            assert "image/png" in data or "<Figure" not in plain, source
            assert shown or len(plain) < 500, (source, plain)
    assert shown


@pytest.mark.slow
def test_the_readmes_snippet_runs(place):
    readme = (FOLDER.parents[1] / "README.md").read_text("utf-8")
    code = re.search(r"## In a notebook\n\n```python\n(.*?)```", readme, re.S)[1]
    words = [sys.executable, "-c", code]
    subprocess.run(words, check=True, cwd=place, env=environment())
    assert gx.read_run(place / "runs/notebook").finished
