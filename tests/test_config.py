"""Overrides are typed, errors name the field, JSON round-trips."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax import presets
from gamayun_jax.config import (
    ModelConfig,
    UserError,
    from_json,
    load_config,
    set_field,
    to_dict,
    to_json,
)
from gamayun_jax.model import parameter_count

EXPERIMENTS = ("tiny", "tiny_no_switch", "stage1", "stage2")
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
    changed = set_field(wide_config, override)
    before, after = leaves(to_dict(wide_config)), leaves(to_dict(changed))
    assert after[path] == value
    assert type(after[path]) is type(value)
    assert {k for k in before | after if before.get(k) != after.get(k)} == {path}
    assert from_json(to_json(changed)) == changed


def test_set_takes_json_for_what_has_parts(wide_config):
    scaling = (
        '{"factor":8,"low_freq_factor":1,"high_freq_factor":4,"original_max_len":32}'
    )
    scaled = set_field(wide_config, f"model.rope_scaling={scaling}")
    assert scaled.model.rope_scaling.factor == 8.0
    for none in ("none", "None", "null"):
        assert set_field(scaled, f"model.rope_scaling={none}") == wide_config
    again = set_field(wide_config, 'languages=["tr","en","ru"]')
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
    ("languages=en", "languages: expected a list, got 'en'"),
    ("languages=[1]", "languages.0: expected str, got 1"),
    ("model=5", "model: expected an object, got 5"),
    ("stages=[1]", "stages.0: expected an object, got 1"),
    ('model.rope_scaling={"factor":8}', "rope_scaling.low_freq_factor is missing"),
    ("stages.align.mixture.shares=5", "shares: expected an object"),
    # a value that cannot be
    ("compute.remat=some", "choose one of none, minimal, attention, full"),
    ("stages.align.schedule.kind=wds", "stages.align.schedule.kind='wds' is unknown"),
    ("stages.align.token_weights.scheme=static", "lacks 'en'"),
    ("stages.align.token_weights.weights.xx=1", "names 'xx', which is not in"),
    ("stages.align.token_weights.weights.en=-1", "at least 0"),
    ("stages.align.mixture.shares.en/*=-0.1", "shares['en/*']=-0.1 must be"),
    ("stages.align.mixture.shares.en/*=inf", "must be a finite number"),
    ("stages.align.mixture.ramp_tokens=-1", "ramp_tokens=-1"),
    ("stages.align.schedule.peak=0", "peak=0.0 must be greater than 0"),
    ("stages.align.schedule.peak=inf", "peak=inf must be a finite number"),
    ("stages.align.schedule.warmup_tokens=-1", "warmup_tokens=-1"),
    ("stages.align.tokens=0", "stages.align.tokens=0 must be greater than 0"),
    ("stages.align.name=enrich", "two stages have the same name"),
    ("stages=[]", "stages is empty"),
    ("languages=[]", "list each language once"),
    ('languages=["en","en","ru","tr"]', "list each language once"),
    ("compute.microbatches=5", "not a multiple of compute.microbatches=5"),
    ("compute.microbatches=0", "compute.microbatches=0 must be greater than 0"),
    ("compute.loss_chunk=-1", "compute.loss_chunk=-1"),
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
        set_field(wide_config, override)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


VALUES = ("0", "-1", "1e9", "0.5", "inf", "NaN", "true", "null", "[]", "{}", "[0]", "[")


def test_no_override_gives_a_traceback(wide_config):
    """Any field with any value: a config, or one line that says why not."""
    paths = [*sorted(leaves(to_dict(wide_config))), "model", "stages", "stages.align"]

    def one_line_or_config(override):
        try:
            changed = set_field(wide_config, override)
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
        ("import nowhere_at_all", "fails to load: ModuleNotFoundError"),
        ("1 / 0", "fails to load: ZeroDivisionError"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("x = '\\0'", "experiment.py"),
        ("def get_config(): return missing", "get_config.. fails: NameError"),
        ("def get_config(): return {}['key']", "get_config.. fails: KeyError: 'key'"),
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


def test_no_experiment_file(tmp_path):
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


def test_the_real_run():
    one, two = (load_config(f"experiments/stage{k}.py") for k in (1, 2))
    assert one.model == two.model
    assert parameter_count(one.model) == pytest.approx(1.495e9, rel=1e-3)
    assert one.tokens_per_step == 2_097_152
    tokens = [s.tokens for cfg in (one, two) for s in cfg.stages]
    assert tokens == [2_000_000_000_000, 500_000_000_000]
