"""The benchmarks' one command: what is measured becomes tables, what fails is said."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import users_environment

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def everything(monkeypatch):
    """The module benchmarks/all.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_all", FOLDER / "all.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_all", module)
    spec.loader.exec_module(module)
    return module


def test_parts_become_tables_and_failures_are_said(everything, tmp_path, monkeypatch):
    part = everything.Part
    monkeypatch.setattr(everything, "HERE", tmp_path)
    scripts = {
        "good": "rows.row('ours', 'tokens/s', [3000, 1000, 2000])\n"
        "rows.ratio('ours over theirs', [2.0, 4.0], [1.0, 1.0])",
        "fails": "rows.row('before it', 's', [1])\nraise SystemExit(3)",
        "silent": "",
        "hangs": "import time; time.sleep(60)",
    }
    for name, code in scripts.items():
        head = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import rows\n"
        (tmp_path / f"{name}.py").write_text(head + code)
    parts = {n: part(f"{n}.py", f"{n}.py", 0.05) for n in scripts}
    parts["elsewhere"] = part("good.py", "good.py", 1, needs=("no_such_module",))
    monkeypatch.setattr(everything, "PARTS", parts)
    out = tmp_path / "speed.md"
    monkeypatch.setattr(
        sys, "argv", ["all.py", "--out", str(out), "--parts", ",".join(parts)]
    )
    assert everything.main() == 1
    text = out.read_text()
    assert "| ours | 2,000 (1,000-3,000) | tokens/s |" in text
    assert "| ours over theirs | 3 (2-4) | times |" in text
    assert "| before it | 1 | s |" in text
    assert "FAILED: status 3." in text
    assert "FAILED: no figures." in text
    assert "FAILED: ended after 0.05 minutes." in text
    assert "Left out: no_such_module not installed here." in text
    assert "cores of" in text.splitlines()[0]


def test_every_part_is_a_benchmark_with_these_options(everything):
    """argparse would refuse what a benchmark does not know, when it is too late."""
    assert sum(p.minutes for p in everything.PARTS.values()) < 75
    for part in everything.PARTS.values():
        for words in (part.words, part.quick):
            script, *options = words.split()
            source = (FOLDER / script).read_text()
            assert "from rows import" in source
            for option in options:
                assert not option.startswith("--") or f'"{option}"' in source, words


@pytest.mark.slow
@pytest.mark.parametrize("name", ["huge_pages", "large_corpus", "loader", "train_step"])
def test_a_small_run_of_each_benchmark(name, tmp_path):
    out = tmp_path / "speed.md"
    command = [sys.executable, str(FOLDER / "all.py"), "--quick", "--out", str(out)]
    subprocess.run([*command, "--parts", name], check=True, env=users_environment())
    rows = [line for line in out.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) > 3, json.dumps(rows)
