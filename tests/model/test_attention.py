"""The kernels of attention against its definition, forward and backward."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gamayun_jax.config import MeshConfig, UserError
from gamayun_jax.model import attention as module
from gamayun_jax.model import sharding
from gamayun_jax.model.attention import attention, self_attention


def inputs(B, T, N, K, H, seed=0):
    """Queries, keys, values, and segments of several documents with padding behind."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H))
    qkv = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    ends = np.sort(rng.choice(np.arange(1, T), (B, 3), replace=False), axis=1)
    segments = 1 + (np.arange(T)[None, :, None] >= ends[:, None]).sum(-1)
    segments = np.where(segments == 4, 0, segments)
    return qkv, jnp.asarray(segments, jnp.int32)


def by_definition(q, k, v, segments):
    """softmax(q k / sqrt(H)) v in float64, head by head."""
    q, k, v, segments = (np.asarray(a, np.float64) for a in (q, k, v, segments))
    B, _, N, H = q.shape
    out = np.zeros_like(q)
    for b in range(B):
        seen = np.tril(segments[b][:, None] == segments[b][None])
        for n in range(N):
            m = n * k.shape[2] // N
            scores = np.where(seen, q[b, :, n] @ k[b, :, m].T / np.sqrt(H), -np.inf)
            e = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, n] = e / e.sum(-1, keepdims=True) @ v[b, :, m]
    return out


def out_and_gradients(compute, qkv, segments):
    """Output, and the gradients of a fixed random product with it."""
    weight = jnp.asarray(np.random.default_rng(9).normal(size=qkv[0].shape), "f4")

    @jax.jit
    def run(qkv):
        def loss(qkv):
            out = compute(*qkv, segments)
            return jnp.sum(out * weight), out

        gradients, out = jax.grad(loss, has_aux=True)(qkv)
        return out, gradients

    return jax.tree.map(np.asarray, run(qkv))


def plain(q, k, v, segments):
    return attention(q, k, v, segments, segments)


def assert_same(compute, qkv, segments, atol=2e-5):
    wanted = out_and_gradients(plain, qkv, segments)
    got = out_and_gradients(compute, qkv, segments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=atol * np.abs(b).max())


def test_the_plain_path_is_the_definition():
    qkv, segments = inputs(2, 24, 4, 2, 8)
    np.testing.assert_allclose(
        plain(*qkv, segments), by_definition(*qkv, segments), atol=1e-5
    )


def test_parts_of_the_queries(monkeypatch):
    """Long sequences are cut, the last part short; the scores never exist whole."""
    monkeypatch.setattr(module, "PART", 16)
    qkv, segments = inputs(2, 72, 4, 2, 8)
    assert_same(functools.partial(self_attention, attention_impl="xla"), qkv, segments)

    def gradients(q, k, v):
        return jax.grad(
            lambda q: jnp.sum(self_attention(q, k, v, segments, "xla"))
        )(q)  # fmt: skip

    text = jax.jit(gradients).lower(*qkv).as_text()
    sizes = re.findall(r"tensor<([\dx]+)xf32>", text)
    assert max(math.prod(map(int, s.split("x"))) for s in sizes) <= 2 * 4 * 16 * 72


def test_parts_of_the_queries_with_contexts(monkeypatch):
    """Continuations see the context before theirs, also in another part."""
    monkeypatch.setattr(module, "LEAST_PART", 8)
    qkv, segments = inputs(2, 72, 4, 2, 8)
    contexts = jnp.maximum(segments - 1, 1)
    wanted = attention(*qkv, segments, segments, 0, contexts)
    assert abs(wanted - plain(*qkv, segments)).max() > 0.1  # they matter
    np.testing.assert_allclose(
        module.by_parts(*qkv, segments, contexts), wanted, atol=1e-5
    )


@pytest.mark.parametrize(("N", "K", "H"), [(4, 2, 128), (2, 2, 64)])
def test_splash(N, K, H):
    """In Pallas's interpreter, which runs the kernels' own code on a CPU."""
    qkv, segments = inputs(1, 256, N, K, H)
    compute = functools.partial(module._splash, interpret=True)
    assert_same(compute, qkv, segments, atol=1e-4)


def test_splash_in_tiles(monkeypatch):
    """Several tiles: above, on and below the diagonal."""
    monkeypatch.setattr(module, "SPLASH_BLOCK", 128)
    qkv, segments = inputs(2, 384, 2, 1, 128)
    compute = functools.partial(module._splash, interpret=True)
    assert_same(compute, qkv, segments, atol=1e-4)


def test_what_cudnn_is_asked_for():
    """Mask, scale and heads, by the same function's other implementation: cuDNN's own
    numbers need a GPU."""
    qkv, segments = inputs(2, 40, 4, 2, 16)
    compute = functools.partial(module._cudnn, implementation="xla")
    assert_same(compute, qkv, segments)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_kernels_divide_over_the_mesh(sizes):
    """Each device gets its rows and heads and nothing is gathered."""
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    qkv, segments = inputs(8, 40, 4, 2, 16)
    seen = []

    def kernel(q, k, v, segments):
        seen.append((q.shape, k.shape, segments.shape))
        return attention(q, k, v, segments, segments)

    wanted = plain(*qkv, segments)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        rows = sharding.batch_sharding(mesh)
        heads = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
        )
        placed = [jax.device_put(a, heads) for a in qkv]
        run = jax.jit(lambda *a: module._over_mesh(kernel)(*a))
        program = run.lower(*placed, jax.device_put(segments, rows)).compile()
        got = program(*placed, jax.device_put(segments, rows))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    B, N, K = 8 // (sizes[0] * sizes[1]), 4 // sizes[2], 2 // sizes[2]
    assert seen[-1] == ((B, 40, N, 16), (B, 40, K, 16), (B, 40))
    assert "all-" not in program.as_text()


@pytest.mark.parametrize(
    ("impl", "T", "H", "dtype", "message"),
    [
        ("splash", 100, 128, "float32", "multiple of 128, not 100"),
        ("splash", 128, 80, "float32", "multiple of 64, not 80"),
        ("cudnn", 128, 64, "float32", "compute.dtype='bfloat16', not float32"),
        ("cudnn", 128, 256, "bfloat16", "multiple of 8 up to 128, not 256"),
    ],
)
def test_shapes_that_a_kernel_cannot_take(impl, T, H, dtype, message):
    shape = jax.ShapeDtypeStruct((1, T, 2, H), jnp.dtype(dtype))
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(
            functools.partial(self_attention, attention_impl=impl),
            shape,
            shape,
            shape,
            ids,
        )
    # "auto" takes the plain path for them, whatever the platform.
    out = jax.eval_shape(self_attention, shape, shape, shape, ids)
    assert out.shape == shape.shape
