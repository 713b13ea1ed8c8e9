"""What the benchmarks beside `transformers` share: a small model, texts, scoring
and decoding."""

from __future__ import annotations

import functools
import json
import time

import jax
import numpy as np
import torch
import zstandard
from rows import compare

from gamayun_jax import config as c
from gamayun_jax.evaluate.loglikelihood import Scorer
from gamayun_jax.model.weights import abstract_params

MODEL = c.ModelConfig(
    vocab_size=8192, num_layers=8, d_model=256, num_heads=4, num_kv_heads=2,
    head_dim=64, d_ff=768, max_seq_len=1024, qk_norm=True, rope_theta=10_000.0,
)  # fmt: skip
BATCHES = (1, 8, 16)  # of texts that a peer scores at a time: it takes its best


class NoText:
    """Token ids only: nothing is decoded to text, no token stops a row."""

    stop_ids = ()


def random_params(cfg: c.ModelConfig) -> dict:
    """Parameters that give other logits at every place: norms are not all ones."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        norm = "scale" in jax.tree_util.keystr(path)
        std = 0.1 if norm else 0.05
        return (norm + std * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def texts(language: str) -> list[str]:
    """Paragraphs of the embedded held-out help pages."""
    path = c.DEMO_CORPUS / f"heldout/{language}.jsonl.zst"
    with zstandard.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def greedy(model: torch.nn.Module, prompts: np.ndarray, new: int) -> list[list[int]]:
    """`new` tokens after each of the prompts [B, T], as `transformers` makes them."""
    tokens = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
        )
    return out[:, tokens.shape[1] :].tolist()


def logprobs(model: torch.nn.Module, ids: np.ndarray, batch: int) -> np.ndarray:
    """Summed log-probability of each row [B, T] after its first token, [B]."""
    found = []
    with torch.inference_mode():
        for at in range(0, len(ids), batch):
            tokens = torch.tensor(ids[at : at + batch])
            logits = model(tokens[:, :-1], use_cache=False).logits.float()
            nll = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            )
            found.append(-nll.view(len(tokens), -1).sum(1))
    return torch.cat(found).numpy()


def compare_scoring(
    name: str, ids: np.ndarray, scorer: Scorer, model: torch.nn.Module, rounds: int
) -> None:
    """Rows of texts scored in a second, ours and of a peer with its best batch.

    Args:
      name: what the rows' names begin with; scores "float32" must agree to 1e-4 nats a
        token.
      ids: texts of one length after a first token, the same one [B, 1 + T].
    """
    count, length = len(ids), ids.shape[1] - 1
    ours = functools.partial(scorer.rolling, ids[:, 1:].tolist(), int(ids[0, 0]))
    tried, some = {}, ids[: BATCHES[-1]]
    for batch in (b for b in BATCHES if b <= count):
        logprobs(model, some[:batch], batch)  # its first call takes longer
        begin = time.perf_counter()
        logprobs(model, some, batch)
        tried[batch] = time.perf_counter() - begin
    best = min(tried, key=lambda b: tried[b])
    theirs = functools.partial(logprobs, model, ids, best)
    off = abs(theirs() - ours()).max() / length
    print(f"peer's batch: {best}; scores differ by {off:.1e} nats a token")
    assert name != "float32" or off < 1e-4
    of = "a text" if count == 1 else f"{count} texts"
    runs = {"ours": ours, "transformers": theirs}
    compare(f"{name}, {of} of {length}", "texts/s", count, runs, rounds)
