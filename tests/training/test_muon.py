"""Muon: against float64, over devices, in runs that stop, switch and begin anew."""

import dataclasses
import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, random_batch, slow_but, started
from flax import linen as nn

from gamayun_jax import train
from gamayun_jax.config import OptimizerConfig, UserError
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import TokenWeights
from gamayun_jax.model.weights import WEIGHTS
from gamayun_jax.training import optimizer as optim
from gamayun_jax.training import step
from gamayun_jax.training.checkpoint import Checkpoints


def reference(x, summed):
    """Newton and Schulz's iteration on one layer's matrix, float64."""
    y = np.float64(x).reshape(int(np.prod(x.shape[:summed])), -1)
    y = y / np.sqrt((y**2).sum())
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y - 4.7750 * gram @ y + 2.0315 * gram @ gram @ y
    return y.reshape(x.shape)


SHAPES = [((24, 24), 1), ((12, 40), 1), ((40, 12), 1), ((16, 4, 6), 1), ((4, 6, 16), 2)]


@pytest.mark.parametrize(("shape", "summed"), SHAPES)
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 0.08)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])  # of the gradients
def test_orthogonal_against_float64(shape, summed, dtype, error, size):
    x = jnp.asarray(size * np.random.default_rng(0).normal(size=shape), dtype)
    got = np.float64(optim.orthogonalise(x, summed))
    want = reference(x, summed)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < error
    # The same singular vectors, and values near 1 but where there was hardly any.
    flat = got.reshape(int(np.prod(shape[:summed])), -1)
    u, s, v = np.linalg.svd(np.float64(x).reshape(flat.shape), full_matrices=False)
    inside = u.T @ flat @ v.T
    values = np.diag(inside)
    assert (np.abs(values - 1)[s > 0.01 * np.linalg.norm(s)] < 0.4).all()
    assert np.abs(inside - np.diag(values)).max() < error


def test_no_gradient_gives_no_update():
    assert not np.any(optim.orthogonalise(jnp.zeros((4, 6)), 1))


def test_updates_against_float64():
    """Per layer, with Nesterov's momentum, AdamW's length and decay; norms by Adam."""
    cfg = OptimizerConfig("muon", clip_norm=5.0, weight_decay=0.1)
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 12, 2, 4), "o": (2, 2, 4, 12)}
    p = {"layers": {"attention": {k: rng.normal(size=s) for k, s in shapes.items()}}}
    p["embedding"] = rng.normal(size=(9, 12))
    params = jax.tree.map(jnp.float32, p)
    optimizer = optim.make_optimizer(cfg)
    state = optimizer.init(params)
    zeros = jax.tree.map(np.zeros_like, p)
    m, adam_m, adam_v = zeros, zeros["embedding"], zeros["embedding"]
    for t in range(1, 6):
        rate = 1e-2 / t
        g = jax.tree.map(lambda x: rng.normal(size=x.shape), p)
        updates, state = optimizer.update(jax.tree.map(jnp.float32, g), state, params)
        params = jax.tree.map(lambda a, u, r=rate: a - r * u, params, updates)
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x: x * min(1, 5 / norm), g)
        m = jax.tree.map(lambda a, b: 0.95 * a + 0.05 * b, m, g)
        for name, weight in p["layers"]["attention"].items():
            ahead = 0.95 * m["layers"]["attention"][name]
            ahead += 0.05 * g["layers"]["attention"][name]
            summed = len(WEIGHTS[f"layers/attention/{name}"].summed)
            made = np.stack([reference(x, summed) for x in ahead])
            weight -= rate * (0.2 * 12**0.5 * made + 0.1 * weight)
        adam_m = 0.9 * adam_m + 0.1 * g["embedding"]
        adam_v = 0.95 * adam_v + 0.05 * g["embedding"] ** 2
        root = np.sqrt(adam_v / (1 - 0.95**t)) + 1e-8
        p["embedding"] -= rate * adam_m / (1 - 0.9**t) / root
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(p), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)


def test_an_update_is_as_long_as_adamw_s():
    """0.2 in root mean square, the more nearly the less square a matrix is."""
    rng = np.random.default_rng(0)
    for name, shape in (("gate", (1, 32, 128)), ("down", (1, 128, 32))):
        tree = {"layers": {"mlp": {name: jnp.float32(rng.normal(size=shape))}}}
        optimizer = optim.make_optimizer(OptimizerConfig("muon", weight_decay=0.0))
        updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
        (update,) = jax.tree.leaves(updates)
        assert 0.15 < np.sqrt((np.float64(update) ** 2).mean()) < 0.25


# --- over devices -----------------------------------------------------------------

MESHES = [(1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1), (1, 1, 8)]


@pytest.mark.parametrize("sizes", slow_but((2, 2, 2), of=MESHES))
@pytest.mark.parametrize("path", ["attention/q", "attention/o", "mlp/up", "mlp/down"])
@pytest.mark.parametrize("layers", [3, 16])
def test_each_layer_is_whole_on_one_device(sizes, path, layers):
    """The same as without a mesh, and no array of all layers but the device's part."""
    weight, mesh = WEIGHTS[f"layers/{path}"], mesh_of(sizes)
    shape = tuple({"D": 16, "N": 8, "H": 3, "F": 24}[k] for k in weight.axes)
    x = np.random.default_rng(0).normal(size=(layers, *shape)).astype("f4")
    spec = sharding.parameter_spec(shape, weight.logical_axes, mesh)
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *spec))

    def f(x):
        return x * jnp.cumsum(x.reshape(-1)).reshape(x.shape)

    def mapped(x):
        return sharding.map_layers(f, x, weight.logical_axes)

    with jax.set_mesh(mesh):
        program = jax.jit(mapped, in_shardings=layout, out_shardings=layout)
        compiled = program.lower(jax.ShapeDtypeStruct(x.shape, "f4")).compile()
        got = compiled(jax.device_put(x, layout))
    np.testing.assert_allclose(got, jax.jit(mapped)(x), rtol=1e-6, atol=1e-6)
    text = compiled.as_text()
    assert "all-gather" not in text
    ways = x.size // np.prod(layout.shard_shape(x.shape))
    most = -(-layers // ways) * np.prod(shape)
    sizes = {
        int(np.prod([int(n) for n in dims.split(",")]))
        for dims in re.findall(r"\bf32\[([\d,]+)\]", text)
    }
    assert max(sizes) <= most


def muon(cfg, **fields):
    optimizer = dataclasses.replace(cfg.optimizer, kind="muon", **fields)
    return dataclasses.replace(cfg, optimizer=optimizer)


@pytest.mark.slow
def test_eight_devices_make_the_step_of_one(wide_config):
    """And the running means are divided as the matrices, which have no second one."""
    cfg = muon(wide_config)
    V = cfg.model.vocab_size
    batch = random_batch(cfg.data.batch_size, cfg.data.seq_len, V)
    tables = TokenWeights(np.ones(3, np.float32), np.ones(V, np.float32))
    after = []
    for sizes in ((1, 1, 1), (2, 2, 2), (1, 8, 1)):
        mesh = mesh_of(sizes)
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            abstract = step.abstract_state(cfg, mesh)
            compiled = step.compile_step(cfg, mesh, abstract, 0, tables, 0)
            state = step.new_state(cfg, mesh)
            for _ in range(3):
                state, _ = compiled(
                    state, jax.device_put(batch, sharding.batch_sharding(mesh))
                )
        (muon_state, adam) = state.opt_state[1]
        for tree in (muon_state.inner_state.mu, adam.inner_state.nu):
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                same = functools.reduce(lambda t, k: t[k.key], path, state.params)
                assert leaf.sharding.is_equivalent_to(same.sharding, leaf.ndim)
        matrices = sum(x.size for x in jax.tree.leaves(muon_state.inner_state.mu))
        others = sum(x.size for x in jax.tree.leaves(adam.inner_state.mu))
        assert matrices + others == sum(x.size for x in jax.tree.leaves(state.params))
        after.append(jax.device_get(state.params))
    start = jax.device_get(step.new_state(cfg, mesh_of((1, 1, 1))).params)
    for other in after[1:]:
        for a, b, c in zip(
            *map(jax.tree.leaves, (after[0], other, start)), strict=True
        ):
            # Of the way that three steps went. Small singular values are made large,
            # and with them what differs by rounding.
            assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a - c)


# --- runs -------------------------------------------------------------------------


def quiet(text):
    pass


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run of both stages; the second begins with new moments."""
    cfg, run = muon(config), tmp_path_factory.mktemp("runs") / "muon"
    cfg = dataclasses.replace(
        cfg, optimizer=dataclasses.replace(cfg.optimizer, ema_tokens=9999)
    )
    assert train.train(cfg, run, log=quiet) == 0
    return cfg, run


def state_of(run, cfg, step_number):
    store = Checkpoints(run / "checkpoints", read_only=True)
    state = store.restore(step_number, step.abstract_state(cfg, mesh_of((8, 1, 1))))
    store.close()
    return jax.device_get(state)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
@pytest.mark.parametrize("last", [3, 7, 9])  # inside a stage, at its end, after it
def test_resumed_is_the_same_bit_for_bit(whole, last, tmp_path):
    cfg, run = whole

    def newer(folder, names):
        inside = folder == str(run / "checkpoints")
        return [n for n in names if inside and n.isdigit() and int(n) > last]

    again = shutil.copytree(run, tmp_path / "run", ignore=newer)
    assert train.train(cfg, again, log=quiet) == 0
    assert_same(state_of(again, cfg, 13), state_of(run, cfg, 13))
    lines = [(r / "metrics.jsonl").read_text().splitlines() for r in (run, again)]
    losses = [[re.search(r'"loss": ?[\d.]+', x) for x in part] for part in lines]
    assert [m and m[0] for m in losses[0]] == [m and m[0] for m in losses[1]]


@pytest.mark.slow
def test_a_stage_that_resets_begins_with_new_means(whole):
    """Adam's count tells of all moments: 6 updates since the boundary, not 13."""
    cfg, run = whole
    _, adam = state_of(run, cfg, 13).opt_state[1]
    assert int(adam.inner_state.count) == 6


def test_a_run_cannot_change_its_optimiser(whole, config):
    _, run = whole
    with pytest.raises(UserError, match="optimizer.kind was 'muon' in the run's check"):
        train.train(config, run, log=quiet)


@pytest.mark.slow
def test_a_run_from_another_optimiser_s_begins_with_new_moments(
    whole, config, tmp_path
):
    cfg, run = whole
    origin = run / "checkpoints" / "7"
    second = dataclasses.replace(config, stages=config.stages[1:])
    keep = dataclasses.replace(
        second.stages[0],
        transition=dataclasses.replace(second.stages[0].transition, moments="keep"),
    )
    kept = dataclasses.replace(second, stages=(keep,))
    with pytest.raises(UserError, match=r"stages.enrich.transition.moments=reset"):
        started(kept, tmp_path / "kept", origin)
    for ema in (0, 9999):
        begun = dataclasses.replace(
            second, optimizer=dataclasses.replace(second.optimizer, ema_tokens=ema)
        )
        state = started(begun, tmp_path / f"reset{ema}", origin).state
        assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
        former = state_of(run, cfg, 7)
        assert_same(jax.device_get(state.params), former.params)
        if ema:  # the average goes on
            assert_same(jax.device_get(state.ema), former.ema)
