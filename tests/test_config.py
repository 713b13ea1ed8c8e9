"""Overrides are typed, errors name the field, JSON round-trips."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax.config import (
    CorpusConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    ScheduleConfig,
    UserError,
    from_json,
    load_config,
    set_fields,
    to_dict,
    to_json,
)
from gamayun_jax.data.plan import unbuilt_plan
from gamayun_jax.model import presets
from gamayun_jax.model.weights import parameter_count

EXPERIMENTS = (
    "tiny", "stage1", "stage2", "continue_tiny", "continue_qwen3", "continue_llama",
)  # fmt: skip
PRESETS = ("gamayun_1p5b", "llama3p2_1b", "qwen2p5_1p5b", "qwen3_1p7b", "tiny")


def leaves(data, path=""):
    """Dotted path -> plain value, of nested JSON data."""
    if isinstance(data, list):
        data = dict(enumerate(data))
    if not isinstance(data, dict):
        return {path: data}
    parts = [leaves(v, f"{path}.{k}".lstrip(".")) for k, v in data.items()]
    return {k: v for part in parts for k, v in part.items()}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", "seed", 7),
        ("seed=1_000", "seed", 1000),
        ("stages.align.tokens=1e6", "stages.0.tokens", 1_000_000),
        ("stages.1.tokens=2_000", "stages.1.tokens", 2000),
        ("stages.align.schedule.peak=1e-3", "stages.0.schedule.peak", 1e-3),
        ("data.max_epochs=3", "data.max_epochs", 3.0),
        ("data.max_epochs=inf", "data.max_epochs", "inf"),
        ("data.max_epochs_of.ru/help=inf", "data.max_epochs_of.ru/help", "inf"),
        ("compute.scan_layers=false", "compute.scan_layers", False),
        ("compute.scan_layers=False", "compute.scan_layers", False),
        ("name=007", "name", "007"),
        ("data.corpus=a=b", "data.corpus", "a=b"),
        ("stages.align.mixture.shares.en/*=0.4", "stages.0.mixture.shares.en/*", 0.4),
        ("stages.align.mixture.shares.en/*=1", "stages.0.mixture.shares.en/*", 1.0),
        ("corpus.sources.ru/help.text_field=x", "corpus.sources.1.text_field", "x"),
        ("corpus.heldout.udhr.files.en=x.txt", "corpus.heldout.0.files.en", "x.txt"),
    ],
)  # fmt: skip
def test_set_changes_one_field_by_its_type(wide_config, override, path, value):
    changed = set_fields(wide_config, [override])
    before, after = leaves(to_dict(wide_config)), leaves(to_dict(changed))
    assert after[path] == value
    assert type(after[path]) is type(value)
    assert {k for k in before | after if before.get(k) != after.get(k)} == {path}
    assert from_json(to_json(changed)) == changed


def test_set_takes_json_for_what_has_parts(wide_config):
    scaling = (
        '{"factor":8,"low_freq_factor":1,"high_freq_factor":4,"original_max_len":32}'
    )
    scaled = set_fields(wide_config, [f"model.rope_scaling={scaling}"])
    assert scaled.model.rope_scaling.factor == 8.0
    for none in ("none", "None", "null"):
        assert set_fields(scaled, [f"model.rope_scaling={none}"]) == wide_config
    again = set_fields(wide_config, ['languages=["tr","en","ru"]'])
    assert again.languages == ("tr", "en", "ru")


BAD = [
    # a name that is not there, with its neighbours
    ("sed=1", "Did you mean 'seed'"),
    ("sed=1", "Known here: name, languages, model, stages"),
    ("stages.align.schedule.peek=1", "Did you mean 'peak'"),
    ("stages.allign.tokens=1", "Did you mean 'align'"),
    ("stages.7.tokens=1", "Known here: align, enrich"),
    ("stages.²=1", "there is no field '²'"),
    ("seed", "write field=value"),
    ("=5", "write field=value"),
    ("seed.x=1", "plain value"),
    # another type
    ("seed=1.5", "seed: expected int, got 1.5"),
    ("seed=true", "seed: expected int, got True"),
    ("seed=", "seed: expected int, got ''"),
    ("stages.align.tokens=1e400", "expected int, got inf"),
    ("data.max_epochs=many", "data.max_epochs: expected float, got 'many'"),
    ("data.max_epochs=NaN", "data.max_epochs: nan is not a number"),
    ("data.max_epochs=-Infinity", "data.max_epochs: -inf is not a number"),
    ("model.rope_theta=true", "expected float, got True"),
    ("compute.scan_layers=3", "compute.scan_layers: expected bool, got 3"),
    ("languages=en", "a list of str, got 'en': did you forget a comma"),
    ("languages=[1]", "languages.0: expected str, got 1"),
    ("model=5", "model: expected ModelConfig, got 5"),
    ("stages=[1]", "stages.0: expected StageConfig, got 1"),
    ('model.rope_scaling={"factor":8}', "rope_scaling.low_freq_factor is missing"),
    ("stages.align.mixture.shares=5", "shares: expected a dict of str to float, got 5"),
    # a value that cannot be
    ("compute.remat=some", "choose one of none, minimal, attention, full"),
    ("log.tracker=wndb", "choose one of '', wandb, trackio"),
    ("stages.align.schedule.kind=wds", "stages.align.schedule.kind='wds' is unknown"),
    ("stages.align.token_weights.scheme=static", "lacks 'en'"),
    ("stages.align.token_weights.weights.xx=1", "names 'xx', which is not in"),
    ("stages.align.token_weights.weights.en=-1", "at least 0"),
    ("stages.align.mixture.shares.en/*=-0.1", "shares['en/*']=-0.1 must be"),
    ("stages.align.mixture.shares.en/*=inf", "must be a finite number"),
    ("stages.align.mixture.shares.en/*=NaN", "is not a number"),
    ("stages.align.mixture.scheme=uniform", "choose one of natural, temperature"),
    ("stages.align.mixture.ramp=cubic", "choose one of step, linear, cosine"),
    ("stages.align.mixture.ramp_tokens=-1", "ramp_tokens=-1"),
    ("data.block_examples=0", "block_examples=0 must be greater than 0"),
    ("stages.align.schedule.peak=0", "peak=0.0 must be a finite number above 0"),
    ("stages.align.schedule.peak=inf", "peak=inf must be a finite number"),
    ("stages.align.schedule.warmup_tokens=-1", "warmup_tokens=-1"),
    ("stages.align.tokens=0", "stages.align.tokens=0 must be greater than 0"),
    ("stages.align.name=enrich", "two are called 'enrich'"),
    ("stages=[]", "stages is empty"),
    ("languages=[]", "list each language once"),
    ('languages=["en","en","ru","tr"]', "list each language once"),
    ("compute.microbatches=5", "not a multiple of compute.microbatches=5"),
    ("compute.microbatches=0", "compute.microbatches=0 must be greater than 0"),
    ("compute.loss_chunk=-1", "compute.loss_chunk=-1"),
    ("corpus.tokenizer.shares.en=NaN", "is not a number"),
    ("corpus.tokenizer.shares.en=-1", "at least 0"),
    ("compute.loss_chunk=5", "loss_chunk=5 does not divide data.seq_len="),
    ("mesh.data=0", "mesh.data=0 must be at least 1, or -1"),
    ("mesh.fsdp=-2", "mesh.fsdp=-2 must be at least 1, or -1"),
    ("data.seq_len=128", "exceeds model.max_seq_len"),
    ("data.batch_size=0", "data.batch_size=0 must be greater than 0"),
    ("data.max_epochs=0", "data.max_epochs=0.0 must be greater than 0"),
    ("data.max_epochs_of.ru/help=-1", "data.max_epochs_of['ru/help']=-1.0"),
    ("evaluation.batch_size=0", "evaluation.batch_size=0 must be greater than 0"),
    ("optimizer.b2=1", "optimizer.b2=1.0 must be in [0, 1)"),
    ("optimizer.clip_norm=0", "optimizer.clip_norm=0.0 must be greater than 0"),
    ("seed=-1", "seed=-1 must be in"),
    ("seed=1e10", "seed=10000000000 must be in"),
    ("model.num_kv_heads=0", "model.num_kv_heads=0 must be greater than 0"),
    ("model.num_kv_heads=3", "model.num_heads=16 is not a multiple"),
    ("model.head_dim=-2", "model.head_dim=-2 must be greater than 0"),
    ("model.head_dim=5", "model.head_dim=5 is odd"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), BAD)
def test_bad_overrides_are_one_line(wide_config, override, message):
    with pytest.raises(UserError) as e:
        set_fields(wide_config, [override])
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("every", [1, 2, 5, 50])
def test_records_begin_with_a_stage_and_none_is_of_few_steps(
    wide_config, replace, every
):
    """Each is of `every` steps, to within a half at a stage's end."""
    data, steps = wide_config.data, (51, 1, 120, 26)
    stages = tuple(
        dataclasses.replace(
            wide_config.stages[0],
            name=f"s{n}",
            tokens=n * data.batch_size * data.seq_len,
            schedule=ScheduleConfig(peak=1e-3),
        )
        for n in steps
    )
    cfg = dataclasses.replace(
        wide_config, stages=stages, log=LogConfig(every_steps=every)
    )
    ends = [k for k in range(1, cfg.total_steps + 1) if cfg.ends_record(k)]
    starts = {cfg.stage_start(k) for k in range(len(steps))}
    assert starts | {cfg.total_steps} <= {0, *ends}
    for begin, end in itertools.pairwise([0, *ends]):
        assert cfg.stage_at(begin) == cfg.stage_at(end - 1)
        least = min(steps[cfg.stage_at(begin)], every / 2)
        assert least <= end - begin < 1.5 * every + 1


# Section -> field -> what a config file may say by mistake, and what is said of it.
WRONG = [
    ("data", "batch_size", 8.0, "data.batch_size: expected int, got 8.0: write 8"),
    ("data", "batch_size", "8", "data.batch_size: expected int, got '8'"),
    ("data", "corpus", None, "data.corpus: expected str, got None"),
    ("data", "corpus", 3, "data.corpus: expected str, got "),
    ("data", "corpus", "\udcff", "data.corpus: expected text that UTF-8 can write"),
    ("data", "threads", True, "data.threads: expected int, got True"),
    ("data", "seq_len", 10**30, "data.seq_len: expected int of at most 64 bits"),
    ("data", "max_epochs_of", {"en/help": "1"}, "max_epochs_of['en/help']: expected f"),
    ("data", "max_epochs_of", {1: 1.0}, "data.max_epochs_of: key: expected str, got 1"),
    ("data", "max_epochs_of", [1], "max_epochs_of: expected a dict of str to float"),
    ("model", "num_layers", 2.0, "model.num_layers: expected int, got 2.0: write 2"),
    ("model", "num_heads", "4", "model.num_heads: expected int, got '4'"),
    ("model", "rope_theta", math.nan, "model.rope_theta: nan is not a number"),
    ("checkpoint", "keep", 2.5, "checkpoint.keep: expected int, got 2.5"),
    ("checkpoint", "every_steps", None, "checkpoint.every_steps: expected int, got N"),
    ("evaluation", "tasks", "last_word", "got 'last_word': did you forget a comma?"),
    ("evaluation", "tasks", {"last_word"}, "tasks: expected a list of str, got {"),
    ("corpus", "sources", ("a.jsonl",), "corpus.sources.0: expected SourceConfig, got"),
    ("corpus", "sources", "a.jsonl", "sources: expected a list of SourceConfig, got"),
    ("corpus", "max_bad_share", 1.5, "corpus.max_bad_share=1.5 must be in [0, 1]"),
    ("compute", "remat", ["full"], "compute.remat=['full'] is unknown: choose one of"),
    ("mesh", "fsdp", -2, "mesh.fsdp=-2 must be at least 1, or -1 for what is left"),
    ("log", "every_steps", 4.5, "log.every_steps: expected int, got 4.5"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "name", "value", "message"), WRONG)
def test_a_wrong_value_in_code_is_named(
    wide_config, replace, section, name, value, message
):
    """As in a config file, where no type checker looks."""
    with pytest.raises(UserError) as e:
        replace(wide_config, f"{section}.{name}", value)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_a_wrong_value_deep_inside_is_named_by_its_path(wide_config):
    change = dataclasses.replace
    align, source = wide_config.stages[0], wide_config.corpus.sources[1]
    for wrong, message in (
        ({"name": 7}, "name: expected str, got 7"),
        ({"languages": "en"}, "languages: expected a list of str, got 'en': did you"),
        ({"data": DataConfig}, "data: expected DataConfig, got <class"),
        ({"data": LogConfig()}, "data: expected DataConfig, got LogConfig("),
        ({"stages": align}, "stages: expected a list of StageConfig, got StageConfig("),
        (
            {"stages": (change(align, schedule=change(align.schedule, floor=5)),)},
            "stages.align.schedule.floor=5 must be in [0, 1]",
        ),
        (
            {"stages": (change(align, mixture=change(align.mixture, alpha="0.3")),)},
            "stages.align.mixture.alpha: expected float, got '0.3'",
        ),
        (
            {"corpus": CorpusConfig((change(source, files="data/*.jsonl"),))},
            "corpus.sources.ru/help.files: expected a list of str, got 'data/*.jsonl': "
            "did you forget a comma?",
        ),
    ):
        with pytest.raises(UserError) as e:
            change(wide_config, **wrong)
        assert message in str(e.value)


def test_lists_and_numpy_numbers_become_plain(wide_config):
    """What comes after, --set included, meets tuples and Python's numbers only."""
    change = dataclasses.replace
    cfg = change(
        wide_config,
        languages=list(wide_config.languages),
        stages=list(wide_config.stages),
        data={"batch_size": np.int64(24), "seq_len": 23, "max_epochs": 2},
        optimizer=change(wide_config.optimizer, weight_decay=np.float32(0.5)),
    )
    assert cfg.stages == wide_config.stages
    assert cfg.languages == wide_config.languages
    assert type(cfg.data.batch_size) is int
    assert type(cfg.optimizer.weight_decay) is float
    assert from_json(to_json(cfg)) == cfg
    assert set_fields(cfg, ["stages.align.tokens=99"]).stages[0].tokens == 99


def test_json_has_one_kind_of_number(wide_config):
    """Runs made before may hold 4e3 tokens; a config file may not say it any more."""
    text = to_json(wide_config).replace('"tokens": 3584', '"tokens": 3.584e3')
    assert "3.584e3" in text
    assert to_json(from_json(text)) == to_json(wide_config)


def test_overrides_that_fit_together_in_any_order(wide_config):
    pair = ["compute.microbatches=5", "data.batch_size=40"]
    both = [set_fields(wide_config, p) for p in (pair, pair[::-1])]
    assert both[0] == both[1]
    assert (both[0].compute.microbatches, both[0].data.batch_size) == (5, 40)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parts = [f"model.rope_scaling.{k}={v}" for k, v in scaling.items()]
    with pytest.raises(UserError, match="rope_scaling.original_max_len is missing"):
        set_fields(wide_config, parts)
    full = set_fields(wide_config, [*parts, "model.rope_scaling.original_max_len=32"])
    assert full.model.rope_scaling == RopeScaling(**scaling, original_max_len=32)
    whole = ["optimizer={}", "optimizer.b1=0.5", "stages.0.name=new", "seed=2"]
    changed = set_fields(wide_config, [*whole, "stages.new.tokens=7"])
    assert (changed.stages[0].name, changed.stages[0].tokens) == ("new", 7)
    assert changed.optimizer == OptimizerConfig(b1=0.5)


def test_an_error_names_the_override_at_fault(wide_config):
    with pytest.raises(UserError) as e:
        set_fields(wide_config, ["seed=2", "stages.0.tokens=x", "name=y"])
    said = "--set stages.0.tokens=x: stages.align.tokens: expected int, got 'x'"
    assert str(e.value) == said
    with pytest.raises(UserError, match=r"^--set data.batch_size=7 --set compute.mic"):
        set_fields(
            wide_config, ["seed=2", "data.batch_size=7", "compute.microbatches=2"]
        )
    with pytest.raises(UserError, match=r"^--set name=y --set stages.0.name=enrich: "):
        set_fields(wide_config, ["name=y", "stages.0.name=enrich"])  # not by `name`


VALUES = ("0", "-1", "1e9", "0.5", "inf", "NaN", "true", "null", "[]", "{}", "[0]", "[")


def test_no_override_gives_a_traceback(wide_config):
    """Any field with any value: a config, or one line that says why not."""
    paths = [*sorted(leaves(to_dict(wide_config))), "model", "stages", "stages.align"]

    def one_line_or_config(override):
        try:
            changed = set_fields(wide_config, [override])
        except UserError as e:
            return "\n" not in str(e)
        return from_json(to_json(changed)) == changed

    @settings(max_examples=300, deadline=None)
    @given(
        st.sampled_from(paths),
        st.sampled_from(["", "x", ".0", "\n"]),
        st.sampled_from(VALUES) | st.text(max_size=4),
    )
    def check(path, tail, value):
        assert one_line_or_config(f"{path}{tail}={value}")

    check()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_round_trip_through_json(wide_config, preset):
    model = getattr(presets, preset)()
    for changes in ({}, {"tie_embeddings": False, "qkv_bias": True}):
        cfg = dataclasses.replace(
            wide_config,
            model=dataclasses.replace(model, **changes),
            data=dataclasses.replace(
                wide_config.data, max_epochs=math.inf, max_epochs_of={"a": math.inf}
            ),
        )
        text = to_json(cfg)
        assert from_json(text) == cfg
        assert to_json(from_json(text)) == text
        assert isinstance(from_json(text).model, ModelConfig)


def test_json_errors_name_the_field(wide_config):
    text = to_json(wide_config)
    with pytest.raises(UserError, match=r"model.d_fff: there is no field .*'d_ff'"):
        from_json(text.replace('"d_ff"', '"d_fff"'))
    with pytest.raises(UserError, match="model is missing"):
        from_json('{"name": "a", "languages": ["en"]}')
    with pytest.raises(UserError, match="run/config.json is not JSON"):
        from_json(text[:-5], "run/config.json")
    with pytest.raises(UserError, match="run/config.json is not a JSON object"):
        from_json("[]", "run/config.json")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "does not define get_config"),
        ("def get_config(): return 1", "returned int"),
        ("def get_config(:", "line 1"),
        ("import nowhere_at_all", "line 1: ModuleNotFoundError"),
        ("1 / 0", "line 1: ZeroDivisionError"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("x = '\\0'", "experiment.py"),
        ("def get_config(): return missing", "line 1: NameError"),
        ("import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
        ("def get_config(): exit()", "line 1: SystemExit"),
        ("raise GeneratorExit", "line 1: GeneratorExit"),
        ("get_config = 5", "TypeError: 'int' object is not callable"),
        ("async def get_config(): pass\nget_config().close()\n1/0", "line 3: ZeroDiv"),
        ("def get_config(): return {}['key']", "line 1: KeyError: 'key'"),
        (
            "from gamayun_jax import config as c\n"
            "def get_config(): return c.ModelConfig(8, 1, 8, 3, 2, 4, 8)",
            "model.num_heads=3 is not a multiple",
        ),
    ],
)
def test_bad_experiment_files(tmp_path, source, message):
    path = tmp_path / "experiment.py"
    path.write_text(source)
    with pytest.raises(UserError, match=message) as e:
        load_config(path)
    assert "\n" not in str(e.value)


def test_an_experiment_file_may_have_dataclasses_of_its_own(tmp_path):
    (tmp_path / "experiment.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from gamayun_jax.config import load_config\n"
        "@dataclass\nclass Choice:\n    name: str = 'experiments/tiny.py'\n"
        "def get_config(): return load_config(Choice().name)\n"
    )
    assert load_config(tmp_path / "experiment.py").name == "tiny"


def test_no_experiment_file(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.py")
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match="is not a Python file"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_load_and_round_trip(name):
    cfg = load_config(f"experiments/{name}.py")
    assert from_json(to_json(cfg)) == cfg
    changed = load_config(f"experiments/{name}.py", ["seed=3", "name=other"])
    assert changed == dataclasses.replace(cfg, seed=3, name="other")


def test_steps_of_stages(wide_config):
    """Every stage gets whole steps; a step belongs to exactly one stage."""
    cfg = wide_config
    steps = cfg.stage_steps()
    for stage, count in zip(cfg.stages, steps, strict=True):
        assert (count - 1) * cfg.tokens_per_step < stage.tokens
        assert count * cfg.tokens_per_step >= stage.tokens
    at = [cfg.stage_at(k) for k in range(cfg.total_steps)]
    assert at == [0] * steps[0] + [1] * steps[1]
    assert [cfg.stage_start(k) for k in (0, 1)] == [0, steps[0]]


@pytest.mark.parametrize(
    ("name", "billions"), [("continue_qwen3", 1.721), ("continue_llama", 1.236)]
)
def test_continued_runs(name, billions):
    cfg = load_config(f"experiments/{name}.py")
    assert parameter_count(cfg.model) == pytest.approx(billions * 1e9, rel=1e-3)
    assert cfg.tokens_per_step == 1_048_576
    assert sum(s.tokens for s in cfg.stages) == 100_000_000_000
    _, _, table = unbuilt_plan(cfg)
    for stage, share in (("adapt", 0.25), ("anneal", 0.30)):
        rows = [r for r in table if r["phase"] == stage]
        assert sum(r["share"] for r in rows) == pytest.approx(1, abs=1e-3)
        english = sum(r["share"] for r in rows if r["source"].startswith("en/"))
        # A stage's mean: the ramp comes from the former share.
        assert english == pytest.approx(share, abs=0.003)


def test_the_real_run():
    one, two = (load_config(f"experiments/stage{k}.py") for k in (1, 2))
    assert one.model == two.model
    assert parameter_count(one.model) == pytest.approx(1.495e9, rel=1e-3)
    assert one.tokens_per_step == 2_097_152
    tokens = [s.tokens for cfg in (one, two) for s in cfg.stages]
    assert tokens == [2_000_000_000_000, 500_000_000_000]
