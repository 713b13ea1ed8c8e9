"""A build that is killed, refused or run twice ends with the same bytes."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_corpora import ROOT, build, one_source, some_texts, tree_hash, write_jsonl

from gamayun_jax import config as c
from gamayun_jax.config import UserError
from gamayun_jax.data import build as corpus_build
from gamayun_jax.data import (
    build_jobs,
    corpus,
    files,
    worker_pool,
)

BUILD = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
from gamayun_jax import config
from gamayun_jax.data import build
cfg = config.from_json(Path(sys.argv[1]).read_text())
build.build(cfg, Path(sys.argv[2]), workers=int(sys.argv[3]), progress=False)
"""


def start_build(cfg, tmp_path, out, workers=2):
    (tmp_path / "config.json").write_text(c.to_json(cfg))
    command = [sys.executable, "-c", BUILD, tmp_path / "config.json", out, str(workers)]
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def children_of(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def all_end(pids, seconds=10):
    """Whether the processes end (one that nobody waits for counts as ended)."""

    def runs(pid):
        try:
            return (
                Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
            )
        except OSError:
            return False

    for _ in range(seconds * 100):
        if not any(map(runs, pids)):
            return True
        time.sleep(0.01)
    return False


def kill_at_points(built, tmp_path, points, workers):
    """SIGKILL a build again and again, later each time; then let it finish."""
    cfg, found = built
    out = tmp_path / "out"
    killed = 0
    for count in points:
        process = start_build(cfg, tmp_path, out, workers)
        children = []
        while process.poll() is None:
            # os.walk doesn't mind folders that vanish while it looks.
            if sum(len(d) + len(f) for _, d, f in os.walk(out)) >= count:
                children = children_of(process.pid)
                process.kill()
                killed += 1
                break
            time.sleep(0.001)
        process.communicate()
        assert all_end(children), "workers outlive a killed build"
        if not (out / "manifest.json").exists() and (out / ".work").exists():
            with pytest.raises(UserError, match="unfinished"):
                corpus.open_corpus(out)
    build(cfg, out)
    assert tree_hash(out) == tree_hash(found.folder)
    return killed


def test_killed_build_goes_on(built, tmp_path):
    assert kill_at_points(built, tmp_path, [3, 30, 55], workers=2) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_many_points(built, tmp_path, workers):
    rng = random.Random(workers)
    points = sorted(rng.choices(range(1, 120), k=25))
    assert kill_at_points(built, tmp_path, points, workers) >= 8


def test_finished_shards_are_not_done_again(built, tmp_path, monkeypatch):
    cfg, found = built
    calls = []
    tokenise = build_jobs.tokenise

    def fails_at_third(*args):
        calls.append(args[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tokenise(*args)

    monkeypatch.setattr(corpus_build, "tokenise", fails_at_third)
    with pytest.raises(KeyboardInterrupt):
        build(cfg, tmp_path / "out")
    done = {p: p.stat().st_ino for p in (tmp_path / "out").rglob("*.records")}
    assert len(done) == 2
    former = next(iter(done)).with_suffix(".arrayrecord")  # a former version began it
    former.write_bytes(b"of another format")
    monkeypatch.setattr(corpus_build, "tokenise", tokenise)
    build(cfg, tmp_path / "out")
    assert {p: p.stat().st_ino for p in done} == done
    assert tree_hash(tmp_path / "out") == tree_hash(found.folder)


def test_ctrl_c_is_clean(built, tmp_path):
    cfg, found = built
    out = tmp_path / "out"
    process = start_build(cfg, tmp_path, out)
    while not list(out.glob(".work/scan/*")) and process.poll() is None:
        time.sleep(0.002)
    children = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert errors.count("Traceback") == 1  # the parent's own, which the CLI catches
    assert "KeyboardInterrupt" in errors
    assert all_end(children)
    build(cfg, out)
    assert tree_hash(out) == tree_hash(found.folder)


def test_dead_worker_is_said():
    with worker_pool.Pool(2) as pool:
        with pytest.raises(UserError, match="worker process"):
            list(pool.run(os._exit, [(3,)]))


def test_another_recipe_is_refused(built, tmp_path):
    cfg, found = built
    other = dataclasses.replace(
        cfg, corpus=dataclasses.replace(cfg.corpus, min_chars=2)
    )
    with pytest.raises(UserError, match="another recipe"):
        build(other, found.folder)
    # What decides whether there is a corpus, not which, may change.
    looser = dataclasses.replace(cfg.corpus, max_bad_share=0.5)
    build(dataclasses.replace(cfg, corpus=looser), found.folder)
    (tmp_path / "out" / ".work").mkdir(parents=True)
    (tmp_path / "out" / ".work" / "recipe.json").write_text('{"recipe": "x"}')
    with pytest.raises(UserError, match="unfinished one of another recipe"):
        build(cfg, tmp_path / "out")
    (tmp_path / "mine" / "sources").mkdir(parents=True)
    with pytest.raises(UserError, match="no corpus"):
        build(cfg, tmp_path / "mine")


def test_changed_input_is_another_recipe(tmp_path):
    path = tmp_path / "a.jsonl"
    cfg = one_source(write_jsonl(path, some_texts("en", 30)))
    cfg = dataclasses.replace(
        cfg,
        corpus=dataclasses.replace(cfg.corpus, tokenizer=c.TokenizerConfig(290)),
    )
    build(cfg, tmp_path / "out")
    data = bytearray(path.read_bytes())
    data[12] ^= 1  # same size
    path.write_bytes(data)
    with pytest.raises(UserError, match="another recipe"):
        build(cfg, tmp_path / "out")


def test_two_builds_of_a_folder(built, tmp_path):
    cfg, _ = built
    with files.lock(tmp_path, c.UserError("in use")):
        with pytest.raises(UserError, match="another process"):
            build(cfg, tmp_path)
