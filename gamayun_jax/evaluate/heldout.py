"""Held-out evaluation by language: loss, bits per byte, parity, token accuracy.

A unit (paragraph, clause) is scored as the tokens of its text after BOS; the end of
the text is not scored, so that bits are the length of a code of exactly these bytes,
whatever a model's convention for ends. Units are packed into rows, each its own
segment; what is longer than a window is cut into windows that overlap by half, every
token scored once. A window is a row as in training, with one compiled shape for all
sets and languages; or of a given length, that of the model for one that was not trained
here, with rows no longer than they need to be. Sums stay on the devices, and one
transfer brings them back.

Shape suffixes: B rows, T length, D model, V vocabulary, U units of all sets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gamayun_jax.config import Config, ModelConfig, UserError
from gamayun_jax.data.corpus import (
    Corpus,
    open_corpus,
    subsample_units,
    text_key,
    xz_bytes,
)
from gamayun_jax.data.loader import global_batch, host_rows
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.interop import huggingface
from gamayun_jax.interop.load_model import LoadedModel, load_params
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import nll_and_logsumexp
from gamayun_jax.model.transformer import Transformer, unembedding


@dataclass(frozen=True)
class Window:
    """A part of a unit that fits a row; only targets from `scored` on count."""

    unit: int
    inputs: np.ndarray  # int32 [n]
    targets: np.ndarray  # int32 [n]
    scored: int
    position: int  # of the first input in the unit


def windows(unit: int, ids: Sequence[int], bos: int, length: int) -> list[Window]:
    """Cut [BOS, *ids] into windows of at most `length` inputs.

    Windows after the first begin with half a window of context that is not scored.
    """
    stream = np.array([bos, *ids], np.int32)
    found, done = [], 0
    while done < len(ids):
        begin = 0 if not done else done - length // 2
        end = min(begin + length, len(ids))
        found.append(
            Window(
                unit,
                stream[begin:end],
                stream[begin + 1 : end + 1],
                done - begin,
                begin,
            )
        )
        done = end
    return found


def pack(parts: Sequence[Window], length: int) -> dict[str, np.ndarray]:
    """Windows to rows, first fit in order of decreasing length: int32 arrays [R, T].

    `unit` numbers the unit of each target; `loss_mask` is 1.0 where it counts.
    """
    rows: list[list[Window]] = []
    free: list[int] = []
    for part in sorted(parts, key=lambda p: -len(p.inputs)):
        n = len(part.inputs)
        # The last rows are the emptiest: look at a few, so that packing stays linear.
        for r in range(max(0, len(rows) - 64), len(rows)):
            if free[r] >= n:
                break
        else:
            r = len(rows)
            rows.append([])
            free.append(length)
        rows[r].append(part)
        free[r] -= n
    names = ("inputs", "targets", "positions", "segment_ids", "unit")
    out = {name: np.zeros((len(rows), length), np.int32) for name in names}
    out["loss_mask"] = np.zeros((len(rows), length), np.float32)
    for r, row in enumerate(rows):
        at = 0
        for segment, part in enumerate(row, 1):
            n = len(part.inputs)
            span = slice(at, at + n)
            out["inputs"][r, span] = part.inputs
            out["targets"][r, span] = part.targets
            out["positions"][r, span] = np.arange(n) + part.position
            out["segment_ids"][r, span] = segment
            out["unit"][r, span] = part.unit
            out["loss_mask"][r, at + part.scored : at + n] = 1.0
            at += n
    return out


def token_scores(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """nll (nats) and whether the target is the most likely token, float32 [B, T].

    Raises:
      UserError: a chunk that does not divide T.
    """
    B, T, _ = x_BTD.shape
    w_VD = w_VD.astype(x_BTD.dtype)

    def score(part):
        x, targets = part
        nll, _, logits = nll_and_logsumexp(x, w_VD, targets)
        return nll, (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)

    if not chunk or chunk >= T:
        return score((x_BTD, targets_BT))
    if T % chunk:
        raise UserError(
            f"compute.loss_chunk={chunk} does not divide data.seq_len={T}: choose one "
            "that does"
        )

    def cut(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(B, T // chunk, chunk, *a.shape[2:]), 1, 0)

    nll, hit = jax.lax.map(score, (cut(x_BTD), cut(targets_BT)))
    return (
        jnp.moveaxis(nll, 0, 1).reshape(B, T),
        jnp.moveaxis(hit, 0, 1).reshape(B, T),
    )


def check_window(window: int | None, cfg: ModelConfig) -> None:
    """UserError if a window is not None, nor one that the model has."""
    if window is not None and not 0 < window <= cfg.max_seq_len:
        raise UserError(
            f"a window of {window} tokens is beyond the model's: choose 1 to "
            f"{cfg.max_seq_len}"
        )


class HeldoutEvaluator:
    """Evaluates parameters on all held-out sets of a corpus.

    Must be used inside `jax.set_mesh(mesh)` and the logical-axis rules.
    """

    def __init__(
        self,
        cfg: Config,
        corpus: Corpus,
        mesh: Mesh,
        model: Transformer,
        languages: Sequence[str] | None = None,
        tokenizer: TextCoder | None = None,
        window: int | None = None,
    ):
        """Tokenise and pack everything once.

        Args:
          languages: evaluate these only.
          tokenizer: the model's; default: the corpus's.
          window: most tokens that the model sees before a predicted one; default:
            rows as in training, or the model's own window where it was not trained
            here.

        Raises:
          UserError: a language that no held-out set has, a tokenizer with more ids
            than the model, a parallel set whose languages have different units.
        """
        self.every_steps = cfg.evaluation.every_steps
        self.sets = {
            name: [k for k in found if not languages or k in languages]
            for name, found in corpus.heldout_sets().items()
        }
        known = {k for found in corpus.heldout_sets().values() for k in found}
        for name in languages or ():
            if name not in known:
                raise UserError(
                    f"no held-out set has language {name!r}; there are: "
                    f"{', '.join(sorted(known)) or 'none'}"
                )
        self._parallel = {
            k: v["parallel"] for k, v in corpus.manifest["heldout"].items()
        }
        self._vocab_size = cfg.model.vocab_size
        # Gaps, not zeros: languages of the config (or asked for) that a set lacks.
        self.missing = {
            name: [k for k in languages or cfg.languages if k not in (*found, "und")]
            for name, found in self.sets.items()
        }
        own = corpus.tokenizer()
        tokenizer = own if tokenizer is None else tokenizer
        if tokenizer.vocab_size > cfg.model.vocab_size:
            raise UserError(
                f"the corpus's tokenizer has {tokenizer.vocab_size} ids, the model "
                f"only model.vocab_size={cfg.model.vocab_size}: give the corpus that "
                "the model was trained on"
            )
        # The frequencies of a corpus are of its own tokens.
        same = tokenizer.fingerprint == own.fingerprint
        unigram = unigram_bits(corpus) if same else {}
        if window is None and not cfg.data.corpus:
            window = cfg.model.max_seq_len
        check_window(window, cfg.model)
        length = window or cfg.data.seq_len
        self._units: dict[tuple[str, str], range] = {}
        self._ids: dict[tuple[str, str], list[str]] = {}
        self._baselines: dict[tuple[str, str], dict[str, float | None]] = {}
        sizes: list[int] = []
        tokens: list[int] = []
        cut: list[bool] = []
        parts: list[Window] = []
        for name, found in self.sets.items():
            chosen: list[str] = []
            for language in found:
                units = subsample_units(
                    corpus.heldout(name, language), cfg.evaluation.max_units
                )
                ids = [i for i, _ in units]
                chosen = chosen or ids
                if self._parallel[name] and ids != chosen:
                    raise UserError(
                        f"held-out set {name!r} is parallel, but {language} and "
                        f"{found[0]} have different units: build the corpus again"
                    )
                first = len(sizes)
                ids_of = [tokenizer.encode(text) for _, text in units]
                for (_, text), unit in zip(units, ids_of, strict=True):
                    parts += windows(len(sizes), unit, tokenizer.start_id, length)
                    sizes.append(len(text.encode()))
                    tokens.append(len(unit))
                    cut.append(len(unit) > length)
                self._units[name, language] = range(first, len(sizes))
                self._ids[name, language] = ids
                texts = [text for _, text in units]
                self._baselines[name, language] = baselines(
                    texts,
                    ids_of,
                    cfg.model.vocab_size,
                    unigram.get(language),
                    corpus.packed(name, language),
                )
        self._bytes = np.array(sizes, np.int64)
        self._tokens = np.array(tokens, np.int64)
        self._cut = np.array(cut, bool)
        self._mesh = mesh
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        # Row length -> what is packed into such rows.
        groups: dict[int, list[Window]] = {}
        for part in parts:
            T = cfg.data.seq_len
            while window and len(part.inputs) > T:
                T *= 2
            groups.setdefault(T, []).append(part)
        self._batches: list[dict[str, np.ndarray]] = []
        for T, group in sorted(groups.items()):
            rows = pack(group, T)
            B = max(cfg.evaluation.batch_size * cfg.data.seq_len // T, 1)
            if window:
                B = min(B, len(rows["inputs"]))
            B = -(-B // ways) * ways
            for key, values in rows.items():
                pad = np.zeros((-len(values) % B, T), values.dtype)
                rows[key] = np.concatenate([values, pad])
            self._batches += [
                {k: v[at : at + B] for k, v in rows.items()}
                for at in range(0, len(rows["inputs"]), B)
            ]
        count = len(sizes)

        def step(params, sums, batch):
            x_BTD, _ = model.apply(
                {"params": params},
                batch["inputs"],
                batch["positions"],
                batch["segment_ids"],
            )
            nll_BT, hit_BT = token_scores(
                x_BTD, unembedding(params), batch["targets"], cfg.compute.loss_chunk
            )
            both = jnp.stack([nll_BT, hit_BT], axis=-1) * batch["loss_mask"][..., None]
            flat = both.reshape(-1, 2)
            return sums + jax.ops.segment_sum(flat, batch["unit"].reshape(-1), count)

        # Whole on every device, or a process could not fetch what others hold.
        self._step = jax.jit(
            step, donate_argnums=1, out_shardings=sharding.replicated(mesh)
        )

    def unit_sums(self, params: Any) -> np.ndarray:
        """float64 [U, 2]: nats and right tokens of each unit."""
        layout = sharding.batch_sharding(self._mesh)
        sums = jax.device_put(
            jnp.zeros((len(self._bytes), 2), jnp.float32),
            sharding.replicated(self._mesh),
        )
        for batch in self._batches:
            B = len(batch["inputs"])
            mine = host_rows(B, layout)
            local = {k: v[mine] for k, v in batch.items()}
            sums = self._step(params, sums, global_batch(local, mine, B, layout))
        return np.asarray(jax.device_get(sums), np.float64)

    def evaluate(
        self, params: Any
    ) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        """`run`, and the units of each set under the name of their file,
        "heldout-NAME"."""
        sums = self.unit_sums(params)
        items = {f"heldout-{name}": self.items(name, sums) for name in self.sets}
        return self.results(sums), items

    def headlines(self, result: Mapping[str, Any]) -> dict[str, float]:
        """Name for TensorBoard -> bits per byte of each set by language."""
        return {
            f"eval/{name}/bits_per_byte/{language}": row["bits_per_byte"]
            for name, values in result["sets"].items()
            for language, row in values["languages"].items()
        }

    def lines(self, result: Mapping[str, Any]) -> list[str]:
        """The console's line of each set."""
        return [
            f"{name}: {values['macro']['bits_per_byte']:.3f} bits per byte (macro)"
            for name, values in result["sets"].items()
        ]

    def run(self, params: Any) -> dict[str, Any]:
        """{"sets": {set: {"parallel", "languages": {...}, "micro", "macro"}}}.

        Per language: units, tokens, bytes, bits, bits_per_byte, bits_per_unit,
        parity (bits per parallel unit over English's), nll (nats per token), accuracy,
        standard errors `*_se` (None where one unit tells none), `truncated` (units
        longer than a row), baselines.
        """
        return self.results(self.unit_sums(params))

    def results(self, sums: np.ndarray) -> dict[str, Any]:
        """`run` from what `unit_sums` returned."""
        return {"sets": {name: self._set_result(name, sums) for name in self.sets}}

    def items(self, name: str, sums: np.ndarray) -> list[dict[str, Any]]:
        """The units of a set: id, language, bits, bytes and tokens of each."""
        found = []
        for language in self.sets[name]:
            span = self._units[name, language]
            for unit, key in zip(span, self._ids[name, language], strict=True):
                row: dict[str, Any] = {"id": key, "language": language}
                row["bits"] = float(sums[unit, 0] / math.log(2))
                row["bytes"] = int(self._bytes[unit])
                row["tokens"] = int(self._tokens[unit])
                found.append(row)
        return found

    def _parallel_se(
        self, name: str, languages: Sequence[str], sums: np.ndarray
    ) -> float | None:
        """Standard error of the macro mean. Units say the same in all languages, so
        their errors go together and must be added before they are squared."""
        parts = []
        for language in languages:
            span = self._units[name, language]
            s = slice(span.start, span.stop)
            parts.append(ratio_residuals(sums[s, 0] / math.log(2), self._bytes[s]))
        return None if len(parts[0]) < 2 else root(np.mean(parts, axis=0))

    def _set_result(self, name: str, sums: np.ndarray) -> dict[str, Any]:
        languages: dict[str, dict[str, Any]] = {}
        for language in self.sets[name]:
            span = self._units[name, language]
            s = slice(span.start, span.stop)
            if not self._tokens[s].any():  # nothing to score: a gap, not a zero
                continue
            bits, hits = sums[s, 0] / math.log(2), sums[s, 1]
            tokens = int(self._tokens[s].sum())
            bpb, bpb_se = ratio(bits, self._bytes[s])
            languages[language] = {
                "units": len(span),
                "tokens": tokens,
                "bytes": int(self._bytes[s].sum()),
                "bits": float(bits.sum()),
                "bits_se": float(bits.std(ddof=1) * math.sqrt(len(span)))
                if len(span) > 1
                else None,
                "bits_per_byte": bpb,
                "bits_per_byte_se": bpb_se,
                "bits_per_unit": float(bits.mean()),
                "parity": None,
                "nll": float(sums[s, 0].sum() / tokens),
                "accuracy": float(hits.sum() / tokens),
                "truncated": int(self._cut[s].sum()),
                "baselines": self._baselines[name, language],
            }
        english = languages.get("en")
        if self._parallel[name] and english:
            for row in languages.values():
                row["parity"] = row["bits_per_unit"] / english["bits_per_unit"]
        result = {"parallel": self._parallel[name], "languages": languages}
        if languages:
            spans = [np.array(self._units[name, k]) for k in languages]
            index = np.concatenate(spans)
            bits_of = [sums[i, 0] / math.log(2) for i in spans]
            bytes_of = [self._bytes[i] for i in spans]
            if self._parallel[name]:  # one sample of units, each in all languages
                bits_of, bytes_of = [np.sum(bits_of, 0)], [np.sum(bytes_of, 0)]
            bpb, bpb_se = pooled_ratio(bits_of, bytes_of)
            rows = list(languages.values())
            if self._parallel[name]:
                macro_se = self._parallel_se(name, list(languages), sums)
            else:
                macro_se = mean_error([r["bits_per_byte_se"] for r in rows])
            result["micro"] = {
                "bits_per_byte": bpb,
                "bits_per_byte_se": bpb_se,
                "accuracy": float(sums[index, 1].sum() / self._tokens[index].sum()),
            }
            result["macro"] = {
                "bits_per_byte": float(np.mean([r["bits_per_byte"] for r in rows])),
                "bits_per_byte_se": macro_se,
                "accuracy": float(np.mean([r["accuracy"] for r in rows])),
            }
        return result


def ratio_residuals(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """What each unit adds to the error of sum(values) / sum(sizes), float64 [units].

    Linearisation of the ratio estimator (Cochran, Sampling Techniques, 1977, 6.3).
    """
    r = values.sum() / sizes.sum()
    n = len(values)
    return math.sqrt(n / max(n - 1, 1)) * (values - r * sizes) / sizes.sum()


def root(residuals: np.ndarray) -> float:
    """The standard error of what independent residuals add up to."""
    return float(math.sqrt((residuals**2).sum()))


def mean_error(errors: Sequence[float | None]) -> float | None:
    """Standard error of the mean of independent values; None if one has none."""
    known = [e for e in errors if e is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None


def ratio(values: np.ndarray, sizes: np.ndarray) -> tuple[float, float | None]:
    """sum(values) / sum(sizes) and its standard error over units; none for one."""
    residuals = ratio_residuals(values, sizes)
    error = None if len(values) < 2 else root(residuals)
    return float(values.sum() / sizes.sum()), error


def pooled_ratio(
    values: Sequence[np.ndarray], sizes: Sequence[np.ndarray]
) -> tuple[float, float | None]:
    """`ratio` over independent strata, e.g. languages, each a sample of units.

    How strata differ from each other is no sampling error, so residuals are centred
    within each (combined ratio estimator, Cochran 1977, 6.11).
    """
    total = sum(float(s.sum()) for s in sizes)
    r = sum(float(v.sum()) for v in values) / total
    variance = 0.0
    for v, s in zip(values, sizes, strict=True):
        residual, n = v - r * s, len(v)
        variance += n / max(n - 1, 1) * ((residual - residual.mean()) ** 2).sum()
    known = min(map(len, values)) > 1  # of one unit nothing tells an error
    return r, math.sqrt(variance) / total if known else None


def unigram_bits(corpus: Corpus) -> dict[str, np.ndarray]:
    """Language -> bits of each id by its add-one smoothed frequency, float64 [V]."""
    totals: dict[str, np.ndarray] = {}
    tokenizer = corpus.tokenizer()
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    for name, source in corpus.sources.items():
        counts = corpus.token_counts(name).astype(np.float64)
        # BOS begins and EOS ends every document; neither is ever a target here.
        counts[special] = 0
        totals[source.language] = totals.get(source.language, 0) + counts
    return {
        k: -np.log2((counts + 1) / (counts.sum() + len(counts)))
        for k, counts in totals.items()
    }


def baselines(
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    vocab_size: int,
    unigram: np.ndarray | None,
    packed: Mapping[str, int],
) -> dict[str, float | None]:
    """Bits per byte of what needs no network: uniform tokens, the training corpus's
    token frequencies, and `xz -9e` of the held-out units joined by newlines.

    Args:
      packed: what `xz` makes of some texts, as a corpus's manifest has it.
    """
    text = "\n".join(texts).encode()
    size = sum(len(t.encode()) for t in texts)
    if not size:
        return dict(uniform=None, unigram=None, xz=None)
    tokens = sum(map(len, ids))
    bits = None
    if unigram is not None:
        bits = float(sum(unigram[np.array(i, np.int64)].sum() for i in ids)) / size
    return {
        "uniform": tokens * math.log2(vocab_size) / size,
        "unigram": bits,
        "xz": 8 * (packed.get(text_key(text)) or xz_bytes(text)) / len(text),
    }


def evaluate_heldout(
    path: Path,
    corpus_folder: Path | None = None,
    languages: Sequence[str] | None = None,
    batch_size: int | None = None,
    loaded: LoadedModel | None = None,
    window: int | None = None,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Evaluate a model on the held-out sets of a corpus, with the model's tokenizer.

    Returns the results, and the units of each set under the name of their file,
    "heldout-NAME".

    Args:
      path: as of `load_params`; without a corpus of its own if it was imported.
      corpus_folder: default: the run's own.
      loaded: what `load_params(path)` returned, if it was called before.
      window: see `HeldoutEvaluator`.

    Raises:
      UserError: a model or corpus that cannot be read, no tokenizer of the model.
    """
    cfg, params, meta, mesh = loaded or load_params(path)
    if not (corpus_folder or cfg.data.corpus):
        raise UserError(
            f"{path} was not trained on a corpus here: give --corpus, a corpus folder "
            "with held-out sets, or --tasks"
        )
    corpus = open_corpus(corpus_folder or Path(cfg.data.corpus))
    tokenizer: TextCoder = corpus.tokenizer()
    if meta.tokenizer != tokenizer.fingerprint:
        tokenizer = huggingface.open_tokenizer(path, meta, cfg.data.corpus)
    if batch_size:
        evaluation = dataclasses.replace(cfg.evaluation, batch_size=batch_size)
        cfg = dataclasses.replace(cfg, evaluation=evaluation)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        model = Transformer(cfg.model, cfg.compute)
        evaluator = HeldoutEvaluator(
            cfg, corpus, mesh, model, languages, tokenizer, window
        )
        result, items = evaluator.evaluate(params)
    head = {"model": meta.lineage.get("run"), "step": meta.step, "label": "eval"}
    return {**head, "tokens": meta.tokens, "stage": "", **result}, items


def evaluate_checkpoint(path: Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The results of `evaluate_heldout`, which has the arguments."""
    return evaluate_heldout(path, *args, **kwargs)[0]
