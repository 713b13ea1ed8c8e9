"""Overrides are typed, errors name the field, JSON round-trips."""

import dataclasses
import math

import pytest

from gamayun_jax import config as c
from gamayun_jax.config import UserError, from_json, load_config, set_field, to_json


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", "seed", 7),
        ("stages.align.tokens=1e6", "stages.0.tokens", 1_000_000),
        ("stages.1.tokens=2_000", "stages.1.tokens", 2000),
        ("stages.align.schedule.peak=1e-3", "stages.0.schedule.peak", 1e-3),
        ("compute.scan_layers=false", "compute.scan_layers", False),
        ("data.max_epochs=inf", "data.max_epochs", math.inf),
        ("name=007", "name", "007"),
        ("stages.align.mixture.shares.en/*=1", "stages.0.mixture.shares.en/*", 1.0),
        (
            "model.rope_scaling={\"factor\":8,\"low_freq_factor\":1,"
            "\"high_freq_factor\":4,\"original_max_len\":32}",
            "model.rope_scaling.factor",
            8.0,
        ),
    ],
)  # fmt: skip
def test_set(config, override, path, value):
    found = set_field(config, override)
    for key in path.split("."):
        if isinstance(found, tuple):
            found = found[int(key)]
        elif isinstance(found, dict):
            found = found[key]
        else:
            found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "Did you mean 'seed'"),
        ("stages.align.schedule.peek=1", "Did you mean 'peak'"),
        ("stages.allign.tokens=1", "Did you mean 'align'"),
        ("seed=1.5", "expected int, got 1.5"),
        ("compute.scan_layers=3", "expected bool"),
        ("seed", "write field=value"),
        ("seed.x=1", "plain value"),
        ("compute.remat=some", "choose one of none, minimal, full"),
        ("stages.align.token_weights.scheme=static", "lacks 'en'"),
        ("compute.microbatches=3", "not a multiple"),
        ("data.seq_len=128", "exceeds model.max_seq_len"),
        ("data.batch_size=0", "greater than 0"),
    ],
)
def test_bad_overrides_are_one_line(config, override, message):
    with pytest.raises(UserError, match=message) as e:
        set_field(config, override)
    assert "\n" not in str(e.value)


def test_json_round_trip(config):
    cfg = dataclasses.replace(
        config, data=dataclasses.replace(config.data, max_epochs=math.inf)
    )
    assert from_json(to_json(cfg)) == cfg


def test_json_errors_name_the_field(config):
    text = to_json(config)
    with pytest.raises(UserError, match="model.d_fff"):
        from_json(text.replace('"d_ff"', '"d_fff"'))
    with pytest.raises(UserError, match="not JSON"):
        from_json(text[:-5])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "does not define get_config"),
        ("def get_config(): return 1", "returned int"),
        ("def get_config(:", "line 1"),
        ("import nowhere_at_all", "fails to load"),
        ("def get_config(): return missing", "get_config.. fails"),
    ],
)
def test_bad_experiment_files(tmp_path, source, message):
    path = tmp_path / "experiment.py"
    path.write_text(source)
    with pytest.raises(UserError, match=message) as e:
        load_config(path)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.py")


@pytest.mark.parametrize("name", ["tiny", "tiny_no_switch", "stage1", "stage2"])
def test_experiments_load_and_round_trip(name):
    cfg = load_config(f"experiments/{name}.py")
    assert from_json(to_json(cfg)) == cfg


def test_the_real_run():
    from gamayun_jax.model import parameter_count

    one, two = (load_config(f"experiments/stage{k}.py") for k in (1, 2))
    assert one.model == two.model
    assert parameter_count(one.model) == pytest.approx(1.495e9, rel=1e-3)
    assert one.tokens_per_step == 2_097_152
    tokens = [s.tokens for cfg in (one, two) for s in cfg.stages]
    assert tokens == [2_000_000_000_000, 500_000_000_000]
    assert isinstance(one, c.Config)
