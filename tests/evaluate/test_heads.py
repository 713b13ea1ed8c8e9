"""Three programs compute the logits of a token: training's loss, the scorers and the
decoder. They agree for every field of ModelConfig that changes what a model says."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, slow_but, small_config

from gamayun_jax.config import ComputeConfig, ModelConfig, RopeScaling
from gamayun_jax.evaluate.loglikelihood import Request, Scorer
from gamayun_jax.inference.decode import Decoder
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import TokenWeights
from gamayun_jax.model.weights import abstract_params
from gamayun_jax.training import step

BASE = ModelConfig(
    vocab_size=80, num_layers=1, d_model=24, num_heads=4, num_kv_heads=2, head_dim=6,
    d_ff=40, max_seq_len=64, rope_theta=100.0,
)  # fmt: skip
# Field -> another value, which changes the logits of the same tokens.
CHANGES = {
    "vocab_size": 96,
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "d_ff": 24,
    "rope_theta": 10.0,
    "rope_scaling": RopeScaling(4.0, 1.0, 4.0, 16),
    "norm_eps": 0.5,
    "qk_norm": True,
    "qkv_bias": True,
    "tie_embeddings": False,
}
NO_CHANGE = {"max_seq_len", "init_std"}
FLOAT32 = ComputeConfig(dtype="float32")
IDS = np.random.default_rng(1).integers(1, BASE.vocab_size, 13)
INPUTS, TARGETS = IDS[:-1], IDS[1:]


def weights(cfg):
    """Random parameters, norms and biases too."""

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng(len(name))
        return np.float32(("scale" in name) + 0.3 * rng.normal(size=x.shape))

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def by_the_loss(cfg, params, **compute):
    """-log p of each target, by what training differentiates."""
    of_run = dataclasses.replace(
        small_config(Path("nowhere")),
        model=cfg,
        compute=dataclasses.replace(FLOAT32, **compute),
    )
    T = len(TARGETS)
    row = {
        "inputs": INPUTS, "targets": TARGETS, "positions": np.arange(T),
        "segment_ids": np.ones(T), "language": np.arange(T),
    }  # fmt: skip
    batch = {name: jnp.asarray(x[None], jnp.int32) for name, x in row.items()}
    batch["loss_mask"] = jnp.ones((1, T))
    # A language for each position: the sums by language are those of single tokens.
    tables = TokenWeights(np.ones(T, "f4"), np.ones(cfg.vocab_size, "f4"))
    _, sums = jax.jit(lambda p: step.loss_sums(p, batch, of_run, tables))(params)
    return np.asarray(sums["languages"]["nll"])


def by_the_scorer(cfg, params, mesh):
    """The same, each target as the continuation of what precedes it."""
    asked = [Request(IDS[:i].tolist(), [[int(IDS[i])]]) for i in range(1, len(IDS))]
    scores = Scorer(cfg, params, mesh, FLOAT32, batch_tokens=512).score(asked)
    return np.array([-s.logprobs[0] for s in scores])


def by_the_decoder(cfg, params, mesh):
    """The same, token by token with a cache."""
    decoder, T = Decoder(cfg, params, mesh, FLOAT32), len(INPUTS)
    K, H = cfg.num_kv_heads, cfg.head_dim
    state = {
        "caches": [(jnp.zeros((1, K, H, T)), jnp.zeros((1, K, T, H)))] * cfg.num_layers,
        "segments": jnp.zeros((1, T), jnp.int32),
        "index": jnp.int32(0),
    }
    one, nlls, forward = jnp.ones((1, 1), jnp.int32), [], jax.jit(decoder._forward)
    for i, target in enumerate(TARGETS):
        token = one * int(INPUTS[i])
        logits_BV, state = forward(decoder.weights, token, one * i, one, state)
        nlls.append(-jax.nn.log_softmax(logits_BV[0])[target])
    return np.array(nlls)


@pytest.fixture(scope="module")
def base():
    with jax.set_mesh(mesh_of((1, 1, 1))), nn.logical_axis_rules(sharding.RULES):
        return by_the_loss(BASE, weights(BASE))


def test_every_field_is_tried():
    assert {f.name for f in dataclasses.fields(ModelConfig)} == {*CHANGES} | NO_CHANGE


@pytest.mark.parametrize(
    "field", slow_but("num_kv_heads", "qkv_bias", "tie_embeddings", of=CHANGES)
)
def test_loss_scores_and_decoding_agree(field, base):
    cfg = dataclasses.replace(BASE, **{field: CHANGES[field]})
    mesh = mesh_of((1, 1, 1))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        params = weights(cfg)
        nll = by_the_loss(cfg, params)
        assert np.abs(nll - base).max() > 1e-3  # the field has a say
        for other in (
            by_the_loss(cfg, params, loss_chunk=4, remat="full"),
            by_the_scorer(cfg, params, mesh),
            by_the_decoder(cfg, params, mesh),
        ):
            np.testing.assert_allclose(other, nll, rtol=1e-5, atol=1e-5)
