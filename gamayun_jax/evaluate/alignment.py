"""Do languages share a space? Retrieval of translations by layer.

A text is the mean of its tokens' hidden states, without BOS. A translation is retrieved
if, among all units of a parallel set in the other language, it has the greatest cosine
with the text (accuracy@1; a tie with n others counts 1/(n+1), so a model whose states
are all alike is at chance). Beside it stands the accuracy after each language's mean
was taken off: languages may hold the same map, each in its own corner of the space.

Of answers, consistency.py has how often two languages pick the same choice of an item.
Information parity, the bits of the same content relative to English, is heldout.py's.

Shape suffixes: B rows, T length, D model, S states (embedding and layers), U units.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import zstandard
from jax.sharding import Mesh

from gamayun_jax.config import AnyPath, Config, UserError
from gamayun_jax.data.corpus import Corpus, open_corpus
from gamayun_jax.data.files import write_json
from gamayun_jax.data.heldout_sets import subsample_units
from gamayun_jax.data.model_tokenizer import open_tokenizer
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.demo_corpus import HELDOUT, heldout_files
from gamayun_jax.evaluate.consistency import consistency_of
from gamayun_jax.evaluate.heldout import HeldoutEvaluator
from gamayun_jax.evaluate.scoring import batches, pack, sum_over_batches, windows
from gamayun_jax.interop.load_model import load_params
from gamayun_jax.model import sharding
from gamayun_jax.model.transformer import Transformer, hidden_states
from gamayun_jax.storage import as_path

Texts = Mapping[str, Sequence[tuple[str, str]]]  # language -> (id, text)


class PooledStates:
    """Mean hidden states of texts. Must be used in the mesh and the logical-axis rules.

    Args:
      cfg: of the model; `data.seq_len` is the length of rows, and what is longer is cut
        into windows as in heldout.py.
      units: the most texts of a call; one program serves them all.
    """

    def __init__(self, cfg: Config, mesh: Mesh, model: Transformer, units: int):
        self._mesh, self._length, self._units = mesh, cfg.data.seq_len, units
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-cfg.evaluation.batch_size // ways) * ways
        self._shape = (cfg.model.num_layers + 1, units, cfg.model.d_model)

        def step(params, sums_SUD, batch):
            unit_BT, mask_BT = batch["unit"].reshape(-1), batch["loss_mask"]

            def pool(states_SBTD):
                masked = states_SBTD.astype(jnp.float32) * mask_BT[None, ..., None]
                flat = masked.reshape(len(masked), -1, masked.shape[-1])
                add = jax.vmap(lambda x: jax.ops.segment_sum(x, unit_BT, units))
                return add(flat)

            parts = hidden_states(
                model, params, batch["inputs"], batch["positions"], batch["segment_ids"]
            )
            return sums_SUD + jnp.concatenate([pool(part) for part in parts])

        self._step = jax.jit(
            step, donate_argnums=1, out_shardings=sharding.replicated(mesh)
        )

    def __call__(
        self, params: Any, texts: Sequence[Sequence[int]], bos: int | None
    ) -> np.ndarray:
        """float32 [S, U, D]: means over each text's tokens, zeros for an empty one.

        Args:
          texts: ids without BOS, no more texts than `units`.
          bos: put before each text; None: the model has none.
        """
        prefix = [] if bos is None else [bos]
        streams = [[*prefix, *ids] for ids in texts]
        parts = [
            window
            for n, stream in enumerate(streams)
            if len(stream) > len(prefix)
            # What follows the last token is not looked at; every input is scored once.
            for window in windows(n, [*stream[1:], 0], stream[0], self._length)
        ]
        rows = pack(parts, self._length)
        if prefix:
            rows["loss_mask"][rows["positions"] == 0] = 0.0
        del rows["targets"]
        sums_SUD = sum_over_batches(
            self._step, params, batches(rows, self._batch), self._shape, self._mesh
        )[:, : len(texts)]
        counts = np.array([max(1, len(ids)) for ids in texts], np.float32)
        return sums_SUD / counts[None, :, None]


class ParallelStates:
    """Mean hidden states of parallel sets by changing parameters.

    Args:
      texts: set -> language -> (id, text), by `parallel_texts`.
    """

    def __init__(
        self,
        cfg: Config,
        mesh: Mesh,
        tokenizer: TextCoder,
        texts: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]],
    ):
        most = max(len(rows) for units in texts.values() for rows in units.values())
        model = Transformer(cfg.model, cfg.compute)
        self._pooled = PooledStates(cfg, mesh, model, most)
        self._bos = tokenizer.start_id if tokenizer.prefix_ids else None
        self._ids = {
            name: {
                k: [tokenizer.encode(text) for _, text in rows]
                for k, rows in units.items()
            }
            for name, units in texts.items()
        }

    def __call__(self, params: Any, name: str) -> dict[str, np.ndarray]:
        """Language -> float32 [S, U, D] of a set."""
        return {
            k: self._pooled(params, ids, self._bos)
            for k, ids in self._ids[name].items()
        }


class RetrievalEvaluator:
    """The translations that are not retrieved, by layer (recording.Evaluator).

    Args:
      wanted: parallel held-out set -> name of the items -> layer; 0: the embedding.

    Raises:
      UserError: none of the corpus's parallel sets has two languages.
    """

    name, every_steps = "retrieval", 0

    def __init__(
        self,
        cfg: Config,
        corpus: Corpus,
        mesh: Mesh,
        wanted: Mapping[str, Mapping[str, int]],
    ):
        texts = parallel_texts(corpus, None, cfg.evaluation.max_units)
        self._texts = {name: texts[name] for name in wanted}
        self._states = ParallelStates(cfg, mesh, corpus.tokenizer(), self._texts)
        self._wanted = wanted

    def run(
        self, params: Any
    ) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        """No results of their own, and each unit's share missed as its `bits`."""
        items: dict[str, list[dict[str, Any]]] = {}
        for name, layers in self._wanted.items():
            states = self._states(params, name)
            for measure, layer in layers.items():
                missed = misses({k: x_SUD[layer] for k, x_SUD in states.items()})
                items[measure] = [
                    {"id": id, "language": k, "bits": float(share), "bytes": 1}
                    for k, missed_U in missed.items()
                    for (id, _), share in zip(
                        self._texts[name][k], missed_U, strict=True
                    )
                ]
        return {}, items


# --- retrieval


def unit_vectors(x_UD: np.ndarray, centred: bool) -> np.ndarray:
    """Rows of length 1 (zeros stay), after the mean was taken off if `centred`."""
    if centred:
        x_UD = x_UD - x_UD.mean(axis=0, keepdims=True)
    norms = np.linalg.norm(x_UD, axis=1, keepdims=True)
    return x_UD / np.where(norms > 0, norms, 1)


def hits(similarity_UU: np.ndarray) -> np.ndarray:
    """Of each row 1 if its greatest entry is on the diagonal, else 0; of a tie its
    share. float64 [U]."""
    best = similarity_UU.max(axis=1, keepdims=True)
    ties = (similarity_UU == best).sum(axis=1)
    return (np.diag(similarity_UU) == best[:, 0]) / ties


def misses(states: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Language -> the share of its translations into the others that is not retrieved,
    float64 [U], of each unit.

    Args:
      states: language -> float [U, D] of one layer, units in the same order.
    """
    vectors = {k: unit_vectors(x_UD, centred=False) for k, x_UD in states.items()}
    return {
        a: 1 - np.mean([hits(x @ y.T) for b, y in vectors.items() if b != a], axis=0)
        for a, x in vectors.items()
    }


def retrieval(states: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy@1 for each ordered pair of languages and each state, and cosines.

    Args:
      states: language -> float [S, U, D], units in the same order.

    Returns:
      {"plain" | "centred": {"accuracy": {query: {target: [S]}}, "mean": [S] over all
      ordered pairs, "cosine": {a: {b: [S]}}: mean cosine of translations,
      "others": [S]: mean cosine of what are not translations}}.
    """
    languages = list(states)
    count = len(next(iter(states.values())))
    found: dict[str, Any] = {}
    for name in ("plain", "centred"):
        accuracy: dict[str, dict[str, list[float]]] = {k: {} for k in languages}
        cosine: dict[str, dict[str, list[float]]] = {k: {} for k in languages}
        others = np.zeros(count)
        vectors = {
            k: [unit_vectors(x_UD, name == "centred") for x_UD in states[k]]
            for k in languages
        }
        pairs = list(itertools.combinations(languages, 2))
        for a, b in pairs:
            forth, back, near = [], [], []
            for s in range(count):
                similarity_UU = vectors[a][s] @ vectors[b][s].T
                units = len(similarity_UU)
                trace = float(np.trace(similarity_UU))
                forth.append(float(hits(similarity_UU).mean()))
                back.append(float(hits(similarity_UU.T).mean()))
                near.append(trace / units)
                rest = float(similarity_UU.sum()) - trace
                others[s] += rest / max(1, units * (units - 1)) / len(pairs)
            accuracy[a][b], accuracy[b][a], cosine[a][b] = forth, back, near
        each = [accuracy[a][b] for a in languages for b in languages if a != b]
        found[name] = {
            "accuracy": accuracy,
            "mean": np.mean(each, axis=0).tolist(),
            "cosine": cosine,
            "others": others.tolist(),
        }
    return found


# --- a model


def parallel_texts(
    corpus: Corpus | None, languages: Sequence[str] | None, limit: int
) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Set -> language -> (id, text): the corpus's parallel sets, or the embedded ones.

    Units without text in one of the languages are left out of all.

    Raises:
      UserError: a language that there is not, or fewer than two of them.
    """
    found: dict[str, dict[str, list[tuple[str, str]]]] = {}
    if corpus is not None:
        for name, known in corpus.heldout_sets().items():
            if corpus.manifest["heldout"][name]["parallel"]:
                found[name] = {k: list(corpus.heldout(name, k)) for k in known}
    else:
        for name in HELDOUT:
            found[name] = {}
            for k, path in heldout_files(name).items():
                with zstandard.open(path, "rt", encoding="utf-8") as lines:
                    rows = [json.loads(line) for line in lines]
                found[name][k] = [(row["id"], row["text"]) for row in rows]
    there = {k for texts in found.values() for k in texts}
    if missing := set(languages or ()) - there:
        raise UserError(
            f"no parallel set has language {min(missing)!r}; there are: "
            f"{', '.join(sorted(there)) or 'none'}"
        )
    chosen: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for name, texts in found.items():
        units = {
            k: dict(subsample_units(rows, limit))
            for k, rows in texts.items()
            if not languages or k in languages
        }
        if len(units) < 2:
            continue
        first = next(iter(units.values()))
        full = [i for i in first if all(u.get(i, "").strip() for u in units.values())]
        if len(full) > 1:
            chosen[name] = {k: [(i, u[i]) for i in full] for k, u in units.items()}
    if not chosen:
        raise UserError(
            "no parallel set has two languages and two units: nothing to do"
        )
    return chosen


def align(
    path: AnyPath,
    out: AnyPath | None = None,
    corpus_folder: AnyPath | None = None,
    languages: Sequence[str] | None = None,
    evaluated: AnyPath | None = None,
) -> dict[str, Any]:
    """Retrieval, parity and consistency of a model.

    Args:
      path: run folder, one checkpoint or a folder in Hugging Face's format.
      out: folder for alignment.json.
      corpus_folder: whose parallel held-out sets are used; default: the run's own, and
        where that is not there, the sets that come with this package, without parity.
      languages: default: all of the sets.
      evaluated: what `gamayun eval` wrote, for the consistency of answers.

    Raises:
      UserError: no model, tokenizer, corpus, language or answers where they should be.
    """
    path, out = as_path(path), as_path(out) if out else None
    answers = consistency_of(as_path(evaluated)) if evaluated else {}
    cfg, params, meta, mesh = load_params(path)
    folder = as_path(corpus_folder or cfg.data.corpus or "nowhere")
    corpus = None
    if corpus_folder or (folder / "manifest.json").exists():
        corpus = open_corpus(folder)
    tokenizer: TextCoder | None = corpus.tokenizer() if corpus else None
    if tokenizer is None or tokenizer.fingerprint != meta.tokenizer:
        tokenizer = open_tokenizer(path, meta.tokenizer, cfg.data.corpus)
    texts = parallel_texts(corpus, languages, cfg.evaluation.max_units)
    result: dict[str, Any] = {
        "format": 1,
        "model": {
            "path": str(path),
            "run": meta.lineage.get("run"),
            "step": meta.step,
            "tokens": meta.tokens,
        },
        "layers": list(range(cfg.model.num_layers + 1)),
        "sets": {},
        "consistency": answers,
    }
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        model = Transformer(cfg.model, cfg.compute)
        states_of = ParallelStates(cfg, mesh, tokenizer, texts)
        parity: dict[str, Any] = {}
        if corpus is not None:
            evaluator = HeldoutEvaluator(cfg, corpus, mesh, model, languages, tokenizer)
            parity = evaluator.run(params)[0]
        for name, units in texts.items():
            found = parity.get(name, {}).get("languages", {})
            count = len(next(iter(units.values())))
            result["sets"][name] = {
                "units": count,
                "chance": 1 / count,
                "languages": list(units),
                "retrieval": retrieval(states_of(params, name)),
                "parity": {k: found[k]["parity"] for k in units if k in found},
            }
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "alignment.json", result)
    return result
