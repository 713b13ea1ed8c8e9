"""Imports point one way; every module and public name says what it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path("gamayun_jax")
# From the bottom up; a module may import from lower layers, and from its own layer
# where no cycle results (checked below).
LAYERS = [
    {"config"},
    {"documents", "files"},
    {"contamination"},
    {
        "presets",
        "chips",
        "hlo",
        "xla",
        "attention",
        "tokenizer",
        "curriculum",
        "demo_corpus",
        "demo_tasks",
    },
    {"sharding", "hosts"},
    {
        "model",
        "losses",
        "optim",
        "profiling",
        "records",
        "meters",
        "signals",
        "pages",
        "runs",
    },
    {"heldout"},
    {"debian"},
    {"cldr_tasks"},
    {"task_data"},
    {"corpus", "checkpoint", "roofline"},
    {"corpus_jobs"},
    {"corpus_build"},
    {"data", "hf_model", "hf_tokenizer", "decode", "generate", "quantize", "sampling"},
    {"model_card"},
    {"step", "evaluate", "hf"},
    {"score", "tasks"},
    {"metrics"},
    {"lm_eval_adapter", "run_tasks"},
    {"lineage", "divergence"},
    {"resume"},
    {"recording"},
    {"figures", "paired"},
    {"page"},
    {"alignment"},
    {"plan_text", "stages", "task_page"},
    {"train", "plan", "report"},
    {"eval_page", "compare"},
    {"cli"},
]
CORPUS = ("documents", "files", "corpus", "corpus_jobs", "corpus_build")
MODULES = sorted(p for p in PACKAGE.glob("*.py") if not p.stem.startswith("__"))
# Used by other modules and not documented yet: take names out, add none.
UNDOCUMENTED = {
    "corpus": {"check_shard", "token_dtype"},
    "documents": {"BadDocument", "Document", "first_line"},
    "figures": {"colours_of"},
    "files": {"file_sha256", "sync", "write_text"},
    "runs": {
        "esc", "fixed", "label_of", "languages_of", "seconds_of", "sets_of", "spans",
    },
}  # fmt: skip


def imported(path):
    """(package or module, name or None) of every import of a file, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for a in node.names:
                yield node.module, a.name
        elif isinstance(node, ast.Import):
            for a in node.names:
                yield a.name, None


def imports(path):
    """Modules of this package that a file imports."""
    found = set()
    for module, name in imported(path):
        package, _, inner = module.partition(".")
        assert package != "experiments", f"{path} imports experiments"
        if package == "gamayun_jax":
            found.add(inner.split(".")[0] if inner else name)
    return found - {"__version__"}


def layer(name):
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def test_every_module_has_a_layer():
    assert [p.stem for p in MODULES if layer(p.stem) is None] == []


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


def test_only_the_entry_point_imports_cli():
    entry = PACKAGE / "__main__.py"
    paths = {*PACKAGE.rglob("*.py"), *Path("experiments").rglob("*.py")}
    assert [p for p in paths if "cli" in imports(p)] == [entry]
    assert imports(entry) == {"cli"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_modules_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert "utils" not in path.stem


def used_elsewhere():
    """Module -> names of it that other modules import or reach through it."""
    used = {p.stem: set() for p in MODULES}
    for path in [*MODULES, PACKAGE / "__main__.py"]:
        aliases = {}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "gamayun_jax":
                aliases |= {a.asname or a.name: a.name for a in node.names}
        for module, name in imported(path):
            if module.startswith("gamayun_jax.") and name:
                used.get(module.split(".")[1], set()).add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used.get(aliases.get(node.value.id, ""), set()).add(node.attr)
    return used


def test_what_other_modules_use_is_documented():
    """Functions and classes; what only its own file uses may speak for itself."""
    missing, used = {}, used_elsewhere()
    for path in MODULES:
        names = {
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and node.name in used[path.stem]
            and not ast.get_docstring(node)
        }
        if names - UNDOCUMENTED.get(path.stem, set()):
            missing[path.stem] = names
    assert missing == {}


def test_light_modules_do_not_import_jax():
    """Neither directly nor through what they import: workers start in no time."""
    names = ("config", "curriculum", "report", "records", "tokenizer", *CORPUS)
    code = f"""
import sys
for name in {names}:
    __import__("gamayun_jax." + name)
    found = {{"jax", "flax", "optax", "orbax"}} & set(sys.modules)
    assert not found, (name, found)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
