"""Imports point one way; every module and public name says what it is."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path("gamayun_jax")
# From the bottom up; a module may import from lower layers, and from its own layer
# where no cycle results (checked below).
LAYERS = [
    {"config"},
    {"documents", "files"},
    {"presets", "chips", "attention", "tokenizer", "curriculum", "demo_corpus"},
    {"model", "sharding", "losses", "optim", "records", "debian", "runs"},
    {"corpus", "checkpoint"},
    {"corpus_jobs"},
    {"corpus_build"},
    {"data", "hf", "generate", "quantize"},
    {"step", "evaluate"},
    {"lineage"},
    {"figures"},
    {"train", "plan", "report"},
    {"cli"},
]
CORPUS = ("documents", "files", "corpus", "corpus_jobs", "corpus_build")
MODULES = sorted(p for p in PACKAGE.glob("*.py") if not p.stem.startswith("__"))


def imports(path):
    """Modules of this package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "gamayun_jax":
                found |= {a.name for a in node.names}
            elif node.module.startswith("gamayun_jax."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            for a in node.names:
                assert not a.name.startswith("experiments")
                if a.name.startswith("gamayun_jax."):
                    found.add(a.name.split(".")[1])
    return found - {"__version__"}


def layer(name):
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_down(path):
    for name in imports(path):
        assert layer(name) <= layer(path.stem), f"{path.stem} imports {name}"


def test_no_cycles():
    graph = {p.stem: imports(p) for p in MODULES}
    while graph:
        free = [m for m, needs in graph.items() if not needs & set(graph)]
        assert free, f"a cycle among {sorted(graph)}"
        for m in free:
            del graph[m]


@pytest.mark.parametrize("path", sorted(Path("experiments").rglob("*.py")), ids=str)
def test_experiments_import_only_config_and_presets(path):
    assert imports(path) <= {"config", "presets"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_modules_and_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    assert "utils" not in path.stem


def test_light_modules_do_not_import_jax():
    for name in ("config", "curriculum", "report", "records", "tokenizer", *CORPUS):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not any(a.name.split(".")[0] == "jax" for a in node.names), name
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in ("jax", "flax"), name
