"""Meshes, and that state and activations are divided over them as the rules say.

Without a mesh a logical constraint silently does nothing, so the activations are read
from the compiled program.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gamayun_jax.config import MeshConfig, UserError
from gamayun_jax.model import ops, presets, sharding
from gamayun_jax.model.loss import TokenWeights
from gamayun_jax.model.weights import VOCAB_MATRIX_AXES, abstract_params, parameter_path
from gamayun_jax.training import step

# Last part of a parameter's path -> its sharding, without the axis of the layers.
SPECS = {
    "embedding": P(("tensor", "fsdp"), None),
    "unembedding": P(("tensor", "fsdp"), None),
    "q": P("fsdp", "tensor", None),
    "k": P("fsdp", "tensor", None),
    "v": P("fsdp", "tensor", None),
    "q_bias": P("tensor", None),
    "k_bias": P("tensor", None),
    "v_bias": P("tensor", None),
    "o": P(("tensor", "fsdp"), None, None),
    "gate": P("fsdp", "tensor"),
    "up": P("fsdp", "tensor"),
    "down": P(("tensor", "fsdp"), None),
    "scale": P(),
}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, 2, -1), (2, 2, 2)),
        ((2, 4, 1), (2, 4, 1)),
    ],
)
def test_mesh(sizes, expected):
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices())
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == expected
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}
    # Linen's logical constraints fail on Explicit axes.
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, -1, 1), "only one axis may be -1"),
        ((3, -1, 1), "3 does not divide 8"),
        ((2, 2, 1), "is 4 devices, but there are 8"),
        ((4, 4, 1), "is 16 devices, but there are 8"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=re.escape(message)) as e:
        sharding.make_mesh(MeshConfig(*sizes))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.batch_size", 6, "use a multiple of 4"),
        ("compute.microbatches", 12, "12 microbatches gives 2 examples"),
        ("model.num_kv_heads", 1, "model.num_kv_heads=1 does not divide"),
        ("model.d_ff", 57, "model.d_ff=57 does not divide over mesh.tensor=2"),
        ("model.vocab_size", 201, "model.vocab_size=201 does not divide"),
        ("model.d_model", 49, "model.d_model=49 does not divide over mesh.fsdp=2"),
    ],
)
def test_sizes_that_do_not_divide(wide_config, replace, path, value, message):
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    sharding.check_divisible(wide_config, mesh)
    with pytest.raises(UserError, match=re.escape(message)) as e:
        sharding.check_divisible(replace(wide_config, path, value), mesh)
    assert "\n" not in str(e.value)


def check_layout(tree, mesh):
    """Every leaf of a tree with parameter paths is divided as SPECS says."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = parameter_path(path)
        spec = SPECS[name.rpartition("/")[2]]
        if "layers" in name.split("/"):
            spec = P(None, *spec)
        found = leaf if isinstance(leaf, NamedSharding) else leaf.sharding
        wanted = NamedSharding(mesh, spec)
        assert found.is_equivalent_to(wanted, len(spec)), (name, found.spec)


@pytest.mark.parametrize("preset", ["gamayun_1p5b", "qwen2p5_1p5b"])
def test_parameters_of_the_presets_are_sharded_by_the_rules(preset):
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    cfg = dataclasses.replace(getattr(presets, preset)(), tie_embeddings=False)
    check_layout(sharding.parameter_shardings(abstract_params(cfg), mesh), mesh)


def test_the_state_is_born_divided(new_states, wide_config):
    state = new_states[0]
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    adam = state.opt_state[1]
    for tree in (state.params, adam.mu, adam.nu):
        check_layout(tree, mesh)
    for scalar in (state.step, adam.count):
        assert scalar.sharding.is_fully_replicated
    # The matrices lie over fsdp x tensor, twice (data = 2); only norms are whole.
    norms = sum(
        x.size
        for path, x in jax.tree_util.tree_flatten_with_path(state.params)[0]
        if parameter_path(path).endswith("scale")
    )
    whole = sum(x.size for x in jax.tree.leaves(state.params))
    local = sum(
        x.addressable_shards[0].data.size for x in jax.tree.leaves(state.params)
    )
    assert local == (whole - norms) // 4 + norms
    declared = step.abstract_state(wide_config, mesh)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(declared), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_initial_values_do_not_depend_on_the_mesh(new_states):
    many, one = (jax.tree.leaves(jax.device_get(s.params)) for s in new_states)
    for a, b in zip(many, one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_batch_lies_by_rows():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    placed = jax.device_put(np.zeros((8, 6)), sharding.batch_sharding(mesh))
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 6)}
    whole = jax.device_put(np.zeros((8, 6)), sharding.replicated(mesh))
    assert whole.sharding.is_fully_replicated


def activations(hlo, length):
    """Width -> rows of the arrays of a program whose rows are tokens: the last axis,
    and the product of the others in units of the sequence length."""
    found = {}
    for dims in re.findall(r"\bf32\[([\d,]+)\]", hlo):
        *rows, width = map(int, dims.split(","))
        if rows and math.prod(rows) % length == 0:
            found.setdefault(width, set()).add(math.prod(rows) // length)
    return found


def test_activations_are_divided_in_the_compiled_step(gradients_on, wide_config):
    """Forward and backward: rows over data x fsdp, mlp and vocabulary over tensor.

    An embedding look-up left to the partitioner is made for the whole batch on every
    device; logits that were whole for a moment would be the largest array there is.
    """
    model, rows = wide_config.model, wide_config.data.batch_size // 4
    found = activations(gradients_on((2, 2, 2)).hlo, wide_config.data.seq_len)
    # Alone, or stacked over the layers for the backward pass.
    allowed = {rows, rows * model.num_layers}
    for width in (model.d_model, model.d_ff // 2, model.vocab_size // 2):
        assert rows in found[width], f"no activations of width {width}"
        assert found[width] <= allowed, f"width {width}: {found[width]} rows"
    for width in (model.d_model // 2, model.d_ff, model.vocab_size):
        assert width not in found, f"width {width}: {found[width]} rows"


def test_constraints_do_nothing_without_rules(wide_config):
    """Why the rules must surround every call: their lack is no error."""
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    params = step.abstract_state(wide_config, mesh).params
    tokens = jax.ShapeDtypeStruct((8, 5), np.int32)

    def apply(params, tokens):
        model = step.Transformer(wide_config.model, wide_config.compute)
        return model.apply({"params": params}, tokens, tokens, tokens)

    def constraints(rules):
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            text = jax.jit(lambda *a: apply(*a)).lower(params, tokens).as_text()
        return re.findall(r"sdy.sharding_constraint .*<@mesh, (\[.*\])>", text)

    # What weights are gathered to follows from the mesh alone.
    weights = {'[{"tensor"}, {}]', '[{}, {"tensor"}]', '[{}, {"tensor"}, {}]'}
    weights.add('[{"tensor"}, {}, {}]')
    assert set(constraints(())) == weights
    assert set(constraints(sharding.RULES)) - weights == {
        '[{"data", "fsdp"}, {}, {}]',  # the residual stream
        '[{"data", "fsdp"}, {}, {"tensor"}, {}]',  # queries
        '[{"data", "fsdp"}, {}, {"tensor"}]',  # the mlp
    }


def test_rows_that_do_not_divide_over_fsdp():
    """A vocabulary of 151,936 has rows for 128 devices, not for 256."""
    shape = {"data": 1, "fsdp": 256, "tensor": 1}
    mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
    at = sharding.parameter_spec
    assert at((151_936, 1536), VOCAB_MATRIX_AXES, mesh) == P("tensor", "fsdp")
    assert at((131_072, 2048), VOCAB_MATRIX_AXES, mesh)[0] == (
        "tensor",
        "fsdp",
    )
    # Heads, then their width, then the model's.
    assert at((16, 128, 2048), ("head_rows", None, None), mesh)[2] == "fsdp"
    small = jax.sharding.AbstractMesh((2, 64, 2), tuple(shape))
    assert at((16, 128, 2048), ("head_rows", None, None), small)[1] == "fsdp"


def test_no_parameter_is_whole_over_the_layers(gradients_on, wide_config):
    """Weights exist whole a layer at a time: neither gathered before the loop, nor
    kept from the forward for the backward pass."""
    hlo_text = gradients_on((1, 8, 1)).hlo
    L = wide_config.model.num_layers
    assert not re.findall(rf"f32\[{L},48,56\]|f32\[{L},56,48\]", hlo_text)
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", hlo_text)
    assert not [dims for dims in gathered if dims.startswith(f"{L},")]


@pytest.mark.slow
def test_no_gathered_weight_waits_for_the_backward_pass(wide_config):
    """Without remat too: the memory of the compiled step is beyond that of `full` by
    less than the layers' weights. Kept, they would undo their division."""
    model = dataclasses.replace(
        wide_config.model, num_layers=8, d_model=64, num_heads=8, head_dim=8, d_ff=256
    )
    data = dataclasses.replace(wide_config.data, batch_size=8, seq_len=8)
    tables = TokenWeights(np.ones(3, np.float32), np.ones(200, np.float32))
    mesh = sharding.make_mesh(MeshConfig(1, 8, 1))
    used = {}
    for remat in ("none", "full"):
        compute = dataclasses.replace(wide_config.compute, remat=remat)
        cfg = dataclasses.replace(wide_config, model=model, data=data, compute=compute)
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            abstract = step.abstract_state(cfg, mesh)
            compiled = step.compile_step(cfg, mesh, abstract, 0, tables, 0)
        used[remat] = compiled.memory_analysis().temp_size_in_bytes
    layers = sum(x.size for x in jax.tree.leaves(abstract.params["layers"]))
    assert 0 < used["none"] - used["full"] < 4 * layers


@pytest.mark.parametrize(
    ("reduce_dtype", "least", "most"),
    [("float32", 0, 1e-6), ("bfloat16", 5e-4, 5e-3)],
)
@pytest.mark.parametrize("shape", [(48, 4, 10), (48, 16, 10)])
def test_in_bfloat16_devices_add_a_weight_s_gradient_in_the_dtype_asked_for(
    reduce_dtype, least, most, shape
):
    """Narrower and wider than the input, against float64; over data and fsdp."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0.5, 1, (8, 23, 48)), jnp.bfloat16)
    g = jnp.asarray(rng.normal(0.5, 1, (8, 23, *shape[1:])), jnp.bfloat16)
    mesh = sharding.make_mesh(MeshConfig(2, 4, 1))
    axes = ("embed", "heads", None)
    layout = NamedSharding(mesh, P("fsdp"))
    w = jax.device_put(jnp.zeros(shape), layout)
    rows = jax.device_put((x, g), sharding.batch_sharding(mesh))

    def gradient(w, x, g):
        def product(w):
            return ops.linear(x, ops.Matrix(w, axes, 1, reduce_dtype))

        return jax.vjp(product, w)[1](g)[0]

    with jax.set_mesh(mesh):
        got = jax.jit(gradient, out_shardings=layout)(w, *rows)
    want = np.einsum("btd,btnh->dnh", np.float64(x), np.float64(g))
    assert got.dtype == np.float32
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert least <= error <= most


class FakeDevice:
    """As much of a TPU device as laying out a mesh looks at."""

    platform, device_kind, process_index, core_on_chip = "tpu", "TPU v5 lite", 0, 0

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index = number, slice_index
        self.coords = (number % 4, number // 4 % 2, 0)


def test_an_axis_over_parts_of_the_torus():
    """fsdp of 8 on 4 x 2 x 1 is a product of dimensions, 2 x 2 of them is a part."""
    devices = [FakeDevice(n, 0) for n in range(8)]
    for sizes in ((1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(MeshConfig(*sizes), devices)
        assert mesh.devices.shape == sizes
        assert {d.id for d in mesh.devices.flat} == set(range(8))


def test_data_crosses_slices():
    devices = [FakeDevice(n, n // 8) for n in range(16)]
    mesh = sharding.make_mesh(MeshConfig(-1, 4, 1), devices)
    assert mesh.devices.shape == (4, 4, 1)
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    # Each row of fsdp is within one slice, and data has both.
    assert (slices == slices[:, :1]).all()
    assert set(slices[:, 0, 0].tolist()) == {0, 1}
    with pytest.raises(
        UserError, match="mesh.data=1 is not a multiple of the 2 slices"
    ):
        sharding.make_mesh(MeshConfig(1, -1, 1), devices)
