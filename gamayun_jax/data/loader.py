"""Batches for training: a pure function of the step number.

Global example number i is a place in a source's shuffled order by the data plan alone
(plan.py); hosts only pick their rows. So the whole state of the loader is one integer,
the number of steps that are done, and it is valid for any number of hosts.

A batch is a dict of arrays [B, T], B rows over all hosts:

  inputs, targets  int32  token ids; targets[t] is the token after inputs[t]
  positions        int32  of each input in its document (0 where a row cuts into one)
  segment_ids      int32  number of the document in the row, from 1; 0 is padding
  language         int32  index into Config.languages
  loss_mask        float32 1 where the target counts: not padding, and not the BOS of
                   another document (targets never cross documents)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from gamayun_jax.config import Config
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.plan import DataPlan
from gamayun_jax.data.records import BadRecordError
from gamayun_jax.data.tokenizer import Boundaries
from gamayun_jax.storage import is_bucket

REQUESTS = 32  # of records in a bucket, under way at a time

OnBadRecord = Callable[[str, str, int, str], None]  # (source, shard, record, reason)


def example_order(
    seed: int, source: str, records: Sequence[Any], per_record: int
) -> Any:
    """Position in a source's order -> example, for any number of epochs.

    Args:
      seed: the curriculum's.
      records: of the source, of `per_record` examples each.
    """
    # By name, so that another source's coming or going changes nothing.
    seed = (seed * 65_537 + zlib.crc32(source.encode())) % 2**32
    return (
        grain.MapDataset.range(len(records) * per_record).seed(seed).shuffle().repeat()
    )


def make_batch(
    tokens: np.ndarray, language: np.ndarray, boundaries: Boundaries
) -> dict[str, np.ndarray]:
    """Records int32 [B, T + 1] and languages int32 [B] to a batch (see the module)."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    B, T = inputs.shape
    # Documents are much longer than a token, so both arrays are written in runs, one
    # per document, instead of by scans over all tokens. A row that cuts into a
    # document begins a run too: segment 1 at position 0, not padding.
    begins = inputs == boundaries.start
    begins[:, 0] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=B * T)
    row = starts // T
    first_run = np.searchsorted(row, np.arange(B))
    number = np.arange(1, len(starts) + 1) - first_run[row]
    segment_ids = np.repeat(number.astype(np.int32), lengths).reshape(B, T)
    places = np.arange(B * T, dtype=np.int32)
    positions = (places - np.repeat(starts.astype(np.int32), lengths)).reshape(B, T)
    padded = boundaries.pads(inputs, targets)
    padding = padded & (inputs == boundaries.pad)
    if padding.any():
        positions[padding] = 0
        segment_ids[padding] = 0
    counts = ~padded
    if boundaries.start != boundaries.end:
        counts &= targets != boundaries.start
    return {
        "inputs": inputs,
        "targets": targets,
        "positions": positions,
        "segment_ids": segment_ids,
        "language": np.repeat(language.astype(np.int32), T).reshape(B, T),
        "loss_mask": counts.astype(np.float32),
    }


class LocalBatches:
    """This host's part of each step's batch, by the step: random access, no state.

    The order of a source's examples is Grain's index shuffle, anew in each epoch; it
    is computed for an index at a time, so nothing grows with the corpus. Whole batches
    are read here, instead of examples by Grain, because its cost for each element is
    more than that of reading one (benchmarks/loader.py).
    """

    def __init__(
        self,
        cfg: Config,
        corpus: Corpus,
        plan: DataPlan,
        rows: np.ndarray,
        on_bad_record: OnBadRecord | None = None,
        records: Sequence[Any] | None = None,
    ):
        """`records`: of each of the plan's sources, where they are held already."""
        self._boundaries = corpus.tokenizer().boundaries
        self._plan, self._rows, self._seq_len = plan, rows, cfg.data.seq_len
        self._per_record = corpus.manifest["record_tokens"] // self._seq_len
        self._on_bad_record = on_bad_record if cfg.data.faults == "set_aside" else None
        self._records = records or [
            corpus.records(name, cfg.data.retry_seconds) for name in plan.sources
        ]
        self._languages = np.array(plan.languages, np.int32)
        # A local file answers sooner than a thread is woken.
        pool = ThreadPoolExecutor(REQUESTS) if is_bucket(corpus.folder) else None
        self._map: Callable[..., Iterator[np.ndarray]] = pool.map if pool else map
        # Of each dataset (DataPlan.lookup): position -> example of its source.
        self.order: list[Any] = []
        for run in plan.runs:
            for name, records in zip(plan.sources, self._records, strict=True):
                seed = run.curriculum.seed
                self.order.append(example_order(seed, name, records, self._per_record))

    def __len__(self) -> int:
        return self._plan.total_steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        examples = int(step) * self._plan.batch_size + self._rows
        return self.read(*self._plan.lookup(examples))

    def read(self, datasets: np.ndarray, positions: np.ndarray) -> dict[str, Any]:
        """A batch of any examples, as DataPlan.lookup names them, int64 [B]."""
        sources = datasets % len(self._records)
        tokens = np.empty((len(datasets), self._seq_len + 1), np.int32)
        examples = self._map(
            self._example, datasets.tolist(), sources.tolist(), positions.tolist()
        )
        for row, example in enumerate(examples):
            tokens[row] = example
        return make_batch(tokens, self._languages[sources], self._boundaries)

    def _example(self, dataset: int, source: int, position: int) -> Any:
        """int32[T + 1], or the padding that takes its place."""
        record, part = divmod(self.order[dataset][position], self._per_record)
        at = part * self._seq_len
        try:
            return self._records[source][record][at : at + self._seq_len + 1]
        except BadRecordError as e:
            if self._on_bad_record is None:
                raise
            self._on_bad_record(self._plan.sources[source], e.shard, e.record, e.reason)
            return self._boundaries.pad


def local_batches(
    cfg: Config,
    corpus: Corpus,
    plan: DataPlan,
    rows: np.ndarray,
    first_step: int,
    on_bad_record: OnBadRecord | None = None,
) -> grain.IterDataset:
    """This host's batches from `first_step` on: dicts of arrays [len(rows), T]."""
    source: Any = LocalBatches(cfg, corpus, plan, rows, on_bad_record)
    return grain.MapDataset.source(source)[first_step:].to_iter_dataset(
        grain.ReadOptions(
            num_threads=cfg.data.threads, prefetch_buffer_size=cfg.data.prefetch
        )
    )


def host_rows(batch_size: int, sharding: NamedSharding) -> np.ndarray:
    """Rows of the global batch that this process's devices hold, ascending."""
    rows: set[int] = set()
    for index in sharding.addressable_devices_indices_map((batch_size, 1)).values():
        assert index is not None
        rows.update(range(*index[0].indices(batch_size)))
    return np.array(sorted(rows), np.int64)


def global_batch(
    local: Mapping[str, np.ndarray],
    rows: np.ndarray,
    batch_size: int,
    sharding: NamedSharding,
) -> dict[str, jax.Array]:
    """Assemble global arrays [B, T] from this process's rows."""

    def assemble(values: np.ndarray) -> jax.Array:
        shape = (batch_size, *values.shape[1:])

        def piece(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(batch_size)
            at = int(np.searchsorted(rows, begin))
            return values[at : at + end - begin]

        return jax.make_array_from_callback(shape, sharding, piece)

    return {name: assemble(values) for name, values in local.items()}


def batches(
    cfg: Config,
    corpus: Corpus,
    plan: DataPlan,
    sharding: NamedSharding,
    first_step: int = 0,
    on_bad_record: OnBadRecord | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Global batches on the devices, from `first_step` to the run's last step."""
    rows = host_rows(cfg.data.batch_size, sharding)
    for local in local_batches(cfg, corpus, plan, rows, first_step, on_bad_record):
        yield global_batch(local, rows, cfg.data.batch_size, sharding)
