"""Imports point one way; every module and public name says what it is."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import syntax_of

PACKAGE = Path("gamayun_jax")
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not p.stem.startswith("__"))
DATA = {"demo_corpus", "demo_tasks"}
# What the report may read through, of rooms that hold a model: they import no JAX.
JSON_ONLY = {
    "data.files",
    "data.ledger",
    "evaluate.paired",
    "training.spool",
    "training.run_folder",
    "training.ticker",
    "study.analysis",
    "study.design",
    "study.findings",
    "study.records",
    "study.registration",
}
# What every room may import. Tables: a corpus, a plan and an evaluation print the same
# kind as the report, and data may not import the report.
BASE = {"fields", "corpus_config", "stage_config", "config", "tables"}
BASE |= {"huge_pages", "storage", "lease"}
HOUSE = {*BASE, "model", "data", "training", "inference", "interop", "evaluate"}
LIGHT = (
    "training.chips"  # a table, that launching may read: it starts with Python alone
)
# Room (or module of the top floor) -> rooms and modules that it may import.
LAWS = {
    "fields": set(),
    "tables": set(),
    "buckets": {"fields"},
    "storage": {"fields", "buckets"},
    "lease": {"fields", "buckets", "storage"},
    "huge_pages": set(),
    "corpus_config": {"fields"},
    "stage_config": {"fields"},
    "config": {"fields", "corpus_config", "stage_config"},
    "model": BASE,
    "data": BASE,
    "training": {*BASE, "model", "data"},
    "inference": {*BASE, "model", "data", "training"},
    "interop": HOUSE - {"interop", "evaluate"},
    "evaluate": HOUSE - {"evaluate"},
    "report": {*BASE, *JSON_ONLY},
    "plan": {*BASE, "model", "data", "training"},
    "launch": {"fields", LIGHT},
    "train": HOUSE,
    "study": HOUSE - {"inference", "interop"} | {"train"},
    "api": HOUSE | {"report", "plan", "train"},
    "commands": HOUSE | {"report", "plan", "train", "study", "api", "launch"},
    "cli": {*BASE, "training", "commands"},
}
LINES, FUNCTION_LINES = 450, 80


def name_of(path):
    """gamayun_jax/data/files.py -> data.files."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path):
    """(package or module, name or None) of every import of a file, wherever in it."""
    for node in ast.walk(syntax_of(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for a in node.names:
                yield node.module, a.name
        elif isinstance(node, ast.Import):
            for a in node.names:
                yield a.name, None


def imports(path):
    """Modules of this package that a file imports, as room.module."""
    names = set()
    for module, name in imported(path):
        package, _, inner = module.partition(".")
        assert package != "experiments", f"{path} imports experiments"
        if package == "gamayun_jax":
            whole = f"{inner}.{name}" if inner else name or ""
            is_module = (PACKAGE / f"{whole.replace('.', '/')}.py").exists()
            names.add(whole if is_module else inner or whole)
    return names - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_rooms_keep_their_law(path):
    name = name_of(path)
    room = name.split(".")[0]
    for other in imports(path) - DATA:
        lawful = {room, *LAWS[room]} & {other, other.split(".")[0]}
        assert lawful, f"{name} imports {other}"


def test_no_cycles():
    graph = {name_of(p): imports(p) for p in MODULES}
    while graph:
        free = [m for m, needs in graph.items() if not needs & set(graph)]
        assert free, f"a cycle among {sorted(graph)}"
        for m in free:
            del graph[m]


def test_rooms_are_no_circle():
    """A room's law names only rooms that stand before it."""
    rooms = list(LAWS)
    for i, room in enumerate(rooms):
        assert LAWS[room] <= {*rooms[:i], *JSON_ONLY, LIGHT}, room


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_are_short(path):
    text, name = path.read_text(), name_of(path)
    assert len(text.splitlines()) <= LINES
    for node in ast.walk(syntax_of(path)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES, (name, node.name, lines)


@pytest.mark.parametrize("path", sorted(Path("experiments").rglob("*.py")), ids=str)
def test_experiments_import_only_config_and_presets(path):
    assert imports(path) <= {"config", "model.presets", "study.design"}


def test_only_the_entry_point_imports_cli():
    entry = PACKAGE / "__main__.py"
    paths = {*PACKAGE.rglob("*.py"), *Path("experiments").rglob("*.py")}
    assert [p for p in paths if "cli" in imports(p)] == [entry]
    assert imports(entry) == {"cli", "huge_pages", "training.xla"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_are(path):
    assert ast.get_docstring(syntax_of(path))
    assert "utils" not in path.stem


def used_elsewhere():
    """Module -> names of it that other modules import or reach through it."""
    used = {name_of(p): set() for p in MODULES}
    for path in [*MODULES, PACKAGE / "__main__.py"]:
        aliases = {}
        for node in ast.walk(syntax_of(path)):
            if isinstance(node, ast.ImportFrom):
                inner = node.module.partition(".")[2]
                for a in node.names:
                    whole = f"{inner}.{a.name}" if inner else a.name
                    aliases[a.asname or a.name] = whole
        for module, name in imported(path):
            if module.startswith("gamayun_jax.") and name:
                used.get(module.partition(".")[2], set()).add(name)
        for node in ast.walk(syntax_of(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used.get(aliases.get(node.value.id, ""), set()).add(node.attr)
    return used


def test_what_other_modules_use_is_documented():
    """Functions and classes; what only its own file uses may speak for itself."""
    missing, used = {}, used_elsewhere()
    for path in MODULES:
        names = {
            node.name
            for node in syntax_of(path).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and node.name in used[name_of(path)]
            and not ast.get_docstring(node)
        }
        if names:
            missing[name_of(path)] = names
    assert missing == {}


def test_light_modules_do_not_import_jax():
    """Neither directly nor through what they import: workers start in no time."""
    names = [*BASE, "cli", "evaluate.results", *JSON_ONLY, LIGHT]
    rooms = ("data", "report", "launch")
    names += [name_of(p) for p in MODULES if p.parent.name in rooms]
    names.remove("data.loader")
    code = f"""
import sys
import tomllib
for name in {names}:
    __import__("gamayun_jax." + name)
    found = {{"jax", "flax", "optax", "orbax"}} & set(sys.modules)
    assert not found, (name, found)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_documents_name_files_that_exist():
    """Modules in the tour of the house, pictures and links of all pages."""
    tour = Path("docs/design.md").read_text()
    names = {p.name for p in [*PACKAGE.rglob("*.py"), *Path("recipes").rglob("*.py")]}
    assert set(re.findall(r"\b\w+\.py\b", tour)) - names - {"test_layout.py"} == set()
    for page in [Path("README.md"), *Path("docs").glob("*.md")]:
        text = page.read_text()
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
        links += re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
        assert [x for x in links if not (page.parent / x).exists()] == [], page


def test_all_rooms_are_installed():
    """A package that pyproject.toml does not name is in a checkout alone."""
    setup = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {".".join(p.parent.parts) for p in PACKAGE.rglob("*.py")}
    assert rooms <= set(setup["packages"])
