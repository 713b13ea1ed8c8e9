"""The loader's speed, in tokens per second of one core, against three peers.

    pip install datasets    # optional: one of the peers
    taskset -c 0 python benchmarks/loader.py [--rounds 5]

Twelve sources mixed by weight, examples of 2,048 tokens, batches of 8, with positions,
segment ids and validity: what training reads (data.py), on one core. Sources are the
embedded corpus's documents in random order, repeated up to 8M tokens each, as uint16
records; everything is in the page cache. Peers, in turns with ours:

  memory map      the least there is to do: rows copied from one file in order, and
                  the same arrays made with whole-array NumPy scans
  grain examples  the same records through stock Grain: one dataset per source,
                  shuffled, mixed by a selection map, batched
  datasets        Hugging Face `datasets`: documents interleaved by weight, then
                  concatenated and cut into examples by map() at read time, as
                  transformers' run_clm.py does

Figures: see docs/speed.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import numpy as np
from rows import ratio, row

from gamayun_jax import config as c
from gamayun_jax.config import load_config
from gamayun_jax.data import build, loader
from gamayun_jax.data.corpus import Corpus, open_corpus
from gamayun_jax.data.plan import make_data_plan
from gamayun_jax.data.records import with_checksum

T, B = 2048, 8
TINY = Path(__file__).parents[1] / "experiments" / "tiny.py"


def documents(corpus: Corpus, source: str, bos: int) -> list[np.ndarray]:
    """A source's documents as token ids, those that one record holds whole."""
    found = []
    for record in corpus.records(source):
        begins = np.flatnonzero(record == bos)
        found += [record[a:b] for a, b in itertools.pairwise(begins)]
    return found


def make_corpus(folder: Path, tokens: int) -> tuple[c.Config, Corpus]:
    """The embedded corpus, grown to `tokens` per source with records of T tokens."""
    replace = dataclasses.replace
    cfg = load_config(TINY)
    cfg = replace(
        cfg,
        model=replace(cfg.model, max_seq_len=T),
        corpus=replace(cfg.corpus, record_tokens=T, shard_bytes=1 << 30),
        data=replace(
            cfg.data, corpus=str(folder), seq_len=T, batch_size=B, max_epochs=1e9
        ),
        stages=tuple(
            replace(
                s,
                tokens=T * B * 20_000,
                mixture=replace(s.mixture, max_epochs=1e9),
                schedule=c.ScheduleConfig(warmup_tokens=0),
            )
            for s in cfg.stages
        ),
    )
    small = build.build(cfg, folder, progress=False)
    bos = small.tokenizer().bos_id
    rng = np.random.default_rng(0)
    manifest = small.manifest
    for name, source in manifest["sources"].items():
        texts = documents(small, name, bos)
        stream, size = [], 0
        while size < tokens:
            for i in rng.permutation(len(texts)):
                stream.append(texts[i])
                size += len(texts[i])
        ids = np.concatenate(stream).astype(manifest["dtype"])
        count = (len(ids) - 1) // T
        path = folder / source["shards"][0]["file"]
        with open(path, "wb") as f:
            for r in range(count):
                f.write(with_checksum(ids[r * T : (r + 1) * T + 1].tobytes(), r))
        source["shards"] = [{**source["shards"][0], "records": count}]
        source |= {"records": count, "tokens": count * T}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return cfg, open_corpus(folder)


def ours(cfg: c.Config, corpus: Corpus) -> Iterator[dict[str, np.ndarray]]:
    plan = make_data_plan(cfg, corpus)
    return iter(loader.local_batches(cfg, corpus, plan, np.arange(B), 0))


def scans(tokens: np.ndarray, bos: int) -> dict[str, np.ndarray]:
    """Positions, segments and validity by scans over all tokens."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    begins = inputs == bos
    segments = np.cumsum(begins, axis=1, dtype=np.int32) + ~begins[:, :1]
    places = np.broadcast_to(np.arange(T, dtype=np.int32), inputs.shape)
    last = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return {
        "inputs": inputs,
        "targets": targets,
        "positions": places - last,
        "segment_ids": segments,
        "loss_mask": (targets != bos).astype(np.float32),
    }


def memory_map(cfg: c.Config, corpus: Corpus) -> Iterator[dict[str, np.ndarray]]:
    bos = corpus.tokenizer().bos_id
    path = corpus.folder / "stream.bin"
    if not path.exists():
        with open(path, "wb") as f:
            for name in corpus.sources:
                for record in corpus.records(name):
                    f.write(record[:-1].astype("<u2").tobytes())
    stream = np.memmap(path, "<u2", "r")
    step = B * T
    while True:
        for at in range(0, len(stream) - step, step):
            flat = stream[at : at + step + 1].astype(np.int32)
            rows = np.lib.stride_tricks.sliding_window_view(flat, T + 1)[::T]
            yield scans(rows, bos)


def grain_examples(cfg: c.Config, corpus: Corpus) -> Iterator[dict[str, np.ndarray]]:
    bos = corpus.tokenizer().bos_id
    plan = make_data_plan(cfg, corpus)

    class Selection(grain.transforms.DatasetSelectionMap):
        def __len__(self) -> int:
            return plan.total_steps * B

        def __getitem__(self, index: int) -> tuple[int, int]:
            dataset, position = plan.lookup(np.array([index]))
            return int(dataset[0]), int(position[0])

    sources = [
        grain.MapDataset.source(corpus.records(name)).seed(k).shuffle().repeat()
        for k, name in enumerate(plan.sources)
    ]
    mixed = grain.MapDataset.select_from_datasets(sources, Selection())
    mixed = mixed.batch(B).map(lambda tokens: scans(tokens, bos))
    return iter(
        mixed.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
    )


def hugging_face(cfg: c.Config, corpus: Corpus) -> Iterator[dict[str, np.ndarray]]:
    import datasets

    bos = corpus.tokenizer().bos_id
    parts = []
    for name in corpus.sources:
        found = [{"ids": d.tolist()} for d in documents(corpus, name, bos)[:2000]]
        source = datasets.Dataset.from_list(found).to_iterable_dataset()
        parts.append(source.repeat(None))
    share = [1 / len(parts)] * len(parts)
    mixed = datasets.interleave_datasets(parts, probabilities=share, seed=0)

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        """As in transformers' run_clm.py, whose remainders are lost."""
        stream = list(itertools.chain(*examples["ids"]))
        cut = range(0, len(stream) - T, T + 1)
        return {"ids": [stream[i : i + T + 1] for i in cut]}

    grouped = mixed.map(group_texts, batched=True).batch(B)
    for batch in grouped:
        yield scans(np.array(batch["ids"], np.int32), bos)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="of each source")
    args = parser.parse_args()
    makers: dict[str, Callable[..., Iterator[dict[str, np.ndarray]]]] = {
        "gamayun_jax": ours,
        "memory map": memory_map,
        "grain examples": grain_examples,
        "datasets": hugging_face,
    }
    with tempfile.TemporaryDirectory() as folder:
        cfg, corpus = make_corpus(Path(folder), args.tokens)
        running = {}
        for name, make in makers.items():
            try:
                running[name] = make(cfg, corpus)
                for _ in range(20):
                    next(running[name])
            except ImportError as e:
                print(f"{name}: left out, {e}")
                running.pop(name, None)
        rates: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(args.rounds):
            for name, batches in running.items():
                count, begin = 0, time.process_time()
                while time.process_time() - begin < args.seconds:
                    next(batches)
                    count += 1
                spent = time.process_time() - begin
                rates[name].append(count * B * T / spent / 1e6)
        for name, values in rates.items():
            row(name, "M tokens/s of a core", values)
            if name != "gamayun_jax":
                ratio(f"gamayun_jax over {name}", rates["gamayun_jax"], values)


if __name__ == "__main__":
    main()
