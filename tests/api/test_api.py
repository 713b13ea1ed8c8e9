"""`import gamayun_jax as gx`: the names, their examples, and what a notebook needs."""

import ast
import dataclasses
import doctest
import importlib.util
import inspect
import io
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

import gamayun_jax as gx
from gamayun_jax import config as c
from gamayun_jax.api import columns, configs, curricula, messages, models, plans, runs
from gamayun_jax.data import corpus as corpus_module
from gamayun_jax.evaluate.stored_model import evaluate_model
from gamayun_jax.interop import huggingface
from gamayun_jax.report.report import write_report
from gamayun_jax.tables import LANGUAGES, Table

MODULES = (columns, configs, curricula, models, plans, runs)


@pytest.fixture(scope="module")
def place(config, tmp_path_factory):
    """A folder as the examples know it: build/demo-corpus, and a run in runs/tiny."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(config.data.corpus, folder / "build/demo-corpus")
    data = dataclasses.replace(config.data, corpus=Path("build/demo-corpus"))
    cfg = dataclasses.replace(config, data=data)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said = []
        run = gx.train(cfg, "runs/tiny", log=said.append)
    return folder, cfg, run, said


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place[0])
    return place


def examples():
    """Every docstring of the public names with an example."""
    finder, found = doctest.DocTestFinder(), {}
    of = [*MODULES, c.load_config, corpus_module.Corpus, corpus_module.open_corpus]
    of += [huggingface.export_hf, huggingface.import_hf]  # in this order
    for part in of:
        name = getattr(part, "__qualname__", part.__name__)
        module = sys.modules[getattr(part, "__module__", name)]
        for test in finder.find(part, name, module, globs={}):
            if test.examples:
                found[test.name] = test
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", examples())
def test_examples(name, here):
    _, cfg, run, _ = here
    test = examples()[name]
    corpus = gx.open_corpus("build/demo-corpus")
    test.globs.update(gx=gx, cfg=cfg, run=run, corpus=corpus)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    out = io.StringIO()
    doctest.DocTestRunner(optionflags=flags).run(test, out=out.write)
    assert not out.getvalue(), out.getvalue()


def test_every_public_function_has_an_example():
    functions = [getattr(gx, n) for n in gx.__all__]
    lacking = [f for f in functions if ">>> " not in (inspect.getdoc(f) or "")]
    assert {f.__name__ for f in lacking} <= {"UserError"}
    for f in functions:
        hints = inspect.signature(f).parameters.values()
        assert all(p.annotation is not p.empty for p in hints), f


def test_names_agree():
    """The list, the places, and what type checkers see."""
    tree = ast.parse(Path(gx.__file__).read_text())
    (checked,) = [n for n in tree.body if isinstance(n, ast.If)]
    typed = {a.asname: n.module for n in checked.body for a in n.names}
    assert sorted(typed) == gx.__all__ == sorted(gx.HOMES)
    assert typed == {k: f"gamayun_jax.{m}" for k, m in gx.HOMES.items()}
    assert set(gx.__all__) <= set(dir(gx))
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        _ = gx.tran


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["gx.train", "import gamayun_jax.plan.aot", "gx.load_model"]
)
def test_rooms_are_functions_whatever_is_imported_first(first):
    code = f"""
import inspect
import gamayun_jax as gx
{first}
from gamayun_jax import evaluate, plan, train
for function, module in (gx.evaluate, evaluate), (gx.plan, plan), (gx.train, train):
    assert function is module and callable(function) and module.__file__
    assert "Example" in function.__doc__ and inspect.signature(function).parameters
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_costs_nothing():
    code = "import sys, gamayun_jax as gx; print({'jax', 'numpy'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "set()\n"


def test_the_reference_is_current():
    docs = Path(__file__).parents[2] / "docs"
    maker = runpy.run_path(str(docs / "make_api_reference.py"))
    advice = "run python docs/make_api_reference.py"
    assert (docs / "api.md").read_text("utf-8") == maker["reference"](), advice


# --- lengths -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "stage1", "stage2"])
@pytest.mark.parametrize("steps", [2, 30, 100])
def test_shortened_configs_keep_their_proportions(name, steps):
    cfg = gx.load_config(name, {"optimizer.ema_tokens": 50_000_000})
    short = gx.shorten(cfg, steps)
    assert short.total_steps == steps
    ratio = steps / cfg.total_steps
    unit = cfg.tokens_per_step
    for old, new in zip(cfg.stages, short.stages, strict=True):
        assert new.tokens % unit == 0
        lengths = [
            (old.tokens, new.tokens),
            (old.mixture.ramp_tokens, new.mixture.ramp_tokens),
            (old.schedule.warmup_tokens, new.schedule.warmup_tokens),
            (old.schedule.decay_tokens, new.schedule.decay_tokens),
        ]
        for a, b in lengths:
            assert bool(a) == bool(b)
            assert abs(b - a * ratio) <= 1.5 * unit
        assert new.mixture.ramp_tokens <= new.tokens
        assert new.schedule.decay_tokens <= new.tokens
    assert short.optimizer.ema_tokens >= unit
    for a, b in (
        (cfg.checkpoint.every_steps, short.checkpoint.every_steps),
        (cfg.log.every_steps, short.log.every_steps),
        (cfg.evaluation.every_steps, short.evaluation.every_steps),
    ):
        assert bool(a) == bool(b)
        assert b == 0 or steps / b <= 20 or b == 1
    assert dataclasses.replace(
        short, stages=cfg.stages, optimizer=cfg.optimizer, log=cfg.log,
        checkpoint=cfg.checkpoint, evaluation=cfg.evaluation,
    ) == cfg  # fmt: skip


def test_shortened_mixtures_have_the_same_shares(tmp_path):
    changes = {"stages.align.mixture.max_epochs": 2.0, "data.corpus": tmp_path}
    cfg = gx.load_config("tiny", changes)
    sizes = {s.name: 30_000 * (k + 1) for k, s in enumerate(cfg.corpus.sources)}
    sources = tuple(
        dataclasses.replace(s, tokens=sizes[s.name]) for s in cfg.corpus.sources
    )
    corpus = dataclasses.replace(cfg.corpus, sources=sources)
    cfg = dataclasses.replace(cfg, corpus=corpus)
    long, short = (gx.curriculum(x) for x in (cfg, gx.shorten(cfg, 100)))
    for a, b in zip(long.rows, short.rows, strict=True):
        assert a["source"] == b["source"]
        assert a["share"] == pytest.approx(b["share"], abs=2e-3)


def test_configs_that_cannot_be_shortened(config):
    assert gx.shorten(config, 1000) is config
    with pytest.raises(gx.UserError, match="less than one for each of 2 stages"):
        gx.shorten(config, 1)
    with pytest.raises(gx.UserError, match="steps='100' is no whole number"):
        gx.shorten(config, "100")


@pytest.mark.parametrize(
    "take", ["shorten", "curriculum", "build_corpus", "train", "plan"]
)
def test_a_name_is_no_config(take):
    more = {"train": ("run",), "plan": ("v5e:4x4",)}.get(take, ())
    with pytest.raises(gx.UserError, match=r"'tiny' is no config: gx.load_config"):
        getattr(gx, take)("tiny", *more)


def test_configs_by_name_and_changes_as_a_mapping():
    changes = {
        "seed": 3,
        "data.max_epochs": np.inf,
        "stages.align.token_weights.scheme": "none",
        "evaluation.tasks": ["help"],
        "log.tensorboard": False,
    }
    cfg = gx.load_config("tiny", changes)
    assert cfg == gx.load_config(
        Path("experiments/tiny.py"),
        ["seed=3", "data.max_epochs=inf", "stages.align.token_weights.scheme=none",
         'evaluation.tasks=["help"]', "log.tensorboard=false"],
    )  # fmt: skip
    with pytest.raises(gx.UserError, match=r"'tinny'\. Did you mean 'tiny'\?.*stage2"):
        gx.load_config("tinny")
    with pytest.raises(gx.UserError, match=r"did you mean experiments/tiny\.py\?"):
        gx.load_config("experiments/tinny.py")
    assert len(repr(cfg)) < 160


# --- runs --------------------------------------------------------------------------


def test_a_run_is_its_records(here):
    _, cfg, run, said = here
    assert any("step 13/13" in line for line in said)
    assert run.config == cfg
    assert Path(run) == Path("runs/tiny")
    lines = Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert list(run.history["step"]) == [r["step"] for r in records]
    assert run.history["nll/ru"][-1] == records[-1]["languages"]["ru"]["nll"]
    assert len({len(column) for column in run.history.values()}) == 1
    assert sum(run.tokens_by_language.values()) == 13 * cfg.tokens_per_step
    last = json.loads(Path("runs/tiny/eval/13.json").read_text())
    scores = run.scores
    mine = (scores["step"] == 13) & (scores["language"] == "tr")
    (value,) = scores["value"][mine]
    assert value == last["sets"]["udhr"]["languages"]["tr"]["bits_per_byte"]
    assert isinstance(run.table("udhr"), Table)
    assert "end of enrich" in str(run)
    with pytest.raises(gx.UserError, match=r"only on udhr"):
        run.table("help")
    with pytest.raises(gx.UserError, match="choose of loss, udhr, nll"):
        run.curves("lost")
    for unknown in ("uk", ["en", "uk"]):
        with pytest.raises(gx.UserError, match="'uk' is not among en, ru, tr"):
            run.curves(languages=unknown)
    assert run.curves("udhr", ["macro"]).axes[0].lines
    one, same = (run.curves(languages=k).axes[0].lines for k in ("ru", ["ru"]))
    assert len(one) == len(same)


def test_columns_without_pandas_or_with(here):
    _, _, run, _ = here
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(ImportError, match="pandas"):
            run.history.to_pandas()
    else:
        assert list(run.history.to_pandas()) == list(run.history)
    with_gap = columns.Columns.of([{"a": 1.5}, {"a": None}], ["a"])
    assert np.isnan(with_gap["a"][1])


def test_everything_shows_itself(here):
    folder, cfg, run, _ = here
    scored = gx.evaluate(run, languages=["ru"])
    _, items = evaluate_model(run.folder, (), languages=["ru"], limit=1)
    assert all(len(rows) == 1 for rows in items.values())
    shown = [run, gx.curriculum(cfg), scored, gx.compare(scored, scored)]
    for thing in shown:
        html = thing._repr_html_()
        assert html.startswith('<div class="gamayun-jax">')
        assert html.count("<div") == html.count("</div>")
        assert ":root" not in html  # rules of a page would be the notebook's
        assert len(repr(thing)) < 200
    figures = [run.curves(), run.curves("udhr"), run.curves("lr")]
    figures += [shown[1].figure()]
    for figure in figures:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert figure._repr_png_().startswith(b"\x89PNG")
    assert "pyplot" not in str(sys.modules.get("matplotlib.pyplot", ""))
    corpus = gx.open_corpus(folder / "build/demo-corpus")
    assert corpus._repr_markdown_().startswith("| source |")
    assert run.table()._repr_markdown_().count("\n") == 3 + 3


def test_unbuilt_curricula_show_themselves(config, tmp_path):
    data = dataclasses.replace(config.data, corpus=str(tmp_path / "none"))
    preview = gx.curriculum(dataclasses.replace(config, data=data))
    assert preview.corpus is None
    assert preview.weights == {}
    assert "there is no corpus" in preview.notes[0]
    assert "there is no corpus" in preview._repr_html_()


def test_weights_and_shares_make_the_objective(here):
    _, cfg, *_ = here
    preview = gx.curriculum(cfg)
    for k, stage in enumerate(cfg.stages):
        shares = preview.plan.language_shares(cfg, k)
        weights = preview.weights[stage.name]
        objective = preview.objective[stage.name]
        assert sum(objective.values()) == pytest.approx(1.0)
        for name, weight in weights.items():
            assert shares[name] * weight == pytest.approx(objective[name])
    # Unweighted, but no loss is on the tokens that begin documents.
    assert list(preview.weights["enrich"].values()) == pytest.approx([1.0] * 3, 0.02)


@pytest.mark.slow
def test_paths_may_be_texts(here, tmp_path):
    """Everything that takes a path; the other tests give Paths, and runs for models."""
    _, cfg, run, _ = here
    out = str(tmp_path)
    assert gx.build_corpus(cfg, "build/demo-corpus")
    assert gx.curriculum(cfg, init_from="runs/tiny").tokens_before == 13 * 512
    assert run.write_report(f"{out}/report").is_file()
    scored = gx.evaluate("runs/tiny", corpus="build/demo-corpus", languages=["ru"])
    assert scored.write(f"{out}/scored").is_file()
    compared = gx.compare(f"{out}/scored", f"{out}/scored", out=f"{out}/compared")
    assert "udhr" in str(compared)
    assert Path(out, "compared/index.html").is_file()
    gx.export_hf("runs/tiny", f"{out}/hf")
    gx.import_hf(f"{out}/hf", f"{out}/imported")
    assert gx.load_model(f"{out}/hf").generate("To", max_tokens=2) is not None
    other = gx.shorten(dataclasses.replace(cfg, seed=1), 2)
    quiet = dict(init_from="runs/tiny", log=lambda text: None)
    assert gx.train(other, f"{out}/run", **quiet).finished
    assert write_report(["runs/tiny", f"{out}/run"], f"{out}/both").is_file()


# --- cells -------------------------------------------------------------------------


def test_an_interrupted_cell_saves_and_goes_on(here, tmp_path):
    _, cfg, run, _ = here
    said = []

    def log(text):
        said.append(text)
        if "step 4/13" in text:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped and saved; the same call"):
        gx.train(cfg, tmp_path / "run", log=log)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stopped = gx.read_run(tmp_path / "run")
    assert not stopped.finished
    assert ": at step" in repr(stopped)
    assert any("saved at step" in line for line in said)
    said.clear()
    again = gx.train(cfg, tmp_path / "run", log=said.append)
    assert any("going on from step" in line for line in said)
    np.testing.assert_array_equal(again.history["loss"], run.history["loss"])
    said.clear()
    gx.train(cfg, tmp_path / "run", log=said.append)
    assert said == [f"{tmp_path}/run was finished before: all 13 steps are done"]


def test_training_works_in_a_thread(here, tmp_path):
    _, cfg, run, _ = here
    made = []
    thread = threading.Thread(
        target=lambda: made.append(
            gx.train(cfg, tmp_path / "run", log=lambda text: None)
        )
    )
    thread.start()
    thread.join()
    np.testing.assert_array_equal(made[0].history["loss"], run.history["loss"])


# --- errors ------------------------------------------------------------------------


def raised(function, *args, **kwargs):
    with pytest.raises(gx.UserError) as error:
        function(*args, **kwargs)
    return str(error.value)


def test_errors_are_in_words_of_calls(here, tmp_path):
    _, cfg, run, _ = here
    told = "`gamayun corpus build CONFIG --out x/y`: give --out or --init-from"
    assert messages.in_words_of_calls(told, {"out"}) == (
        "`gx.build_corpus(cfg, 'x/y')`: give out or --init-from"
    )
    told = "`gamayun corpus build CONFIG --out Ann's`"
    assert messages.in_words_of_calls(told, ()) == '`gx.build_corpus(cfg, "Ann\'s")`'
    other = dataclasses.replace(cfg, seed=cfg.seed + 1)
    assert raised(gx.train, other, run).endswith("or use another workdir")
    assert "leave fresh out" in raised(gx.train, cfg, run, fresh=True)
    assert "init_from" in raised(gx.train, cfg, run, init_from=run)
    assert raised(gx.load_config, "tiny", ["seed"]).startswith("'seed': write")
    assert raised(gx.load_config, "tiny", {"sed": 1}).startswith("sed: there is no")
    nowhere = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, corpus="no"))
    assert "make it with `gx.build_corpus(cfg, 'no')`" in raised(
        gx.train, nowhere, tmp_path / "new"
    )
    assert raised(gx.plan, cfg, "v9").startswith("topology 'v9'")


# Options of commands that have no call: their rooms are not reached from a notebook.
COMMANDS_ALONE = {
    "arms", "coordinator", "distributed", "eval", "gen", "last", "measured",
    "num-processes", "process-id", "restart", "share", "side-by-side", "steps",
    "text-field", "window",
}  # fmt: skip


def test_options_in_errors_are_parameters_of_calls():
    """Outside of the commands, whose words these are."""
    known = {
        p for n in gx.__all__ for p in inspect.signature(getattr(gx, n)).parameters
    }
    package, found = Path(gx.__file__).parent, {}
    for path in sorted(package.rglob("*.py")):
        own = {"commands", "launch", "cli.py", "xla.py"}  # rooms that no call reaches
        if own & {path.parent.name, path.name}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise) or "UserError" not in ast.unparse(node):
                continue
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            text = " ".join(t for t in texts if isinstance(t, str))
            text = re.sub("`[^`]*`", "", text)
            for option in re.findall("--([a-z][a-z-]+)", text):
                if option.replace("-", "_") not in known | {"set"}:
                    found.setdefault(option, []).append(path.name)
    assert set(found) <= COMMANDS_ALONE, found


def test_languages_have_one_order(here):
    """That which is asked for, and else the config's, in scores and comparisons."""
    for languages in (None, ["tr", "en"]):
        scored = gx.evaluate(
            "runs/tiny", tasks=["udhr"], corpus="build/demo-corpus", limit=1,
            languages=languages,
        )  # fmt: skip
        order = languages or list(here[1].languages)
        assert list(scored.result["sets"]["udhr"]["languages"]) == order
        of_task = [*order, *(k for k in LANGUAGES[:12] if k not in order)]
        of_task = languages or of_task
        assert list(scored.result["tasks"]["udhr"]["languages"]) == of_task
        compared = gx.compare(scored, scored).result
        assert compared.languages("heldout-udhr") == [*order, "macro"]
        assert compared.languages("udhr") == [*of_task, "macro"]
