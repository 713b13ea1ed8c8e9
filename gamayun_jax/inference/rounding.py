"""int4 weights rounded by what they do to real text: GPTQ (arXiv 2210.17323).

Rounding each weight to the nearest code makes each as right as it can be. What counts
is a matrix's products with its inputs, and inputs go together: what the rounding of one
weight adds to a product, weights that are rounded later can take away. Layer by layer,
a matrix's inputs are recorded on text as the layers below, rounded already, give them.

Shape suffixes: B or R rows, T length, D model, F mlp; I (and J) inputs and O outputs of
a matrix, flattened; G of a group of inputs.
"""

from __future__ import annotations

import collections
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.sharding import Mesh

from gamayun_jax.config import DEMO_CORPUS, AnyPath, Config, SourceConfig
from gamayun_jax.data.corpus import Corpus, open_corpus
from gamayun_jax.data.documents import Document
from gamayun_jax.data.inputs import read_documents
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.inference import quantize
from gamayun_jax.model import sharding
from gamayun_jax.model.transformer import Block, compute_dtype, rope_angles
from gamayun_jax.storage import as_path

# Matrix -> the one under whose name the model sows the inputs of both.
SOWN = dict(q="q", k="q", v="q", o="o", gate="gate", up="gate", down="down")
DAMPING = 0.01  # of the mean of the diagonal, added to it: the paper's
TOKENS = 2048  # of text in each language
ROW, BATCH = 256, 8  # tokens of a row of text, rows of a batch


def text_rows(tokenizer: TextCoder, folder: AnyPath) -> tuple[np.ndarray, str]:
    """int32 [R, T]: about TOKENS of each language; and whose text it is.

    Of a corpus's sources where the tokenizer is the corpus's own, else of the embedded
    corpus; of neither's held-out sets.

    Args:
      folder: of the corpus, or "".
    """
    path = as_path(folder)
    if folder and (path / "manifest.json").exists():
        corpus = open_corpus(path)
        if corpus.manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint:
            return _corpus_rows(corpus), str(path)
    return _embedded_rows(tokenizer), "the embedded corpus"


def _corpus_rows(corpus: Corpus) -> np.ndarray:
    length = min(ROW, corpus.manifest["record_tokens"])
    sources = collections.Counter(s.language for s in corpus.sources.values())
    rows = []
    for name, source in corpus.sources.items():
        records = corpus.records(name)
        wanted = -(-TOKENS // (length * sources[source.language]))
        places = np.linspace(0, len(records) - 1, min(wanted, len(records)))
        rows += [records[int(place)][:length] for place in places]
    return np.stack(rows)


def _embedded_rows(tokenizer: TextCoder) -> np.ndarray:
    rows = []
    for path in sorted((DEMO_CORPUS / "train").glob("*.help.jsonl.zst")):
        name = path.name.removesuffix(".jsonl.zst").replace(".", "/")
        ids: list[int] = []
        for document in read_documents(SourceConfig(name, (str(path),))):
            if len(ids) >= TOKENS:
                break
            if isinstance(document, Document) and len(document.text) > ROW:
                ids += [tokenizer.start_id, *tokenizer.encode(document.text)]
        whole = min(len(ids), TOKENS) // ROW
        rows.append(np.array(ids[: whole * ROW], np.int32).reshape(-1, ROW))
    return np.concatenate(rows)


def round_matrix(w: jax.Array, summed: tuple[int, ...], factor_II: jax.Array) -> Any:
    """{"codes", "scale", "zero"} of one layer's matrix, as `quantize_matrix` has them.

    Args:
      summed: its summed axes, which are its first ones.
      factor_II: of `inverse_factor`.
    """
    axis = w.ndim + summed[0]
    group = quantize.group_of(w.shape[axis])
    w_IO = w.reshape(len(factor_II), -1)

    def one_group(w_IO: jax.Array, first: jax.Array) -> Any:
        """Codes of a group of rows; what they miss is taken off the rows below."""
        w_GO = jax.lax.dynamic_slice_in_dim(w_IO, first, group)
        factor_GI = jax.lax.dynamic_slice_in_dim(factor_II, first, group)
        factor_GG = jax.lax.dynamic_slice_in_dim(factor_GI, first, group, axis=1)
        scale_1O, zero_1O = quantize.grid(w_GO, 0)

        def one_row(w_GO: jax.Array, row: Any) -> Any:
            at, factor_G = row
            codes_O = quantize.encode(w_GO[at], scale_1O[0], zero_1O[0])
            missed_O = w_GO[at] - quantize.decode(codes_O, scale_1O[0], zero_1O[0])
            missed_O /= factor_G[at]
            return w_GO - jnp.outer(factor_G, missed_O), (codes_O, missed_O)

        rows = (jnp.arange(group), factor_GG)
        _, (codes_GO, missed_GO) = jax.lax.scan(one_row, w_GO, rows)
        return w_IO - factor_GI.T @ missed_GO, (codes_GO, scale_1O[0], zero_1O[0])

    firsts = jnp.arange(0, len(w_IO), group)
    _, (codes, scale, zero) = jax.lax.scan(one_group, w_IO, firsts)
    shape = (*w.shape[:axis], w.shape[axis] // group, *w.shape[axis + 1 :])
    return {
        "codes": quantize.pack(codes.reshape(w.shape), axis),
        "scale": scale.reshape(shape),
        "zero": zero.reshape(shape),
    }


def inverse_factor(products_II: np.ndarray) -> np.ndarray:
    """The upper triangular U of U^T U = H^-1, float32, for H = X^T X of the inputs.

    In float64. H is damped; an input that is always 0 gets a 1 in its place.
    """
    h = np.asarray(products_II, np.float64).copy()
    diagonal = np.einsum("ii->i", h)
    damping = DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1
    diagonal += damping
    # H = R R^T with R upper triangular, so U = R^-1: nothing but triangles is inverted.
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return scipy.linalg.solve_triangular(upper, np.eye(len(h))).astype(np.float32)


class _Layers:
    """The programs that a layer at a time is run and rounded with."""

    def __init__(self, cfg: Config, mesh: Mesh):
        self._block = Block(cfg.model, cfg.compute)
        self._whole = sharding.replicated(mesh)
        self._cfg = cfg.model
        self.run = jax.jit(lambda layer, x_BTD: self._apply(layer, x_BTD)[0])
        self.products = jax.jit(self._products, out_shardings=self._whole)
        self.round = jax.jit(self._round, out_shardings=self._whole)

    def _apply(self, layer: Any, x_BTD: jax.Array) -> Any:
        B, T = x_BTD.shape[:2]
        angles = rope_angles(self._cfg, jnp.broadcast_to(jnp.arange(T), (B, T)))
        ones_BT = jnp.ones((B, T), jnp.int32)
        floats = quantize.map_leaves(lambda _, x: quantize.dequantize(x), layer)
        segments = (ones_BT, ones_BT, 0, None)
        arguments = (x_BTD, None, *angles, segments)
        (y_BTD, _), sown = self._block.apply(
            {"params": floats}, *arguments, mutable=["inputs"]
        )
        return y_BTD, sown["inputs"]

    def _products(self, layer: Any, x_BTD: jax.Array) -> dict[str, jax.Array]:
        """X^T X, float32 [I, I], of each that is sown."""
        _, sown = self._apply(layer, x_BTD)
        inputs = {
            name: value[0] for part in sown.values() for name, value in part.items()
        }
        gate_BTF, up_BTF = inputs["down"]
        inputs["down"] = jax.nn.silu(gate_BTF) * up_BTF
        return {
            name: jnp.einsum("BTI,BTJ->IJ", *[x.reshape(*x.shape[:2], -1)] * 2,
                             preferred_element_type=jnp.float32)
            for name, x in inputs.items()
        }  # fmt: skip

    def _round(self, layer: Any, factors: dict[str, jax.Array]) -> Any:
        def one(name: str, w: jax.Array) -> Any:
            if name not in SOWN:
                return w
            whole = jax.lax.with_sharding_constraint(w, self._whole)
            summed = quantize.MATRICES[name].summed_axes
            return round_matrix(whole, summed, factors[SOWN[name]])

        return quantize.map_leaves(one, layer)


def quantize_by_text(cfg: Config, params: Any, rows_RT: np.ndarray, mesh: Mesh) -> Any:
    """`quantize(params, 4)`, its layers' matrices rounded by their inputs.

    Args:
      rows_RT: int32 ids of text; rows beyond whole batches are left out.
      mesh: that the parameters lie on.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    B = -(-min(BATCH, len(rows_RT)) // ways) * ways
    rows_RT = np.resize(rows_RT, (max(len(rows_RT) // B, 1) * B, rows_RT.shape[1]))
    small = quantize.quantize({k: v for k, v in params.items() if k != "layers"}, 4)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        layers, done = _Layers(cfg, mesh), []
        floats = quantize.dequantize(
            small["embedding"], compute_dtype(cfg.compute.dtype)
        )
        layout = sharding.batch_sharding(mesh)
        states = [
            jnp.take(floats, jax.device_put(rows_RT[at : at + B], layout), axis=0)
            for at in range(0, len(rows_RT), B)
        ]
        del floats
        for number in range(cfg.model.num_layers):
            layer = jax.tree.map(lambda x, n=number: x[n], params["layers"])
            sums: dict[str, Any] = {}
            for x_BTD in states:
                for name, product in layers.products(layer, x_BTD).items():
                    sums[name] = sums.get(name, 0) + np.asarray(product, np.float64)
            factors = {name: inverse_factor(h) for name, h in sums.items()}
            layer = layers.round(layer, factors)
            states = [jax.block_until_ready(layers.run(layer, x)) for x in states]
            done.append(jax.device_get(layer))
    return {**small, "layers": jax.tree.map(lambda *x: np.stack(x), *done)}
