"""The documents: their examples run, their links lead somewhere, none is left out."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import syntax_of

from gamayun_jax import cli
from gamayun_jax.config import DEMO_CORPUS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page, language="python"):
    text = (DOCS / page).read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_examples_of_the_questions_run():
    space = {}
    for number, code in enumerate(blocks("questions.md")):
        lines = [x for x in code.splitlines() if x.strip()]
        assert len(lines) <= 14, lines[0]
        exec(compile(code, f"questions.md, example {number}", "exec"), space)


def places(path):
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in link:
            continue
        path, _, place = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not place or place in places(target), link


def test_the_index_has_every_page():
    index = (DOCS / "README.md").read_text("utf-8")
    missing = [p.name for p in PAGES if p.name != "README.md" and p.name not in index]
    assert missing == []


def texts_of(path):
    """All texts of a module, with \0 for what is filled in."""
    for node in ast.walk(syntax_of(path)):
        if isinstance(node, ast.JoinedStr):
            known = (getattr(part, "value", None) for part in node.values)
            yield "".join(x if isinstance(x, str) else "\0" for x in known)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_errors_that_are_explained_are_errors():
    package = (ROOT / "gamayun_jax").rglob("*.py")
    known = "\n".join(text for path in package for text in texts_of(path))
    rows = re.findall(r"^\| ([^|]*) \|", (DOCS / "faq.md").read_text("utf-8"), re.M)
    quoted = [x for row in rows for x in re.findall(r"`([^`]*)`", row)]
    assert len(quoted) > 8
    for message in quoted:
        for part in message.split("..."):
            assert part.strip() in known, message


@pytest.mark.slow
def test_own_data_to_an_exported_model(tmp_path, monkeypatch, capfd):
    """The guide's config and commands, on the embedded corpus and a small model."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(blocks("own_data.md")[0])
    small = [
        "corpus.tokenizer.vocab_size=1024", "model.vocab_size=1024",
        "model.num_layers=2", "model.d_model=64", "model.num_heads=2",
        "model.num_kv_heads=1", "model.head_dim=32", "model.d_ff=128",
        "model.max_seq_len=256", "corpus.record_tokens=128", "data.seq_len=128",
        "data.batch_size=8", "data.block_examples=32", "evaluation.max_units=20",
        "evaluation.every_steps=0", "checkpoint.every_steps=20",
        "log.tensorboard=false",
        *(f"stages.{name}.{field}={1024 * steps}"
          for name, steps in (("align", 14), ("enrich", 6), ("finish", 4))
          for field in ("tokens",)),
        *(f"stages.{name}.{field}=2048" for name in ("align", "enrich", "finish")
          for field in ("mixture.ramp_tokens", "schedule.warmup_tokens")),
        "stages.finish.schedule.decay_tokens=4096",
    ]  # fmt: skip
    sets = [word for field in small for word in ("--set", field)]
    for k in ("en", "ru", "tr"):
        (tmp_path / f"data/{k}").mkdir(parents=True)
        source = DEMO_CORPUS / f"train/{k}.help.jsonl.zst"
        shutil.copy(source, tmp_path / f"data/{k}/a.jsonl.zst")
    text = (DOCS / "own_data.md").read_text("utf-8")
    commands = re.findall(r"^```\n(gamayun .*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(commands) == 4
    for line in "".join(commands).splitlines():
        words = shlex.split(line, comments=True)
        if not words or "more.py" in words:
            continue
        words = ["0.1" if w == "0.005" else w for w in words]
        if "own.py" in words:
            words += sets
        capfd.readouterr()
        assert cli.main(words[1:]) == 0, (line, capfd.readouterr().err)
    assert (tmp_path / "out/config.json").exists()
    assert (tmp_path / "runs/own/report/index.html").exists()
