"""int4 weights rounded by what they do to real text: GPTQ (arXiv 2210.17323).

Rounding each weight to the nearest code makes each as right as it can be. What counts
is a matrix's products with its inputs, and inputs go together: what the rounding of one
weight adds to a product, weights that are rounded later can take away. Matrix by
matrix, inputs are recorded on text as what is rounded already gives them, beside those
of the floats. First the matrix is moved by least squares to what would give the floats'
products (GPTQ with asymmetric inputs, arXiv 2504.02692), and, where it is added to the
residual stream, the floats' stream; then it is rounded.

Shape suffixes: B or R rows, T length, D model, F mlp; I (and J) inputs and O outputs of
a matrix, flattened; G of a group of inputs.
"""

from __future__ import annotations

import collections
import functools
import operator
from collections.abc import Sequence
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

# Matrices with the same inputs, which the model sows under the first one's name, in the
# order in which a layer computes them.
STEPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
# Of the mean of the diagonal, added to it. GPTQ's 0.01 is for codes alone; the least
# squares would fit the text.
DAMPING = 0.1
TOKENS = 1024  # of text in each language
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


def least_squares(
    w_IO: jax.Array, factor_II: jax.Array, sums: Sequence[jax.Array]
) -> jax.Array:
    """The matrix whose products with the inputs come nearest to those wanted.

    Args:
      factor_II: of `inverse_factor`.
      sums: X^T (X' - X), of the inputs X' that the floats have, and X^T Y [I, O] of
        what the products are to have beside.
    """
    off_II, *more = sums
    gap_IO = functools.reduce(jnp.add, more, off_II @ w_IO)
    return w_IO + factor_II.T @ (factor_II @ gap_IO)


def round_matrix(
    w: jax.Array, summed: tuple[int, ...], factor_II: jax.Array, bits: int
) -> Any:
    """One layer's matrix as `quantize_matrix` has it.

    Args:
      summed: its summed axes, which are its first ones.
      factor_II: of `inverse_factor`.
    """
    axis = w.ndim + summed[0]
    group = quantize.group_of(w.shape[axis], bits)
    w_IO = w.reshape(len(factor_II), -1)

    def one_group(w_IO: jax.Array, first: jax.Array) -> Any:
        """Codes of a group of rows; what they miss is taken off the rows below."""
        w_GO = jax.lax.dynamic_slice_in_dim(w_IO, first, group)
        factor_GI = jax.lax.dynamic_slice_in_dim(factor_II, first, group)
        factor_GG = jax.lax.dynamic_slice_in_dim(factor_GI, first, group, axis=1)
        importance_G1 = 1 / jnp.square(jnp.diagonal(factor_GG))[:, None]
        scale_1O, zero_1O = quantize.grid(w_GO, 0, bits, importance_G1)

        def one_row(w_GO: jax.Array, row: Any) -> Any:
            at, factor_G = row
            codes_O = quantize.encode(w_GO[at], scale_1O[0], zero_1O[0], bits)
            missed_O = w_GO[at] - quantize.decode(codes_O, scale_1O[0], zero_1O[0])
            missed_O /= factor_G[at]
            return w_GO - jnp.outer(factor_G, missed_O), (codes_O, missed_O)

        rows = (jnp.arange(group), factor_GG)
        _, (codes_GO, missed_GO) = jax.lax.scan(one_row, w_GO, rows)
        return w_IO - factor_GI.T @ missed_GO, (codes_GO, scale_1O[0], zero_1O[0])

    firsts = jnp.arange(0, len(w_IO), group)
    _, (codes, scale, zero) = jax.lax.scan(one_group, w_IO, firsts)
    shape = (*w.shape[:axis], w.shape[axis] // group, *w.shape[axis + 1 :])
    scale, zero = (x.reshape(shape) for x in (scale, zero))
    return quantize.packed(codes.reshape(w.shape), scale, zero, axis, bits)


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
        self.products = jax.jit(
            self._products, static_argnums=0, out_shardings=self._whole
        )
        self.round = jax.jit(self._round, static_argnums=0, out_shardings=self._whole)

    def _apply(self, layer: Any, x_BTD: jax.Array) -> Any:
        """The output, and the inputs of matrices by the names they are sown under."""
        B, T = x_BTD.shape[:2]
        angles = rope_angles(self._cfg, jnp.broadcast_to(jnp.arange(T), (B, T)))
        ones_BT = jnp.ones((B, T), jnp.int32)
        floats = quantize.map_leaves(lambda _, x: quantize.dequantize(x), layer)
        segments = (ones_BT, ones_BT, 0, None)
        arguments = (x_BTD, None, *angles, segments)
        (y_BTD, _), sown = self._block.apply(
            {"params": floats}, *arguments, mutable=["inputs"]
        )
        inputs = {k: v[0] for part in sown["inputs"].values() for k, v in part.items()}
        gate_BTF, up_BTF = inputs["down"]
        inputs["down"] = jax.nn.silu(gate_BTF) * up_BTF
        return y_BTD, {k: v.reshape(B, T, -1) for k, v in inputs.items()}

    def _products(self, name: str, was: Any, layer: Any, was_BTD: Any, x_BTD: Any):
        """X^T X, float32 [I, I], of a matrix's inputs; X^T of how far the floats' are
        off them, [I, I]; and of what else its products are to make good, [I, D].

        Args:
          name: the first one of STEPS.
          was, was_BTD: the floats' layer and its input.
        """
        was_y_BTD, theirs = self._apply(was, was_BTD)
        y_BTD, ours = self._apply(layer, x_BTD)
        x_BTI = ours[name]
        off_BTI = theirs[name] - x_BTI
        wanted = [x_BTI, off_BTI]
        if name == "o":  # how far the residual stream is off
            wanted.append(was_BTD - x_BTD)
        if name == "down":
            w_ID = was["mlp"]["down"].astype(off_BTI.dtype)
            wanted.append(was_y_BTD - y_BTD - off_BTI @ w_ID)
        return [
            jnp.einsum("BTI,BTJ->IJ", x_BTI, y, preferred_element_type=jnp.float32)
            for y in wanted
        ]

    def _round(
        self, names: tuple[str, ...], layer: Any, factor_II: Any, sums: list[jax.Array]
    ) -> Any:
        def one(name: str, w: jax.Array) -> Any:
            if name not in names:
                return w
            whole = jax.lax.with_sharding_constraint(w, self._whole)
            w_IO = whole.reshape(len(factor_II), -1)
            moved = least_squares(w_IO, factor_II, sums).reshape(w.shape)
            summed = quantize.MATRICES[name].summed_axes
            return round_matrix(moved, summed, factor_II, quantize.bits_of(name))

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
    rest = {k: v for k, v in params.items() if k != "layers"}
    small = jax.jit(quantize.quantize, static_argnums=1)(rest, 4)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        layers, done = _Layers(cfg, mesh), []
        layout = sharding.batch_sharding(mesh)
        batches = [
            jax.device_put(rows_RT[at : at + B], layout)
            for at in range(0, len(rows_RT), B)
        ]

        def embedded(leaf: Any) -> list[jax.Array]:
            floats = quantize.dequantize(leaf).astype(compute_dtype(cfg.compute.dtype))
            return [jnp.take(floats, ids, axis=0) for ids in batches]

        theirs, ours = embedded(params["embedding"]), embedded(small["embedding"])
        for number in range(cfg.model.num_layers):
            was = jax.tree.map(lambda x, n=number: x[n], params["layers"])
            layer = was
            for names in STEPS:
                sums: list[Any] = []
                for pair in zip(theirs, ours, strict=True):
                    found = layers.products(names[0], was, layer, *pair)
                    sums = [*map(operator.add, sums, jax.device_get(found))] or found
                factor_II = inverse_factor(np.asarray(sums[0]))
                layer = layers.round(names, layer, factor_II, sums[1:])
            theirs = [layers.run(was, x) for x in theirs]
            ours = [jax.block_until_ready(layers.run(layer, x)) for x in ours]
            done.append(jax.device_get(layer))
    return {**small, "layers": jax.tree.map(lambda *x: np.stack(x), *done)}
